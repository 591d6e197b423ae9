"""The curves of a run as numbers: what plots and reports draw.

Knows neither matplotlib nor HTML, and of a run only what its history says.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptcli.runs.record import RunHistory, Step

_SMOOTHED_PART = 0.01  # of the logged steps, to either side
_FEWEST_NEIGHBOURS, _MOST_NEIGHBOURS = 3, 50
_START_PART = 0.03  # of a curve, which need not be seen
_FEWEST_TO_SMOOTH = 20


class Axis(StrEnum):
    """What curves are drawn against."""

    STEPS = "steps"
    TOKENS = "tokens"
    HOURS = "hours"


class Panel(StrEnum):
    """What is drawn, one above the other."""

    LOSS = "loss"
    LR = "lr"
    TOKENS_PER_SECOND = "tokens_per_second"
    MEMORY = "memory"
    GRAD_NORM = "grad_norm"


@dataclass(frozen=True)
class Curve:
    """Points in the order they are joined."""

    x: tuple[float, ...] = ()
    y: tuple[float, ...] = ()


@dataclass(frozen=True)
class LossCurves:
    """The losses of a run, nats per token.

    Attributes:
        train: As logged, each over its own step's tokens.
        smoothed: Their course without noise and single peaks; empty where they are too few.
        val: Of the evaluations.
        epochs: Means of whole epochs, where nothing is validated.
        best: The point of the loss that chose best.pt.
        frame: The lowest and the highest loss to show: all of the curves, most of the single
            steps, and not the steep first part of a long run. None where there is no loss.
    """

    train: Curve
    smoothed: Curve
    val: Curve
    epochs: Curve
    best: tuple[float, float] | None
    frame: tuple[float, float] | None


def loss_curves(run: "RunHistory", axis: Axis, most: int) -> LossCurves:
    """Return the losses of a run, `most` points of each at most."""
    at = _position(run, axis)
    logged = [(row.step, row.loss) for row in run.steps if row.loss is not None]
    train = _curve([(at(step), loss) for step, loss in logged])
    smooth = Curve()
    if len(logged) >= _FEWEST_TO_SMOOTH:
        reach = round(len(logged) * _SMOOTHED_PART)
        reach = min(max(reach, _FEWEST_NEIGHBOURS), _MOST_NEIGHBOURS)
        smooth = Curve(train.x, smoothed(train.y, reach))
    val = [(at(row.step), row.val_loss) for row in run.evaluations if row.val_loss is not None]
    means = [] if val else run.epochs
    best = (at(run.best_point[0]), run.best_point[1]) if run.best_point else None
    curves = (train, smooth, _curve(val), _curve(
        [(at(row.step), row.train_loss) for row in means if row.train_loss is not None]
    ))  # fmt: skip
    frame = _frame(train.y, [smooth.y or train.y, *(curve.y for curve in curves[2:])])
    thin = [thinned(one, most) for one in curves]
    return LossCurves(thin[0], thin[1], thin[2], thin[3], best, frame)


def panel_curve(run: "RunHistory", axis: Axis, panel: Panel, most: int) -> Curve:
    """Return what was measured at the logged steps; memory in bytes. Not for the loss."""
    at = _position(run, axis)
    measured = [(at(row.step), _measured(row, panel)) for row in run.steps]
    return thinned(_curve([(x, y) for x, y in measured if y is not None]), most)


def smoothed(values: Sequence[float], reach: int) -> tuple[float, ...]:
    """Return the course of values: the median of each one's neighbourhood, then the mean of these.

    The median lets a single peak leave no trace. Neighbourhoods begin small, for at the start of
    training the loss falls too steeply for wide ones.

    Args:
        values: Equally spaced.
        reach: Neighbours to take on either side, where there are as many.
    """
    middles = [statistics.median(near) for near in _neighbourhoods(values, reach)]
    # Divided before they are added: losses that explode must not become infinite.
    return tuple(
        sum(value / len(near) for value in near) for near in _neighbourhoods(middles, reach)
    )


def thinned(curve: Curve, most: int) -> Curve:
    """Return a curve of at most about `most` points that still shows every peak.

    Neighbours share a cell, and of a cell the lowest and the highest point are kept.
    """
    n = len(curve.x)
    if n <= most:
        return curve
    size = math.ceil(2 * n / most)
    kept: list[int] = []
    for start in range(0, n, size):
        cell = range(start, min(start + size, n))
        kept += sorted({min(cell, key=curve.y.__getitem__), max(cell, key=curve.y.__getitem__)})
    kept = sorted({0, *kept, n - 1})
    return Curve(tuple(curve.x[i] for i in kept), tuple(curve.y[i] for i in kept))


def _frame(raw: Sequence[float], curves: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    shown = [value for curve in curves for value in _settled(curve)]
    if not shown:
        return None
    low, high = min(shown), max(shown)
    span = high - low or 0.1
    top = min(max([high, *_settled(raw)]), high + span / 5)
    bottom = max(min([low, *_settled(raw)]), low - span / 5)
    return bottom - 0.04 * span, top + 0.04 * span


def _settled(values: Sequence[float]) -> Sequence[float]:
    """Return a curve without its steep start."""
    return values[int(len(values) * _START_PART) :]


def _neighbourhoods(values: Sequence[float], reach: int) -> Iterator[Sequence[float]]:
    for place in range(len(values)):
        wide = min(reach, place // 3)
        yield values[place - wide : place + wide + 1]


def _position(run: "RunHistory", axis: Axis) -> Callable[[int], float]:
    """Return what says where a step lies on the axis; time is in seconds."""
    match axis:
        case Axis.STEPS:
            return float
        case Axis.TOKENS:
            return run.tokens_at
        case Axis.HOURS:
            return run.seconds_at


def _measured(row: "Step", panel: Panel) -> float | None:
    match panel:
        case Panel.LOSS:
            return row.loss
        case Panel.LR:
            return row.lr
        case Panel.TOKENS_PER_SECOND:
            return row.tokens_per_second
        case Panel.MEMORY:
            return row.memory_bytes
        case Panel.GRAD_NORM:
            return row.grad_norm


def _curve(points: Sequence[tuple[float, float]]) -> Curve:
    return Curve(tuple(x for x, _ in points), tuple(y for _, y in points))
