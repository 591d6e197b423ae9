"""From a configuration to everything the loop works with, fresh or resumed.

Every `auto` that was settled once is taken up again when a run is resumed.
"""

import platform
from dataclasses import asdict, dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any

import torch

from gptcli import __version__
from gptcli.checkpoint import BASE, Checkpoint, load_weights, save_checkpoint
from gptcli.config.schema import Config
from gptcli.data.loader import TokenLoader, require_window
from gptcli.data.shards import Manifest, TokenReader, read_manifest, read_tokenizer
from gptcli.data.sources import data_dir
from gptcli.device import Compute, available_devices, compute, machine_facts, settle
from gptcli.errors import CheckpointError, ConfigError, DataError
from gptcli.generation import encode_prompt
from gptcli.model import GPT, is_adapter
from gptcli.tokenizers import Tokenizer, make_tokenizer
from gptcli.training.fit import compiling_pays, fitting_rows, require_disk
from gptcli.training.initial import adopt, first_network, freeze, frozen_names, n_learning
from gptcli.training.optim import Optimizer
from gptcli.training.resume import compare_settings, machine_changes, newest_checkpoint
from gptcli.training.run import Run, describe_run

_MACHINE_KEYS = ("device", "dtype", "compile", "deterministic")


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


@dataclass
class Session:
    """All that one call of `train` works with."""

    run: Run
    config: Config
    compute: Compute
    tokenizer: Tokenizer
    manifest: Manifest
    train_tokens: TokenReader
    val_tokens: TokenReader | None
    loader: TokenLoader
    model: GPT
    optimizer: Optimizer
    state: TrainState
    max_steps: int
    is_resumed: bool
    notes: list[str]

    def close(self) -> None:
        """Close the data's files."""
        self.train_tokens.close()
        if self.val_tokens is not None:
            self.val_tokens.close()

    def save(self) -> Path:
        """Write the checkpoint of the present step and return its file."""
        self.run.sync_metrics()
        self.state.machine = machine_facts(self.compute.device)
        path = self.run.step_file(self.state.step)
        weights: dict[str, torch.Tensor] = dict(self.model.named_parameters())
        checkpoint = Checkpoint(
            model=weights,
            optimizer=self.optimizer.state(),
            config=self.config.model_dump(mode="json"),
            tokenizer=self.tokenizer.definition(),
            data=data_facts(self.config, self.manifest),
            state=asdict(self.state),
        )
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
        return replace(checkpoint, model=adapters, state=asdict(self.state))


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


def start(run: Run, config: Config, *, resume: bool) -> Session:
    """Set up a run: data, network, optimizer, and the position to go on from.

    Raises:
        ConfigError: The configuration does not fit the data, or changes what a run must keep.
        DataError: The data cannot be used.
        CheckpointError: There are checkpoints, but none can be used.
    """
    notes: list[str] = []
    checkpoint = newest_checkpoint(run, notes) if resume else None
    if resume and checkpoint is None:
        notes.append("nothing to resume here: starting at step 0")
    folder = data_dir(config.data)
    manifest = read_manifest(folder)
    tokenizer = read_tokenizer(folder, manifest)
    config, origin = adopt(config, tokenizer, checkpoint)
    config = _resolve(config, folder, manifest, checkpoint, notes)
    if checkpoint is not None:
        notes += compare_settings(checkpoint, config, manifest, tokenizer)
    # A prompt that cannot be sampled from should not come to light at the run's end.
    encode_prompt(tokenizer, config.generate.prompt, config.model.block_size)
    train_tokens, val_tokens = _open_tokens(folder, manifest, config)
    loader = _loader(config, train_tokens)
    if checkpoint is None:
        state = TrainState(origin=origin.facts() if origin is not None else {})
        model = first_network(config, origin)
        if origin is not None:
            notes.append(
                f"weights of {origin.name}" + f" at {origin.revision}" * bool(origin.revision)
            )
    else:
        state = _restore_state(checkpoint)
        model = GPT(config.model)
        load_weights(model, checkpoint.model, run.folder)
    freeze(model, config.train.freeze)
    max_steps = _max_steps(config, loader)
    config = _with_compile(config, max_steps)
    machine = compute(config)
    if (n_trained := n_learning(model)) < model.n_params():
        notes.append(f"{n_trained:,} of {model.n_params():,} parameters learn")
    model.to(machine.device)
    require_disk(config, model, run.checkpoints)
    if config.train.micro_batch_size == "auto":
        rows = fitting_rows(config, model, machine)
        notes.append(f"micro_batch_size is {rows}: the most rows that fit and divide a step")
        config = with_train(config, micro_batch_size=rows)
    optimizer = Optimizer(model, config.optim, machine.device)
    if checkpoint is not None:
        were_frozen = frozen_names(model, checkpoint.config["train"].get("freeze", []))
        optimizer.load_state(checkpoint.optimizer, were_frozen)
        notes += machine_changes(state.machine, machine_facts(machine.device))
    describe_run(run, _facts(config, manifest, model, state))
    return Session(
        run, config, machine, tokenizer, manifest, train_tokens, val_tokens, loader, model,
        optimizer, state, max_steps, checkpoint is not None, notes,
    )  # fmt: skip


