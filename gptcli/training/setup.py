"""From a configuration to everything the loop works with, fresh or resumed.

Rank 0 looks, reads and decides; the others are told, and given their part.
"""

import math
import platform
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from gptcli import __version__
from gptcli.checkpoint import BASE, Checkpoint, load_weights, save_checkpoint
from gptcli.config.reference import keys
from gptcli.config.schema import Config
from gptcli.config.windows import eval_tokens
from gptcli.data.loader import TokenLoader
from gptcli.data.shards import Manifest, TokenReader, read_manifest, read_tokenizer
from gptcli.data.sources import data_dir
from gptcli.device import Runtime, init_runtime, machine_facts
from gptcli.distributed.process_group import World
from gptcli.errors import CheckpointError
from gptcli.generation import encode_prompt
from gptcli.model import GPT, is_adapter
from gptcli.runs.folder import ReadOnlyRun, Run, describe_run
from gptcli.tokenizers import Tokenizer
from gptcli.training.batch_size import fitting_rows
from gptcli.training.memory import estimate_memory, require_disk, require_memory, size_of
from gptcli.training.optim import Optimizer
from gptcli.training.parallel import (
    Parallelism,
    apply_fsdp,
    choose_parallelism,
    gather_full,
    rows_of,
    scatter_from_rank0,
)
from gptcli.training.resolve import (
    close_tokens,
    make_loader,
    max_steps_of,
    open_tokens,
    resolve,
    with_compile,
    with_train,
)
from gptcli.training.resume import (
    compare_settings,
    machine_changes,
    newest_checkpoint,
    rate_change,
)
from gptcli.training.weights import apply_pretrained_shape, build_model, freeze, frozen_names


