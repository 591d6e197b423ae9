"""A run before its first step: what it is, what it needs and takes, as a record and as text."""

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from gptcli.config.model import ModelConfig
from gptcli.config.schema import Config
from gptcli.data.shards import Manifest
from gptcli.device import memory_bytes, peak_flops, synchronize
from gptcli.distributed.process_group import World
from gptcli.errors import ConfigError
from gptcli.formatting import plural, scored, size
from gptcli.runs import RUN
from gptcli.runs.folder import ReadOnlyRun
from gptcli.training.advice import Advice, advise, drawn, estimate_work, step_cost
from gptcli.training.calibrate import steps_within
from gptcli.training.memory import Disk, Memory, estimate_disk, estimate_memory
from gptcli.training.optim import clip_gradients, lr_at
from gptcli.training.setup import Session, set_up
from gptcli.training.spec import RunSpec, compile_seconds, settle, with_train

SECONDS = 4.0  # that are spent on micro-batches, about, however long one is
_FIRST_TOKENS = 64
_REPEATS = 5


@dataclass(frozen=True)
class TimedSteps:
    """What a step takes."""

    step: int  # steps done before, by a run that is resumed
    seconds_per_step: float  # all its micro-batches and its update; 0 if there are no steps left
    measured_tokens: int  # tokens of the largest batch that was timed; the rest is multiplied
    setup_seconds: float  # reading, building and compiling
    memory_bytes: int  # peak memory
    max_steps: int = 0  # steps of the whole run, as its time budget allows


@dataclass(frozen=True)
class Plan:
    """A settled run, what it needs, and advice about it."""

    spec: RunSpec  # the run
    memory: Memory  # memory of one process
    disk: Disk  # disk space for checkpoints
    flops_per_token: int  # floating-point operations of training on one token
    peak_flops: float | None  # those that one device could do in a second; None if unknown
    advice: tuple[Advice, ...]  # what few runs have on purpose

    @classmethod
    def of(cls, spec: RunSpec, allocated: int = 0) -> "Plan":
        """Estimate what a run needs; `allocated` bytes of it this process has already."""
        config, counts = spec.config, spec.size
        n_frozen = counts.parameters - counts.trained
        name = torch.cuda.get_device_name() if config.device == "cuda" else ""
        return cls(
            spec,
            estimate_memory(config, counts, spec.rows, spec.parallel, spec.n_processes, allocated),
            estimate_disk(config, counts),
            flops_per_token(config.model, counts.parameters, n_frozen, config.seq_len),
            peak_flops(name, config.dtype),
            advise(spec),
        )

    def seconds_left(self, timed: TimedSteps) -> dict[str, float]:
        """Return the expected seconds of the rest of the run, by kind of work."""
        per_token = timed.seconds_per_step / step_cost(self.spec.config)
        work = estimate_work(self.spec, timed.step)
        parts = {kind: cost * per_token for kind, (_, cost) in work.items()}
        return {"setting up": timed.setup_seconds, **parts}

    def measured_advice(self, timed: TimedSteps | None) -> tuple[Advice, ...]:
        """Return the advice that follows from how long a token takes."""
        if timed is None or not timed.seconds_per_step:
            return ()
        per_token = timed.seconds_per_step / step_cost(self.spec.config)
        return tuple(one for one in advise(self.spec, per_token) if one not in self.advice)

    def lines(self, step: int = 0) -> list[tuple[str, str]]:
        """Return the plan as text, by label, for a run that has done `step` steps."""
        spec, config, counts = self.spec, self.spec.config, self.spec.size
        trained = f", {counts.trained:,} of them trained" * (counts.trained < counts.parameters)
        source = config.model.init_from
        start = f", from {source}" * (source != "scratch")
        goal = f"from step {step:,} to " * bool(step) + f"{spec.max_steps:,}"
        if spec.budget is not None:
            goal = f"as many as fit in {plural(spec.budget, 'minute')}"
        machine: str = config.device
        if spec.n_processes > 1:
            machine = f"{spec.n_processes} x {machine} ({spec.parallel})"
        compiled = ", compiled" * (config.compile is True)
        micro = f"{spec.rows:,} x {spec.grad_accum_steps:,}"
        micro += f" x {spec.n_processes}" * (spec.n_processes > 1)
        n_evaluations = estimate_work(spec)["evaluating"].times
        record, n_rows = spec.manifest.tokenizer, config.model.vocab_size
        padded = f" (the model has {n_rows:,} rows)" * (n_rows != record.vocab_size)
        memory, names = self.memory, ("weights", "gradients", "optimizer", "activations", "program")
        parts = ", ".join(f"{name} {size(n)}" for name in names if (n := getattr(memory, name)))
        each = f" for each of {memory.processes} processes" * (memory.processes > 1)
        available = f" of {size(memory.available)}" if memory.available is not None else ""
        return [
            ("run", str(config.run_folder)),
            ("model", f"{counts.parameters:,} parameters{trained}{start}"),
            ("machine", f"{machine}, {config.dtype}{compiled}"),
            ("data", f"{config.data.dir or plural(len(spec.parts), 'source')}:"
                     f" {spec.train_tokens:,} + {spec.val_tokens:,} tokens,"
                     f" {record.name} of {record.vocab_size:,} ids{padded}"),
            *(("", each.text) for each in drawn(spec)),
            *_conversations(spec),
            ("steps", f"{goal} of {plural(spec.tokens_per_step, 'token')} (rows: {micro})"
                      + f", {plural(spec.epochs, 'epoch')}" * (spec.budget is None)),
            ("evaluation", f"{plural(n_evaluations, 'time')}, " * (spec.budget is None)
                           + _scored(spec)),
            ("memory", f"about {size(memory.total)}{each}{available}, an estimate: {parts}"),
            ("disk", f"{size(self.disk.needed)} for checkpoints of {size(self.disk.checkpoint)}"
                     f" each; {size(self.disk.free)} free"),
        ]  # fmt: skip

    def json(self, timed: TimedSteps | None = None) -> dict[str, Any]:
        """Return the JSON result of `gpt train --dry-run`."""
        spec, config, counts = self.spec, self.spec.config, self.spec.size
        if timed is not None and not timed.seconds_per_step:
            timed = None
        return {
            "run_dir": str(config.run_folder),
            "data_dir": config.data.dir,
            "sources": [asdict(each) for each in drawn(spec)] or None,
            "init_from": config.model.init_from,
            "revision": spec.pretrained.revision if spec.pretrained is not None else None,
            "parameters": counts.parameters,
            "trained_parameters": counts.trained,
            "train_tokens": spec.train_tokens,
            "val_tokens": spec.val_tokens,
            "conversations": sum(each.documents for each in _chats(spec)) or None,
            "trained_tokens": spec.manifest.trained("train"),
            "packing": spec.packing or None,
            "tokens_per_step": spec.tokens_per_step,
            "grad_accum_steps": spec.grad_accum_steps,
            "max_steps": None if spec.budget is not None else spec.max_steps,
            "max_minutes": config.train.max_minutes,
            "epochs": None if spec.budget is not None else round(spec.epochs, 3),
            "device": config.device,
            "dtype": config.dtype,
            "compile": config.compile is True,
            "tokenizer": spec.manifest.tokenizer.name,
            "vocab_size": spec.manifest.tokenizer.vocab_size,
            "model_vocab_size": config.model.vocab_size,
            "rows": spec.rows,
            "evaluations": estimate_work(spec)["evaluating"].times,
            "eval_tokens": spec.eval_tokens[1],
            "eval_train_tokens": spec.eval_tokens[0],
            "processes": spec.n_processes,
            "parallel": spec.parallel,
            "holds_run": self.holds_run,
            "memory_bytes": asdict(self.memory) | {"total": self.memory.total},
            "disk_bytes": asdict(self.disk),
            "flops_per_token": self.flops_per_token,
            "peak_flops": self.peak_flops,
            "advice": [asdict(one) for one in (*self.advice, *self.measured_advice(timed))],
            "step": timed and timed.step,
            "seconds_per_step": timed and timed.seconds_per_step,
            "tokens_per_second": timed and spec.tokens_per_step / timed.seconds_per_step,
            "seconds": timed and sum(self.seconds_left(timed).values()),
            "measured_memory_bytes": timed and timed.memory_bytes,
        }

    @property
    def holds_run(self) -> bool:
        """Whether the run folder has a run in it already."""
        return (self.spec.config.run_folder / RUN).is_file()


