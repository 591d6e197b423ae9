"""Proof that resuming is exact: on this machine, with this configuration, in fresh processes."""

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.checkpoint import Checkpoint, load_checkpoint
from gptcli.config.schema import Config
from gptcli.runs import METRICS
from gptcli.training.loop import train
from gptcli.training.plan import time_steps
from gptcli.training.signals import StopRequest
from gptcli.training.spec import settle, with_train

if TYPE_CHECKING:
    import torch

_NEVER = 10**12
_TIMES = ("tokens_per_second", "memory_bytes", "seconds")


@dataclass(frozen=True)
class ResumeCheck:
    """The result of training some steps with and without a stop in between."""

    steps: int  # steps done
    stopped_at: int  # where one of the runs was stopped and resumed
    tensors: int  # tensors compared, of the weights and of the optimizer
    differing: list[str]  # those that are not the same bit for bit, and other state that is not


def verify_resume(config: Config, steps: int, folder: Path) -> ResumeCheck:
    """Train `steps` steps in one go, and again with a stop in the middle; compare everything.

    Each part runs in its own process, as a resumed run does, and in the empty `folder`. Evaluations
    and saves are left out.
    """
    if settle(config).budget is not None:  # both runs are to do the same steps
        config = with_train(config, max_steps=time_steps(config).max_steps, max_minutes=None)
    steps = min(steps, settle(config).max_steps)
    middle = steps // 2
    name = f"checkpoints/step-{steps:08d}.pt"
    straight = _in(config, folder / "straight")
    _train_apart(straight, steps, resume=False)
    one = load_checkpoint(straight.run_folder / name)
    # `auto` may depend on the moment; a run keeps what it found.
    rows = one.config["train"]["micro_batch_size"]
    stopped = with_train(_in(config, folder / "stopped"), micro_batch_size=rows)
    _train_apart(stopped, middle, resume=False)
    _train_apart(stopped, steps, resume=True)
    other = load_checkpoint(stopped.run_folder / name)
    first, second = _tensors(one), _tensors(other)
    both = first.keys() & second.keys()
    differing = [key for key in both if not _same_bits(first[key], second[key])]
    differing += first.keys() ^ second.keys()
    if {**one.state, "seconds": 0} != {**other.state, "seconds": 0}:
        differing.append("state")
    if _metrics(straight) != _metrics(stopped):
        differing.append(METRICS)
    return ResumeCheck(steps, middle, len(first), sorted(differing))


def _in(config: Config, folder: Path) -> Config:
    """Return the same training in another folder, without evaluations and samples."""
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


def _tensors(checkpoint: Checkpoint) -> "dict[str, torch.Tensor]":
    tensors = {f"model {name}": tensor for name, tensor in checkpoint.model.items()}
    for name, state in checkpoint.optimizer.items():
        tensors |= {f"optimizer {name} {key}": tensor for key, tensor in state.items()}
    return tensors


def _same_bits(one: "torch.Tensor", other: "torch.Tensor") -> bool:
    """Compare bits, so that -0.0 is not 0.0 and a NaN equals itself."""
    import torch

    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (one, other)))


def _metrics(config: Config) -> list[dict[str, Any]]:
    lines = map(json.loads, (config.run_folder / METRICS).read_text().splitlines())
    return [{key: line[key] for key in line if key not in _TIMES} for line in lines]
