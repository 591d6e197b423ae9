"""A few micro-batches of a run on its real data, timed; nothing of them is kept or written."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gptcli.config.schema import Config
from gptcli.device import memory_bytes, synchronize
from gptcli.distributed.process_group import World
from gptcli.runs.folder import ReadOnlyRun
from gptcli.training.batch_size import compile_seconds, compiled_seconds
from gptcli.training.optim import clip_gradients
from gptcli.training.schedule import lr_at
from gptcli.training.setup import Session, set_up

SECONDS = 4.0  # that are spent on micro-batches, about, however long one is
_FIRST_TOKENS = 64
_REPEATS = 5


@dataclass(frozen=True)
class TimedSteps:
    """What a step takes, and what was found out on the way.

    Attributes:
        step: Steps that were done before, by a run that is resumed.
        rows: Of a micro-batch, found out if the configuration leaves that open.
        seconds_per_step: Of all its micro-batches and its update.
        measured_tokens: Of the largest batch that was timed; the rest is multiplied.
        setup_seconds: Of reading, building and compiling.
        memory_bytes: The most that was used.
    """

    step: int
    rows: int
    seconds_per_step: float
    measured_tokens: int
    setup_seconds: float
    memory_bytes: int


def time_steps(config: Config, *, resume: bool = False) -> TimedSteps:
    """Set up a run in this process alone, and time some of its micro-batches and an update.

    Batches grow from a few tokens to a micro-batch while there is time for the next larger one, so
    it takes seconds whatever the network. What compiling gives is computed, for it takes longer.

    Args:
        config: The run.
        resume: Go on from its newest checkpoint.

    Raises:
        GptError: As training does.
    """
    began = time.perf_counter()
    run = ReadOnlyRun(config.run_folder)
    with contextlib.closing(set_up(run, config, World(), resume=resume)) as session:
        config, setup = session.config, time.perf_counter() - began
        device = session.compute.device
        per_token, measured = _seconds_per_token(session)
        if session.compute.compile:
            per_token = compiled_seconds(config, per_token)
            setup += compile_seconds(config)
        update = _timed(session, _update)
        left = session.state.step < session.max_steps
        return TimedSteps(
            step=session.state.step,
            rows=session.rows,
            seconds_per_step=(config.tokens_per_step * per_token + update) * left,
            measured_tokens=measured,
            setup_seconds=setup,
            memory_bytes=memory_bytes(device),
        )


def _seconds_per_token(session: Session) -> tuple[float, int]:
    """Return what a token of a micro-batch takes, and the tokens of the batch that showed it."""
    batches = session.loader.micro_batches(session.state.step, session.rows)
    tokens, targets = (part.to(session.compute.device) for part in next(batches))
    began = time.perf_counter()
    seconds = size = 0.0
    for rows, length in _sizes(*tokens.shape):
        growth = rows * length / size if size else 1.0
        if time.perf_counter() - began + growth * seconds > SECONDS and size:
            break
        part = tokens[:rows, :length].contiguous(), targets[:rows, :length].contiguous()
        size = rows * length
        seconds = _timed(session, _pass, *part)
        while time.perf_counter() - began < SECONDS / 20:  # what is first used is slow once
            seconds = _timed(session, _pass, *part)
    again = [seconds]
    while len(again) < _REPEATS and time.perf_counter() - began + seconds < SECONDS:
        again.append(_timed(session, _pass, *part))
    return statistics.median(again) / size, int(size)


def _sizes(rows: int, length: int) -> Iterator[tuple[int, int]]:
    """Yield growing parts of a micro-batch, the whole of it last."""
    tokens = min(_FIRST_TOKENS, length)
    while tokens < length:
        yield 1, tokens
        tokens *= 2
    some = 1
    while some < rows:
        yield some, length
        some *= 2
    yield rows, length


def _timed(session: Session, work: Callable[..., None], *arguments: Tensor) -> float:
    began = time.perf_counter()
    work(session, *arguments)
    synchronize(session.compute.device)
    return time.perf_counter() - began


def _pass(session: Session, tokens: Tensor, targets: Tensor) -> None:
    """Go forward and backward, gradients adding up as in a step."""
    with session.compute.autocast():
        recompute = session.config.train.activation_checkpointing
        loss = session.model(tokens, targets, recompute=recompute).loss
    torch.autograd.backward(loss)


def _update(session: Session) -> None:
    """Clip and update, as at the end of a step."""
    config, scaler = session.config, torch.amp.GradScaler(enabled=False)
    clip_gradients(session.parameters.values(), config.optim.grad_clip)
    session.optimizer.step(lr_at(session.state.step, session.max_steps, config), scaler)
    session.optimizer.zero_grad()