def plan(config: Config, n_processes: int = 1) -> Plan:
    """Return the plan of a fresh run; raises what `settle` does."""
    return Plan.of(settle(config, n_processes))


def plan_with_steps(
    config: Config,
    n_processes: int = 1,
    *,
    resume: bool = False,
    on_plan: Callable[[Plan], None] = lambda plan: None,
) -> tuple[Plan, TimedSteps | None]:
    """Plan a run and time a little of it, where this process alone can.

    Of several processes with a GPU each, one does its share of a step; on a CPU, whose cores they
    share, it does all of it. The exchange of gradients is left out.

    Args:
        config: The run.
        n_processes: Processes that train.
        resume: Time it from its newest checkpoint.
        on_plan: Called with the plan before anything is timed.

    Returns:
        The plan; what was measured, None where there is too little memory for it, or shards.

    Raises:
        GptError: As training does.
    """
    found, timed = plan(config, n_processes), None
    spec = found.spec
    can_time = spec.parallel != "fsdp" and found.memory.fits
    if spec.budget is None or not can_time:
        on_plan(found)
    if not can_time:
        return found, None
    share = with_train(config, micro_batch_size=spec.rows)
    if n_processes > 1 and spec.config.device != "cpu":
        share = with_train(share, tokens_per_step=spec.tokens_per_step // n_processes)
    try:
        timed = time_steps(share, resume=resume)
    except ConfigError:
        if not (n_processes > 1 and resume):  # its own share is another step than the run's
            raise
    if spec.budget is not None:
        found = found if timed is None else Plan.of(spec.lasting(timed.max_steps))
        on_plan(found)
    return found, timed


def time_steps(config: Config, *, resume: bool = False) -> TimedSteps:
    """Set up a run in this process alone, and time some of its micro-batches and an update.

    Batches grow from a few tokens to a micro-batch while there is time for the next larger one, so
    it takes seconds whatever the model. Compiling, which takes longer, is not tried: its time is
    added, and what it gives is left out. Nothing is kept or written. Raises what training does.
    """
    began = time.perf_counter()
    run = ReadOnlyRun(config.run_folder)
    with contextlib.closing(set_up(run, config, World(), resume=resume)) as session:
        spec, setup = session.spec, time.perf_counter() - began
        per_token, measured = _seconds_per_token(session)
        update = _timed(session, _update)
        compiling = compile_seconds(spec.config) if spec.config.compile is True else 0.0
        seconds, max_steps = spec.tokens_per_step * per_token + update, spec.max_steps
        if spec.budget is not None:
            max_steps = steps_within(spec, 60 * spec.budget - compiling, seconds)
        return TimedSteps(
            step=session.state.step,
            max_steps=max_steps,
            seconds_per_step=seconds * (session.state.step < max_steps),
            measured_tokens=measured,
            setup_seconds=setup + compiling,
            memory_bytes=memory_bytes(session.compute.device),
        )


def _seconds_per_token(session: Session) -> tuple[float, int]:
    """Return what a token of a micro-batch takes, and the tokens of the batch that showed it."""
    batches = session.loader.micro_batches(session.state.step, session.spec.rows)
    batch = [part.to(session.compute.device) for part in next(batches)]
    began, n, is_over = time.perf_counter(), _FIRST_TOKENS, False
    while not is_over:
        part = [tensor[: n // tensor.shape[1] or 1, :n].contiguous() for tensor in batch]
        seconds = _timed(session, _pass, *part)
        while time.perf_counter() - began < SECONDS / 20:  # what is first used is slow once
            seconds = _timed(session, _pass, *part)
        n, n_tokens = 2 * n, part[0].numel()
        is_next_late = time.perf_counter() - began + 2 * seconds > SECONDS
        is_over = is_next_late or n_tokens == batch[0].numel()
    again = [seconds]
    while len(again) < _REPEATS and time.perf_counter() - began + seconds < SECONDS:
        again.append(_timed(session, _pass, *part))
    return statistics.median(again) / n_tokens, n_tokens


def _timed(session: Session, work: Callable[..., None], *arguments: Tensor) -> float:
    began = time.perf_counter()
    work(session, *arguments)
    synchronize(session.compute.device)
    return time.perf_counter() - began


def _pass(session: Session, *batch: Tensor) -> None:
    """Go forward and backward, gradients adding up as in a step."""
    with session.compute.autocast():
        recompute = session.config.train.activation_checkpointing
        loss = session.model(*batch, recompute=recompute).loss
    torch.autograd.backward(loss)


def _update(session: Session) -> None:
    """Clip and update, as at the end of a step."""
    clip_gradients(session.parameters.values(), session.config.optim.grad_clip)
    session.optimizer.step(lr_at(session.state.step, session.spec.max_steps, session.config))
    session.optimizer.zero_grad()


def flops_per_token(config: ModelConfig, n_params: int, n_frozen: int, seq_len: int) -> int:
    """Return the floating-point operations of training on a token.

    6 N + 12 L H D T of Chowdhery et al. 2022 (PaLM), appendix B, for N parameters in products. Rows
    that are only looked up are in none: positions, pairs, and embeddings that are not the head. Two
    of the six operations are the parameter's gradient, which frozen ones lack.
    """
    looked_up = config.block_size * config.n_embd if config.position == "learned" else 0
    if not config.tie_embeddings:
        looked_up += (config.vocab_size or 0) * config.n_embd
    kv_width = (config.n_kv_head or config.n_head) * config.head_size
    looked_up += config.bigram_rows * config.n_embd
    looked_up += config.n_value_embd * (config.vocab_size or 0) * kv_width
    in_products = n_params - looked_up
    attention = 12 * config.n_layer * config.n_head * config.head_size * seq_len
    return 6 * in_products - 2 * min(n_frozen, in_products) + attention


def _chats(spec: RunSpec) -> list[Manifest]:
    return [part.manifest for part in spec.parts if part.manifest.is_chat]


def _conversations(spec: RunSpec) -> list[tuple[str, str]]:
    """Return the line of the plan about conversations; none for text."""
    chats = _chats(spec)
    if not chats:
        return []
    trained = sum(each.trained("train") for each in chats)
    share = trained / max(1, sum(each.tokens.train for each in chats))
    n = sum(each.documents for each in chats)
    each = f"{n:,} conversations, {share:.0%} of their training tokens trained on"
    return [("packing", f"{each}; {spec.packing}")]


def _scored(spec: RunSpec) -> str:
    """Return on how much of each split an evaluation measures the losses."""
    splits = zip(spec.eval_tokens, (spec.train_tokens, spec.val_tokens),
                 ("training", "validation"), strict=True)  # fmt: skip
    return " and ".join(
        f"{scored(n, total).strip(' ()') or f'{n:,} tokens'} of the {split} split"
        for n, total, split in reversed(list(splits)) if n
    )  # fmt: skip
