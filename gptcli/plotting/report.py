"""A run as one HTML page: curves, settings, data, samples; page.js draws the charts."""

import shlex
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from gptcli.config.render import explicit_settings
from gptcli.formatting import duration, shares, size
from gptcli.plotting import page
from gptcli.plotting.curves import PANELS, Axis, Curve, Panel, loss_curves, panel_curve
from gptcli.runs import RunHistory
from gptcli.runs.compare import at_a_glance

_MAX_POINTS = 1500  # of a curve
_MAX_SAMPLES = 60
_STATES = ("finished", "running", "stopped", "failed", "died")

Item = TypeVar("Item")


def render(run: RunHistory, now: str) -> str:
    """Return the page of a run; `now` is named on it."""
    numbers = {"charts": _charts(run), "tokens": _scale(run, run.tokens_at),
               "seconds": _scale(run, run.seconds_at)}  # fmt: skip
    spent = run.status.seconds_by_work
    sources = tuple(dict.fromkeys(name for one in run.evaluations for name in one.sources))
    return page.fill(
        "report.html", "page.js", name=run.name, tiles=at_a_glance(run), now=now,
        folder=run.folder, numbers=numbers, run=run,
        kind=run.state if run.state in _STATES else "unknown",
        command=shlex.join(["gpt", *run.facts.command]) if run.facts.command else "",
        best=run.best, sources=sources,
        samples=_spread(run.samples, _MAX_SAMPLES)[::-1],
        spent=[(work, spent[work], duration(spent[work]), share)
               for work, share in shares(spent).items()],
        changed=explicit_settings(run.settings, run.facts.given),
        checkpoints=[(name, size(n_bytes)) for name, n_bytes in run.checkpoints.items()],
    )  # fmt: skip


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


def _spread(items: Sequence[Item], most: int) -> Sequence[Item]:
    """Return at most `most` items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
