"""From a configuration to everything the loop works with, fresh or resumed.

Rank 0 reads and decides; the other ranks receive the decision and their part of the model.
"""

import contextlib
import math
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from gptcli import __version__
from gptcli.checkpoint import BASE, Checkpoint, load_weights, save_checkpoint
from gptcli.config.reference import keys
from gptcli.config.schema import Config
from gptcli.data.loader import Loader, Split, make_loader, open_parts
from gptcli.data.shards import Manifest
from gptcli.device import Runtime, init_runtime, machine_facts
from gptcli.distributed.process_group import World
from gptcli.errors import CheckpointError
from gptcli.formatting import plural
from gptcli.model import GPT
from gptcli.runs.folder import ReadOnlyRun, Run, describe_run
from gptcli.training.memory import estimate_memory, require_disk, require_memory
from gptcli.training.optim import Optimizer, WeightAverage
from gptcli.training.parallel import apply_fsdp, gather_full, scatter_from_rank0, sharded_inference
from gptcli.training.resume import compare_settings, machine_changes, newest_checkpoint, rate_change
from gptcli.training.spec import RunSpec, settle
from gptcli.training.weights import build_model, freeze, frozen_names

RAW = "weight"  # beside the optimizer's state of a parameter: the model then has the average


@dataclass
class TrainState:
    """The position of a run; saved in every checkpoint."""

    step: int = 0  # optimizer steps done
    best_loss: float | None = None  # lowest validation loss so far (epoch loss without validation)
    best_step: int | None = None  # the step it was measured at
    epoch_loss: float = 0.0  # sum of the losses of this epoch's tokens so far, nats
    epoch_tokens: int = 0  # tokens of this epoch so far
    seconds: float = 0.0  # wall time so far
    # state of the gradient scaler, which only float16 has
    scaler: dict[str, Any] = field(default_factory=dict)
    skipped: int = 0  # steps skipped in a row up to this one, because a number was not finite
    # what the bits depend on besides the configuration, such as torch's version
    machine: dict[str, Any] = field(default_factory=dict)
    # where the first weights came from; empty if they were random
    origin: dict[str, Any] = field(default_factory=dict)
    # checksum of the weights in base.pt that adapters belong to; empty without adapters
    base: str = ""
    minutes: float | None = None  # the time budget that set max_steps; None without one

    def is_better(self, loss: float | None) -> bool:
        """Tell whether a loss of this step is the best so far; NaN or infinity never is."""
        if loss is None or not math.isfinite(loss):
            return False
        return self.best_loss is None or not self.best_loss <= loss or self.best_step == self.step


