"""A page that needs no other file: page.html is its skeleton, page.css its style.

Its policy lets a browser run nothing but the script that is given.
"""

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from string import Template

from gptcli import __version__, atomic
from gptcli.config.render import to_yaml
from gptcli.formatting import printable
from gptcli.plotting import require_ending

FORMATS = (".html", ".htm"), "a page"
_MAX_ROWS_OPEN = 15


class Html(str):
    """Text that is markup already, which is not escaped again."""


def resource(name: str) -> str:
    """Return a file of this folder."""
    return resources.files("gptcli.plotting").joinpath(name).read_text(encoding="utf-8")


def write(file: Path, page: str) -> int:
    """Write a page, whole or not at all, and return its bytes.

    Raises:
        ConfigError: `file` is not a page's name.
        StorageError: It cannot be written.
    """
    require_ending(file, *FORMATS)
    content = page.encode("utf-8")
    with atomic.create_errors(file):
        atomic.write_bytes(file, content)
    return len(content)


def fill(
    name: str,
    *,
    state: str = "",
    facts: str,
    tiles: Iterable[tuple[str, object, str]],
    body: Iterable[str],
    script: str = "",
    numbers: object = None,
    now: str,
    folder: object,
) -> str:
    """Return a page.

    Args:
        name: Its title.
        state: Markup behind the title.
        facts: Markup below it.
        tiles: (name, value, remark) of figures at a glance, those that are known.
        body: Sections, of which empty ones are left out.
        script: What the page runs.
        numbers: What the script reads.
        now: When the page was written.
        folder: What it is about.
    """
    style = resource("page.css")
    scripts = (
        f'<script type="application/json" id="numbers">{embed(numbers)}</script>\n'
        f"<script>{script}</script>"
    )
    return Template(resource("page.html")).substitute(
        style=style,
        style_digest=digest(style),
        script_source=digest(script) if script else "none",
        scripts=scripts if script else "",
        name=escape(name),
        state=state,
        facts=facts,
        tiles="".join(
            f"<div><dt>{escape(title)}</dt><dd>{escape(value)}"
            f"{f'<small>{escape(more)}</small>' if more else ''}</dd></div>"
            for title, value, more in tiles
            if value
        ),
        body="\n".join(filter(None, body)),
        version=escape(__version__),
        now=escape(now),
        folder=escape(folder),
    )


def escape(value: object) -> str:
    """Return a value as text that HTML shows and never obeys; control characters are `\\ufffd`."""
    return value if isinstance(value, Html) else html.escape(printable(str(value), "\ufffd"))


def embed(value: object) -> str:
    """Return JSON that can stand inside a script element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def digest(text: str) -> str:
    """Return how a content security policy names a script or style that stands in its page."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def section(title: str, *parts: str) -> str:
    """Return a section; nothing where it has no content."""
    shown = [part for part in parts if part]
    return "\n".join([f"<h2>{title}</h2>", *shown]) if shown else ""


def table(
    rows: Sequence[Iterable[object]], header: Iterable[str] = (), kind: str = "numbers"
) -> str:
    """Return a table; nothing where it has no rows."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    head = f"<thead><tr>{head}</tr></thead>" if head else ""
    body = "\n".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    made = f'<div class="wide"><table class="{kind}">{head}<tbody>\n{body}</tbody></table></div>'
    return made if rows else ""


def pairs(pairs: Iterable[tuple[str, object]]) -> str:
    """Return a table of names and values."""
    rows = ((name, value if isinstance(value, str) and value else to_yaml(value))
            for name, value in pairs)  # fmt: skip
    return table(list(rows), kind="facts")


def bars(rows: Iterable[tuple[str, float, object, object]]) -> str:
    """Return a table of (name, number, two cells more) with a bar for each number."""
    rows = list(rows)
    most = max((number for _, number, _, _ in rows), default=0) or 1
    bar = ('<svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
           '<rect width="{:.2f}" height="10"></rect></svg>')  # fmt: skip
    drawn = [(name, Html(bar.format(100 * number / most)), *cells) for name, number, *cells in rows]
    return table(drawn, kind="bars")


def details(summary: str, content: str, *, is_open: bool = False) -> str:
    """Return what is shown once its summary is clicked."""
    attribute = " open" if is_open else ""
    return f"<details{attribute}><summary>{escape(summary)}</summary>\n{content}</details>"


def folded(content: str, n_rows: int, what: str) -> str:
    """Return a table; a long one is shown on request."""
    return details(f"{n_rows:,} {what}", content) if n_rows > _MAX_ROWS_OPEN else content
