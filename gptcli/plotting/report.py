"""A run as one HTML page that needs no other file: curves, settings, data, samples.

page.html is its skeleton, page.js draws the charts; its policy lets a browser run nothing else.
"""

import base64
import hashlib
import html
import json
import shlex
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any, TypeVar

from gptcli import __version__, atomic
from gptcli.config.render import explicit_settings, to_yaml
from gptcli.formatting import (
    count,
    duration,
    loss,
    perplexity,
    plural,
    printable,
    scored,
    shares,
    size,
)  # fmt: skip
from gptcli.plotting import require_ending
from gptcli.plotting.curves import PANELS, Axis, Curve, Panel, loss_curves, panel_curve
from gptcli.runs import RunHistory

FORMATS = (".html", ".htm"), "a page"
_MAX_POINTS = 1500  # of a curve
_MAX_SAMPLES, _SAMPLES_OPEN, _MAX_ROWS_OPEN = 60, 6, 15
_MOST_OF_IT = 0.9  # of the time, when it counts as accounted for

Item = TypeVar("Item")


class Html(str):
    """Text that is markup already, which is not escaped again."""


def write_report(run: RunHistory, file: Path, now: str) -> int:
    """Write the page of a run, whole or not at all, and return its bytes; `now` is named on it.

    Raises:
        ConfigError: `file` is not a page's name.
        StorageError: It cannot be written.
    """
    require_ending(file, *FORMATS)
    page = render(run, now).encode("utf-8")
    with atomic.create_errors(file):
        atomic.write_bytes(file, page)
    return len(page)


