"""A run settled once: every `auto` and null, checked against its data and this machine.

The plan, the session, the events and what is printed hold the same `RunSpec`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import ceil
from typing import TYPE_CHECKING, Any

import torch

from gptcli.checkpoint import Checkpoint
from gptcli.config import windows
from gptcli.config.schema import Config
from gptcli.data.loader import Part, combined, make_loader, open_parts, read_parts
from gptcli.data.shards import Manifest, TokenReader, read_tokenizer
from gptcli.device import available_devices, resolve_auto
from gptcli.errors import ConfigError
from gptcli.generation import sample_start
from gptcli.tokenizers import Tokenizer
from gptcli.training.memory import (
    ModelSize,
    Parallelism,
    choose_parallelism,
    fitting_rows,
    model_size,
)
from gptcli.training.weights import apply_pretrained_shape

if TYPE_CHECKING:
    from gptcli.interop.weights import Pretrained

_MACHINE_KEYS = ("device", "dtype", "compile", "deterministic")
# On two cores with a cold cache, four blocks took 34 s; what one takes was not measured.
_COMPILE_SECONDS, _COMPILE_SECONDS_PER_BLOCK = 20.0, 3.5
_SHORT_RUN = 60 * 4e14  # operations that a large GPU does in the minute that compiling takes there
_COMPILE_MINUTES = 3.0  # time budget from which that minute is worth it
_TUNED_STEPS, _TUNED_PARAMETERS = 1000, 50_000_000  # of runs that steps are timed for, on a CPU
_MOST_STEPS = 10**8 - 1  # that the name of a checkpoint has digits for


@dataclass(frozen=True)
class RunSpec:
    """A run with every setting settled, and the facts that follow from them."""

    config: Config  # the configuration, without `auto`
    manifest: Manifest  # the prepared data, of all sources
    tokenizer: Tokenizer = field(repr=False, compare=False)  # the data's tokenizer
    size: ModelSize  # counts of the model and its optimizer
    n_windows: int  # training windows of an epoch
    max_steps: int  # steps of the whole run
    rows: int  # rows of a micro-batch in each process
    n_processes: int = 1  # processes that train
    parallel: Parallelism = "none"  # how they share the model
    # the weights to start from; None to draw or resume them, and beyond rank 0
    pretrained: "Pretrained | None" = field(default=None, repr=False, compare=False)
    notes: tuple[str, ...] = ()  # what the user should know about the way it was settled
    # minutes to train within, until steps are timed: `max_steps` is then an upper limit
    budget: float | None = None
    packing: str = ""  # how the training rows hold conversations; empty for text
    parts: tuple[Part, ...] = ()  # the data of each source
    part_windows: tuple[int, ...] = ()  # of an epoch of each source

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step, over all processes."""
        return self.config.tokens_per_step

    @property
    def grad_accum_steps(self) -> int:
        """Micro-batches of a step in each process."""
        return self.config.tokens_per_step // (self.rows * self.config.seq_len * self.n_processes)

    @property
    def epochs(self) -> float:
        """Passes over the training windows that the whole run makes."""
        return self.epochs_at(self.max_steps)

    def epochs_at(self, step: int) -> float:
        """Return the passes over the training windows that the first `step` steps make."""
        return windows.epochs(step, self.tokens_per_step // self.config.seq_len, self.n_windows)

    @property
    def train_tokens(self) -> int:
        """Tokens of the training split."""
        return self.manifest.tokens.train

    @property
    def val_tokens(self) -> int:
        """Tokens of the validation split; 0 without one."""
        return self.manifest.tokens.val

    @property
    def eval_tokens(self) -> tuple[int, int]:
        """Training and validation tokens that an evaluation scores."""
        counts = [part.manifest.tokens for part in self.parts] or [self.manifest.tokens]
        sizes = [(each.train, each.val) for each in counts]
        return windows.eval_tokens(sizes, self.config.seq_len, self.config.train.eval_tokens)

    def most_scored(self, part: Part, *, is_val: bool) -> int:
        """Return the most tokens of a split of a source that an evaluation scores."""
        most = windows.share_of_eval(self.config.train.eval_tokens, len(self.parts))
        return most if is_val else min(most, part.manifest.tokens.val or most)

    def mean_loss(self, losses: Mapping[str, float]) -> float:
        """Return the mean of the losses of some sources, by their weights at the run's end."""
        mix = self.config.data.mix
        if mix is None:
            [loss] = losses.values()
            return loss
        weights = {part.name: each.weight_at(1.0)
                   for part, each in zip(self.parts, mix, strict=True)}  # fmt: skip
        total = sum(weights[name] for name in losses)
        if not total:  # what is drawn last has no validation text
            return sum(losses.values()) / len(losses)
        return sum(weights[name] * loss for name, loss in losses.items()) / total

    @property
    def saves_in_background(self) -> bool:
        """Whether training continues while a checkpoint is written."""
        requested = self.config.train.async_save
        return self.config.device == "cuda" if requested == "auto" else requested

    def computing(self, **values: bool | int) -> "RunSpec":
        """Return the run with what is settled of how it computes: `compile`, `threads`.

        What is settled is saved: eager and compiled dropout differ.
        """
        return replace(self, config=self.config.model_copy(update=values))

    def lasting(self, max_steps: int) -> "RunSpec":
        """Return the run with its number of steps, which its time budget allows."""
        config = with_train(self.config, max_steps=max_steps)
        return replace(self, config=config, max_steps=max_steps, budget=None)

    def to_dict(self) -> dict[str, Any]:
        """Return what the other processes need to hold the same record, for JSON."""
        names = ("n_windows", "max_steps", "rows", "n_processes", "parallel", "budget",
                 "packing", "part_windows")  # fmt: skip
        facts = {key: getattr(self, key) for key in names}
        config = self.config.model_dump(mode="json")
        return {**facts, "config": config, "size": asdict(self.size)}

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> "RunSpec":
        """Return the record that rank 0 described, with the data read again."""
        config = Config.model_validate(facts["config"])
        parts = read_parts(config)
        known = {"config": config, "size": ModelSize(**facts["size"]), "parts": parts,
                 "part_windows": tuple(facts["part_windows"])}  # fmt: skip
        tokenizer = read_tokenizer(parts[0].folder, parts[0].manifest)
        return cls(manifest=combined(parts), tokenizer=tokenizer, **{**facts, **known})


def settle(config: Config, n_processes: int = 1, checkpoint: Checkpoint | None = None) -> RunSpec:
    """Settle a run: every `auto` and null, checked against its data; no model is allocated.

    Args:
        config: The run.
        n_processes: Processes that train.
        checkpoint: The one to resume from, whose settled values hold.

    Raises:
        ConfigError: The configuration does not fit the data.
        DataError, CheckpointError: The data, or the weights to start from, cannot be used.
    """
    notes: list[str] = []
    parts = read_parts(config)
    manifest = combined(parts)
    tokenizer = read_tokenizer(parts[0].folder, parts[0].manifest)
    config, pretrained = apply_pretrained_shape(config, tokenizer, checkpoint)
    config = _resolve(config, parts, manifest, checkpoint, notes)
    # A prompt that cannot be sampled from should not come to light at the end of the run.
    if config.generate.prompt:
        sample_start(tokenizer, config.generate, config.trained_context)
    train_tokens, val_tokens = open_parts(parts, config)
    if config.train.stop_after is not None and not val_tokens:
        raise ConfigError("train.stop_after: there is no validation text", "set data.val_fraction")
    part_windows = make_loader([*train_tokens.values()], config, 0).part_windows
    packing = "; ".join(f"{name}: " * bool(name) + tokens.description
                        for name, tokens in train_tokens.items()
                        if not isinstance(tokens, TokenReader))  # fmt: skip
    config, budget = _within_budget(config, checkpoint)
    max_steps = max_steps_of(config, part_windows)
    size = model_size(config)
    # The bits depend on these, so a run keeps to them. On a CPU, timed steps may decide on threads.
    is_timed = config.device == "cpu" and n_processes == 1 and checkpoint is None
    is_tuned = is_timed and max_steps >= _TUNED_STEPS and size.parameters < _TUNED_PARAMETERS
    if config.compile == "auto":
        pays = compiling_pays(config, max_steps, budget)
        config = config.model_copy(update={"compile": pays})
    if config.threads == "auto" and not is_tuned:
        threads = _recorded_threads(checkpoint, n_processes) or torch.get_num_threads()
        config = config.model_copy(update={"threads": threads})
    parallel = choose_parallelism(config, size, n_processes)
    rows = rows_of(config, n_processes)
    if config.train.micro_batch_size == "auto":
        rows = fitting_rows(config, size, parallel, n_processes)
        notes.append(f"micro_batch_size is {rows}: the most rows that fit and divide a step")
        config = with_train(config, micro_batch_size=rows)
    elif rows != config.rows:
        notes.append(
            f"micro_batch_size reduced to {rows} so that it divides evenly among the processes"
        )
    return RunSpec(
        config, manifest, tokenizer, size, sum(part_windows), max_steps, rows, n_processes,
        parallel, pretrained, tuple(notes), budget, packing, parts, part_windows,
    )  # fmt: skip


def _resolve(
    config: Config,
    parts: tuple[Part, ...],
    manifest: Manifest,
    checkpoint: Checkpoint | None,
    notes: list[str],
) -> Config:
    """Settle what the machine and the data decide, as the checkpoint has it if there is one."""
    from gptcli.data.settings import require_same_settings  # which compares, and that is all

    if checkpoint is not None:
        update = {key: checkpoint.config[key] for key in _MACHINE_KEYS}
        update = {key: value for key, value in update.items() if getattr(config, key) == "auto"}
        if update.get("device", "cpu") not in available_devices():
            notes.append(f"this machine has no {update['device']}: the bits will differ")
            update = {}
        config = config.model_copy(update=update)
        if config.train.micro_batch_size == "auto":
            rows = checkpoint.config["train"]["micro_batch_size"]
            config = with_train(config, micro_batch_size=rows)
    config = resolve_auto(config)
    notes += require_same_settings(parts)
    if manifest.is_chat and config.stride != config.seq_len:
        raise ConfigError(
            f"data.stride: {config.stride} applies to windows of text, and {parts[0].folder} holds"
            " conversations", "drop the setting",
        )  # fmt: skip
    vocab_size = config.model.vocab_size or manifest.tokenizer.vocab_size
    if vocab_size < manifest.tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size: {vocab_size} is smaller than the {manifest.tokenizer.vocab_size}"
            f" tokens of the vocabulary in {parts[0].folder}"
        )
    folder = {} if config.data.mix is not None else {"dir": parts[0].place}
    sections = {
        "data": {**folder, "seq_len": config.seq_len, "stride": config.stride},
        "tokenizer": {"name": manifest.tokenizer.name},
        "model": {"vocab_size": vocab_size},
        "train": {"tokens_per_step": config.tokens_per_step},
        "optim": {"min_lr": config.min_lr},
    }
    update = {key: getattr(config, key).model_copy(update=new) for key, new in sections.items()}
    return config.model_copy(update={**update, "run_dir": str(config.run_folder)})


