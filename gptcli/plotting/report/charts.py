"""The numbers that the page's script draws: series of steps and values, thinned.

Knows what is drawn, not how.
"""

from dataclasses import dataclass

from gptcli.plotting.curves import Axis, Curve, Panel, loss_curves, panel_curve
from gptcli.plotting.report.markup import rounded
from gptcli.runs import RunHistory

_MOST_POINTS = 1500
_PANELS = {
    Panel.LR: ("Learning rate", "rate"),
    Panel.GRAD_NORM: ("Gradient norm before clipping", "number"),
    Panel.TOKENS_PER_SECOND: ("Tokens per second", "count"),
    Panel.MEMORY: ("Memory", "bytes"),
}


@dataclass(frozen=True)
class Series:
    """A curve by steps; `kind` is its style: line, faint, dotted or marked."""

    name: str
    kind: str
    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Chart:
    """Curves on one scale; `unit` is loss, rate, number, count or bytes."""

    title: str
    unit: str
    series: list[Series]
    low: float
    high: float
    best: tuple[int, float] | None = None


@dataclass(frozen=True)
class Numbers:
    """What the script is given.

    Attributes:
        charts: In the order they are drawn.
        tokens: Steps, and the tokens seen by then.
        seconds: Steps, and the time passed by then.
    """

    charts: list[Chart]
    tokens: tuple[list[int], list[float]]
    seconds: tuple[list[int], list[float]]


def numbers_of(run: RunHistory) -> Numbers:
    """Return the charts of a run; none where nothing is logged yet."""
    losses = _losses(run)
    charts = [losses] if losses.series else []
    for panel, (title, unit) in _PANELS.items():
        curve = panel_curve(run, Axis.STEPS, panel, _MOST_POINTS)
        if curve.x:
            high = rounded(1.08 * max(curve.y)) or 1.0
            charts.append(Chart(title, unit, [_series(title, "line", curve)], 0.0, high))
    return Numbers(charts, _scale(run, Axis.TOKENS), _scale(run, Axis.HOURS))


def _losses(run: RunHistory) -> Chart:
    losses = loss_curves(run, Axis.STEPS, _MOST_POINTS)
    scored = [(row.step, row.train_loss) for row in run.evaluations if row.train_loss is not None]
    fixed = Curve(tuple(float(step) for step, _ in scored), tuple(loss for _, loss in scored))
    series = [
        _series("training", "faint" if losses.smoothed.x else "line", losses.train),
        _series("training, smoothed", "line", losses.smoothed),
        _series("training, evaluated", "dotted", fixed),
        _series("validation", "marked", losses.val),
        _series("training, epoch mean", "marked", losses.epochs),
    ]
    best = (run.best_point[0], rounded(run.best_point[1])) if run.best_point else None
    low, high = losses.frame or (0.0, 1.0)
    return Chart("Loss", "loss", [one for one in series if one.steps], low, high, best)


def _series(name: str, kind: str, curve: Curve) -> Series:
    return Series(name, kind, [int(x) for x in curve.x], [rounded(y) for y in curve.y])


def _scale(run: RunHistory, axis: Axis) -> tuple[list[int], list[float]]:
    """Return steps and what has passed by then, close enough together to draw between them."""
    steps = sorted({0, *(row.step for row in run.steps), *(row.step for row in run.evaluations)})
    every = max(1, len(steps) // _MOST_POINTS)
    steps = sorted({*steps[::every], steps[-1]})
    at = run.tokens_at if axis is Axis.TOKENS else run.seconds_at
    return steps, [rounded(at(step)) for step in steps]
