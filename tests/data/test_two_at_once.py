"""Two preparations of one folder at once: one holds it, the other says so and touches nothing."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

from gptcli.config import load_config
from gptcli.data.prepare import finalize, make_plan, prepare, prepare_share
from gptcli.data.shards import Manifest, read_manifest
from gptcli.errors import RunLockedError
from support.folders import Prepared, Write
from support.processes import forked, until, wait

OUT = Path("data/out")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")


@pytest.fixture(params=[1, 6])
def source(request: pytest.FixtureRequest, write: Write) -> str:
    """A folder of one unit or of six."""
    for index in range(request.param):
        rows = [json.dumps({"text": f"file {index} row {row} " * 20}) for row in range(100)]
        write(f"rows/part-{index}.jsonl", "\n".join(rows))
    return "rows"


def prepare_as(source: str, name: str, **options: bool) -> Manifest:
    sets = [f"tokenizer.name={name}", f"data.source={source}", f"data.dir={OUT}"]
    return prepare(make_plan(load_config(None, sets)), **options)


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("names", [("bytes", "bytes"), ("bytes", "char")])
def test_one_of_two_is_refused_or_finds_the_others_work(
    source: str, names: tuple[str, str], forced: bool, prepared: Prepared
) -> None:
    if forced:
        prepare_as(source, "bytes")
    for attempt in range(8):
        children = [
            forked(lambda name=name: prepare_as(source, name, force=forced))  # type: ignore[misc]
            for name in names
        ]
        codes = [wait(child) for child in children]
        # Refused while the other works; of another tokenizer, refused afterwards as well.
        refused = {6} if names[0] == names[1] or forced else {6, 2}
        assert 0 in codes and set(codes) <= {0} | refused, f"{codes} at attempt {attempt}"
        manifest = read_manifest(OUT)
        left = {shard.file for unit in manifest.units for shard in unit.shards}
        assert {path.name for path in OUT.iterdir()} == left | {"manifest.json", "tokenizer.json"}
        assert prepare_as(source, manifest.tokenizer.name) == manifest
        if not forced:
            for path in OUT.iterdir():
                path.unlink()


def test_the_refusal_names_the_process_and_a_way_out(source: str, prepared: Prepared) -> None:
    def second(kind: str, n_bytes: int) -> None:
        with pytest.raises(RunLockedError) as caught:
            prepare_as(source, "bytes")
        assert caught.value.message.startswith(f"{OUT}: process {os.getpid()} on ")
        assert caught.value.message.endswith(" is preparing this folder")
        assert "--out" in (caught.value.hint or "")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared(source, on_bytes=second)
    assert not Path("data").exists()


def test_ranks_share_a_folder_with_each_other_and_with_nobody_else(
    source: str, prepared: Prepared
) -> None:
    plan = make_plan(
        load_config(None, ["tokenizer.name=bytes", f"data.source={source}", f"data.dir={OUT}"])
    )
    seen = []

    def others(kind: str, n_bytes: int) -> None:
        if seen:
            return
        seen.append(n_bytes)
        prepare_share(plan, 1, 2)
        for alone in (
            lambda: prepare(plan),
            lambda: prepare(plan, force=True),
            lambda: finalize(plan),
        ):
            with pytest.raises(RunLockedError, match="is preparing this folder"):
                alone()

    prepare_share(plan, 0, 2, on_bytes=others)
    manifest = finalize(plan)
    assert manifest == prepared(source, out=Path("data/plain"))
    assert not (OUT / ".lock").exists()


def test_a_finished_folder_is_looked_at_by_any_number_at_once(
    source: str, prepared: Prepared
) -> None:
    prepared(source)
    children = [forked(lambda: prepare_as(source, "bytes")) for _ in range(8)]
    assert [wait(child) for child in children] == [0] * 8


def test_a_killed_preparation_holds_nothing(source: str, prepared: Prepared) -> None:
    child = forked(lambda: prepared(source, on_bytes=lambda *_: time.sleep(60)))
    until((OUT / ".progress/recipe.json").exists)
    with pytest.raises(RunLockedError, match=f"process {child} on "):
        prepare_as(source, "bytes")
    os.kill(child, 9)
    wait(child)
    assert prepare_as(source, "bytes") == prepared(source, out=Path("data/plain"))