@dataclass
class TrainState:
    """Where a run stands; saved in every checkpoint.

    Attributes:
        step: Optimizer steps done.
        best_loss: Lowest validation loss so far (epoch loss without validation).
        best_step: The step it was measured at.
        epoch_loss: Sum of the losses of the running epoch's tokens, nats.
        epoch_tokens: Tokens of the running epoch trained on.
        seconds: Wall time so far.
        scaler: State of the gradient scaler, which only float16 has.
        skipped: Steps skipped in a row, the last one included, for want of finite numbers.
        machine: What the bits depend on besides the configuration, such as torch's version.
        origin: Where the first weights came from; empty if they were drawn.
        base: Checksum of the weights in base.pt that adapters belong to; empty without adapters.
    """

    step: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    epoch_loss: float = 0.0
    epoch_tokens: int = 0
    seconds: float = 0.0
    scaler: dict[str, Any] = field(default_factory=dict)
    skipped: int = 0
    machine: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)
    base: str = ""

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
    config: Config
    compute: Runtime
    tokenizer: Tokenizer
    manifest: Manifest
    train_tokens: TokenReader
    val_tokens: TokenReader | None
    loader: TokenLoader
    model: GPT
    parameters: dict[str, torch.Tensor]
    optimizer: Optimizer
    state: TrainState
    max_steps: int
    is_resumed: bool
    kind: Parallelism
    notes: list[str]
    sound_step: int | None = None  # the last one whose weights are known to give a finite loss

    @property
    def rows(self) -> int:
        """Rows of a micro-batch on this rank, as on every other."""
        return rows_of(self.config, self.world.size)

    @property
    def grad_accum_steps(self) -> int:
        """Micro-batches of a step on this rank, as on every other."""
        return self.config.grad_accum_steps(self.rows, self.world.size)

    @property
    def n_val_tokens(self) -> int:
        """Tokens of the validation split; 0 without one."""
        return len(self.val_tokens) if self.val_tokens is not None else 0

    @property
    def eval_tokens(self) -> int:
        """Validation tokens that an evaluation scores."""
        config, n_train = self.config, len(self.train_tokens)
        return eval_tokens(n_train, self.n_val_tokens, config.seq_len, config.train.eval_tokens)[1]

    @property
    def epochs(self) -> float:
        """Passes over the training windows that the whole run makes."""
        return self.loader.epochs(self.max_steps)

    @property
    def saves_in_background(self) -> bool:
        """Whether training continues while a checkpoint is written."""
        wanted = self.config.train.async_save
        return self.compute.device.type == "cuda" if wanted == "auto" else wanted

    def close(self) -> None:
        """Close the data's files."""
        close_tokens(self.train_tokens, self.val_tokens)

    def snapshot(self, copy: bool) -> Checkpoint:
        """Return the checkpoint of the present step; every rank must ask, rank 0 gets tensors.

        Args:
            copy: Make copies, that training goes on without changing.
        """
        keep = self.world.is_main
        self.state.machine = _machine_facts(self.compute, self.world)
        weights = gather_full(self.parameters, keep)
        states = {name: gather_full(state, keep) for name, state in self.optimizer.state().items()}
        if copy:
            weights = {name: weight.to("cpu", copy=True) for name, weight in weights.items()}
            states = {name: {key: tensor.to("cpu", copy=True) for key, tensor in state.items()}
                      for name, state in states.items()}  # fmt: skip
        return Checkpoint(
            model=weights,
            optimizer=states,
            config=self.config.model_dump(mode="json"),
            tokenizer=self.tokenizer.definition(),
            data=data_facts(self.config, self.manifest),
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


def data_facts(config: Config, manifest: Manifest) -> dict[str, Any]:
    """Return what a checkpoint says about its data."""
    return {
        "dir": config.data.dir,
        "source": manifest.recipe.source,
        "revision": manifest.recipe.revision,
        "fingerprint": manifest.fingerprint,
        "tokenizer": manifest.tokenizer.sha256,
        "tokens": manifest.tokens.model_dump(),
        "bytes": manifest.bytes.model_dump(),
    }


@dataclass
class _Choice:
    """What rank 0 settles for all, and what it alone has."""

    config: Config
    state: TrainState
    max_steps: int
    is_resumed: bool
    kind: Parallelism
    notes: list[str]
    model: GPT | None = None
    checkpoint: Checkpoint | None = None

    def told(self) -> dict[str, Any]:
        """Return what the others are told."""
        return {
            "config": self.config.model_dump(mode="json"),
            "state": asdict(self.state),
            "max_steps": self.max_steps,
            "is_resumed": self.is_resumed,
            "kind": self.kind,
        }


def set_up(run: Run, config: Config, world: World, *, resume: bool) -> Session:
    """Set up a run: data, network, optimizer, and the position to go on from.

    Raises:
        ConfigError: The configuration does not fit the data, or changes what a run must keep.
        DataError: The data cannot be used.
        CheckpointError: There are checkpoints, but none can be used.
    """
    chosen: list[_Choice] = []

    def choose() -> dict[str, Any]:
        chosen.append(_choose(run, config, world, resume))
        return chosen[0].told()

    told = world.broadcast_object(choose)
    if not chosen:
        settled, state = Config.model_validate(told["config"]), TrainState(**told["state"])
        chosen.append(_Choice(**{**told, "config": settled, "state": state, "notes": []}))
    return _build(run, chosen[0], world, [key for key in keys() if config.is_set(key)])


def _choose(run: Run, config: Config, world: World, resume: bool) -> _Choice:
    """Settle what is to be trained, from which weights, and how."""
    notes: list[str] = []
    checkpoint = newest_checkpoint(run, notes) if resume else None
    if resume and checkpoint is None:
        notes.append("nothing to resume here: starting at step 0")
    folder = data_dir(config.data)
    manifest = read_manifest(folder)
    tokenizer = read_tokenizer(folder, manifest)
    config, origin = apply_pretrained_shape(config, tokenizer, checkpoint)
    config = resolve(config, folder, manifest, checkpoint, notes)
    if checkpoint is not None:
        notes += compare_settings(checkpoint, config, manifest, tokenizer)
    # A prompt that cannot be sampled from should not come to light at the run's end.
    encode_prompt(tokenizer, config.generate.prompt, config.trained_context)
    train_tokens, val_tokens = open_tokens(folder, manifest, config)
    loader = make_loader(config, train_tokens)
    max_steps = max_steps_of(config, loader)
    close_tokens(train_tokens, val_tokens)
    size = size_of(config)
    kind = choose_parallelism(config, world, size.parameters, torch.device(config.device))
    rows = rows_of(config, world.size)
    require_memory(config, estimate_memory(config, size, rows, kind, world.size))
    require_disk(config, size)
    if checkpoint is None:
        state = TrainState(origin=origin.facts() if origin is not None else {})
        model = build_model(config, origin)
        if origin is not None:
            notes.append(
                f"weights of {origin.name}" + f" at {origin.revision}" * bool(origin.revision)
            )
    else:
        state = _restore_state(checkpoint)
        notes += rate_change(checkpoint, config, loader, state.step)
        model = GPT(config.model)
        load_weights(model, checkpoint.model, run.folder)
    freeze(model, config.train.freeze)
    config = with_compile(config, max_steps)
    machine = init_runtime(config, trains=True)
    if size.learning < size.parameters:
        notes.append(f"{size.learning:,} of {size.parameters:,} parameters learn")
    if config.train.micro_batch_size == "auto":
        rows = fitting_rows(config, model.to(machine.device), machine)
        notes.append(f"micro_batch_size is {rows}: the most rows that fit and divide a step")
        config = with_train(config, micro_batch_size=rows)
    if (rows := rows_of(config, world.size)) != config.rows:
        notes.append(
            f"micro_batch_size reduced to {rows} so that it divides evenly among the processes"
        )
    if checkpoint is not None:
        notes += machine_changes(state.machine, _machine_facts(machine, world))
    return _Choice(config, state, max_steps, checkpoint is not None, kind, notes, model, checkpoint)


def _build(run: Run, choice: _Choice, world: World, given: list[str]) -> Session:
    """Make what every rank has: its data, its part of the network, its optimizer."""
    config = choice.config
    folder = data_dir(config.data)
    manifest = read_manifest(folder)
    tokenizer = read_tokenizer(folder, manifest)
    train_tokens, val_tokens = open_tokens(folder, manifest, config)
    machine = init_runtime(config, trains=True)
    model = choice.model or GPT(config.model)
    model.n_tokens = tokenizer.vocab_size
    freeze(model, config.train.freeze)
    first = {name: weight.detach() for name, weight in model.named_parameters()}
    if choice.kind == "fsdp":
        if (failure := apply_fsdp(model, machine)) is not None:
            choice.notes.append(failure)
    else:
        model.to(machine.device)
    parameters: dict[str, torch.Tensor] = dict(model.named_parameters())
    if world.size > 1:
        scatter_from_rank0(world, parameters, first)
    optimizer = Optimizer(model, config.optim, machine.device)
    if choice.is_resumed:
        found = choice.checkpoint
        frozen = found.config["train"].get("freeze", []) if found is not None else []
        states = found.optimizer if found is not None else {}
        optimizer.load_state(states, frozen_names(model, frozen), world)
    if not isinstance(run, ReadOnlyRun):
        facts = _facts(config, manifest, model, choice.state)
        describe_run(run, {**facts, "given": given})
    return Session(
        run, world, config, machine, tokenizer, manifest, train_tokens, val_tokens,
        make_loader(config, train_tokens), model, parameters, optimizer, choice.state,
        choice.max_steps, choice.is_resumed, choice.kind, choice.notes,
    )  # fmt: skip


def _machine_facts(machine: Runtime, world: World) -> dict[str, Any]:
    """Return what the bits depend on besides the configuration."""
    return {**machine_facts(machine.device), "processes": world.size}


def _facts(config: Config, manifest: Manifest, model: GPT, state: TrainState) -> dict[str, Any]:
    """Return what run.json records about the program, the machine and the data."""
    return {
        "gptcli": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "parameters": model.n_params(),
        "origin": state.origin,
        "data": data_facts(config, manifest),
    }


def _restore_state(checkpoint: Checkpoint) -> TrainState:
    try:
        return TrainState(**checkpoint.state)
    except TypeError as error:
        raise CheckpointError(f"incompatible training state in checkpoint ({error})") from error
