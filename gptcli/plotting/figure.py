"""Figures of runs and sweeps, drawn by matplotlib into a PNG, SVG or PDF file.

Works without a screen and leaves matplotlib's own state as it was.
"""

import importlib.util
import io
import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gptcli import atomic
from gptcli.formatting import count, loss, size
from gptcli.plotting import require_ending
from gptcli.plotting.curves import PANELS, Axis, Curve, Panel, loss_curves, panel_curve
from gptcli.runs import RunHistory, read_run
from gptcli.runs.compare import names_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Trials = Sequence[tuple[Mapping[str, Any], Sequence[float]]]

FORMATS = (".png", ".svg", ".pdf"), "a picture format"
_MAX_POINTS, _MAX_DOTS = 3000, 40
_MAX_NAME = 40
_DASHED = (0, (4, 1.5))
_STYLES: dict[str, dict[str, Any]] = {
    "line": {}, "faint": {"linewidth": 0.7, "alpha": 0.25}, "marked": {"marker": "o"},
    "source": {"marker": "s", "linewidth": 0.9},
}  # fmt: skip
# Without a date, the same runs give the same bytes.
_UNDATED: dict[str, dict[str, None]] = {
    "png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}
}  # fmt: skip


def draw_figure(
    runs: Sequence[RunHistory],
    file: Path,
    axis: Axis = Axis.STEPS,
    panels: Sequence[Panel] = (Panel.LOSS, Panel.LR),
) -> None:
    """Write a picture of one run, or of several over one another.

    Raises:
        ConfigError: The file's ending names no picture format.
        StorageError: The file cannot be written.
        ModuleNotFoundError: There is no matplotlib.
    """
    _write(lambda: _figure(runs, axis, panels), file)


def draw_sweep(keys: Mapping[str, bool], trials: Trials, file: Path) -> None:
    """Write a picture with a panel for each key.

    Args:
        keys: The keys that were swept, and whether their axis is logarithmic.
        trials: Settings and the losses of their seeds, the best first.
        file: What to write; errors are those of `draw_figure`.
    """
    _write(lambda: _sweep(keys, trials), file)


def _write(draw: "Callable[[], Figure]", file: Path) -> None:
    """Write what `draw` returns, in our style."""
    kind = require_ending(file, *FORMATS).removeprefix(".")
    import matplotlib

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it reports caches and fonts
    data = io.BytesIO()
    style = Path(__file__).with_name("figure.mplstyle")
    with matplotlib.rc_context(fname=style), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name may have letters that the font lacks
        draw().savefig(data, format=kind, dpi=160, metadata=_UNDATED[kind])
    with atomic.create_errors(file):
        atomic.write_bytes(file, data.getvalue())


