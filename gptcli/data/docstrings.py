"""Questions and answers out of Python sources: what a name is for, and how it is called.

The sources are parsed, never run. Each public name with a docstring is asked about twice, in words
drawn by its name: the answers are the first paragraph of the docstring, and the signature.
"""

import ast
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from gptcli.data.messages import BadRow, Turns
from gptcli.seeding import derive_seed

_MAX_CHARS = 360  # of an answer: some 90 tokens of GPT-2's, so that a small model learns to end it
_MIN_WORDS = 3
_SYSTEM = "You answer questions about Python's standard library, briefly."
_SYSTEM_EVERY = 5  # conversations, one of which has the system message
_ABOUT = {
    "module": (
        "What is the module {name} for?", "What does the {name} module do?",
        "What is {name} in Python?", "Describe the module {name}.", "What can I do with {name}?",
        "Tell me about the Python module {name}.",
    ),
    "class": (
        "What is {name}?", "What is the class {name} for?", "What does {name} represent?",
        "Describe the class {name}.", "What is {short} in the module {module}?",
        "When do I use {name}?",
    ),
    "function": (
        "What does {name} do?", "What is {name} for?", "What does the function {name} do?",
        "Describe {name}.", "What does {short} do in the module {module}?",
        "Explain {name} in a few words.",
    ),
}  # fmt: skip
_SIGNATURE = (
    "How do I call {name}?", "What is the signature of {name}?", "What arguments does {name} take?",
    "How is {name} called?", "Which parameters does {name} have?",
    "Show me the signature of {name}.",
)  # fmt: skip
_THEN_SIGNATURE = (
    "How do I call it?", "And its signature?", "What arguments does it take?", "How is it called?",
)  # fmt: skip

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def module_name(path: Path) -> str | None:
    """Return the name a source is imported by, None for a private one or a script."""
    parts = [path.stem] if path.stem != "__init__" else []
    folder = path.parent
    while (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder = folder.parent
    public = all(part.isidentifier() and not part.startswith("_") for part in parts)
    return ".".join(parts) if parts and public else None


def conversations_of(source: str, module: str) -> Iterator[tuple[int, Turns | BadRow]]:
    """Yield (line, conversation) for each public documented name of a Python source."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes, which are the source's business
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        yield (
            getattr(error, "lineno", None) or 1,
            BadRow("not Python", getattr(error, "msg", str(error))),
        )
        return
    for node, name, kind in _names(tree, module):
        answer = _first_paragraph(ast.get_docstring(node) or "")
        for turns in _asked(node, name, module, kind, answer) if answer else ():
            yield getattr(node, "lineno", 1), turns


def _names(
    tree: Documented, name: str, kind: str = "module"
) -> Iterator[tuple[Documented, str, str]]:
    """Yield a node and the public ones in it, each with its full name and kind."""
    yield tree, name, kind
    if kind == "function":
        return
    for node in tree.body:
        if isinstance(node, Documented) and not node.name.startswith("_"):
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            yield from _names(node, f"{name}.{node.name}", kind)


def _asked(node: Documented, name: str, module: str, kind: str, answer: str) -> Iterator[Turns]:
    """Yield the conversations about one name: one about both, or one about each."""

    def draw(*key: str | int) -> int:
        return derive_seed("docstrings", name, *key)

    words = {"name": name, "module": module, "short": name.removeprefix(f"{module}.")}
    about = _ABOUT[kind]
    question = about[draw("about") % len(about)].format(**words)
    described: Turns = [("user", question), ("assistant", answer)]
    signature = _signature(node, words["short"])
    both = signature is not None and draw("both") % 3 == 0
    asks = _THEN_SIGNATURE if both else _SIGNATURE
    called: Turns = []
    if signature is not None:
        question = asks[draw("called") % len(asks)].format(**words)
        called = [("user", question), ("assistant", signature)]
    for index, turns in enumerate([described + called] if both else [described, called]):
        if turns:
            has_system = draw("system", index) % _SYSTEM_EVERY == 0
            yield [("system", _SYSTEM), *turns] if has_system else turns


def _first_paragraph(docstring: str) -> str | None:
    """Return the first paragraph on one line, as many whole sentences of it as are short."""
    text = " ".join(re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0].split())
    if len(text) > _MAX_CHARS:
        ends = [match.end(1) for match in re.finditer(r"([.!?])(?= [A-Z])", text[:_MAX_CHARS])]
        text = text[: ends[-1]] if ends else ""
    if (
        len(text.split()) < _MIN_WORDS
        or not text[0].isupper()
        or re.search(">>>|::|Internal", text)
    ):
        return None
    return text if text[-1] in ".!?" else text.rstrip(":,; ") + "."


def _signature(node: Documented, name: str) -> str | None:
    """Return how a function is called; None for anything else, and for a long signature."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return None
    if any("property" in ast.unparse(decorator) for decorator in node.decorator_list):
        return None
    arguments = ast.unparse(node.args)
    if "." in name:  # of a class: what it is bound to is not passed
        arguments = re.sub(r"^(self|cls)(, (/, )?|$)", "", arguments)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    text = f"{name}({arguments}){returns}"
    return text if len(text) <= _MAX_CHARS // 2 else None
