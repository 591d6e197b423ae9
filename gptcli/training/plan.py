"""What a run would do, need and take, found out without training it."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gptcli.config.schema import Config
from gptcli.data.shards import read_manifest, read_tokenizer
from gptcli.data.sources import data_dir
from gptcli.distributed.process_group import World
from gptcli.errors import ConfigError
from gptcli.runs import RUN
from gptcli.training.advice import advise
from gptcli.training.estimate import estimate_requirements
from gptcli.training.memory import size_of
from gptcli.training.parallel import Parallelism, choose_parallelism, rows_of
from gptcli.training.requirements import Advice, Requirements
from gptcli.training.resolve import (
    close_tokens,
    make_loader,
    max_steps_of,
    open_tokens,
    resolve,
    with_compile,
    with_train,
)
from gptcli.training.timing import TimedSteps, time_steps
from gptcli.training.weights import apply_pretrained_shape
from gptcli.training.work import RunCounts, cost_of_step, estimate_work


@dataclass(frozen=True)
class Plan:
    """A fresh run, as far as it is known beforehand.

    Attributes:
        rows: Of a micro-batch in each process.
        evaluations: In the whole run.
        eval_tokens: Of the validation split that each evaluation scores.
        eval_train_tokens: Of the training split, likewise.
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
    eval_train_tokens: int
    processes: int
    parallel: Parallelism
    holds_run: bool
    outlook: Requirements
    config: Config
    counts: RunCounts

    def seconds_left(self, rehearsal: TimedSteps) -> dict[str, float]:
        """Return the time that the rest of the run is expected to take, by what it goes into."""
        per_token = rehearsal.seconds_per_step / cost_of_step(self.config)
        work = estimate_work(self.config, self.counts, rehearsal.step)
        return {
            "setting up": rehearsal.setup_seconds,
            **{name: cost * per_token for name, cost in work.costs.items()},
        }

    def measured_advice(self, rehearsal: TimedSteps | None) -> tuple[Advice, ...]:
        """Return what there is to say besides, now that it is known how long a token takes."""
        if rehearsal is None or not rehearsal.seconds_per_step:
            return ()
        per_token = rehearsal.seconds_per_step / cost_of_step(self.config)
        found = advise(self.config, self.counts, per_token)
        return tuple(one for one in found if one not in self.outlook.advice)

    def json(self, rehearsal: TimedSteps | None = None) -> dict[str, Any]:
        """Return the JSON result of `gpt train --dry-run`."""
        facts = asdict(self)
        outlook = facts.pop("outlook")
        del facts["config"], facts["counts"]
        memory = self.outlook.memory
        facts["memory_bytes"] = outlook.pop("memory") | {"total": memory.total}
        facts["disk_bytes"] = outlook.pop("disk")
        facts["advice"] = [
            *outlook.pop("advice"), *(asdict(one) for one in self.measured_advice(rehearsal))
        ]  # fmt: skip
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
        DataError, CheckpointError: The data, or the weights to start from, cannot be used.
    """
    folder = data_dir(config.data)
    manifest = read_manifest(folder)
    config, origin = apply_pretrained_shape(config, read_tokenizer(folder, manifest), None)
    config = resolve(config, folder, manifest, None, [])
    train_tokens, val_tokens = open_tokens(folder, manifest, config)
    n_train, n_val = len(train_tokens), len(val_tokens) if val_tokens is not None else 0
    loader = make_loader(config, train_tokens)
    close_tokens(train_tokens, val_tokens)
    max_steps = max_steps_of(config, loader)
    config = with_compile(config, max_steps)
    size, rows = size_of(config), rows_of(config, n_processes)
    kind = choose_parallelism(
        config, World(size=n_processes), size.parameters, torch.device(config.device)
    )
    counts = RunCounts.of(
        manifest, n_params=size.parameters, train_tokens=n_train, val_tokens=n_val,
        max_steps=max_steps, n_windows=loader.n_windows, rows=rows, processes=n_processes,
    )  # fmt: skip
    work = estimate_work(config, counts)
    return Plan(
        run_dir=str(config.run_folder),
        data_dir=str(folder),
        init_from=config.model.init_from,
        revision=origin.revision if origin is not None else None,
        parameters=size.parameters,
        trained_parameters=size.learning,
        train_tokens=n_train,
        val_tokens=n_val,
        tokens_per_step=config.tokens_per_step,
        grad_accum_steps=config.grad_accum_steps(rows, n_processes),
        max_steps=max_steps,
        epochs=round(loader.epochs(max_steps), 3),
        device=config.device,
        dtype=config.dtype,
        compile=config.compile is True,
        tokenizer=manifest.tokenizer.name,
        vocab_size=manifest.tokenizer.vocab_size,
        model_vocab_size=config.model.vocab_size or manifest.tokenizer.vocab_size,
        rows=rows,
        evaluations=work.evaluations,
        eval_tokens=work.eval_tokens[1],
        eval_train_tokens=work.eval_tokens[0],
        processes=n_processes,
        parallel=kind,
        holds_run=(Path(config.run_folder) / RUN).is_file(),
        outlook=estimate_requirements(config, size, counts, kind),
        config=config,
        counts=counts,
    )


def plan_with_steps(
    config: Config,
    n_processes: int = 1,
    *,
    resume: bool = False,
    on_plan: Callable[[Plan], None] = lambda plan: None,
) -> tuple[Plan, TimedSteps | None]:
    """Plan a run and time a little of it, where this process alone can.

    Of several processes with a GPU each, one does its share of a step; on a CPU, whose cores they
    share, it does all of it. What the exchange of gradients takes is not in it.

    Args:
        config: The run.
        n_processes: That are to do it.
        resume: Go on from its newest checkpoint.
        on_plan: Given the plan as soon as it is known, which is before anything is timed unless
            the rows of a micro-batch have to be found out.

    Returns:
        The plan; what was measured, None where there is too little memory for it, or shards.

    Raises:
        GptError: As training does.
    """
    found = plan(config, n_processes)
    is_open = config.train.micro_batch_size == "auto"
    if not is_open:
        on_plan(found)
    rehearsal = None
    if found.parallel != "fsdp" and found.outlook.memory.fits:
        rehearsal = _measure(config, found, resume)
    if is_open:
        if rehearsal is not None:
            found = plan(with_train(config, micro_batch_size=rehearsal.rows), n_processes)
        on_plan(found)
    return found, rehearsal


def _measure(config: Config, found: Plan, resume: bool) -> TimedSteps | None:
    share = config
    if found.processes > 1 and found.device != "cpu":
        share = with_train(
            config,
            micro_batch_size=found.rows,
            tokens_per_step=found.tokens_per_step // found.processes,
        )
    try:
        return time_steps(share, resume=resume)
    except ConfigError:
        if found.processes > 1 and resume:  # its own share is another step than the run's
            return None
        raise