@dataclass
class Session:
    """All that one call of `train` works with."""

    run: Run
    world: World
    spec: RunSpec
    compute: Runtime
    train_tokens: dict[str, Split]  # of each source, by its name
    val_tokens: dict[str, Split]  # of those that have any
    loader: Loader
    model: GPT
    parameters: dict[str, torch.Tensor]
    optimizer: Optimizer
    average: WeightAverage
    state: TrainState
    is_resumed: bool
    notes: list[str]  # what the user should know: changed settings, fallbacks, a skipped checkpoint
    finite_step: int | None = None  # the last step whose weights are known to give a finite loss

    @property
    def config(self) -> Config:
        """The settled configuration."""
        return self.spec.config

    @property
    def stalled(self) -> str:
        """Why the run is over before its last step; empty if it is not.

        Counts the evaluations since the best, the one of this step included.
        """
        train, best = self.config.train, self.state.best_step
        limit, every = train.stop_after, train.eval_every
        if limit is None or best is None or self.state.step // every - best // every < limit:
            return ""
        return f"no better validation loss in {plural(limit, 'evaluation')}"

    def close(self) -> None:
        """Close the files of the data."""
        for tokens in (*self.train_tokens.values(), *self.val_tokens.values()):
            tokens.close()

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """Evaluate or decode in the block, with the average of the weights if there is one."""
        with self.average.in_use(), sharded_inference(self.model, self.compute):
            yield

    def snapshot(self, copy: bool) -> Checkpoint:
        """Return the checkpoint of this step; a collective call, only rank 0 gets tensors.

        Args:
            copy: Copy the tensors, so that training can continue meanwhile.
        """
        keep = self.world.is_main
        self.state.machine = _machine_facts(self.config, self.world)
        weights = gather_full(self.parameters, keep, copy)
        states = {name: gather_full(state, keep, copy)
                  for name, state in self.optimizer.state().items()}  # fmt: skip
        average = gather_full(self.average.tensors(), keep, copy) if states else {}
        for name in average:
            states[name][RAW] = weights[name]
        weights |= average
        return Checkpoint(
            model=weights,
            optimizer=states,
            config=self.config.model_dump(mode="json"),
            tokenizer=self.spec.tokenizer.definition(),
            data=data_facts(self.spec),
            state=asdict(self.state),
        )

    def write(self, checkpoint: Checkpoint, path: Path | None = None) -> Path:
        """Write a checkpoint, by default under its step's name, and return its file."""
        self.run.require_same_folder()
        path = path or self.run.step_file(checkpoint.state["step"])
        if self.config.model.lora is not None:
            checkpoint = self._adapters_of(checkpoint)
        save_checkpoint(path, checkpoint)
        return path

    def _adapters_of(self, checkpoint: Checkpoint) -> Checkpoint:
        """Leave what never changes to base.pt, which is written before the first checkpoint."""
        from gptcli.model.lora import is_adapter  # which few runs have

        weights = checkpoint.model
        if not self.state.base:
            base = {name: weight for name, weight in weights.items() if not is_adapter(name)}
            config = {**checkpoint.config, "model": {**checkpoint.config["model"], "lora": None}}
            self.state.base = save_checkpoint(
                self.run.folder / BASE, replace(checkpoint, model=base, optimizer={}, config=config)
            )
        adapters = {name: weight for name, weight in weights.items() if is_adapter(name)}
        state = {**checkpoint.state, "base": self.state.base}
        return replace(checkpoint, model=adapters, state=state)


