"""What the program tells people to type: commands, options and keys in its texts are all real."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from gptcli.cli import _command
from gptcli.config.reference import keys, sections
from support.commands import COMMAND, SETTING, require_good_advice, require_understood

PACKAGE = Path(__file__).parents[1] / "gptcli"
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
# Of pip, docker, libreoffice and pandoc.
FOREIGN = {"--force-reinstall", "--shm-size", "--headless", "--convert-to", "--wrap"}
FILES = (".bin", ".json", ".safetensors")
SECTION = "|".join(sections())
KEY = re.compile(rf"(?<![\w./])(?:{SECTION})\.[a-z][a-z0-9_]*(?![\w/(*])(?!\.[a-z])")


def texts(path: Path) -> list[str]:
    """Return a module's strings but for docstrings, with PLACE for what is put in."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner: set[int] = set()
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.JoinedStr(values=values):
                inner |= {id(part) for value in values for part in ast.walk(value)}
                text = "".join(
                    str(part.value) if isinstance(part, ast.Constant) else "PLACE"
                    for part in values
                )
            case ast.Constant(value=str(text)) if id(node) not in inner:
                pass
            case ast.Expr(value=ast.Constant() as docstring):
                inner.add(id(docstring))
                continue
            case _:
                continue
        found.append(text)
    return found


def options() -> set[str]:
    """Return the long options of all commands."""
    found, groups = {"--help"}, [_command()]
    while groups:
        command: Any = groups.pop()
        groups += getattr(command, "commands", {}).values()
        for param in command.params:
            found |= {*param.opts, *param.secondary_opts}
    return found


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix()
)
def test_what_a_text_says_to_type_is_there(path: Path) -> None:
    known = options() | FOREIGN
    for text in texts(path):
        for parts in COMMAND.findall(text):
            command = "".join(parts)
            for part in command.split(" && "):
                if not part.startswith("gpt PLACE"):
                    require_understood(part.split()[1:])
        for option in OPTION.findall(text) if not text.startswith("--") or " " in text else []:
            assert option in known, text
        for key in SETTING.findall(text):
            assert key in keys() or "PLACE" in key or key == "KEY", text
        for key in KEY.findall(text) if " " in text else []:
            assert key in keys() or key.endswith(FILES), text


@pytest.mark.parametrize(
    "text",
    ["hint: run `gpt trane`", "next: gpt train -c no-such -s model.n_heads=2",
     "hint: use -s model.n_heads=2", "next: gpt train -s model.n_layer=0 && gpt generate",
     "next: gpt generate\n      gpt evaluate x"],
)  # fmt: skip
def test_wrong_advice_is_noticed(text: str) -> None:
    with pytest.raises(Exception, match=r"(?i)no such|unknown|n_heads|expected|command"):
        require_good_advice(text)
    require_good_advice("next: gpt train -c quickstart && gpt generate\n      gpt eval x\n")
