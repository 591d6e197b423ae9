"""Rows to conversations: four forms that public data sets have, and which rows are not one.

Knows nothing of files, tokens or splits.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from gptcli.config.schema import DataFormat

if TYPE_CHECKING:
    from gptcli.tokenizers.chat import Role  # which imports numpy; to name a source needs none

Turns = list[tuple["Role", str]]
# The fields that each form of row has, and those that it may have.
FIELDS: dict[DataFormat, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
}
OPTIONAL = ("system", "input")
_ROLES: dict[object, "Role"] = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant",
}  # fmt: skip


class BadRow(NamedTuple):
    """Why a row is no conversation."""

    reason: str  # one of a few, to count by
    detail: str = ""


def format_of(fields: list[str]) -> DataFormat | None:
    """Return the form of a row with these fields, None if it is no conversation."""
    return next((name for name, needed in FIELDS.items() if set(needed) <= set(fields)), None)


def conversation_of(row: dict[str, Any], form: DataFormat) -> Turns | BadRow:
    """Return the turns of a row, white space around them removed, or why it is skipped.

    A system message comes first or not at all; an empty one is left out. A field `system` beside
    the messages is one.
    """
    said = list(_said(row, form))
    if row.get("system") is not None:
        said.insert(0, ("system", row["system"]))
    turns: Turns = []
    for index, (name, content) in enumerate(said):
        role = _ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            return BadRow("unknown role", repr(name)[:40])
        if not isinstance(content, str):
            return BadRow("not text", f"the content of turn {index + 1}")
        if role == "system" and index:
            return BadRow("second system message", f"turn {index + 1}")
        if content := content.strip():
            turns.append((role, content))
        elif role != "system":
            return BadRow("empty turn", f"turn {index + 1}")
    if not any(role == "assistant" for role, _ in turns):
        return BadRow("nothing to train on", "no turn is the assistant's")
    return turns


def _said(row: dict[str, Any], form: DataFormat) -> Iterator[tuple[object, object]]:
    """Yield (role, content) of a row, as they are."""
    match form:
        case "messages" | "conversations":
            names = ("role", "content") if form == "messages" else ("from", "value")
            turns = row[form] if isinstance(row[form], list) else []
            for turn in turns:
                values = turn if isinstance(turn, dict) else {}
                yield values.get(names[0]), values.get(names[1])
        case "prompt":
            yield "user", row["prompt"]
            yield "assistant", row["completion"]
        case _:
            prompt, given = row["instruction"], row.get("input")
            if isinstance(prompt, str) and isinstance(given, str) and given.strip():
                prompt = f"{prompt.strip()}\n\n{given}"
            yield "user", prompt
            yield "assistant", row["output"]
