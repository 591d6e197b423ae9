"""From the name of a source to its files, their order, and what is held out."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from gptcli.config import DataConfig
from gptcli.data import units
from gptcli.data.presets import PRESETS, data_dir, is_local, source_name, unknown_part
from gptcli.data.sources import Source, find_source
from gptcli.data.units import Unit, documents
from gptcli.errors import ConfigError, DataError, GptError, StorageError
from gptcli.seeding import derive_uniform
from support.folders import Write


def source_of(source: str | None, **data: Any) -> Source:
    """Return the source of a name, with the default seed."""
    return find_source(DataConfig(source=source, **data), 1337)


def files_of(source: Source) -> list[str]:
    """Return the names of a source's files, in order."""
    return [Path(str(path)).name for unit in source.units for path in unit.paths]


def texts_of(unit: Unit, **data: Any) -> dict[int, str]:
    """Return the documents of a unit by their index."""
    found: dict[int, str] = {}
    for index, piece, _ in documents(unit, DataConfig(**data)):
        found[index] = found.get(index, "") + piece
    return found


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("stdlb", "did you mean 'stdlib'?"),
        ("tinystory", "did you mean 'tinystories'?"),
        ("fineweb_edu", "did you mean 'fineweb-edu'?"),
        ("qqqqq", f"presets: {', '.join(PRESETS)}"),
    ],
)
def test_an_unknown_name_gets_a_suggestion(name: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        source_of(name)
    assert caught.value.message == f"no preset, file or folder is named '{name}'"
    assert caught.value.hint == hint


def test_the_presets_are_pinned() -> None:
    assert {"stdlib", "openwebtext", "tinystories", "wikipedia", "shakespeare"} <= set(PRESETS)
    for preset in PRESETS.values():
        on_the_hub = preset.kind in ("rows", "lines", "shards")
        assert (preset.revision is not None) == on_the_hub
        assert not on_the_hub or len(preset.revision or "") == 40
        assert preset.licence and preset.about
    assert PRESETS["openwebtext"].expected.gpt2_tokens == 9_040_017_095


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.txt", "missing.txt: no such file or folder"),
        ("./missing", "./missing: no such file or folder"),
        ("a/b", "a/b: no such file or folder"),
        ("*.jsonl", "*.jsonl: no file matches"),
    ],
)
def test_what_is_not_there_is_named(source: str, message: str) -> None:
    with pytest.raises(GptError) as caught:
        source_of(source)
    assert message in caught.value.message
    assert caught.value.exit_code == 3


def test_nothing_named_is_a_usage_error() -> None:
    with pytest.raises(ConfigError, match="no dataset named"):
        source_of(None)
    with pytest.raises(ConfigError, match="local files have none"):
        source_of("./x.txt", config="en")
    with pytest.raises(ConfigError, match=r"data\.config is en, but the source says de"):
        source_of("hf:org/name:de", config="en")


def test_a_folder_without_text_says_what_is_looked_for(write: Write, tmp_path: Path) -> None:
    write("folder/image.png", b"x")
    write("folder/.hidden.txt", "x")
    write("folder/.git/a.txt", "x")
    (tmp_path / "folder/folder.txt").mkdir()
    with pytest.raises(DataError, match="folder: no text in this folder") as caught:
        source_of("folder")
    known = ".txt .md .py .jsonl .csv .parquet .arrow .tar"
    assert caught.value.hint == f"looked for {known}, also in .gz .bz2 .xz .zst"


def test_a_folder_is_read_in_the_order_of_its_paths(write: Write) -> None:
    """Text files come first, in one order on every system; hidden and foreign files are left."""
    names = ["b.txt", "a/z.md", "a.txt", "a/b/c.py", "B.txt.gz", "rows.jsonl", "a/rows.csv.gz",
             "c.parquet", "a-b.txt"]  # fmt: skip
    for name in names:
        write(f"folder/{name}", "x")
    for name in (".hidden.txt", ".cache/x.txt", "a/.x/y.md", "x.png", "x.gz", "README"):
        write(f"folder/{name}", "x")
    source = source_of("folder")
    paths = [Path(str(p)).relative_to("folder").as_posix() for u in source.units for p in u.paths]
    assert paths == [
        "B.txt.gz", "a-b.txt", "a.txt", "a/b/c.py", "a/z.md", "b.txt",
        "a/rows.csv.gz", "c.parquet", "rows.jsonl",
    ]  # fmt: skip
    assert [unit.index for unit in source.units] == [0, 1, 2, 3]
    assert [unit.held_out for unit in source.units] == ["tail", *["documents"] * 3]


