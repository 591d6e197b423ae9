"""What is packed for an index, and which versions of other programs are asked for."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gptcli.config import load_config
from support.commands import require_understood

from .test_documents import LINK, PAGES

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = {
    canonicalize_name(name): version
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    for name, _, version in [line.partition("==")]
    if version
}


def declared() -> Iterator[Requirement]:
    """Yield what the package and its extras ask for."""
    project = PROJECT["project"]
    for lines in (project["dependencies"], *project["optional-dependencies"].values()):
        yield from map(Requirement, lines)


@pytest.mark.parametrize("wanted", list(declared()), ids=str)
def test_what_is_asked_for_is_pinned_to_a_version_that_will_do(wanted: Requirement) -> None:
    if wanted.name == "gptcli":
        assert wanted.extras <= PROJECT["project"]["optional-dependencies"].keys()
    else:
        assert wanted.specifier.contains(PINS[canonicalize_name(wanted.name)])


@pytest.mark.parametrize(
    ("name", "version", "why"),
    [
        ("tiktoken", "0.12.0", "takes the square of the length for a run of newlines or letters"),
        ("typer", "0.27.0", "folds the examples under the help into one paragraph"),
    ],
)
def test_versions_that_do_not_do_are_below_the_floor(name: str, version: str, why: str) -> None:
    [wanted] = [one for one in declared() if one.name == name]
    assert not wanted.specifier.contains(version), why


def test_the_wheel_holds_the_package_and_its_examples_and_nothing_else() -> None:
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    examples = {"examples": "gptcli/examples"}
    assert wheel == {"packages": ["gptcli"], "force-include": examples}


def test_the_source_package_holds_what_its_tests_read() -> None:
    always = ("LICENSE", "pyproject.toml")
    packed = (*always, *PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"])
    for path in (*PAGES, ROOT / "constraints.txt", ROOT / "Makefile", Path(__file__)):
        name = path.relative_to(ROOT).as_posix()
        assert any(name == one or name.startswith(f"{one}/") for one in packed), name


def description() -> str:
    """Return the page that an index shows, as the build makes it of the README."""
    how: dict[str, Any] = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    text = "".join((ROOT / part["path"]).read_text() for part in how["fragments"])
    for rule in how["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    return text


def test_no_link_of_the_description_leads_to_a_file() -> None:
    text = description()
    assert not [link for link in LINK.findall(text) if not link.startswith("https://")]
    assert "![" not in text and "All figures name the machine" in text
    changed = len((ROOT / "README.md").read_text().splitlines()) - len(text.splitlines())
    assert 0 < changed < 8, "a picture is a line or two, and all else stays"


def test_the_demo_is_understood_and_samples_another_prompt_than_training() -> None:
    demo = (ROOT / "Makefile").read_text().partition("\ndemo:")[2].partition("\n\n")[0]
    lines = re.findall(r"^\t\$\(BIN\)/gpt (.+)$", demo, re.MULTILINE)
    commands = [shlex.split(line) for line in lines]
    assert [words[0] for words in commands] == ["prepare", "train", "eval", "generate"]
    for words in commands:
        require_understood(words)
    prompt = load_config("quickstart").generate.prompt
    assert prompt and commands[-1][-1] != prompt and not commands[-1][-1].startswith("-")
    assert "<" not in commands[-1], "an empty stdin would be the example's prompt again"
