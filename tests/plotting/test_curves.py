"""Curves: smoothing that invents nothing, thinning that hides nothing."""

import pytest

from gptcli.plotting.curves import Axis, Curve, Panel, loss_curves, panel_curve, smoothed, thinned
from gptcli.runs import read_run
from support.runs import Logged, MakeRun


def test_smoothing_keeps_what_is_constant_and_what_is_straight() -> None:
    assert smoothed([3.0] * 50, 5) == pytest.approx([3.0] * 50)
    line = [float(i) for i in range(101)]
    assert smoothed(line, 4)[:90] == pytest.approx(line[:90])


def test_smoothing_takes_noise_away_and_single_peaks() -> None:
    noisy = [2.0 + 0.1 * (-1) ** i for i in range(200)]
    noisy[100] = 1e300
    assert smoothed(noisy, 10)[30:] == pytest.approx([2.0] * 170, abs=0.06)


def test_smoothing_follows_a_steep_start() -> None:
    steep = [10.0 * 0.9**i for i in range(500)]
    found = smoothed(steep, 5)
    assert found[0] == steep[0]
    assert all(abs(one - other) < 0.3 for one, other in zip(found, steep, strict=True))


def test_the_frame_holds_the_curves_and_not_every_peak(make_run: MakeRun, logged: Logged) -> None:
    losses = [3.0 + 8.0 * 0.8**step for step in range(1000)]
    losses[500] = 900.0
    lines = [logged(step, loss=loss) for step, loss in enumerate(losses, 1)]
    frame = loss_curves(read_run(make_run("long", lines)), Axis.STEPS, 100).frame
    assert frame is not None and 2.8 < frame[0] < 3.0 < frame[1] < 3.2
    short = loss_curves(read_run(make_run("short", lines[:10])), Axis.STEPS, 100).frame
    assert short is not None and short[0] < losses[9] < losses[0] < short[1]
    assert loss_curves(read_run(make_run("empty")), Axis.STEPS, 100).frame is None


def test_thinning_keeps_ends_and_peaks() -> None:
    y = [1.0] * 10_000
    y[0], y[1234], y[7777], y[-1] = 4.0, 99.0, -99.0, 6.0
    thin = thinned(Curve(tuple(map(float, range(10_000))), tuple(y)), 100)
    assert len(thin.x) <= 102 and list(thin.x) == sorted(thin.x)
    points = dict(zip(thin.x, thin.y, strict=True))
    assert points[0] == 4.0 and points[1234] == 99.0 and points[7777] == -99.0
    assert points[9999] == 6.0


def test_a_short_curve_is_drawn_as_it_is() -> None:
    curve = Curve((1.0, 2.0), (3.0, 4.0))
    assert thinned(curve, 10) is curve


def test_losses_lie_where_their_steps_are(make_run: MakeRun, logged: Logged) -> None:
    lines = [logged(step) for step in range(1, 31)]
    lines[9:9] = [{"step": 10, "val_loss": 2.5, "train_loss": 2.0}]
    lines += [{"step": 30, "val_loss": 3.5, "train_loss": 1.0}]
    run = read_run(make_run("a", lines))
    val = loss_curves(run, Axis.STEPS, 100)["validation"]
    assert (val.x, val.y) == ((10.0, 30.0), (2.5, 3.5))
    assert loss_curves(run, Axis.STEPS, 100).best == (10.0, 2.5)
    assert loss_curves(run, Axis.TOKENS, 100)["validation"].x == (640.0, 1920.0)
    assert loss_curves(run, Axis.HOURS, 100)["validation"].x == (20.0, 60.0)
    assert len(loss_curves(run, Axis.STEPS, 100)["training, smoothed"].x) == 30


def test_a_few_steps_are_not_smoothed(make_run: MakeRun, logged: Logged) -> None:
    run = read_run(make_run("a", [logged(1), logged(2)]))
    losses = loss_curves(run, Axis.STEPS, 100)
    assert (
        losses["training, smoothed"] == Curve()
        and losses["training"].y == (4.9, 4.8)
        and losses.best is None
    )


def test_what_was_not_finite_is_not_drawn(make_run: MakeRun, logged: Logged) -> None:
    lines = [logged(1), logged(2, loss=None, grad_norm=None, skipped=True), logged(3)]
    run = read_run(make_run("a", lines))
    assert loss_curves(run, Axis.STEPS, 100)["training"].x == (1.0, 3.0)
    assert panel_curve(run, Axis.STEPS, Panel.GRAD_NORM, 100).x == (1.0, 3.0)
    assert panel_curve(run, Axis.STEPS, Panel.MEMORY, 100).y == (1e6, 1e6, 1e6)
