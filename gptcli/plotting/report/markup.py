"""Text and numbers for a page: escaped, readable, harmless whatever a run contains.

Knows nothing of runs.
"""

import html
import json
import re
from collections.abc import Iterable

# C0 without newline and tab, DEL, C1, and the marks that reorder text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_DIGITS = 6  # of a number that is drawn


def escaped(value: object) -> str:
    """Return a value as text that HTML shows and never obeys; control characters are `\\ufffd`."""
    text = _CONTROL.sub("\ufffd", str(value)).encode("utf-8", "replace").decode()
    return html.escape(text)


def embedded(value: object) -> str:
    """Return JSON that may stand inside a script element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def rounded(number: float) -> float:
    """Return a number with the digits that a drawing can show."""
    return float(f"{number:.{_DIGITS}g}")


def table(header: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "numbers") -> str:
    """Return a table; the cells are HTML already."""
    head = "".join(f"<th>{escaped(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>\n" for row in rows)
    head = f"<thead><tr>{head}</tr></thead>" if head else ""
    return f'<div class="wide"><table class="{kind}">{head}<tbody>\n{body}</tbody></table></div>\n'


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """Return a table of names and values, those without a value left out."""
    rows = [
        (escaped(name), f"<code>{escaped(value)}</code>") for name, value in pairs if value != ""
    ]
    return table((), rows, "facts")
