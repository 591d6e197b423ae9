"""Runs of a tiny model: their settings, how they are trained, and all that they end with.

torch is imported by the functions that need it: this module is imported by every test.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gptcli.config import Config, load_config

from .folders import copy_folder

if TYPE_CHECKING:
    import torch

    from gptcli.training.events import Event

Tiny = Callable[..., Config]
MakeRun = Callable[..., Path]
Logged = Callable[..., dict[str, Any]]
Figures = Callable[[str], None]

TINY = (
    "model.n_layer=2", "model.n_head=2", "model.n_embd=32", "model.block_size=16",
    "train.micro_batch_size=4", "train.max_steps=6", "train.eval_every=3", "train.log_every=1",
    "train.eval_tokens=64", "optim.lr=3e-3", "generate.max_new_tokens=8",
    "device=cpu", "dtype=float32", "compile=false",
)  # fmt: skip
# Steps of several micro-batches with dropout, and saves, evaluations and logs out of step.
THOROUGH = (
    "train.max_steps=20", "train.eval_every=4", "train.save_every=3", "train.log_every=2",
    "model.dropout=0.1", "train.micro_batch_size=2", "train.tokens_per_step=96",
    "optim.warmup_steps=3", "generate.max_new_tokens=1",
)  # fmt: skip
LONG = os.environ.get("GPTCLI_CHAOS") == "long"  # the crash suites at full length
TIMES = ("seconds", "tokens_per_second", "memory_bytes")


def settings(*overrides: str, name: str = "tiny") -> list[str]:
    """Return the settings of a tiny run on data/tiny."""
    return [*TINY, "data.dir=data/tiny", f"name={name}", *overrides]


def finish(config: Config, **how: bool) -> "list[Event]":
    """Train to the end."""
    from gptcli.training.loop import train

    return list(train(config, **how))


def stop_after(config: Config, step: int, **how: bool) -> "list[Event]":
    """Train, asking to stop once `step` steps are done."""
    from gptcli.training.events import StepDone
    from gptcli.training.loop import train
    from gptcli.training.signals import StopRequest

    stop, events = StopRequest(), []
    for event in train(config, stop=stop, **how):
        events.append(event)
        if isinstance(event, StepDone) and event.step == step:
            stop.request()
    return events


def metrics(config: Config) -> list[dict[str, Any]]:
    """Return metrics.jsonl, times aside."""
    lines = (config.run_folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


class Result(NamedTuple):
    """All that a run ended with, times aside.

    Attributes:
        bits: A digest of each tensor of the last checkpoint.
        state: The rest of it that training changes.
        metrics: The lines of metrics.jsonl.
    """

    bits: dict[str, str]
    state: dict[str, Any]
    metrics: list[dict[str, Any]]


def result_of(config: Config) -> Result:
    """Return what a run ended with."""
    bits, state = last_state(config)
    return Result(bits, state, metrics(config))


def last_state(config: Config) -> tuple[dict[str, str], dict[str, Any]]:
    """Return a digest of each tensor of the last checkpoint, and its state without times."""
    from gptcli.checkpoint import load_checkpoint

    found = load_checkpoint(config.run_folder / "last.pt")
    tensors = {f"model {name}": tensor for name, tensor in found.model.items()}
    for name, state in found.optimizer.items():
        tensors |= {f"optimizer {name} {key}": tensor for key, tensor in state.items()}
    bits = {name: _digest(tensor) for name, tensor in tensors.items()}
    return bits, {key: value for key, value in found.state.items() if key != "seconds"}


def _digest(tensor: "torch.Tensor") -> str:
    import torch

    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(raw).hexdigest()}"


class Trained:
    """Runs that were trained once for all tests of a process, in a folder with data/tiny."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._results: dict[tuple[str, ...], Result] = {}
        self._runs: dict[tuple[Any, ...], Path] = {}

    def straight(self, *overrides: str) -> Result:
        """Return what a run ends with that nothing stops."""
        if overrides not in self._results:
            with contextlib.chdir(self._folder):
                config = load_config(None, settings(*overrides, name=f"s{len(self._results)}"))
                finish(config)
                self._results[overrides] = result_of(config)
        return self._results[overrides]

    def copy(self, *overrides: str, name: str = "tiny", until: int | None = None) -> Config:
        """Put a run here that is finished, or was stopped after a step; return its settings."""
        key = (*overrides, name, until)
        if key not in self._runs:
            place = self._folder / f"run-{len(self._runs)}"
            copy_folder(self._folder / "data", place / "data")
            with contextlib.chdir(place):
                config = load_config(None, settings(*overrides, name=name))
                stop_after(config, -1 if until is None else until)
            self._runs[key] = place / config.run_folder
        config = load_config(None, settings(*overrides, name=name))
        copy_folder(self._runs[key], config.run_folder)
        return config
