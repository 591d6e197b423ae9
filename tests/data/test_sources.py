"""From the name of a source to its files, their order, and what is held out."""

import json
import sysconfig
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from gptcli.config import DataConfig
from gptcli.data import sources
from gptcli.data.presets import PRESETS
from gptcli.data.sources import Source, Unit, documents, find_source, source_name
from gptcli.errors import ConfigError, DataError, GptError, StorageError
from gptcli.keyed import keyed_float

Write = Callable[..., Path]


def source_of(source: str | None, **data: Any) -> Source:
    """Return the source of a name, with the default seed."""
    return find_source(DataConfig(source=source, **data), 1337)


def files_of(source: Source) -> list[str]:
    """Return the names of a source's files, in order."""
    return [Path(str(path)).name for unit in source.units for path in unit.paths]


def texts_of(unit: Unit, **data: Any) -> dict[int, str]:
    """Return the documents of a unit by their index."""
    found: dict[int, str] = {}
    for index, piece in documents(unit, DataConfig(**data)):
        found[index] = found.get(index, "") + piece
    return found


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("stdlb", "did you mean 'stdlib'?"),
        ("tinystory", "did you mean 'tinystories'?"),
        ("fineweb_edu", "did you mean 'fineweb-edu'?"),
        ("qqqqq", "presets: stdlib, openwebtext, tinystories, wikipedia, fineweb, fineweb-edu"),
    ],
)
def test_an_unknown_name_gets_a_suggestion(name: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        source_of(name)
    assert caught.value.message == f"no preset, file or folder is named '{name}'"
    assert caught.value.hint == hint


def test_the_presets_are_pinned() -> None:
    assert list(PRESETS)[:2] == ["stdlib", "openwebtext"]
    for preset in PRESETS.values():
        assert (preset.repository is None) == (preset.revision is None) == (preset.name == "stdlib")
        assert preset.revision is None or len(preset.revision) == 40


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.txt", "missing.txt: no such file or folder"),
        ("./missing", "./missing: no such file or folder"),
        ("a/b", "a/b: no such file or folder"),
        ("*.jsonl", "*.jsonl: no file matches"),
        ("x" * 5000, "File name too long"),
        ("x/" * 5000, "File name too long"),
    ],
)
def test_what_is_not_there_is_named(source: str, message: str) -> None:
    with pytest.raises(GptError) as caught:
        source_of(source)
    assert message in caught.value.message
    assert caught.value.exit_code == 3


def test_nothing_named_is_a_usage_error() -> None:
    with pytest.raises(ConfigError, match="no data set named"):
        source_of(None)
    with pytest.raises(ConfigError, match="local files have none"):
        source_of("./x.txt", config="en")


def test_a_folder_without_text_says_what_is_looked_for(write: Write, tmp_path: Path) -> None:
    write("folder/image.png", b"x")
    write("folder/.hidden.txt", "x")
    write("folder/.git/a.txt", "x")
    (tmp_path / "folder/folder.txt").mkdir()
    with pytest.raises(DataError, match="folder: no text in this folder") as caught:
        source_of("folder")
    assert caught.value.hint == "looked for .txt .md .py .jsonl .csv .parquet and .gz"


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


def test_a_preset_wins_over_a_folder_of_its_name(write: Write, library: Path) -> None:
    write("stdlib/a.txt", "x")
    assert "module0.py" in files_of(source_of("stdlib"))
    assert files_of(source_of("./stdlib")) == ["a.txt"]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("stdlib", "stdlib"),
        ("fineweb-edu", "fineweb-edu"),
        ("hf:org/name", "name"),
        ("hf:org/name-v1.5", "name-v1.5"),
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
    assert sources.data_dir(DataConfig(source=source)) == Path("data") / name


def test_an_explicit_data_folder_is_taken_as_it_is() -> None:
    assert sources.data_dir(DataConfig(source="x.txt", dir="a/b")) == Path("a/b")
    assert sources.data_dir(DataConfig(dir="a/b")) == Path("a/b")
    with pytest.raises(ConfigError, match=r"neither data\.source nor data\.dir is set"):
        sources.data_dir(DataConfig())


def test_what_is_on_this_machine() -> None:
    local = {name: sources.is_local(DataConfig(source=name))
             for name in ("stdlib", "x.txt", "./a", "hf:a/b", "fineweb")}  # fmt: skip
    assert local == {"stdlib": True, "x.txt": True, "./a": True, "hf:a/b": False, "fineweb": False}
    assert not sources.is_local(DataConfig())


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
            "val" if keyed_float("split", 1337, unit.index, i) < 0.1 else "train"
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
    assert (texts.held_out, rows.held_out) == (held_out, "documents")
    assert texts_of(texts) == {i: f"text {i}" for i in range(count)}


def test_text_files_are_grouped_up_to_a_size(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "GROUP_BYTES", 100)
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
    assert list(documents(unit, DataConfig())) == [(0, "first"), (1, ""), (2, "third")]


def test_a_fingerprint_follows_the_content(write: Write) -> None:
    write("folder/a.txt", "first")
    write("folder/b.txt", "second")
    [unit] = source_of("folder").units
    before = sources.fingerprint(unit)
    assert sources.fingerprint(unit) == before
    write("folder/a.txt", "firs")
    write("folder/b.txt", "tsecond")
    assert sources.fingerprint(unit) != before


def test_a_file_that_is_gone_is_named(write: Write) -> None:
    path = write("folder/a.txt", "first")
    [unit] = source_of("folder").units
    path.unlink()
    with pytest.raises(DataError, match=r"folder/a\.txt: No such file"):
        sources.fingerprint(unit)


