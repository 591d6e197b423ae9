"""House rules that no linter states: sizes, and what starting the program may import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "gptcli").rglob("*.py"))
HEAVY = ("torch", "numpy", "datasets", "pyarrow", "tiktoken", "transformers", "matplotlib")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
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


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["prepare", "--list"],
        ["train", "-s", "model.n_heads=3"],
        ["train", "-c", "nowhere.yaml"],
        ["trane"],
        ["config", "explain", "optim.lr"],
        ["config", "schema"],
        ["doctor", "--help"],
        ["runs", "show", "nothing"],
        ["plot", "nowhere"],
        ["report", "nowhere"],
        [],
    ],
    ids=" ".join,
)
def test_help_and_configuration_errors_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from gptcli.cli import run; run(sys.argv[1:]);"
        f"print('HEAVY', [name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "HEAVY []"
