"""Questions and answers out of Python sources, which are parsed and never run."""

from pathlib import Path

import pytest

from gptcli.config.schema import DataConfig
from gptcli.data.docstrings import conversations_of, module_name
from gptcli.data.messages import BadRow, Turns
from gptcli.data.sources import find_source
from gptcli.data.units import documents
from gptcli.tokenizers.bpe import gpt2
from gptcli.tokenizers.chat import ROLES
from support.folders import Prepared, Refusal, Write

SOURCE = '''"""Tools for tests of
questions.

More of it.
"""
raise SystemExit("this was run")

def join(parts, /, sep=", ", *, last: str = " and ") -> str:
    """Join parts as people do"""

def _private():
    """Not to be asked about."""

class Box:
    """A box that holds things. It can be opened."""

    @property
    def size(self):
        """The size of the box."""

    @classmethod
    def of(cls, *things):
        """Make a box of things."""

    def bare(self, x): ...
'''


def asked(source: str, module: str = "tools") -> list[Turns]:
    """Return the conversations of a source that is sound."""
    found = [turns for _, turns in conversations_of(source, module)]
    assert not any(isinstance(turns, BadRow) for turns in found)
    return found  # type: ignore[return-value]


def test_answers_are_first_paragraphs_and_signatures() -> None:
    answers = [text for turns in asked(SOURCE) for role, text in turns if role == "assistant"]
    assert answers == [
        "Tools for tests of questions.",
        "Join parts as people do.",
        "join(parts, /, sep=', ', *, last: str=' and ') -> str",
        "A box that holds things. It can be opened.",
        "The size of the box.",
        "Make a box of things.",
        "Box.of(*things)",
    ]


def test_a_conversation_is_one_question_or_two() -> None:
    for turns in asked(SOURCE):
        roles = [role for role, _ in turns if role != "system"]
        assert roles in (["user", "assistant"], ["user", "assistant"] * 2)
        assert all(role != "system" for role, _ in turns[1:])


def test_names_are_asked_about_in_several_ways() -> None:
    source = "".join(f'def name{i}(x):\n    """Return the {i}th name."""\n' for i in range(300))
    questions = [text for turns in asked(source) for role, text in turns if role == "user"]
    words = {text.replace("tools.", "").partition("name")[0] for text in questions}
    assert len(words) > 8
    assert asked(source) == asked(source)


@pytest.mark.parametrize("source", ["def (", "\0", "(" * 10_000 + ")" * 10_000, "\ufeff\ufeffx ="])
def test_a_source_that_is_not_python_is_a_bad_row(source: str) -> None:
    [(_, found)] = conversations_of(source, "tools")
    assert isinstance(found, BadRow) and found.reason == "not Python"


def test_long_paragraphs_keep_whole_sentences() -> None:
    long = " ".join(["It does this and that and more of the same."] * 40)
    [turns] = asked(f'"""{long}"""')
    assert turns[-1][1].endswith("of the same.") and 300 < len(turns[-1][1]) <= 360
    assert asked(f'"""{"word " * 300}"""') == []


def test_modules_are_named_as_they_are_imported(write: Write) -> None:
    for name in ("pack/__init__.py", "pack/sub/__init__.py", "pack/sub/mod.py", "_own.py"):
        path = write(name, "")
    assert module_name(path.with_name("pack") / "sub/mod.py") == "pack.sub.mod"
    assert module_name(path.with_name("pack") / "__init__.py") == "pack"
    assert module_name(path) is None
    assert module_name(Path("my-script.py")) is None


def test_own_sources_can_be_asked_about(write: Write, prepared: Prepared, refusal: Refusal) -> None:
    write("pack/tools.py", SOURCE)
    write("pack/README.md", "No Python.")
    assert prepared("pack", "data.format=docstrings").documents == len(asked(SOURCE))
    write("broken/tools.py", SOURCE + "\ndef (")
    error = refusal("broken", "data.format=docstrings", out=Path("b"))
    assert "broken/tools.py: line 27: not Python (invalid syntax)" in error.message
    write("none/a.txt", "x")
    assert "no Python source" in refusal("none", "data.format=docstrings", out=Path("c")).message


@pytest.fixture(scope="module")
def library() -> dict[str, list[Turns]]:
    """The conversations about this Python's library, by split."""
    source = find_source(DataConfig(source="stdlib-chat"), 1337)
    config = DataConfig(format="docstrings")
    found: dict[str, dict[int, Turns]] = {}
    for unit in source.units:
        for index, text, role in documents(unit, config):
            turns = found.setdefault(unit.held_out, {}).setdefault(index, [])
            turns.append((ROLES[role], text))
    return {split: [*talks.values()] for split, talks in found.items()}


def test_the_library_gives_thousands_of_short_answers(library: dict[str, list[Turns]]) -> None:
    answers = [text for split in library.values() for turns in split for role, text in turns
               if role == "assistant"]  # fmt: skip
    assert len(answers) > 5000
    lengths = [len(gpt2().encode(text)) for text in answers[::7]]
    assert sum(length < 100 for length in lengths) > 0.99 * len(lengths)
    assert max(map(len, answers)) <= 360


def test_the_librarys_split_is_by_package(library: dict[str, list[Turns]]) -> None:
    assert 0.02 < len(library["val"]) / len(library["train"]) < 0.25
    source = find_source(DataConfig(source="stdlib-chat"), 1337)
    text = find_source(DataConfig(source="stdlib"), 1337)
    assert [unit.held_out for unit in source.units] == [unit.held_out for unit in text.units]
    assert [unit.name for unit in source.units] == ["stdlib-chat train", "stdlib-chat val"]


def test_one_package_of_the_library_holds_out_its_last(prepared: Prepared) -> None:
    manifest = prepared("stdlib-chat:textwrap")
    assert manifest.is_chat and manifest.documents > 8
    assert manifest.tokens.val and manifest.tokens.train > manifest.tokens.val
