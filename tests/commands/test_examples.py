"""Which shipped example fits which data."""

import pytest

from gptcli.commands import examples
from gptcli.config import load_config


@pytest.mark.parametrize(
    ("settings", "fitting", "others"),
    [
        (["data.source=openwebtext"], "openwebtext", ["gpt2-8head"]),
        (["data.source=openwebtext", "data.dir=data/web"], None, ["gpt2-8head", "openwebtext"]),
        (["data.source=openwebtext", "data.keep_downloads=false"], "openwebtext", ["gpt2-8head"]),
        (["data.source=openwebtext", "tokenizer.name=char"], None, ["gpt2-8head", "openwebtext"]),
        (["data.source=shakespeare"], "finetune-gpt2", ["shakespeare-char"]),
        (["data.source=wikipedia"], "wikipedia", []),
        (["data.source=tinystories"], None,
         ["tinystories-124m", "tinystories-large", "tinystories-small"]),
        (["data.source=books"], None, []),
        (["data.source={train: a.txt, val: b.txt}"], None, []),
    ],
)  # fmt: skip
def test_examples_fit_the_data_that_their_own_settings_make(
    settings: list[str], fitting: str | None, others: list[str]
) -> None:
    config = load_config(None, settings)
    assert examples.trains_on(config) == fitting
    assert examples.prepared_otherwise(config) == others


def test_the_table_says_what_each_example_is_for() -> None:
    rows = {name: (data, about) for name, data, about in examples.table()}
    assert rows["openwebtext-char"][0] == "two text files"
    assert rows["wikipedia"][0] == "wikipedia" and "Wikipedia" in rows["wikipedia"][1]
    assert all(10 < len(about) < 95 and "#" not in about for _, about in rows.values())
