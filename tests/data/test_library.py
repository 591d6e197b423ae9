"""The text every machine has: this Python's own library, held out by package."""

import sysconfig
from pathlib import Path
from typing import Any

import pytest

from gptcli.config import DataConfig
from gptcli.data.sources import Source, find_source
from gptcli.data.units import Unit, documents
from gptcli.errors import ConfigError, DataError
from support.folders import Write

TOPICS = Path(sysconfig.get_path("stdlib"), "pydoc_data", "topics.py")


def source_of(source: str, **data: Any) -> Source:
    """Return the source of a name, with the default seed."""
    return find_source(DataConfig(source=source, **data), 1337)


def files_of(source: Source) -> list[str]:
    """Return the names of a source's files, in order."""
    return [Path(str(path)).name for unit in source.units for path in unit.paths]


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


def test_a_preset_wins_over_a_folder_of_its_name(write: Write, library: Path) -> None:
    write("stdlib/a.txt", "x")
    assert "module0.py" in files_of(source_of("stdlib"))
    assert files_of(source_of("./stdlib")) == ["a.txt"]


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
    source = source_of("stdlib:json")
    [unit] = source.units
    assert files_of(source) == ["a.py", "c.py"]
    assert (unit.held_out, source.n_bytes) == ("tail", 100)
    assert source_of("stdlib", config="json") == source
    assert files_of(source_of("stdlib:module3")) == ["module3.py"]
    with pytest.raises(ConfigError, match="stdlib has no module 'jsno'") as caught:
        source_of("stdlib:jsno")
    assert caught.value.hint == "did you mean 'json'?"


def test_the_prose_of_the_language_reference_is_one_document_a_topic() -> None:
    unit = Unit(0, "x", (TOPICS,), "train")
    texts = [text for _, text, _ in documents(unit, DataConfig())]
    assert len(texts) > 50
    assert sum(text.startswith("Boolean operations\n") for text in texts) == 1
    assert not any("topics = {" in text for text in texts)
