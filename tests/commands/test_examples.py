"""Which shipped example fits which data."""

import pytest

from gptcli.commands import examples
from gptcli.config import load_config


@pytest.mark.parametrize(
    ("settings", "fitting"),
    [
        (["data.source=openwebtext"], "openwebtext"),
        (["data.source=openwebtext", "data.dir=data/web"], None),
        (["data.source=openwebtext", "data.keep_downloads=false"], "openwebtext"),
        (["data.source=openwebtext", "tokenizer.name=char"], None),
        (["data.source=shakespeare"], "finetune-gpt2"),
        (["data.source=wikipedia"], "wikipedia"),
        (["data.source=tinystories"], None),
        (["data.source=books"], None),
        (["data.source={train: a.txt, val: b.txt}"], None),
    ],
)
def test_examples_fit_the_data_that_their_own_settings_make(
    settings: list[str], fitting: str | None
) -> None:
    assert examples.trains_on(load_config(None, settings)) == fitting


def test_the_table_says_what_each_example_is_for() -> None:
    rows = {name: (data, about) for name, data, about in examples.table()}
    assert rows["openwebtext-char"][0] == "two text files"
    assert rows["wikipedia"][0] == "wikipedia" and "Wikipedia" in rows["wikipedia"][1]
    assert all(10 < len(about) < 95 and "#" not in about for _, about in rows.values())
