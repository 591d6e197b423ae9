"""The models that a server offers: opened once, kept checkpoints of their runs on demand."""

import asyncio
import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gptcli.api.generate import Sampler
from gptcli.checkpoint import TrainedModel
from gptcli.config import Config, GenerateConfig
from gptcli.errors import ConfigError, MemoryLimitError
from gptcli.formatting import size
from gptcli.generation.decode import Rows
from gptcli.generation.samples import rows_together
from gptcli.runs import BEST, RUN, RunHistory
from gptcli.runs.find import find_checkpoint
from gptcli.runs.read import read_run

_log = logging.getLogger("gptcli")
_STEP = re.compile(r"step-(\d{8})\.pt")

Settings = Callable[[dict[str, Any] | None], Config]


class Model:
    """A model ready to decode.

    Attributes:
        id: What requests call it.
        trained: The model with its checkpoint.
        defaults: What a request leaves out: the run's own section `generate`.
        rows: The texts that grow.
        n_jobs: Requests that use it.
        n_bytes: Of its weights.
    """

    def __init__(self, id: str, name: str | None, settings: Settings, *, int8: bool) -> None:
        sampler = Sampler(name, settings, int8=int8)
        self.id, self.trained = id, sampler.trained
        self.defaults: GenerateConfig = sampler.config.generate
        self.weights = sampler.weights
        self.rows, self.n_jobs = Rows(self.trained.model), 0
        self.max_rows = rows_together(self.trained.model, 1 << 30)
        history = history_of(self.trained)
        # Weights that kernels have taken are parameters no more.
        self._n_params = history.facts.parameters or self.trained.model.n_params()
        self.n_bytes = 4 * self._n_params
        losses = [row.val_loss for row in history.evaluations if row.step == self.trained.step]
        self._val_loss = losses[-1] if losses else None

    @property
    def context(self) -> int:
        """The most tokens of a prompt."""
        return self.trained.model.config.block_size

    def facts(self) -> dict[str, Any]:
        """Return what the page shows of it."""
        trained = self.trained
        return {
            "context": self.context,
            "chat": trained.tokenizer.chat is not None,
            "step": trained.step,
            "steps": sorted(steps_of(trained)),
            "vocab_size": trained.tokenizer.vocab_size,
            "parameters": self._n_params,
            "val_loss": self._val_loss,
            "weights": self.weights,
            "defaults": self.defaults.model_dump(exclude={"prompt", "num_samples"}),
        }


def run_folder(trained: TrainedModel) -> Path | None:
    """Return the run folder that a checkpoint is in."""
    folders = trained.path.resolve().parents[:2]
    return next((folder for folder in folders if (folder / RUN).is_file()), None)


def history_of(trained: TrainedModel) -> RunHistory:
    """Return the run of a checkpoint; empty for a checkpoint without a run."""
    return read_run(run_folder(trained) or Path("/nonexistent"))


def steps_of(trained: TrainedModel) -> dict[int, Path]:
    """Return the kept checkpoints of a model's run, by step."""
    folder = run_folder(trained)
    files = folder.glob("checkpoints/*") if folder else []
    return {int(found[1]): path for path in files if (found := _STEP.fullmatch(path.name))}


class Models:
    """All models of a server, by id; `RUN@STEP` is a kept checkpoint of a run."""

    def __init__(
        self, names: Sequence[str | None], settings: Settings, *, int8: bool, max_bytes: int
    ) -> None:
        """Open the models that are named; None is the newest run's best.

        Raises:
            GptError: A model cannot be used, or two have the same id.
        """
        self._settings, self._int8, self._max_bytes = settings, int8, max_bytes
        self.served: dict[str, Model] = {}
        self._kept: OrderedDict[str, Model] = OrderedDict()  # the one used last comes last
        self._lock = asyncio.Lock()
        for name in names:
            model = _opened("", name, settings, int8)
            model.id = _id_of(name, model.trained)
            if model.id in self.served:
                raise ConfigError(
                    f"--checkpoint {name}: there is already a model {model.id}",
                    "serve each checkpoint once; runs need names that differ",
                )
            self.served[model.id] = model

    async def use(self, id: str) -> Model:
        """Return a model, opened if need be; `done` must follow.

        Raises:
            KeyError: There is no such model.
            GptError: It cannot be opened now.
        """
        model = self.served.get(id) or self._kept.get(id)
        if model is None:
            async with self._lock:
                model = self._kept.get(id) or await self._open(id)
        if id in self._kept:
            self._kept.move_to_end(id)
        model.n_jobs += 1
        return model

    async def _open(self, id: str) -> Model:
        run, at, step = id.rpartition("@")
        known = steps_of(self.served[run].trained) if at and run in self.served else {}
        path = next((path for number, path in known.items() if str(number) == step), None)
        if path is None:
            raise KeyError(id)
        self._forget(self.served[run].n_bytes)
        model = await asyncio.to_thread(_opened, id, str(path), self._settings, self._int8)
        self._kept[id] = model
        return model

    @staticmethod
    def done(model: Model) -> None:
        """Say that a request needs a model no more."""
        model.n_jobs -= 1

    def _forget(self, n_bytes: int) -> None:
        """Make room for a checkpoint: the one that was not used for longest goes first."""
        idle = [model for model in self._kept.values() if not model.n_jobs]
        while sum(model.n_bytes for model in self._kept.values()) + n_bytes > self._max_bytes:
            if not idle:
                room = size(self._max_bytes)
                raise MemoryLimitError(f"no room for another checkpoint in {room}; try again later")
            del self._kept[idle.pop(0).id]


def _opened(id: str, name: str | None, settings: Settings, int8: bool) -> Model:
    """Return a model that was opened in a thread that has ended.

    OpenMP keeps a pool for each thread that computes. With more threads than cores, those that wait
    for each other sleep at once, and every step of the engine takes longer.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(Model, id, name, settings, int8=int8).result()


def _id_of(name: str | None, trained: TrainedModel) -> str:
    """Return the run's name, with `@STEP` unless it is its best; else the name that was given."""
    folder = run_folder(trained)
    if folder is None:
        return name or str(trained.path)
    is_best = name is None or find_checkpoint(name).name == BEST
    return folder.name if is_best else f"{folder.name}@{trained.step}"
