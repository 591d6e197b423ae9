"""The page as a whole: its head, what keeps it harmless, and the file it becomes.

The page's policy lets the browser run the one script and the one style sheet that stand in it,
and load nothing from anywhere.
"""

import base64
import hashlib
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from string import Template

from gptcli import atomic
from gptcli.errors import ConfigError
from gptcli.plotting.report.charts import numbers_of
from gptcli.plotting.report.markup import embedded, escaped
from gptcli.plotting.report.sections import body
from gptcli.runs import RunHistory

_ENDINGS = (".html", ".htm")


def require_page(file: Path) -> None:
    """Refuse a name that is not a page's.

    Raises:
        ConfigError: It is a folder, or ends otherwise than in .html.
    """
    if file.is_dir():
        raise ConfigError(f"{file} is a folder, not a file")
    if file.suffix.lower() not in _ENDINGS:
        raise ConfigError(f"{file}: a report is a page", "name it with the ending .html")


def write_report(run: RunHistory, file: Path, now: str) -> int:
    """Write the page of a run and return its bytes.

    Args:
        run: What the page tells.
        file: What becomes the page, whole or not at all.
        now: The time to name on it.

    Raises:
        ConfigError: `file` is not a page's name.
        StorageError: It cannot be written.
    """
    require_page(file)
    page = render(run, now).encode("utf-8")
    with atomic.create_errors(file):
        atomic.write_bytes(file, page)
    return len(page)


def render(run: RunHistory, now: str) -> str:
    """Return the page of a run."""
    style, script, numbers = _part("page.css"), _part("page.js"), numbers_of(run)
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}';"
        f" script-src '{_digest(script)}'; base-uri 'none'; form-action 'none'"
    )
    return Template(_part("page.html")).substitute(
        policy=policy,
        title=f"{escaped(run.name)} – gptcli",
        style=style,
        script=script,
        numbers=embedded(asdict(numbers)),
        body=body(run, numbers.charts, now),
    )


def _part(name: str) -> str:
    return resources.files("gptcli.plotting.report").joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
