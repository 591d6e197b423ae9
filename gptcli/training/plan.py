"""What a run would do, need and take, found out without training it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gptcli.config.schema import Config
from gptcli.config.windows import eval_tokens
from gptcli.data.shards import read_manifest, read_tokenizer
from gptcli.data.sources import data_dir
from gptcli.distributed.world import World
from gptcli.errors import ConfigError
from gptcli.model import GPT
from gptcli.training.estimate import look_ahead
from gptcli.training.initial import adopt, freeze, n_learning
from gptcli.training.outlook import Outlook
from gptcli.training.parallel import Kind, rows_of, settle_kind
from gptcli.training.rehearsal import Rehearsal, rehearse
from gptcli.training.resolve import (
    close_tokens,
    make_loader,
    max_steps_of,
    open_tokens,
    resolve,
    with_compile,
    with_train,
)
from gptcli.training.run import RUN
from gptcli.training.unusual import Counts

_FORWARD_SHARE = 1 / 3  # of a training step's arithmetic, which an evaluation does too


@dataclass(frozen=True)
class Plan:
    """A fresh run, as far as it is known beforehand.

    Attributes:
        rows: Of a micro-batch in each process.
        evaluations: In the whole run.
        eval_tokens: Of one evaluation, both splits together.
        processes: That are to do it.
        parallel: How they share the network: none, ddp or fsdp.
        holds_run: Whether the run folder has a run in it already.
    """

    run_dir: str
    data_dir: str
    init_from: str
    revision: str | None
    parameters: int
    trained_parameters: int
    train_tokens: int
    val_tokens: int
    tokens_per_step: int
    grad_accum_steps: int
    max_steps: int
    epochs: float
    device: str
    dtype: str
    compile: bool
    tokenizer: str
    vocab_size: int
    model_vocab_size: int
    rows: int
    evaluations: int
    eval_tokens: int
    processes: int
    parallel: Kind
    holds_run: bool
    outlook: Outlook

    def seconds_left(self, rehearsal: Rehearsal) -> dict[str, float]:
        """Return the time that the rest of the run is expected to take, by what it goes into."""
        steps = self.max_steps - rehearsal.step
        per_token = rehearsal.seconds_per_step / self.tokens_per_step
        evaluations = self.evaluations * steps / self.max_steps
        return {
            "setting up": rehearsal.setup_seconds,
            "steps": steps * rehearsal.seconds_per_step,
            "evaluating": evaluations * self.eval_tokens * per_token * _FORWARD_SHARE,
        }

    def json(self, rehearsal: Rehearsal | None = None) -> dict[str, Any]:
        """Return the JSON result of `gpt train --dry-run`."""
        facts = asdict(self)
        outlook = facts.pop("outlook")
        memory = self.outlook.memory
        facts["memory_bytes"] = outlook.pop("memory") | {"total": memory.total}
        facts["disk_bytes"] = outlook.pop("disk")
        facts["unusual"] = outlook.pop("unusual")
        measured = dict.fromkeys(_MEASURED)
        if rehearsal is not None and rehearsal.seconds_per_step:
            measured = {
                "step": rehearsal.step,
                "seconds_per_step": rehearsal.seconds_per_step,
                "tokens_per_second": self.tokens_per_step / rehearsal.seconds_per_step,
                "seconds": sum(self.seconds_left(rehearsal).values()),
                "measured_memory_bytes": rehearsal.memory_bytes,
            }
        return {**facts, **outlook, **measured}


_MEASURED = (
    "step", "seconds_per_step", "tokens_per_second", "seconds", "measured_memory_bytes"
)  # fmt: skip


def plan(config: Config, n_processes: int = 1) -> Plan:
    """Check a fresh run as far as that is possible without training, and say what it would do.

    Args:
        config: The run.
        n_processes: That are to do it.

    Raises:
        ConfigError: The configuration does not fit the data.
        DataError: The data cannot be used.
        CheckpointError: The weights to start from cannot be used.
    """
    folder = data_dir(config.data)
    manifest = read_manifest(folder)
    config, origin = adopt(config, read_tokenizer(folder, manifest), None)
    config = resolve(config, folder, manifest, None, [])
    train_tokens, val_tokens = open_tokens(folder, manifest, config)
    n_train, n_val = len(train_tokens), len(val_tokens) if val_tokens is not None else 0
    loader = make_loader(config, train_tokens)
    close_tokens(train_tokens, val_tokens)
    with torch.device("meta"):
        model = GPT(config.model)
    freeze(model, config.train.freeze)
    rows = rows_of(config, n_processes)
    max_steps = max_steps_of(config, loader)
    config = with_compile(config, max_steps)
    device = torch.device(config.device)
    kind = settle_kind(config, World(size=n_processes), model.n_params(), device)
    epochs = loader.epochs(max_steps)
    counts = Counts(
        model.n_params(), n_train, n_val, manifest.documents, manifest.tokenizer.vocab_size,
        max_steps, epochs, rows,
    )  # fmt: skip
    return Plan(
        run_dir=str(config.run_folder),
        data_dir=str(folder),
        init_from=config.model.init_from,
        revision=origin.revision if origin is not None else None,
        parameters=model.n_params(),
        trained_parameters=n_learning(model),
        train_tokens=n_train,
        val_tokens=n_val,
        tokens_per_step=config.tokens_per_step,
        grad_accum_steps=config.tokens_per_step // (rows * config.seq_len * n_processes),
        max_steps=max_steps,
        epochs=round(epochs, 3),
        device=config.device,
        dtype=config.dtype,
        compile=config.compile is True,
        tokenizer=manifest.tokenizer.name,
        vocab_size=manifest.tokenizer.vocab_size,
        model_vocab_size=model.wte.num_embeddings,
        rows=rows,
        evaluations=-(-max_steps // config.train.eval_every),
        eval_tokens=sum(eval_tokens(n_train, n_val, config.seq_len, config.train.eval_tokens)),
        processes=n_processes,
        parallel=kind,
        holds_run=(Path(config.run_folder) / RUN).is_file(),
        outlook=look_ahead(config, counts, kind, n_processes),
    )


def plan_with_steps(
    config: Config, n_processes: int = 1, *, resume: bool = False
) -> tuple[Plan, Rehearsal | None]:
    """Plan a run and do its first three steps, where this process alone can.

    Of several processes with a GPU each, one does its share of a step; on a CPU, whose cores they
    share, it does all of it. What the exchange of gradients takes is not in it.

    Returns:
        The plan; what the steps took, None where there is too little memory for them, or shards.

    Raises:
        GptError: As training does.
    """
    found = plan(config, n_processes)
    if found.parallel == "fsdp" or not found.outlook.memory.fits:
        return found, None
    share = config
    if n_processes > 1 and found.device != "cpu":
        share = with_train(
            config,
            micro_batch_size=found.rows,
            tokens_per_step=found.tokens_per_step // n_processes,
        )
    try:
        rehearsal = rehearse(share, resume=resume)
    except ConfigError:
        if n_processes > 1 and resume:  # its own share is another step than the run's
            return found, None
        raise
    if config.train.micro_batch_size == "auto":
        found = plan(with_train(config, micro_batch_size=rehearsal.rows), n_processes)
    return found, rehearsal