def _recorded_threads(checkpoint: Checkpoint | None, n_processes: int) -> int | None:
    """Return the threads that a run began with, if as many processes share them now."""
    machine = {} if checkpoint is None else checkpoint.state["machine"]
    threads: int | None = machine.get("threads")
    return threads if machine.get("processes") == n_processes else None


def with_train(config: Config, **values: Any) -> Config:
    """Return `config` with other values in its train section."""
    return config.model_copy(update={"train": config.train.model_copy(update=values)})


def _within_budget(config: Config, checkpoint: Checkpoint | None) -> tuple[Config, float | None]:
    """Return `config` with the steps of its time budget; the minutes if these are not timed yet.

    A resumed run keeps its steps. With other minutes, they change in proportion to the time that
    those done so far took.
    """
    minutes, state = config.train.max_minutes, checkpoint.state if checkpoint is not None else {}
    if minutes is None:
        return config, None
    if minutes != state.get("minutes") and not state.get("step"):
        return config, minutes
    assert checkpoint is not None
    steps: int | None = checkpoint.config["train"]["max_steps"]  # None if epochs set them
    given, done = config.train.max_steps, state["step"]
    if minutes != state.get("minutes"):
        given = None if given == steps else given
        steps = max(done, int(done * 60 * minutes / max(state["seconds"], 1e-9)))
    return with_train(config, max_steps=min(n for n in (given, steps) if n is not None)), None


