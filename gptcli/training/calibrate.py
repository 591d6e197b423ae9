"""How long a run's steps take on this machine, and how many of them fit in its time budget."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

from gptcli.device import synchronize
from gptcli.training.events import Clock
from gptcli.training.setup import Session
from gptcli.training.spec import RunSpec, compiling_pays
from gptcli.training.step import Stepper

_SHARE, _MOST_SECONDS = 0.08, 4.0  # of the budget that is spent on timing steps
_LEAST_STEPS, _SLOW_STEPS = 8, 3  # the first do not count: what is first used is slow once
_SUSTAINED = 1.03  # what a step takes later, of what the first ones took, as measured
_PATIENCE = 4  # times as long as planned, after which even a single step is not waited for


def seconds_per_step(
    stepper: Stepper, seconds: float, stopped: Callable[[], bool] = lambda: False
) -> float | None:
    """Time real steps for about so many seconds, and leave the session as it was.

    A collective call, which returns the same on every rank. Of steps that take far longer, some
    micro-batches are timed.

    Args:
        stepper: Of a session at step 0.
        seconds: How long to do so.
        stopped: Asked between micro-batches.

    Returns:
        The seconds of a step; None if a stop came.
    """
    s, times, began = stepper.s, list[float](), time.perf_counter()
    n_batches, is_late = 0, False

    def is_enough() -> bool:
        nonlocal n_batches, is_late
        spent = time.perf_counter() - began
        # Every rank says the same, for all stop at the same micro-batch.
        is_late = bool(s.world.all_reduce_max(n_batches > 0 and spent > _PATIENCE * seconds))
        n_batches += not is_late
        return is_late or stopped()

    with stepper.rehearsal():
        is_done = False
        while not is_done:
            at, n_batches = time.perf_counter(), 0
            is_whole = stepper.step(is_enough) is not None
            synchronize(s.compute.device)
            spent = time.perf_counter() - at
            if not is_whole and not is_late:
                return None
            times.append(spent if is_whole else spent / n_batches * s.spec.grad_accum_steps)
            s.state.step += 1
            limit = seconds * (1 if len(times) >= _LEAST_STEPS else _PATIENCE)
            spent = time.perf_counter() - began
            is_over = len(times) == s.spec.max_steps
            is_done = is_late or is_over or bool(s.world.all_reduce_max(spent > limit))
    [total] = s.world.all_reduce_sum(statistics.median(times[_SLOW_STEPS:] or times[-1:]))
    return total / s.world.size


def steps_within(spec: RunSpec, seconds: float, step_seconds: float) -> int:
    """Return how many steps fit in a time, with their evaluations, checkpoints and samples."""
    from gptcli.training.advice import estimate_work, step_cost  # which only some runs need

    def taken(n_steps: int) -> float:
        costs = sum(work.cost for work in estimate_work(replace(spec, max_steps=n_steps)).values())
        return costs / step_cost(spec.config) * step_seconds * _SUSTAINED

    least, most = 1, max(1, min(spec.max_steps, int(seconds / step_seconds)))
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if taken(middle) <= seconds else (least, middle - 1)
    return least


def ready_stepper(session: Session, clock: Clock, stopped: Callable[[], bool]) -> Stepper:
    """Return what does the steps of a run, after its time budget has settled how many they are.

    Steps are timed as they will be done. Where nothing says so, whether the model is compiled is
    decided by a first, uncompiled timing. A stop leaves the run unsettled.
    """
    spec, began = session.spec, clock.seconds
    stepper = Stepper(session)
    clock.add("compiling", stepper.compile_seconds)
    if spec.budget is None:
        session.state.minutes = spec.config.train.max_minutes
        return stepper
    budget, known = 60 * spec.budget, stepper.compile_seconds
    trial = min(_MOST_SECONDS, _SHARE * budget)

    def fitting() -> int | None:
        seconds = seconds_per_step(stepper, trial, stopped)
        left = budget - clock.seconds
        n_steps = None if seconds is None else steps_within(session.spec, left, seconds)
        agreed: int | None = session.world.broadcast_object(lambda: n_steps)
        return agreed

    n_steps = fitting()
    if n_steps and spec.config.compile == "auto":
        session.spec = spec.with_compile(compiling_pays(spec.config, n_steps))
        if session.config.compile:
            session.compute = replace(session.compute, compile=True)
            stepper.feed.close()
            stepper = Stepper(session)
            clock.add("compiling", stepper.compile_seconds)
            known += stepper.compile_seconds
            n_steps = fitting()
    if n_steps:
        session.state.minutes = spec.budget
        session.spec = session.spec.lasting(n_steps)
        session.notes.append(f"{n_steps:,} steps fit in train.max_minutes = {spec.budget:g} here")
    clock.add("measuring", clock.seconds - began - known)
    return stepper
