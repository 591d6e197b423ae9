"""Text and numbers for a page: escaped, readable, harmless whatever a run contains.

Knows nothing of runs.
"""

import html
import json
import math
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


def loss(value: float | None) -> str:
    """Return a loss, or a dash where there is none."""
    return "–" if value is None else f"{value:.4f}"


def perplexity(value: float | None) -> str:
    """Return the perplexity of a loss in nats."""
    if value is None:
        return "–"
    return f"{math.exp(value):,.2f}" if value < 20 else f"{math.exp(min(value, 700)):.1e}"


def count(number: float | None) -> str:
    """Return a count in the unit a person would choose."""
    if number is None:
        return "–"
    for unit in ("", "k", "M", "B"):
        if abs(number) < (10_000 if not unit else 1000):
            return f"{number:,.0f}" if not unit else f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:,.3g}T"


def size(n_bytes: float) -> str:
    """Return bytes in the unit a person would choose."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "bytes" else f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.3g} TB"


def duration(seconds: float) -> str:
    """Return seconds in the unit a person would choose."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:,.3g} h"


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
