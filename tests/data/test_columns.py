"""Arrow files, and folders of `datasets.save_to_disk`, to documents."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gptcli.errors import GptError
from support.folders import Prepared, Refusal, TokensOf

from .test_readers import refusal, rows_of


def arrow(path: Path, rows: Any, *, footer: bool = False, batch: int = 1000) -> Path:
    """Write rows as Arrow, as `datasets` does, or with a footer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    column = rows if isinstance(rows, pa.Array) else pa.array(rows, pa.string())
    table = pa.table({"id": list(range(len(column))), "text": column})
    make = pa.ipc.new_file if footer else pa.ipc.new_stream
    with make(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=batch)
    return path


def saved(folder: Path, *files: list[str]) -> None:
    """Write a folder as `datasets.save_to_disk` does, with a cache beside the data."""
    names = [f"data-{i:05d}-of-{len(files):05d}.arrow" for i in range(len(files))]
    for name, rows in zip(names, files, strict=True):
        arrow(folder / name, rows)
    arrow(folder / "cache-1234.arrow", ["a copy"] * 50)
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


@pytest.mark.parametrize("footer", [False, True])
@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
)
def test_arrow_rows(tmp_path: Path, footer: bool, kind: Any) -> None:
    rows = ["one", "", "caf\u00e9 \U0001f600", None] * 900
    path = arrow(tmp_path / "a.arrow", pa.array(rows, pa.string()).cast(kind), footer=footer)
    assert rows_of(path) == [row or "" for row in rows]
    error = refusal(rows_of, path, "body")
    assert error.message == f"{path}: no field 'body'; the fields are: id, text"
    assert refusal(rows_of, path, "id").message == f"{path}: row 0: 'id' is a int, not text"


def test_bytes_that_are_not_utf8_name_the_row(tmp_path: Path) -> None:
    column = pa.array([b"fine", b"bad \xff"], pa.binary()).view(pa.string())
    path = arrow(tmp_path / "a.arrow", column)
    assert refusal(rows_of, path).message == f"{path}: row 1: not UTF-8 at byte 4 of its text"
    assert rows_of(path, errors="replace") == ["fine", "bad \ufffd"]


def test_offsets_that_lead_out_of_a_column_are_refused(tmp_path: Path) -> None:
    """Reading them would be reading what is not ours in memory."""
    path = arrow(tmp_path / "a.arrow", ["text", "more", "text"])
    data, sound = path.read_bytes(), np.array([0, 4, 8, 12], "<i4").tobytes()
    assert data.count(sound) == 1
    path.write_bytes(data.replace(sound, np.array([0, 4, 1 << 30, 12], "<i4").tobytes()))
    assert refusal(rows_of, path).message.startswith(f"{path}: damaged Arrow file (")


@pytest.mark.parametrize("footer", [False, True])
def test_a_file_that_is_cut_anywhere_is_refused(tmp_path: Path, footer: bool) -> None:
    """Also between two batches, where a reader of streams sees an end."""
    data = arrow(tmp_path / "a.arrow", ["text"] * 40, footer=footer, batch=10).read_bytes()
    for end in range(0, len(data), 8):
        path = tmp_path / "b.arrow"
        path.write_bytes(data[:end])
        assert refusal(rows_of, path).message.startswith(f"{path}: damaged Arrow file (")


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), footer=st.booleans())
@example(place=0.37109375, bit=0, footer=False)  # a part of 2^56 bytes
@example(place=0.890625, bit=7, footer=True)  # the name of a field that is not UTF-8
def test_any_flipped_bit_gives_rows_or_an_error_of_the_data(
    tmp_path: Path, place: float, bit: int, footer: bool
) -> None:
    path = arrow(tmp_path / "a.arrow", ["some", "text", "caf\u00e9"] * 4, footer=footer)
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    path.write_bytes(data)
    try:
        rows_of(path)
    except GptError as error:
        assert error.exit_code == 3 and error.message.startswith(f"{path}: ")


def test_a_saved_dataset_is_its_rows_without_its_caches(prepared: Prepared) -> None:
    saved(Path("set"), ["first"] * 120, ["second"] * 80)
    manifest = prepared("./set")
    assert manifest.documents == 200 and len(manifest.units) == 2


def test_saved_splits_are_training_and_validation(prepared: Prepared, tokens_of: TokensOf) -> None:
    for split in ("train", "validation", "test"):
        saved(Path("set", split), [split] * 150)
    Path("set/dataset_dict.json").write_text('{"splits": ["train", "validation", "test"]}')
    manifest = prepared("set")
    assert manifest.documents == 300 and manifest.recipe.source == "set"
    assert bytes(t for t in tokens_of(manifest, "val") if t < 256) == b"validation" * 150
    drawn = prepared("set", "data.val_fraction=0.2", out=Path("data/drawn"))
    assert drawn.documents == 150 and drawn.tokens.val
    assert prepared("set/test", out=Path("data/test")).documents == 150


def test_a_saved_dataset_without_a_training_split_names_one(refusal: Refusal) -> None:
    saved(Path("set/test"), ["a"] * 9)
    Path("set/dataset_dict.json").write_text('{"splits": ["test", "../..", 3]}')
    error = refusal("set")
    assert error.message == "set: no training split; the splits are: test"
    assert error.hint == "name the one to train on: gpt prepare set/test"


def test_the_list_of_a_saved_dataset_leads_nowhere_else(refusal: Refusal) -> None:
    saved(Path("set"), ["a"] * 9)
    Path("set/state.json").write_text('{"_data_files": [{"filename": "../../secret.arrow"}]}')
    assert refusal("./set").message == "set/secret.arrow: missing; state.json lists it"


def test_datasets_itself_writes_what_is_read(prepared: Prepared) -> None:
    import datasets

    rows = {"text": [f"row {i}" for i in range(250)]}
    both = {name: datasets.Dataset.from_dict(rows) for name in ("train", "validation")}
    datasets.DatasetDict(both).save_to_disk("set")
    assert prepared("./set").documents == 500