def test_a_hidden_folder_is_read_when_it_is_named(write: Write) -> None:
    write(".notes/a.txt", "x")
    assert files_of(source_of(".notes")) == ["a.txt"]


def test_a_glob_takes_what_matches_in_order(write: Write, tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.txt", "d/e.jsonl", ".hidden.jsonl"):
        write(name, "")
    (tmp_path / "f.jsonl").mkdir()
    assert files_of(source_of("*.jsonl")) == ["a.jsonl", "b.jsonl"]
    assert files_of(source_of("**/*.jsonl")) == ["a.jsonl", "b.jsonl", "e.jsonl"]
    assert files_of(source_of("[ac].*")) == ["c.txt", "a.jsonl"]
    assert files_of(source_of("?.txt")) == ["c.txt"]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(write: Write) -> None:
    write("a[1].txt", "x")
    write("a1.txt", "y")
    assert files_of(source_of("a[1].txt")) == ["a[1].txt"]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("stdlib", "stdlib"),
        ("fineweb-edu", "fineweb-edu"),
        ("hf:org/name", "name"),
        ("hf:org/name-v1.5", "name-v1.5"),
        ("hf:org/name:part", "name-part"),
        ("hf:name", "name"),
        ("stdlib:textwrap", "stdlib-textwrap"),
        ("input.txt", "input"),
        ("./input.txt", "input"),
        ("/a/b/input.txt.gz", "input"),
        ("wiki.en.jsonl", "wiki.en"),
        ("a/rows.jsonl.gz", "rows"),
        ("texts", "texts"),
        ("texts/", "texts"),
        ("v1.5/", "v1.5"),
        ("texts/*.txt", "texts"),
        ("texts/**/*.txt", "texts"),
        ("*.txt", "here"),
        (".", "here"),
        ("..", "work"),
        ("my texts & more.txt", "my-texts-more"),
        ("caf\u00e9.txt", "caf\u00e9"),
        ("$(x).txt", "x"),
        ("---.txt", "text"),
    ],
)
def test_the_data_folder_is_named_after_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, name: str
) -> None:
    here = tmp_path / "work" / "here"
    (here / "texts").mkdir(parents=True)
    (here / "v1.5").mkdir()
    monkeypatch.chdir(here)
    assert source_name(source) == name
    assert data_dir(DataConfig(source=source)) == Path("data") / name


def test_an_explicit_data_folder_is_taken_as_it_is() -> None:
    assert data_dir(DataConfig(source="x.txt", dir="a/b")) == Path("a/b")
    assert data_dir(DataConfig(dir="a/b")) == Path("a/b")
    with pytest.raises(ConfigError, match=r"neither data\.source nor data\.dir is set"):
        data_dir(DataConfig())


def test_what_is_on_this_machine() -> None:
    expected = {"stdlib": True, "stdlib:json": True, "x.txt": True, "./a": True,
                "hf:a/b": False, "fineweb": False}  # fmt: skip
    assert {name: is_local(DataConfig(source=name)) for name in expected} == expected
    assert not is_local(DataConfig())


def test_the_default_validation_part_depends_on_the_size() -> None:
    small = Source("x", (), 49_999_999)
    large = Source("x", (), 50_000_000)
    assert small.val_fraction(DataConfig()) == 0.1
    assert large.val_fraction(DataConfig()) == 0.0005
    assert large.val_fraction(DataConfig(val_fraction=0.25)) == 0.25
    assert small.val_fraction(DataConfig(val_fraction=0)) == 0


def test_rows_are_held_out_by_their_hash(write: Write) -> None:
    rows = "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(1000))
    write("a.jsonl", rows)
    write("b.jsonl", rows)
    first, second = source_of("*.jsonl").units
    for unit in (first, second):
        splits = [unit.split_of(i, 1337, 0.1) for i in range(1000)]
        assert 60 < splits.count("val") < 140
        assert splits == [
            "val" if derive_uniform("split", 1337, unit.index, i) < 0.1 else "train"
            for i in range(1000)
        ]
    same = [first.split_of(i, 1337, 0.1) == second.split_of(i, 1337, 0.1) for i in range(1000)]
    assert not all(same)
    assert [first.split_of(i, 1, 0.1) for i in range(99)] != [
        first.split_of(i, 2, 0.1) for i in range(99)
    ]
    assert {first.split_of(i, 1337, 0.0) for i in range(1000)} == {"train"}


