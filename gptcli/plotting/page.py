"""Pages that need no other file: page.html is their skeleton, page.css their style.

Jinja escapes what it is given; the policy lets a browser run nothing but the page's script.
"""

import base64
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from gptcli import __version__, atomic
from gptcli.config.render import to_yaml
from gptcli.formatting import count, decimal, duration, loss, perplexity, plural, printable
from gptcli.plotting import require_ending

FORMATS = (".html", ".htm"), "a page"
_HERE = Path(__file__).parent


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


def fill(template: str, script: str = "", **facts: Any) -> str:
    """Return a page.

    Args:
        template: Its file here.
        script: The file here of what it runs.
        facts: What the template names. Every page has `name`, its title; `tiles`, (name, value,
            remark) of figures at a glance, where one without a value is left out; `now`, when it
            was written; `folder`, what it is about; `numbers`, what the script reads.
    """
    style, code = (_read(file) if file else "" for file in ("page.css", script))
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, finalize=_harmless,
    )  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters |= {
        "commas": "{:,}".format, "count": count, "decimal": decimal, "digest": digest,
        "duration": duration, "known": _known, "loss": loss, "perplexity": perplexity,
        "plural": plural, "yaml": to_yaml,
    }  # fmt: skip
    page = environment.get_template(template)
    return page.render(style=style, script=code, version=__version__, **facts)


def _harmless(value: object) -> object:
    """Return a value whose control characters are `\\ufffd`; markup and scripts are ours."""
    return value if isinstance(value, Markup) else printable(str(value), "\ufffd")


def _known(rows: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Return names and values without those that are not known; counts with their commas."""
    return [(name, f"{value:,}" if type(value) is int else value)
            for name, value in rows if value or value is False]  # fmt: skip


def digest(text: str) -> str:
    """Return how a content security policy names a script or style that stands in its page."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")
