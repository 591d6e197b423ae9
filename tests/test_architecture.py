"""House rules that no linter states: sizes, and what starting the program may import."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "gptcli").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
HEAVY = ("torch", "numpy", "datasets", "pyarrow", "tiktoken", "transformers", "matplotlib")


@pytest.mark.parametrize("path", [*FILES, *TESTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_fit_in_a_head(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= 400
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1  # type: ignore[operator]
            assert length <= 60, f"{path}:{node.lineno} {node.name} has {length} lines"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_everything_public_is_documented(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{path} has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path}:{node.lineno} {node.name}"


def imports_of(name: str) -> Iterator[str]:
    """Yield what importing a module of ours imports with it, by the statements at module level."""
    parts = name.split(".")
    yield from (".".join(parts[:end]) for end in range(1, len(parts)))
    path = ROOT / Path(*parts)
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def closure(name: str) -> set[str]:
    """Return the modules of ours that importing one of them imports."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES}
    modules |= {module.removesuffix(".__init__") for module in modules}
    found, left = set(), [name]
    while left:
        if (module := left.pop()) not in found and module in modules:
            found.add(module)
            left += imports_of(module)
    return found - {name}


def test_the_training_loop_is_read_without_the_rest_of_the_house() -> None:
    far = closure("gptcli.training.loop")
    assert len(far) <= 55, sorted(far)
    assert not {name for name in far if name.split(".")[1:2] in (["interop"], ["terminal"])}
    assert len(list((ROOT / "gptcli" / "training").glob("*.py"))) <= 16


LIGHT: tuple[list[str], ...] = (
    [], ["--help"], ["--version"], ["train", "--help"], ["doctor", "--help"], ["prepare", "--list"],
    ["train", "-s", "model.n_heads=3"], ["train", "-c", "nowhere.yaml"], ["trane"],
    ["config", "show", "-c", "quickstart"], ["config", "schema"],
    ["config", "explain"], ["config", "explain", "lr"], ["config", "explain", "optim.lr"],
    ["runs", "show", "nothing"], ["plot", "nowhere"], ["report", "nowhere"],
    ["config", "init"],
)  # fmt: skip
RUN_ALL = f"""
import sys
from gptcli.cli import run
seen = set()
for words in {LIGHT}:
    run(words)
    heavy = {{name for name in {HEAVY} if name in sys.modules}}
    print("HEAVY", *sorted(heavy - seen))
    seen |= heavy
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What each of the light commands imports first, run one after another in one process."""
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL], capture_output=True, text=True, check=True,
        cwd=tmp_path_factory.mktemp("light"),
    )  # fmt: skip
    lines = done.stdout.splitlines()
    return [line.removeprefix("HEAVY").strip() for line in lines if line.startswith("HEAVY")]


@pytest.mark.parametrize("number", range(len(LIGHT)), ids=lambda number: " ".join(LIGHT[number]))
def test_help_and_configuration_errors_import_nothing_heavy(
    imported: list[str], number: int
) -> None:
    assert imported[number] == ""
    assert len(imported) == len(LIGHT)
