"""A run as one HTML page: curves, settings, data, samples; page.js draws the charts."""

import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from string import Template
from typing import Any, TypeVar

from gptcli.config.render import explicit_settings
from gptcli.formatting import count, duration, loss, perplexity, plural, scored, shares, size
from gptcli.plotting import page
from gptcli.plotting.curves import PANELS, Axis, Curve, Panel, loss_curves, panel_curve
from gptcli.plotting.page import Html, details, escape, folded, pairs, section, table
from gptcli.runs import RunHistory

_MAX_POINTS = 1500  # of a curve
_MAX_SAMPLES, _SAMPLES_OPEN = 60, 6
_MOST_OF_IT = 0.9  # of the time, when it counts as accounted for

Item = TypeVar("Item")


def write_report(run: RunHistory, file: Path, now: str) -> int:
    """Write the page of a run as `page.write` does, and return its bytes; `now` is named on it."""
    return page.write(file, render(run, now))


def render(run: RunHistory, now: str) -> str:
    """Return the page of a run."""
    charts = _charts(run)
    numbers = {"charts": charts, "tokens": _scale(run, run.tokens_at),
               "seconds": _scale(run, run.seconds_at)}  # fmt: skip
    figures = "\n".join(
        f"<figure><figcaption><b>{escape(chart['title'])}</b></figcaption></figure>"
        for chart in charts
    )
    figures = figures or '<p class="quiet">Nothing is logged yet.</p>'
    curves = Template(page.resource("curves.html")).substitute(figures=figures)
    parts = (_evaluations, _samples, _time, _settings, _data, _environment, _checkpoints)
    known = run.state in ("finished", "running", "stopped", "failed", "died")
    kind = run.state if known else "unknown"
    return page.fill(
        run.name,
        state=f'<span class="state {kind}">{escape(run.state)}</span>',
        facts=_facts(run),
        tiles=_tiles(run),
        body=[curves, *(part(run) for part in parts)],
        script=page.resource("page.js"),
        numbers=numbers,
        now=now,
        folder=run.folder,
    )


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
        {"name": curve.name, "kind": curve.kind + f" s{number % 4}" * (curve.kind == "source"),
         "steps": [int(x) for x in curve.x], "values": [_rounded(y) for y in curve.y]}
        for number, curve in enumerate(curves)
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


def _tiles(run: RunHistory) -> list[tuple[str, object, str]]:
    """Return the figures of the run at a glance, those that are known."""
    last = run.steps[-1] if run.steps else None
    newest = run.evaluations[-1] if run.evaluations else None
    best, epoch = run.best, run.best_epoch
    part = scored(run.eval_tokens, run.facts.data.tokens.val)
    epochs = run.epochs_at(last.step) if last else None
    val_loss = newest.val_loss if newest and newest is not best else None
    train_loss = newest.train_loss if newest else last.loss if last else None
    return [
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


def _evaluations(run: RunHistory) -> str:
    sources = list(dict.fromkeys(name for one in run.evaluations for name in one.sources))
    best = run.best.step if run.best is not None else None
    rows = [
        (f"{one.step:,}", count(run.tokens_at(one.step)),
         loss(one.val_loss) + " ★" * (one.step == best), perplexity(one.val_loss),
         loss(one.train_loss),
         *(loss(one.sources[name].loss) if name in one.sources else "" for name in sources))
        for one in reversed(run.evaluations)
    ]  # fmt: skip
    header = ("step", "tokens", "validation loss", "perplexity", "training loss", *sources)
    means = [(f"{one.epoch}", f"{one.step:,}", loss(one.train_loss))
             for one in reversed(run.epochs)]  # fmt: skip
    return section(
        "Evaluations",
        folded(table(rows, header), len(rows), "evaluations"),
        folded(table(means, ("epoch", "step", "mean training loss")), len(means), "epochs"),
    )


def _samples(run: RunHistory) -> str:
    shown = _spread(run.samples, _MAX_SAMPLES)
    is_part = len(shown) < len(run.samples)
    texts: list[str] = []
    for sample in reversed(shown):
        prompt = f"<b>{escape(sample.prompt)}</b>" if sample.prompt else ""
        # A parser drops a line break right after <pre>: this one, and none of the text.
        text = f'<pre dir="auto">\n{prompt}{escape(sample.text)}</pre>'
        texts.append(details(f"after step {sample.step:,}", text, is_open=not texts))
    earlier = texts[_SAMPLES_OPEN:]
    return section(
        "Samples",
        f'<p class="quiet">{len(shown)} of {len(run.samples)}</p>' if is_part else "",
        *texts[:_SAMPLES_OPEN],
        details(f"{len(earlier)} earlier", "\n".join(earlier)) if earlier else "",
    )


def _time(run: RunHistory) -> str:
    spent, wall = run.status.seconds_by_work, run.seconds
    total = sum(spent.values())
    if not total:
        return ""
    rows = [(work, spent[work], duration(spent[work]), share)
            for work, share in shares(spent).items()]  # fmt: skip
    is_part = total < _MOST_OF_IT * wall  # a killed process records nothing
    note = f"{duration(total)} of {duration(wall)} are accounted for"
    return section(
        "Where the time went",
        f'<p class="quiet">{note}</p>' if is_part else "",
        page.bars(rows),
    )


def _settings(run: RunHistory) -> str:
    changed = explicit_settings(run.settings, run.facts.given)
    if not run.settings:
        return ""
    return section(
        "Configuration",
        '<p class="quiet">What differs from the defaults</p>',
        pairs(changed.items()),
        details(f"all {len(run.settings)} settings", pairs(run.settings.items())),
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
    return section("Data", pairs(row for row in rows if row[1]))


def _environment(run: RunHistory) -> str:
    facts = run.facts
    settled = [(key, run.settings.get(key)) for key in ("device", "dtype", "compile")]
    origin = [(f"began from: {key}", value) for key, value in facts.origin.items()]
    rows = [("gptcli", facts.gptcli), ("torch", facts.torch), ("python", facts.python),
            ("platform", facts.platform), ("host", run.status.host), ("threads", facts.threads),
            *settled, *origin]  # fmt: skip
    return section("Environment", pairs(row for row in rows if row[1] not in (None, "")))


def _checkpoints(run: RunHistory) -> str:
    rows = [(name, size(n_bytes)) for name, n_bytes in run.checkpoints.items()]
    return section("Checkpoints", table(rows, ("file", "size")))


def _spread(items: Sequence[Item], most: int) -> Sequence[Item]:
    """Return at most `most` items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
