"""The page of `gpt serve` as one answer, which needs no other file and runs no other script."""

from functools import cache
from importlib import resources
from string import Template

from gptcli import __version__
from gptcli.plotting.page import digest

# In this order: each uses what is above it.
_SCRIPTS = ("client", "text", "view", "settings", "modes", "main")


@cache
def page() -> tuple[bytes, dict[str, str]]:
    """Return the page and its headers, which let it speak only to the server it came from."""
    folder = resources.files(__name__)
    names = ("index.html", "style.css", *(f"{name}.js" for name in _SCRIPTS))
    skeleton, style, *scripts = (folder.joinpath(name).read_text("utf-8") for name in names)
    script = "".join(scripts)
    policy = (
        f"default-src 'none'; connect-src 'self'; img-src data:; style-src '{digest(style)}'; "
        f"script-src '{digest(script)}'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'"
    )
    headers = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }
    body = Template(skeleton).substitute(style=style, script=script, version=__version__)
    return body.encode(), headers
