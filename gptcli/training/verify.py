"""Proof that resuming is exact: on this machine, with this configuration, in fresh processes."""

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from gptcli.checkpoint import Checkpoint, load_checkpoint
from gptcli.config.schema import Config
from gptcli.runs import METRICS
from gptcli.training.loop import train
from gptcli.training.plan import plan
from gptcli.training.signals import StopRequest
from gptcli.training.spec import with_train

_NEVER = 10**12
_TIMES = ("tokens_per_second", "memory_bytes", "seconds")


@dataclass(frozen=True)
class ResumeCheck:
    """What became of training some steps with and without a stop in between.

    Attributes:
        steps: Steps done.
        stopped_at: Where one of the runs was stopped and taken up again.
        tensors: Tensors compared, of the weights and of the optimizer.
        differing: Those that are not the same bit for bit, and other state that is not.
        largest: The largest difference between two of their numbers.
    """

    steps: int
    stopped_at: int
    tensors: int
    differing: list[str]
    largest: float


def verify_resume(config: Config, steps: int, folder: Path) -> ResumeCheck:
    """Train `steps` steps in one go, and again with a stop in the middle; compare all there is.

    Each part runs in a process of its own, as a run that is resumed does.

    Args:
        config: The run; what it says of evaluation and saving does not matter here.
        steps: At least 2; a run that has fewer is done to its end.
        folder: An empty folder for both runs.

    Raises:
        GptError: As `train` does.
    """
    steps = min(steps, plan(config).spec.max_steps)
    middle = steps // 2
    name = f"checkpoints/step-{steps:08d}.pt"
    whole = _in(config, folder / "whole")
    _train_apart(whole, steps, resume=False)
    one = load_checkpoint(whole.run_folder / name)
    # What `auto` found may depend on the moment; a run keeps it.
    cut = with_train(
        _in(config, folder / "cut"), micro_batch_size=one.config["train"]["micro_batch_size"]
    )
    _train_apart(cut, middle, resume=False)
    _train_apart(cut, steps, resume=True)
    other = load_checkpoint(cut.run_folder / name)
    here, there = _tensors(one), _tensors(other)
    differing = [
        key
        for key in here.keys() | there.keys()
        if key not in here or key not in there or not _same(here[key], there[key])
    ]
    gaps = [
        float((here[key].double() - there[key].double()).abs().max())
        for key in differing
        if key in here and key in there and here[key].shape == there[key].shape
    ]
    if {**one.state, "seconds": 0} != {**other.state, "seconds": 0}:
        differing.append("state")
    if _metrics(whole) != _metrics(cut):
        differing.append(METRICS)
    return ResumeCheck(steps, middle, len(here), sorted(differing), max(gaps, default=0.0))


def _in(config: Config, folder: Path) -> Config:
    """Return the same training in another folder, without what only looks at it."""
    quiet = with_train(config, eval_every=_NEVER, save_every=_NEVER, sample_every=None, log_every=1)
    return quiet.model_copy(update={"run_dir": str(folder)})


def _train_apart(config: Config, step: int, *, resume: bool) -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        process.submit(_train_to, config, step, resume).result()


def _train_to(config: Config, step: int, resume: bool) -> None:
    stop = StopRequest()
    for event in train(config, resume=resume, stop=stop):
        if getattr(event, "step", 0) >= step:
            stop.request()


def _tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    found = {f"model {name}": tensor for name, tensor in checkpoint.model.items()}
    for name, state in checkpoint.optimizer.items():
        found |= {f"optimizer {name} {key}": tensor for key, tensor in state.items()}
    return found


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Compare bits, where -0.0 is not 0.0 and a NaN is itself."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    bits = [tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*bits)


def _metrics(config: Config) -> list[dict[str, Any]]:
    lines = (config.run_folder / METRICS).read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key not in _TIMES}
        for line in lines
    ]