def _raw(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Return the weights that were trained, where the model of a checkpoint is their average."""
    states = checkpoint.optimizer.items()
    return {name: state[RAW] for name, state in states if RAW in state}


def data_facts(spec: RunSpec) -> dict[str, Any]:
    """Return what a checkpoint says about its data."""
    facts = {"dir": spec.config.data.dir, **_facts_of(spec.manifest)}
    if spec.config.data.mix is not None:
        facts["parts"] = {
            part.name: {"dir": part.place, "weight": source.weight_at(1.0),
                        **_facts_of(part.manifest)}
            for part, source in zip(spec.parts, spec.config.data.mix, strict=True)
        }  # fmt: skip
    return facts


def _facts_of(manifest: Manifest) -> dict[str, Any]:
    return {
        "source": manifest.recipe.source,
        "revision": manifest.recipe.revision,
        "fingerprint": manifest.fingerprint,
        "tokenizer": manifest.tokenizer.sha256,
        "tokens": manifest.tokens.model_dump(),
        "bytes": manifest.bytes.model_dump(),
    }


@dataclass
class _Start:
    """What rank 0 settles for all, and what it alone has: notes, first weights, checkpoint."""

    spec: RunSpec
    state: TrainState
    is_resumed: bool
    notes: list[str] = field(default_factory=list)
    model: GPT | None = None
    checkpoint: Checkpoint | None = None


def set_up(run: Run, config: Config, world: World, *, resume: bool) -> Session:
    """Set up a run: data, model, optimizer, and the position to resume from.

    Raises:
        ConfigError: The configuration does not fit the data, or changes what a run must keep.
        DataError: The data cannot be used.
        CheckpointError: There are checkpoints, but none can be used.
    """
    start: _Start | None = None

    def choose() -> dict[str, Any]:
        nonlocal start
        start = _choose(run, config, world, resume)
        return {
            "spec": start.spec.to_dict(),
            "state": asdict(start.state),
            "is_resumed": start.is_resumed,
        }

    facts = world.broadcast_object(choose)
    if start is None:
        spec, state = RunSpec.from_dict(facts["spec"]), TrainState(**facts["state"])
        start = _Start(spec, state, facts["is_resumed"])
    return _build(run, start, world, [key for key in keys() if config.is_set(key)])


def _choose(run: Run, config: Config, world: World, resume: bool) -> _Start:
    """Settle what is to be trained, and from which weights."""
    notes: list[str] = []
    checkpoint = newest_checkpoint(run, notes) if resume else None
    if resume and checkpoint is None:
        notes.append("nothing to resume here: starting at step 0")
    spec = settle(config, world.size, checkpoint)
    config, size = spec.config, spec.size
    notes += spec.notes
    if checkpoint is not None:
        notes += compare_settings(checkpoint, spec)
    # Before any weight is allocated: the system kills a process that takes too much.
    require_memory(config, estimate_memory(config, size, spec.rows, spec.parallel, world.size))
    require_disk(config, size)
    if checkpoint is None:
        state, pretrained = TrainState(), spec.pretrained
        if pretrained is not None:
            state.origin = pretrained.facts()
            at = f" at {pretrained.revision}" if pretrained.revision else ""
            notes.append(f"weights of {pretrained.name}{at}")
        model = build_model(config, pretrained, spec.tokenizer.vocab_size)
    else:
        try:
            state = TrainState(**checkpoint.state)
        except TypeError as error:
            message = f"incompatible training state in checkpoint ({error})"
            raise CheckpointError(message) from error
        notes += rate_change(checkpoint, spec, state.step)
        notes += machine_changes(state.machine, _machine_facts(config, world))
        model = GPT(config.model, spec.tokenizer.vocab_size)
        load_weights(model, checkpoint.model | _raw(checkpoint), run.folder)
    if size.trained < size.parameters:
        notes.append(f"{size.trained:,} of {size.parameters:,} parameters learn")
    return _Start(spec, state, checkpoint is not None, notes, model, checkpoint)


def _build(run: Run, start: _Start, world: World, given: list[str]) -> Session:
    """Make what every rank has: its data, its part of the model, its optimizer."""
    spec, config = start.spec, start.spec.config
    train_tokens, val_tokens = open_parts(spec.parts, config)
    compute = init_runtime(config, trains=True)
    model = start.model or GPT(config.model, spec.tokenizer.vocab_size)
    freeze(model, config.train.freeze)
    # Wrapping replaces the parameters: their first values are kept by name.
    first = {name: weight.detach() for name, weight in model.named_parameters()}
    if spec.parallel == "fsdp":
        if (failure := apply_fsdp(model, compute, world)) is not None:
            start.notes.append(failure)
            spec = spec.computing(compile=False)
    else:
        model.to(compute.device)
    parameters: dict[str, torch.Tensor] = dict(model.named_parameters())
    if world.size > 1:
        scatter_from_rank0(world, parameters, first)
    optimizer = Optimizer(model, config.optim, compute.device, compute.dtype)
    average = WeightAverage(parameters, config.train.ema)
    if start.is_resumed:
        # Rank 0 scatters what it has read.
        saved = start.checkpoint or Checkpoint({}, {}, {"train": {}}, {}, {}, {})
        states = {name: {key: value for key, value in state.items() if key != RAW}
                  for name, state in saved.optimizer.items()}  # fmt: skip
        frozen = frozen_names(model, saved.config["train"].get("freeze", []))
        optimizer.load_state(states, frozen, world)
        if world.broadcast_object(lambda: bool(_raw(saved))):
            scatter_from_rank0(world, average.tensors(), saved.model)
    if not isinstance(run, ReadOnlyRun):
        facts = {
            "gptcli": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "threads": None if config.threads == "auto" else config.threads,
            "parameters": spec.size.parameters,
            "origin": start.state.origin,
            "data": data_facts(spec),
        }
        describe_run(run, {**facts, "given": given})
    loader = make_loader([*train_tokens.values()], config, spec.max_steps)
    return Session(
        run, world, spec, compute, train_tokens, val_tokens, loader, model, parameters, optimizer,
        average, start.state, start.is_resumed, start.notes,
    )  # fmt: skip


def _machine_facts(config: Config, world: World) -> dict[str, Any]:
    """Return what the bits depend on besides the configuration."""
    facts = machine_facts(torch.device(config.device))
    if "threads" in facts and config.threads != "auto":
        facts["threads"] = config.threads  # those that it computes with, or is about to
    return {**facts, "processes": world.size}