def plan(config: Config) -> dict[str, Any]:
    """Check a fresh run as far as that is possible without training, and say what it would do.

    Raises:
        ConfigError: The configuration does not fit the data.
        DataError: The data cannot be used.
        CheckpointError: The weights to start from cannot be used.
    """
    folder = data_dir(config.data)
    manifest = read_manifest(folder)
    config, origin = adopt(config, read_tokenizer(folder, manifest), None)
    config = _resolve(config, folder, manifest, None, [])
    train_tokens, val_tokens = _open_tokens(folder, manifest, config)
    loader = _loader(config, train_tokens)
    with torch.device("meta"):
        model = GPT(config.model)
    freeze(model, config.train.freeze)
    max_steps = _max_steps(config, loader)
    config = _with_compile(config, max_steps)
    return {
        "run_dir": str(config.run_folder),
        "data_dir": str(folder),
        "init_from": config.model.init_from,
        "revision": origin.revision if origin is not None else None,
        "parameters": model.n_params(),
        "trained_parameters": n_learning(model),
        "train_tokens": len(train_tokens),
        "val_tokens": len(val_tokens) if val_tokens is not None else 0,
        "tokens_per_step": config.tokens_per_step,
        "grad_accum_steps": config.grad_accum_steps,
        "max_steps": max_steps,
        "epochs": round(max_steps * config.tokens_per_step / config.seq_len / loader.n_windows, 3),
        "device": config.device,
        "dtype": config.dtype,
        "compile": config.compile,
    }


def _loader(config: Config, train_tokens: TokenReader) -> TokenLoader:
    return TokenLoader(
        train_tokens,
        seq_len=config.seq_len,
        stride=config.stride,
        windows_per_step=config.tokens_per_step // config.seq_len,
        seed=config.seed,
    )


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
        raise CheckpointError(f"a checkpoint with another state ({error})") from error


def _resolve(
    config: Config,
    folder: Path,
    manifest: Manifest,
    checkpoint: Checkpoint | None,
    notes: list[str],
) -> Config:
    """Settle every `auto` and null that a run keeps, from its checkpoint if it has one."""
    _require_supported(config)
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
    config = settle(config)
    _require_same_data_settings(config, manifest)
    vocab_size = config.model.vocab_size or manifest.tokenizer.vocab_size
    if vocab_size < manifest.tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size: {vocab_size} is smaller than the {manifest.tokenizer.vocab_size}"
            f" tokens of the vocabulary in {folder}"
        )
    sections = {
        "data": {"dir": str(folder), "seq_len": config.seq_len, "stride": config.stride},
        "tokenizer": {"name": manifest.tokenizer.name},
        "model": {"vocab_size": vocab_size},
        "train": {"tokens_per_step": config.tokens_per_step},
        "optim": {"min_lr": config.min_lr},
    }
    update = {key: getattr(config, key).model_copy(update=new) for key, new in sections.items()}
    return config.model_copy(update={**update, "run_dir": str(config.run_folder)})


def _with_compile(config: Config, max_steps: int) -> Config:
    """Settle whether to compile; from then on a run keeps to it, for the bits differ."""
    if config.compile != "auto":
        return config
    return config.model_copy(update={"compile": compiling_pays(config, max_steps)})


def with_train(config: Config, **values: Any) -> Config:
    """Return `config` with other values in its train section."""
    return config.model_copy(update={"train": config.train.model_copy(update=values)})


def _require_supported(config: Config) -> None:
    """Refuse settings that nothing would heed."""
    if config.train.parallel != "auto":
        raise ConfigError("train.parallel: this version trains in one process; leave it at auto")


def _require_same_data_settings(config: Config, manifest: Manifest) -> None:
    """Refuse shards that were prepared otherwise than the configuration says.

    Raises:
        DataError: With both values.
    """
    recipe = manifest.recipe
    found: dict[str, object] = {
        "tokenizer.name": recipe.tokenizer.name,
        "tokenizer.vocab_size": recipe.max_vocab_size,
        "data.text_field": recipe.text_field,
        "data.encoding_errors": recipe.encoding_errors,
        "data.val_fraction": recipe.val_fraction,
    }
    if config.tokenizer.path is not None:
        found.pop("tokenizer.name")
        if make_tokenizer(config.tokenizer, list).fingerprint != recipe.tokenizer.sha256:
            raise DataError(
                f"{data_dir(config.data)} was prepared with another tokenizer than"
                f" tokenizer.path = {config.tokenizer.path}",
                "prepare it anew: the same configuration with `gpt prepare --force`",
            )
    values = config.model_dump()
    for key, there in found.items():
        section, name = key.split(".")
        here = values[section][name]
        if config.is_set(key) and here is not None and here != there:
            raise DataError(
                f"{data_dir(config.data)} was prepared with {key} = {there},"
                f" the configuration says {here}",
                "drop the setting, or prepare anew: `gpt prepare --force` with this configuration",
            )


def _open_tokens(
    folder: Path, manifest: Manifest, config: Config
) -> tuple[TokenReader, TokenReader | None]:
    """Open both splits; without validation tokens there is no second one."""
    train_tokens = TokenReader(folder, manifest, "train")
    val_tokens = TokenReader(folder, manifest, "val")
    if not len(val_tokens):
        return train_tokens, None
    require_window(val_tokens, config.seq_len, "val")
    return train_tokens, val_tokens


def _max_steps(config: Config, loader: TokenLoader) -> int:
    """Return the steps to train: given, or from epochs; one epoch if neither is."""
    limits = [config.train.max_steps] if config.train.max_steps else []
    if config.train.max_epochs or not limits:
        windows = (config.train.max_epochs or 1) * loader.n_windows
        limits.append(max(1, ceil(windows / (config.tokens_per_step // config.seq_len))))
    return min(limits)
