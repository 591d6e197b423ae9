"""The picture of a sweep: the validation loss of each trial against each key that was swept."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.plotting.figure import write_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Trials = Sequence[tuple[Mapping[str, Any], Sequence[float]]]


def draw_sweep(keys: Mapping[str, bool], trials: Trials, file: Path) -> None:
    """Write a picture with a panel for each key.

    Args:
        keys: The keys that were swept, and whether their axis is logarithmic.
        trials: Settings and the losses of their seeds, the best first.
        file: What to write; errors are those of `draw_figure`.
    """
    write_figure(partial(_figure, keys, trials), file)


def _figure(keys: Mapping[str, bool], trials: Trials) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(keys) + 0.8, 3.4), layout="constrained")
    row = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    means = [sum(losses) / len(losses) for _, losses in trials]
    for axes, (key, is_log) in zip(row, keys.items(), strict=True):
        places = [settings[key] for settings, _ in trials]
        if not all(type(place) in (int, float) for place in places):
            names = sorted(map(str, set(places)))
            axes.set_xticks(range(len(names)), names)
            places = [names.index(str(place)) for place in places]
        for place, (_, losses) in zip(places, trials, strict=True):
            axes.plot([place] * len(losses), losses, ".-", color="C0", alpha=0.4)
        axes.plot(places, means, "o", color="C0", label="mean of the seeds")
        axes.plot(places[0], means[0], "*", color="C1", markersize=13, label="best")
        axes.set_xlabel(key)
        axes.set_xscale("log" if is_log else "linear")
    row[0].set_ylabel("validation loss (nats per token)")
    row[0].legend(loc="upper right")
    return figure