def leave_picture(folder: Path) -> str | None:
    """Write loss.pdf into a run folder if matplotlib is installed; return why it failed."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    try:
        draw_figure([read_run(folder)], folder / "loss.pdf")
    except Exception as error:  # a picture is no reason to lose a run's summary
        return f"loss.pdf could not be drawn: {error}"
    return None


def _figure(runs: Sequence[RunHistory], axis: Axis, panels: Sequence[Panel]) -> "Figure":
    from matplotlib.figure import Figure

    heights = [3.2 if panel is Panel.LOSS else 1.3 for panel in panels]
    figure = Figure(figsize=(8, sum(heights) + 0.9), layout="constrained")
    grid = figure.subplots(
        len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    names = [_plain(name) for name in names_of(runs)]
    time_unit, seconds = _time_unit(runs) if axis is Axis.HOURS else ("", 1.0)
    for axes, panel in zip(grid[:, 0], panels, strict=True):
        label, unit = PANELS[panel]
        axes.set_ylabel(label)
        if panel is Panel.LOSS:
            _draw_losses(axes, runs, names, axis, seconds)
            continue
        for number, (run, name) in enumerate(zip(runs, names, strict=True)):
            curve = panel_curve(run, axis, panel, _MAX_POINTS)
            axes.plot(*_scaled(curve, seconds), color=f"C{number}", linewidth=1.1, label=name)
        highest = axes.dataLim.ymax
        axes.set_ylim(0, 1.08 * highest if 0 < highest < math.inf else 1)
        axes.yaxis.set_major_formatter(_formatter(unit))
    if Panel.LOSS not in panels and len(runs) > 1:
        _add_legend(grid[0, 0])
    figure.align_ylabels()
    lowest = grid[-1, 0]
    lowest.set_xlabel(f"wall time ({time_unit})" if time_unit else f"{axis}")
    if not time_unit:
        lowest.xaxis.set_major_formatter(_formatter("count"))
    if len(runs) == 1:
        figure.suptitle(names[0], fontsize=11, parse_math=False)
    return figure


def _draw_losses(
    axes: "Axes", runs: Sequence[RunHistory], names: list[str], axis: Axis, seconds: float
) -> None:
    """Draw training and validation losses; of one run in two colors, of more in one each."""
    is_one, n_sources = len(runs) == 1, 0
    frames: list[tuple[float, float]] = []
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        losses = loss_curves(run, axis, _MAX_POINTS)
        step, lowest = run.best_point or (0, 0.0)
        best = f"best {loss(lowest)} at step {step:,}" if run.best_point else ""
        color, val_color = ("C0", "C1") if is_one else (f"C{number}", f"C{number}")
        if not is_one:
            axes.plot([], [], color=color, label=f"{name}  {best}".rstrip())
        for curve in (curve for curve in losses.curves if curve.kind in _STYLES):
            is_val = curve.kind == "marked"
            if curve.kind == "source":
                if not is_one:  # one run's alone are told apart
                    continue
                n_sources += 1
                color = f"C{1 + n_sources}"
            axes.plot(
                *_scaled(curve, seconds),
                color=val_color if is_val else color,
                linestyle=_DASHED if is_val and not is_one else "-",
                label=curve.name if is_one and curve.kind != "faint" else None,
                markersize=3.0 if len(curve.x) <= _MAX_DOTS else 0.0,
                **_STYLES[curve.kind],
            )
        if losses.best is not None:
            x, y = losses.best
            axes.plot(x / seconds, y, marker="*", markersize=11, zorder=5, linestyle="none",
                      color=val_color, markeredgecolor="white",
                      label=best if is_one else None)  # fmt: skip
        frames += [losses.frame] if losses.frame else []
    if not is_one:
        kinds = ["validation"] * any(run.best for run in runs)
        kinds += ["epoch mean"] * any(run.best_epoch for run in runs)
        axes.plot([], [], color="#666666", label="training")
        axes.plot([], [], color="#666666", linestyle=_DASHED, marker="o", markersize=3,
                  label=" or ".join(kinds) or "validation")  # fmt: skip
    _add_legend(axes, "best" if n_sources else "upper right")
    if frames:
        axes.set_ylim(min(low for low, _ in frames), max(high for _, high in frames))


def _add_legend(axes: "Axes", place: Literal["best", "upper right"] = "upper right") -> None:
    n_columns = 1 + (len(axes.get_legend_handles_labels()[0]) > 8)
    for text in axes.legend(loc=place, ncols=n_columns).get_texts():
        text.set_parse_math(False)


def _formatter(unit: str) -> Callable[[float, object], str]:
    write: Callable[[float], str] = {"count": count, "bytes": size}.get(unit, "{:g}".format)
    return lambda value, _place: write(value)


def _plain(text: str) -> str:
    """Return `text` in one line that can be drawn; a legend would skip one that begins with _."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in text)
    shown = shown if len(shown) <= _MAX_NAME else f"{shown[: _MAX_NAME - 1]}…"
    return f" {shown}" if shown.startswith("_") else shown


def _time_unit(runs: Sequence[RunHistory]) -> tuple[str, float]:
    """Return the unit that fits the longest run, and its seconds."""
    longest = max((row.seconds for run in runs for row in run.steps[-1:]), default=0.0)
    if longest < 120:
        return "seconds", 1.0
    return ("minutes", 60.0) if longest < 7200 else ("hours", 3600.0)


def _scaled(curve: Curve, seconds: float) -> tuple[list[float], tuple[float, ...]]:
    return [x / seconds for x in curve.x], curve.y


def _sweep(keys: Mapping[str, bool], trials: Trials) -> "Figure":
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