def render(run: RunHistory, now: str) -> str:
    """Return the page of a run."""
    folder = resources.files("gptcli.plotting")
    page, style, script = (
        folder.joinpath(name).read_text(encoding="utf-8")
        for name in ("page.html", "page.css", "page.js")
    )
    charts = _charts(run)
    numbers = {"charts": charts, "tokens": _scale(run, run.tokens_at),
               "seconds": _scale(run, run.seconds_at)}  # fmt: skip
    figures = "\n".join(
        f"<figure><figcaption><b>{escape(chart['title'])}</b></figcaption></figure>"
        for chart in charts
    )
    sections = (_evaluations, _samples, _time, _settings, _data, _environment, _checkpoints)
    known = run.state in ("finished", "running", "stopped", "failed", "died")
    return Template(page).substitute(
        style=style,
        style_digest=digest(style),
        script=script,
        script_digest=digest(script),
        numbers=embed(numbers),
        name=escape(run.name),
        state=escape(run.state),
        state_class=run.state if known else "unknown",
        facts=_facts(run),
        tiles=_tiles(run),
        figures=figures or '<p class="quiet">Nothing is logged yet.</p>',
        sections="\n".join(filter(None, (section(run) for section in sections))),
        version=escape(__version__),
        now=escape(now),
        folder=escape(run.folder),
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


def _charts(run: RunHistory) -> list[dict[str, Any]]:
    """Return what the script draws; nothing where nothing is logged yet."""
    losses = loss_curves(run, Axis.STEPS, _MAX_POINTS)
    best = run.best_point and (run.best_point[0], _rounded(run.best_point[1]))
    charts = [_chart(Panel.LOSS, losses.curves, *(losses.frame or (0.0, 1.0))) | {"best": best}]
    for panel in (panel for panel in PANELS if panel is not Panel.LOSS):
        curve = panel_curve(run, Axis.STEPS, panel, _MAX_POINTS)
        highest = _rounded(1.08 * max(curve.y, default=0.0)) or 1.0
        charts.append(_chart(panel, [curve] if curve.x else [], 0.0, highest))
    return [chart for chart in charts if chart["series"]]


def _chart(panel: Panel, curves: Iterable[Curve], low: float, high: float) -> dict[str, Any]:
    label, unit = PANELS[panel]
    series = [
        {"name": curve.name, "kind": curve.kind,
         "steps": [int(x) for x in curve.x], "values": [_rounded(y) for y in curve.y]}
        for curve in curves
    ]  # fmt: skip
    title = label[0].upper() + label[1:]
    return {"title": title, "unit": unit, "series": series, "low": low, "high": high}


def _scale(run: RunHistory, at: Callable[[int], float]) -> tuple[list[int], list[float]]:
    """Return steps and what has passed by then, close enough together to draw between them."""
    steps = sorted({0, *(row.step for row in run.steps), *(row.step for row in run.evaluations)})
    every = max(1, len(steps) // _MAX_POINTS)
    steps = sorted({*steps[::every], steps[-1]})
    return steps, [_rounded(at(step)) for step in steps]


def _rounded(number: float) -> float:
    return float(f"{number:.6g}")  # the digits that a drawing can show


def _facts(run: RunHistory) -> str:
    """Return the lines below the page's title."""
    lines: list[tuple[str, str]] = [("quiet", f"started {run.facts.created}")] * bool(
        run.facts.created
    )
    command = escape(shlex.join(["gpt", *run.facts.command]))
    lines += [("", Html(f"<code>{command}</code>"))] * bool(run.facts.command)
    lines += [("bad", run.status.error)] if run.status.error else []
    lines += [("bad", f"note: {problem}") for problem in run.problems]
    return "\n".join(f'<p class="{kind}">{escape(text)}</p>' for kind, text in lines)


def _tiles(run: RunHistory) -> str:
    """Return the figures of the run at a glance, those that are known."""
    last = run.steps[-1] if run.steps else None
    newest = run.evaluations[-1] if run.evaluations else None
    best, epoch = run.best, run.best_epoch
    part = scored(run.eval_tokens, run.facts.data.tokens.val)
    epochs = run.epochs_at(last.step) if last else None
    val_loss = newest.val_loss if newest and newest is not best else None
    train_loss = newest.train_loss if newest else last.loss if last else None
    tiles = [
        ("Steps", f"{run.step:,}", f"of {run.max_steps:,}" if run.max_steps else ""),
        ("Best validation loss", best and loss(best.val_loss),
         f"at step {best.step:,}{part}" if best else ""),
        ("Best perplexity", best and perplexity(best.val_loss), "per token"),
        ("Best epoch loss", epoch and loss(epoch.train_loss),
         f"at step {epoch.step:,}" if epoch else ""),
        ("Last validation loss", None if val_loss is None else loss(val_loss), ""),
        ("Last training loss", (newest or last) and loss(train_loss), "evaluated" * bool(newest)),
        ("Tokens", last and count(last.tokens),
         plural(epochs, "epoch") if epochs is not None else ""),
        ("Wall time", last and duration(run.seconds), ""),
        ("Tokens per second", last and count(last.tokens_per_second), "last logged"),
        ("Parameters", run.facts.parameters and count(run.facts.parameters), ""),
    ]  # fmt: skip
    return "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}"
        f"{f'<small>{escape(more)}</small>' if more else ''}</dd></div>"
        for name, value, more in tiles if value
    )  # fmt: skip


def _evaluations(run: RunHistory) -> str:
    best = run.best.step if run.best is not None else None
    rows = [
        (f"{one.step:,}", count(run.tokens_at(one.step)),
         loss(one.val_loss) + " ★" * (one.step == best), perplexity(one.val_loss),
         loss(one.train_loss))
        for one in reversed(run.evaluations)
    ]  # fmt: skip
    header = ("step", "tokens", "validation loss", "perplexity", "training loss")
    means = [(f"{one.epoch}", f"{one.step:,}", loss(one.train_loss))
             for one in reversed(run.epochs)]  # fmt: skip
    return _section(
        "Evaluations",
        _folded(_table(rows, header), len(rows), "evaluations"),
        _folded(_table(means, ("epoch", "step", "mean training loss")), len(means), "epochs"),
    )


def _samples(run: RunHistory) -> str:
    shown = _spread(run.samples, _MAX_SAMPLES)
    is_part = len(shown) < len(run.samples)
    texts: list[str] = []
    for sample in reversed(shown):
        prompt = f"<b>{escape(sample.prompt)}</b>" if sample.prompt else ""
        # A parser drops a line break right after <pre>: this one, and none of the text.
        text = f'<pre dir="auto">\n{prompt}{escape(sample.text)}</pre>'
        texts.append(_details(f"after step {sample.step:,}", text, is_open=not texts))
    earlier = texts[_SAMPLES_OPEN:]
    return _section(
        "Samples",
        f'<p class="quiet">{len(shown)} of {len(run.samples)}</p>' if is_part else "",
        *texts[:_SAMPLES_OPEN],
        _details(f"{len(earlier)} earlier", "\n".join(earlier)) if earlier else "",
    )


def _time(run: RunHistory) -> str:
    spent, wall = run.status.seconds_by_work, run.seconds
    total = sum(spent.values())
    if not total:
        return ""
    bar = ('<svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
           '<rect width="{:.2f}" height="10"></rect></svg>')  # fmt: skip
    rows = [
        (work, Html(bar.format(100 * spent[work] / total)), duration(spent[work]), share)
        for work, share in shares(spent).items()
    ]
    is_part = total < _MOST_OF_IT * wall  # a killed process records nothing
    note = f"{duration(total)} of {duration(wall)} are accounted for"
    return _section(
        "Where the time went",
        f'<p class="quiet">{note}</p>' if is_part else "",
        _table(rows, kind="bars"),
    )


def _settings(run: RunHistory) -> str:
    changed = explicit_settings(run.settings, run.facts.given)
    if not run.settings:
        return ""
    return _section(
        "Configuration",
        '<p class="quiet">What differs from the defaults</p>',
        _pairs(changed.items()),
        _details(f"all {len(run.settings)} settings", _pairs(run.settings.items())),
    )


def _data(run: RunHistory) -> str:
    data = run.facts.data
    counts = [
        (f"{name}, {split}", f"{number:,}")
        for name, pair in (("tokens", data.tokens), ("bytes of text", data.bytes))
        for split, number in (("training", pair.train), ("validation", pair.val))
        if number
    ]
    rows = [("source", data.source), ("revision", data.revision), ("folder", data.dir), *counts,
            ("fingerprint", data.fingerprint), ("tokenizer", run.settings.get("tokenizer.name")),
            ("sha256 of the tokenizer", data.tokenizer)]  # fmt: skip
    return _section("Data", _pairs(row for row in rows if row[1]))


def _environment(run: RunHistory) -> str:
    facts = run.facts
    settled = [(key, run.settings.get(key)) for key in ("device", "dtype", "compile")]
    origin = [(f"began from: {key}", value) for key, value in facts.origin.items()]
    rows = [("gptcli", facts.gptcli), ("torch", facts.torch), ("python", facts.python),
            ("platform", facts.platform), ("host", run.status.host), ("threads", facts.threads),
            *settled, *origin]  # fmt: skip
    return _section("Environment", _pairs(row for row in rows if row[1] not in (None, "")))


def _checkpoints(run: RunHistory) -> str:
    rows = [(name, size(n_bytes)) for name, n_bytes in run.checkpoints.items()]
    return _section("Checkpoints", _table(rows, ("file", "size")))


def _section(title: str, *parts: str) -> str:
    """Return a section; nothing where it has no content."""
    shown = [part for part in parts if part]
    return "\n".join([f"<h2>{title}</h2>", *shown]) if shown else ""


def _table(
    rows: Sequence[Iterable[object]], header: Iterable[str] = (), kind: str = "numbers"
) -> str:
    """Return a table; nothing where it has no rows."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    head = f"<thead><tr>{head}</tr></thead>" if head else ""
    body = "\n".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    table = f'<div class="wide"><table class="{kind}">{head}<tbody>\n{body}</tbody></table></div>'
    return table if rows else ""


def _pairs(pairs: Iterable[tuple[str, object]]) -> str:
    """Return a table of names and values."""
    rows = ((name, value if isinstance(value, str) and value else to_yaml(value))
            for name, value in pairs)  # fmt: skip
    return _table(list(rows), kind="facts")


def _details(summary: str, content: str, *, is_open: bool = False) -> str:
    attribute = " open" if is_open else ""
    return f"<details{attribute}><summary>{escape(summary)}</summary>\n{content}</details>"


def _folded(table: str, n_rows: int, what: str) -> str:
    """Return a table; a long one is shown on request."""
    return _details(f"{n_rows:,} {what}", table) if n_rows > _MAX_ROWS_OPEN else table


def _spread(items: Sequence[Item], most: int) -> Sequence[Item]:
    """Return at most `most` items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