def test_a_larger_fraction_holds_out_the_same_rows_and_more() -> None:
    unit = Unit(0, "x", (), "documents")
    few = {i for i in range(1000) if unit.split_of(i, 1, 0.1) == "val"}
    more = {i for i in range(1000) if unit.split_of(i, 1, 0.2) == "val"}
    assert few < more


@pytest.mark.parametrize(("count", "held_out"), [(99, "tail"), (100, "documents")])
def test_from_a_hundred_text_files_whole_files_are_held_out(
    write: Write, count: int, held_out: str
) -> None:
    for i in range(count):
        write(f"folder/{i:03d}.txt", f"text {i}")
    write("folder/rows.jsonl", "")  # not a text file, so it does not count
    texts, rows = source_of("folder").units
    assert (texts.held_out, rows.held_out) == (held_out, "end")
    assert texts_of(texts) == {i: f"text {i}" for i in range(count)}


def test_text_files_are_grouped_up_to_a_size(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "GROUP_BYTES", 100)
    for name, size in {"a": 40, "b": 60, "c": 1, "d": 500, "e": 50, "f": 50}.items():
        write(f"folder/{name}.txt", "x" * size)
    source = source_of("folder")
    groups = [[Path(str(path)).stem for path in unit.paths] for unit in source.units]
    assert groups == [["a", "b"], ["c"], ["d"], ["e", "f"]]
    assert source.n_bytes == 701
    assert [unit.index for unit in source.units] == [0, 1, 2, 3]


def test_documents_are_counted_across_the_files_of_a_unit(write: Write) -> None:
    write("folder/a.txt", "first")
    write("folder/b.txt", "")
    write("folder/c.py", "third")
    [unit] = source_of("folder").units
    assert list(documents(unit, DataConfig())) == [
        (0, "first", -1), (1, "", -1), (2, "third", -1)
    ]  # fmt: skip


def test_a_fingerprint_follows_the_content(write: Write) -> None:
    write("folder/a.txt", "first")
    write("folder/b.txt", "second")
    [unit] = source_of("folder").units
    before = units.content_hash(unit)
    assert units.content_hash(unit) == before
    write("folder/a.txt", "firs")
    write("folder/b.txt", "tsecond")
    assert units.content_hash(unit) != before


def test_a_file_that_is_gone_is_named(write: Write) -> None:
    path = write("folder/a.txt", "first")
    [unit] = source_of("folder").units
    path.unlink()
    with pytest.raises(DataError, match=r"folder/a\.txt: No such file"):
        units.content_hash(unit)


def test_a_file_without_permission_is_named(
    write: Write, without_privileges: Callable[[], AbstractContextManager[None]]
) -> None:
    path = write("a.txt", "x")
    [unit] = source_of("a.txt").units
    path.chmod(0)
    with without_privileges(), pytest.raises(StorageError, match=r"a\.txt: Permission denied"):
        units.content_hash(unit)


def test_a_folder_without_permission_is_named(
    write: Write,
    tmp_path: Path,
    without_privileges: Callable[[], AbstractContextManager[None]],
) -> None:
    write("locked/a.txt", "x")
    (tmp_path / "locked").chmod(0)
    write("open.txt", "x")
    tmp_path.chmod(0o755)
    with without_privileges():
        for name in ("locked/a.txt", "locked", "."):  # "." has a file that may be read, too
            with pytest.raises(StorageError, match=r"locked.*: Permission denied"):
                source_of(name)
    (tmp_path / "locked").chmod(0o755)


@pytest.mark.parametrize(
    ("said", "message", "hint"),
    [
        ("BuilderConfig 'on' not found. Available: ['one', 'two']", "no part named 'on'", "'one'"),
        ("Config name is missing.\nPlease pick one among the available configs: ['one', 'two']",
         "hf:a/b has several parts: 'one', 'two'", "hf:a/b:one"),
        ("BuilderConfig 'x' not found. Available: " + str([f"{i:03}" for i in range(300)]),
         "'009' and 290 more", None),
        ("BuilderConfig of another age", "hf:a/b: BuilderConfig of another age", None),
    ],
)  # fmt: skip
def test_a_part_that_is_missing_is_answered_with_those_there_are(
    said: str, message: str, hint: str | None
) -> None:
    error = unknown_part("hf:a/b", said)
    assert message in error.message
    assert (hint or "") in (error.hint or "") and (hint is None) == (error.hint is None)
