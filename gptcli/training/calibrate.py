"""How long a run's steps take on this machine, and what follows: threads, and a time budget.

What is settled is stored with the run, for the bits depend on it.
"""

import math
import statistics
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace

import torch

from gptcli.config.windows import changes
from gptcli.data.loader import make_loader
from gptcli.device import synchronize
from gptcli.formatting import plural
from gptcli.training.events import Clock
from gptcli.training.setup import Session
from gptcli.training.spec import RunSpec
from gptcli.training.step import Stepper

_SHARE, _MOST_SECONDS = 0.08, 4.0  # of the budget that is spent on timing steps
_SHORT_TRIAL, _THREAD_LAPS = 0.2, 3  # seconds for each number of threads, and how often
_SHORT_STEP = 0.1  # seconds of a step up to which other numbers of threads are tried
_MARGIN, _HOPELESS = 1.05, 1.5  # factor to win by, and of the best beyond which none is timed again
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

    most = min(spec.max_steps, int(seconds / step_seconds))
    return max(1, bisect_right(range(1, most + 1), seconds, key=taken))


def ready_stepper(session: Session, clock: Clock, stopped: Callable[[], bool]) -> Stepper:
    """Return what does the steps of a run, after what its steps' time decides is settled.

    That is its threads, where they are `auto`, and the number of steps of a time budget. Steps are
    timed as they will be done. A stop leaves the run unsettled.
    """
    began, stepper = clock.seconds, Stepper(session)
    compiling = stepper.compile_seconds
    clock.add("compiling", compiling)
    state, spec, seconds = session.state, session.spec, None
    budget = None if spec.budget is None else 60 * spec.budget
    if budget is not None or spec.config.threads == "auto":
        trial = _SHORT_TRIAL if budget is None else min(_MOST_SECONDS, _SHARE * budget)
        seconds = seconds_per_step(stepper, trial, stopped)
    if seconds is not None and spec.config.threads == "auto":
        seconds = settle_threads(stepper, seconds, stopped)
    if budget is None:
        state.minutes = spec.config.train.max_minutes
    elif seconds is not None:
        fitting = steps_within(session.spec, budget - clock.seconds, seconds)
        n_steps: int = session.world.broadcast_object(lambda: fitting)
        state.minutes = spec.budget
        session.spec = session.spec.lasting(n_steps)
        if changes(session.config.data.mix):  # over as many steps as it now has
            tokens = [*session.train_tokens.values()]
            session.loader = make_loader(tokens, session.config, n_steps)
            stepper.feed.read_from(session.loader)
        fits = plural(n_steps, "step fits", "steps fit")
        session.notes.append(f"{fits} in train.max_minutes = {spec.budget:g} here")
    clock.add("measuring", clock.seconds - began - compiling)
    return stepper


def settle_threads(stepper: Stepper, seconds: float, stopped: Callable[[], bool]) -> float | None:
    """Compute with as many threads as are fastest now, and settle the run on them.

    A small network may be faster on one: its products end sooner than threads meet. Steps that
    take long are not tried again.

    Args:
        stepper: Of a session at step 0.
        seconds: What a step takes with all threads.
        stopped: Asked between micro-batches.

    Returns:
        The seconds of a step with the threads chosen; None if a stop came.
    """
    session, most = stepper.s, torch.get_num_threads()
    counts = [most >> halvings for halvings in range(most.bit_length())]  # most, ..., 2, 1
    best = dict.fromkeys(counts, math.inf) | {most: seconds}
    is_short = seconds < _SHORT_STEP
    for _ in range(_THREAD_LAPS if len(counts) > 1 and is_short else 0):
        slowest = _HOPELESS * min(best.values())
        for count in (count for count in counts if best[count] <= slowest):
            torch.set_num_threads(count)
            taken = seconds_per_step(stepper, _SHORT_TRIAL, stopped)
            if taken is None:
                torch.set_num_threads(most)
                return None
            best[count] = min(best[count], taken)
    # All of them keep their place in a close race, so that noise does not decide it.
    fastest = min(counts, key=lambda count: best[count] * (1 if count == most else _MARGIN))
    torch.set_num_threads(fastest)
    session.spec = session.spec.computing(threads=fastest)
    if fastest < most:
        session.notes.append(f"{plural(fastest, 'thread')} of {most}: faster for this model here")
    return best[fastest]
