"""The curves of a run as numbers: the one source of the live display, `gpt plot` and `gpt report`.

Knows neither matplotlib nor HTML nor terminals.
"""

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import groupby
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from gptcli.runs import RunHistory

Item = TypeVar("Item")

_SMOOTHED_PART = 0.01  # of the logged steps, to either side
_MIN_NEIGHBORS, _MAX_NEIGHBORS = 3, 50
_MIN_TO_SMOOTH = 20
_START_PART = 0.03  # of a curve: its steep start, which may lie outside the frame


class Axis(StrEnum):
    """What curves are drawn against."""

    STEPS = "steps"
    TOKENS = "tokens"
    HOURS = "hours"


class Panel(StrEnum):
    """What is drawn, one above the other; the name is that in metrics.jsonl, but for memory."""

    LOSS = "loss"
    LR = "lr"
    TOKENS_PER_SECOND = "tokens_per_second"
    MEMORY = "memory"
    GRAD_NORM = "grad_norm"


# Of each panel its label, and the unit that its values are written in.
PANELS = {
    Panel.LOSS: ("loss (nats per token)", "loss"),
    Panel.LR: ("learning rate", "rate"),
    Panel.TOKENS_PER_SECOND: ("tokens/s", "count"),
    Panel.MEMORY: ("memory", "bytes"),
    Panel.GRAD_NORM: ("gradient norm", "count"),
}


@dataclass(frozen=True)
class Curve:
    """Points in the order they are joined; `kind` is how: line, faint, dotted, marked or
    source."""

    x: tuple[float, ...] = ()
    y: tuple[float, ...] = ()
    name: str = ""
    kind: str = "line"


@dataclass(frozen=True)
class LossCurves:
    """The losses of a run, nats per token.

    Attributes:
        curves: Those that have points, of training, of validation (of epochs without it), and of
            each source of a mixture.
        best: The point of the loss that chose best.pt.
        frame: The lowest and the highest loss to show: all of the curves, most of the single
            steps, and not the steep first part of a long run. None where there is no loss.
    """

    curves: tuple[Curve, ...]
    best: tuple[float, float] | None
    frame: tuple[float, float] | None

    def __getitem__(self, name: str) -> Curve:
        return next((curve for curve in self.curves if curve.name == name), Curve())


def loss_curves(run: "RunHistory", axis: Axis, most: int) -> LossCurves:
    """Return the losses of a run, `most` points of each at most."""
    at = _position(run, axis)
    train = _curve((at(row.step), row.loss) for row in run.steps)
    smooth = Curve()
    if len(train.x) >= _MIN_TO_SMOOTH:
        reach = min(max(round(len(train.x) * _SMOOTHED_PART), _MIN_NEIGHBORS), _MAX_NEIGHBORS)
        smooth = Curve(train.x, smoothed(train.y, reach))
    evaluated = _curve((at(row.step), row.train_loss) for row in run.evaluations)
    val = _curve((at(row.step), row.val_loss) for row in run.evaluations)
    names = dict.fromkeys(name for row in run.evaluations for name in row.sources)
    sources = {
        name: _curve((at(row.step), row.sources[name].loss)
                     for row in run.evaluations if name in row.sources)
        for name in names
    }  # fmt: skip
    epochs = Curve() if val.x else _curve((at(row.step), row.train_loss) for row in run.epochs)
    named = (
        ("training", "faint" if smooth.x else "line", train),
        ("training, smoothed", "line", smooth),
        ("training, evaluated", "dotted", evaluated),
        ("validation", "marked", val),
        ("epoch mean", "marked", epochs),
        *((name, "source", curve) for name, curve in sources.items()),
    )
    curves = (replace(thinned(curve, most), name=name, kind=kind)
              for name, kind, curve in named if curve.x)  # fmt: skip
    best = (at(run.best_point[0]), run.best_point[1]) if run.best_point else None
    frame = _frame(train, smooth if smooth.x else train, val, epochs, *sources.values())
    return LossCurves(tuple(curves), best, frame)


def panel_curve(run: "RunHistory", axis: Axis, panel: Panel, most: int) -> Curve:
    """Return what was measured at the logged steps; memory in bytes. Not for the loss."""
    at = _position(run, axis)
    name = "memory_bytes" if panel is Panel.MEMORY else panel.value
    return thinned(_curve((at(row.step), getattr(row, name)) for row in run.steps), most)


def smoothed(values: Sequence[float], reach: int) -> tuple[float, ...]:
    """Return the trend of values: the median of each one's neighborhood, then the mean of these.

    The median lets a single peak leave no trace. Neighborhoods begin small, because at the start
    of training the loss falls too steeply for wide ones.

    Args:
        values: Equally spaced.
        reach: Neighbors to take on either side, where there are as many.
    """
    medians = [statistics.median(near) for near in _neighborhoods(values, reach)]
    # Divided before they are added: losses that explode must not become infinite.
    return tuple(
        sum(value / len(near) for value in near) for near in _neighborhoods(medians, reach)
    )


def thinned(curve: Curve, most: int) -> Curve:
    """Return a curve of at most about `most` points that still shows every peak.

    The axis is cut into cells, and of each the lowest and the highest point are kept.
    """
    n = len(curve.x)
    if n <= most:
        return curve
    width = (curve.x[-1] - curve.x[0]) / (most // 2) or 1.0
    kept = {0, n - 1}
    for _, cell in groupby(range(n), lambda i: int((curve.x[i] - curve.x[0]) / width)):
        points = list(cell)
        kept |= {min(points, key=curve.y.__getitem__), max(points, key=curve.y.__getitem__)}
    return Curve(tuple(curve.x[i] for i in sorted(kept)), tuple(curve.y[i] for i in sorted(kept)))


def settled(values: Sequence[Item]) -> Sequence[Item]:
    """Return the values or points of a curve without its steep start."""
    return values[int(len(values) * _START_PART) :]


def _frame(raw: Curve, *curves: Curve) -> tuple[float, float] | None:
    shown = [value for curve in curves for value in settled(curve.y)]
    if not shown:
        return None
    low, high = min(shown), max(shown)
    span = high - low or 0.1
    top = min(max([high, *settled(raw.y)]), high + span / 5)
    bottom = max(min([low, *settled(raw.y)]), low - span / 5)
    return bottom - 0.04 * span, top + 0.04 * span


def _neighborhoods(values: Sequence[float], reach: int) -> Iterator[Sequence[float]]:
    for i in range(len(values)):
        width = min(reach, i // 3)
        yield values[i - width : i + width + 1]


def _position(run: "RunHistory", axis: Axis) -> Callable[[int], float]:
    """Return what maps a step to its place on the axis; time is in seconds."""
    match axis:
        case Axis.STEPS:
            return float
        case Axis.TOKENS:
            return run.tokens_at
        case Axis.HOURS:
            return run.seconds_at


def _curve(points: Iterable[tuple[float, float | None]]) -> Curve:
    known = [(x, y) for x, y in points if y is not None]
    return Curve(tuple(x for x, _ in known), tuple(y for _, y in known))