def max_steps_of(config: Config, part_windows: Sequence[int]) -> int:
    """Return the most steps to train: given, or from epochs; one epoch if nothing is given.

    Raises:
        ConfigError: The steps given take more epochs of a source than it may have.
    """
    given, mix = config.train.max_steps, config.data.mix
    limits = [given] if given else []
    if config.train.max_minutes and not limits:
        limits = [_MOST_STEPS]
    if config.train.max_epochs or not limits:
        n_seen = (config.train.max_epochs or 1) * sum(part_windows)
        limits.append(max(1, ceil(n_seen / (config.tokens_per_step // config.seq_len))))
    if mix is not None and any(each.max_epochs is not None for each in mix):
        from gptcli.data.mixture import most_steps

        most = most_steps(config, part_windows)
        if not most or (given and given > most):
            raise ConfigError(
                f"data.mix: the max_epochs of its sources allow {most:,} steps of"
                f" {config.tokens_per_step:,} tokens" + f", not {given:,}" * bool(given),
                f"use -s train.max_steps={most}, a higher max_epochs or a lower weight"
                if most
                else "use a higher max_epochs, a lower weight or smaller train.tokens_per_step",
            )
        limits.append(most)
    return min(limits)


def rows_of(config: Config, n_processes: int) -> int:
    """Return the rows of a micro-batch: at most those requested, and as many on every rank.

    Raises:
        ConfigError: The rows of a step cannot be divided evenly.
    """
    n_rows = config.tokens_per_step // config.seq_len
    if n_rows % n_processes:
        fewer = next(n for n in range(n_processes, 0, -1) if n_rows % n == 0)
        more = -(-n_rows // n_processes) * n_processes * config.seq_len
        raise ConfigError(
            f"train.tokens_per_step: a step of {n_rows} rows of {config.seq_len} tokens cannot be"
            f" divided evenly among {n_processes} processes",
            f"use {fewer} processes, or -s train.tokens_per_step={more}",
        )
    each = n_rows // n_processes
    return next(rows for rows in range(min(config.rows, each), 0, -1) if each % rows == 0)


def compiling_pays(config: Config, max_steps: int, minutes: float | None = None) -> bool:
    """Tell whether a run is on CUDA, and long enough to be worth compiling its model first.

    On a CPU, compiled steps are no faster than those of attention.c and kernels.c.
    """
    n_params = 12 * config.model.n_layer * config.model.n_embd**2
    is_long = 6 * n_params * max_steps * config.tokens_per_step > _SHORT_RUN
    return config.device == "cuda" and is_long and (minutes is None or minutes > _COMPILE_MINUTES)


def compile_seconds(config: Config) -> float:
    """Return what compiling takes, with a cold cache."""
    return _COMPILE_SECONDS + _COMPILE_SECONDS_PER_BLOCK * config.model.n_layer