def test_a_file_without_permission_is_named(
    write: Write, without_privileges: Callable[[], AbstractContextManager[None]]
) -> None:
    path = write("a.txt", "x")
    [unit] = source_of("a.txt").units
    path.chmod(0)
    with without_privileges(), pytest.raises(StorageError, match=r"a\.txt: Permission denied"):
        sources.fingerprint(unit)


def test_a_folder_without_permission_is_named(
    write: Write,
    tmp_path: Path,
    without_privileges: Callable[[], AbstractContextManager[None]],
) -> None:
    write("locked/a.txt", "x")
    (tmp_path / "locked").chmod(0)
    with without_privileges(), pytest.raises(StorageError, match="Permission denied"):
        source_of(str(tmp_path / "locked" / "a.txt"))
    (tmp_path / "locked").chmod(0o755)


# What follows is the preset `stdlib`.


def package_of(path: Any, root: Path) -> str:
    """Return the top-level package of a file of the library."""
    return Path(path).relative_to(root).parts[0].removesuffix(".py")


def test_the_library_is_held_out_by_package() -> None:
    root = Path(sysconfig.get_path("stdlib"))
    source = source_of("stdlib")
    train, val = source.units
    assert (train.held_out, val.held_out) == ("train", "val")
    packages = [{package_of(path, root) for path in unit.paths} for unit in (train, val)]
    assert not packages[0] & packages[1]
    assert len(packages[0]) > 100 and len(packages[1]) > 5
    sizes = [sum(Path(str(p)).stat().st_size for p in unit.paths) for unit in (train, val)]
    assert 0.08 < sizes[1] / sum(sizes) <= 0.1
    assert 5_000_000 < source.n_bytes == sum(sizes)


def test_the_library_comes_without_tests_and_foreign_packages() -> None:
    root = Path(sysconfig.get_path("stdlib"))
    folders = {
        part
        for unit in source_of("stdlib").units
        for path in unit.paths
        for part in Path(str(path)).relative_to(root).parts[:-1]
    }
    assert not folders & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert {"json", "email", "asyncio"} <= folders


def test_the_librarys_split_depends_on_the_seed_alone(library: Path) -> None:
    def held_out(seed: int) -> str:
        return files_of(find_source(DataConfig(source="stdlib"), seed))[-1]

    drawn = [held_out(seed) for seed in range(20)]
    assert [held_out(seed) for seed in range(20)] == drawn
    assert len(set(drawn)) > 4


@pytest.fixture
def library(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of ten packages of 100 bytes, and what is not taken from one."""
    root = tmp_path / "library"
    for i in range(8):
        write(f"library/module{i}.py", "x" * 100)
    for name in ("email/__init__.py", "email/mime/text.py", "json/a.py", "json/b/c.py"):
        write(f"library/{name}", "x" * 50)
    write("library/empty.py", "")
    for name in ("test/a.py", "json/tests/a.py", "idlelib/idle_test/a.py", "email/test/x.py",
                 "site-packages/numpy/a.py", "dist-packages/a.py", "json/__pycache__/a.py",
                 "LICENSE.txt", "json/data.json"):  # fmt: skip
        write(f"library/{name}", "no library")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(root))
    return root


@pytest.mark.parametrize(("fraction", "held_out"), [(None, 1), (0.1, 1), (0.25, 2), (0.55, 5)])
def test_packages_are_held_out_while_they_fit(
    library: Path, fraction: float | None, held_out: int
) -> None:
    source = source_of("stdlib", val_fraction=fraction)
    train, val = source.units
    assert source.n_bytes == 1000
    assert len({package_of(path, library) for path in val.paths}) == held_out
    taken = [Path(str(p)).relative_to(library).as_posix() for p in (*train.paths, *val.paths)]
    assert sorted(taken) == sorted([
        *(f"module{i}.py" for i in range(8)), "email/__init__.py", "email/mime/text.py",
        "empty.py", "json/a.py", "json/b/c.py",
    ])  # fmt: skip
    for unit in (train, val):
        names = [Path(str(path)).relative_to(library).as_posix() for path in unit.paths]
        assert names == sorted(names)


def test_no_validation_takes_no_package_not_even_an_empty_one(library: Path) -> None:
    [train] = source_of("stdlib", val_fraction=0).units
    assert train.held_out == "train"
    assert len(train.paths) == 13


def test_a_python_without_its_library_says_so(tmp_path: Path, library: Path) -> None:
    for path in library.rglob("*.py"):
        path.unlink()
    with pytest.raises(DataError, match="comes without its library's sources"):
        source_of("stdlib")


def test_one_package_of_the_library_is_a_few_files(library: Path) -> None:
    source = source_of("stdlib", config="json")
    [unit] = source.units
    assert files_of(source) == ["a.py", "c.py"]
    assert (unit.held_out, source.n_bytes) == ("tail", 100)
    with pytest.raises(ConfigError, match="'jsno'") as caught:
        source_of("stdlib", config="jsno")
    assert caught.value.hint == "did you mean 'json'?"


def test_the_prose_of_the_language_reference_is_one_document_a_topic() -> None:
    root = Path(sysconfig.get_path("stdlib"))
    texts = texts_of(Unit(0, "x", (root / "pydoc_data" / "topics.py",), "train"))
    assert len(texts) > 50
    assert sum(text.startswith("Boolean operations\n") for text in texts.values()) == 1
    assert not any("topics = {" in text for text in texts.values())
