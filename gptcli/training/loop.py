"""The training loop, on one page: train, log, save, evaluate, link the best.

`train` yields events; whoever reads them draws, prints or waits. Knows no terminal.
"""

import contextlib
import math
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from gptcli.checkpoint import BEST, LAST
from gptcli.config.schema import Config
from gptcli.device import Compute, memory_bytes
from gptcli.errors import MemoryLimitError, NonFiniteError
from gptcli.evaluation import TokenSequence, evaluate
from gptcli.generation import TextStream, encode_prompt, stream
from gptcli.keyed import keyed_int
from gptcli.model import GPT, GPTOutput
from gptcli.training.events import (
    EpochDone,
    Evaluated,
    Event,
    Finished,
    Sampled,
    Saved,
    Started,
    StepDone,
    Stopped,
    Summary,
    describe,
    metrics_of,
)
from gptcli.training.optim import clip_gradients
from gptcli.training.run import open_run
from gptcli.training.schedule import lr_at
from gptcli.training.session import Session, start
from gptcli.training.stop import Stop

MOST_EVAL_TOKENS = 1_000_000


def train(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    stop: Stop | None = None,
) -> Iterator[Event]:
    """Train a network, yielding what happens.

    Args:
        config: The run.
        resume: Go on from the newest checkpoint that verifies.
        overwrite: Set an old run in the folder aside and begin anew.
        stop: Read between micro-batches; once asked, the state is saved and the run ends.

    Raises:
        GptError: Every kind that a user can cause; what is saved stays usable.
    """
    with open_run(config, resume=resume, overwrite=overwrite) as run:
        session = start(run, config, resume=resume)
        with contextlib.closing(session):
            yield from _events(session, resume, stop or Stop())


def _events(session: Session, resume: bool, stop: Stop) -> Iterator[Event]:
    """Run a session and write down what it yields; one that was finished has nothing to do."""
    run = session.run
    summary = run.read_status().get("summary")
    if resume and summary and session.state.step >= session.max_steps:
        yield Finished(session.state.step, Summary(**summary))
        return
    run.cut_metrics(session.state.step)
    for event in Trainer(session, stop).events():
        if (line := metrics_of(event)) is not None:
            run.add_metrics(line)
        if (text := describe(event)) is not None:
            run.log(text)
        yield event


class Trainer:
    """The loop and its tallies."""

    def __init__(self, session: Session, stop: Stop) -> None:
        self.s = session
        self.stop = stop
        self.network, note = _network(session.model, session.compute, session.config)
        if note:
            session.notes.append(note)
        self.scaler = torch.amp.GradScaler(
            session.compute.device.type, enabled=session.compute.dtype == torch.float16
        )
        if session.state.scaler:
            self.scaler.load_state_dict(session.state.scaler)
        self.resumed_seconds = session.state.seconds
        self.began = time.perf_counter()
        self.step_seconds = 0.0
        self.steps_timed = 0
        self.last_rate: float | None = None
        self.evaluated: Evaluated | None = None
        self.saved_step = session.state.step if session.is_resumed else None

    def events(self) -> Iterator[Event]:
        """Run to the last step, or until asked to stop."""
        state, train = self.s.state, self.s.config.train
        yield self._started()
        self.s.run.write_status("running", state.step, None)
        if self.saved_step is None:
            yield self._save()  # also shows at once whether the disk takes a checkpoint
        elif self._due(train.eval_every):
            yield from self._evaluate()
        while state.step < self.s.max_steps:
            done = self._step()
            if done is None or self.stop.requested():
                break
            yield done
            is_best_epoch = yield from self._end_epoch()
            if is_best_epoch or self._due(train.save_every) or self._due(train.eval_every):
                yield self._save()
            if is_best_epoch:
                self.s.run.link(state.step, BEST)
            if self._due(train.eval_every):
                yield from self._evaluate()
            if train.sample_every and self._due(train.sample_every):
                yield self._sample()
        if self.stop.requested():
            yield from self._stopped()
            return
        if not train.sample_every:
            yield self._sample()
        summary = self._summary()
        self.s.run.write_status("finished", state.step, 0, summary=asdict(summary))
        yield Finished(state.step, summary)

    def _stopped(self) -> Iterator[Event]:
        """Save what is not yet saved, and say so."""
        step = self.s.state.step
        if self.saved_step != step:
            yield self._save()
        self.s.run.write_status("stopped", step, self.stop.exit_code)
        yield Stopped(step, self._summary())

    def _due(self, every: int) -> bool:
        """Tell whether something done every so many steps, and at the last, is due now."""
        step = self.s.state.step
        return step > 0 and (step % every == 0 or step == self.s.max_steps)

    def _step(self) -> StepDone | None:
        """Do one optimizer step; None if asked to stop, with everything as before the step."""
        s, state, config = self.s, self.s.state, self.s.config
        began = time.perf_counter()
        lr = lr_at(state.step, s.max_steps, config)
        with _memory_errors(config):
            loss = self._accumulate()
            if loss is None:
                s.optimizer.zero_grad()
                return None
            s.optimizer.unscale(self.scaler)
            norm = float(clip_gradients(s.model, config.optim.grad_clip))
            self._require_finite(float(loss), norm)
            s.optimizer.step(lr, self.scaler)
            s.optimizer.zero_grad()
        state.step += 1
        state.epoch_loss += float(loss)
        state.epoch_tokens += config.tokens_per_step
        self.step_seconds += time.perf_counter() - began
        self.steps_timed += 1
        state.seconds = self.resumed_seconds + time.perf_counter() - self.began
        rate = self.steps_timed * config.tokens_per_step / self.step_seconds
        done = StepDone(
            step=state.step,
            tokens=state.step * config.tokens_per_step,
            loss=float(loss) / config.tokens_per_step,
            lr=lr,
            grad_norm=norm,
            tokens_per_second=rate,
            memory_bytes=memory_bytes(s.compute.device),
            seconds=state.seconds,
            logged=self._due(config.train.log_every),
        )
        if done.logged:
            self.last_rate, self.step_seconds, self.steps_timed = rate, 0.0, 0
        return done

    def _accumulate(self) -> Tensor | None:
        """Add up the gradients of a step's micro-batches; return the sum of its losses, nats."""
        s, step = self.s, self.s.state.step
        total = torch.zeros((), device=s.compute.device)
        micro_batches = s.loader.micro_batches(step, s.config.train.micro_batch_size)
        for index, (tokens, targets) in enumerate(micro_batches):
            if self.stop.requested():
                return None
            if s.config.model.dropout:
                torch.manual_seed(keyed_int("dropout", s.config.seed, step, index))
            with s.compute.autocast():
                loss = self.network(tokens.to(s.compute.device), targets.to(s.compute.device)).loss
            assert loss is not None
            torch.autograd.backward(self.scaler.scale(loss / s.config.tokens_per_step))
            total += loss.detach()
        return total

    def _require_finite(self, loss: float, norm: float) -> None:
        """Keep a loss or gradient that is not finite away from the weights."""
        overflowed = self.scaler.is_enabled() and math.isfinite(loss)  # the scaler skips and adapts
        if (math.isfinite(loss) and math.isfinite(norm)) or overflowed:
            return
        step = self.s.state.step
        what = "gradient" if math.isfinite(loss) else "loss"
        files = self.s.run.step_files()
        raise NonFiniteError(
            f"step {step + 1}: the {what} is not finite; step {step} was the last good one"
            + (f", saved: {files[0]}" if files else ""),
            "try a lower optim.lr, more optim.warmup_steps, or dtype=float32",
        )

    def _end_epoch(self) -> Generator[Event, None, bool]:
        """Report the epoch the last step completed; tell whether it is the best to keep.

        Without validation the best is by epoch loss, and a run too short for one still has a best.
        """
        s, state = self.s, self.s.state
        epoch = s.loader.epoch_of(state.step)
        completed = epoch > s.loader.epoch_of(state.step - 1)
        loss = state.epoch_loss / state.epoch_tokens
        if completed:
            state.epoch_loss, state.epoch_tokens = 0.0, 0
            yield EpochDone(state.step, epoch, loss)
        elif state.step < s.max_steps or state.best_loss is not None:
            return False
        if s.val_tokens is not None or (state.best_loss is not None and loss >= state.best_loss):
            return False
        state.best_loss, state.best_step = loss, state.step
        return True

    def _save(self) -> Saved:
        """Write a checkpoint, then let go of old ones."""
        if self.scaler.is_enabled():
            self.s.state.scaler = dict(self.scaler.state_dict())
        path = self.s.save()
        self.saved_step = self.s.state.step
        self.s.run.link(self.s.state.step, LAST)
        self.s.run.retain(self.s.config.train.keep_last)
        self.s.run.write_status("running", self.s.state.step, None)
        return Saved(self.s.state.step, path)

    def _evaluate(self) -> Iterator[Event]:
        """Score fixed windows of both splits, and link the best so far."""
        s, state = self.s, self.s.state
        val_loss = None
        n_tokens = s.config.train.eval_tokens or MOST_EVAL_TOKENS
        if s.val_tokens is not None:
            val_loss = self._loss(s.val_tokens, n_tokens)
            n_tokens = min(n_tokens, len(s.val_tokens))
        train_loss = self._loss(s.train_tokens, n_tokens)
        if train_loss is None or (val_loss is None and s.val_tokens is not None):
            return  # asked to stop; resuming evaluates again
        is_best = val_loss is not None and (state.best_loss is None or val_loss < state.best_loss)
        if is_best:
            state.best_loss, state.best_step = val_loss, state.step
            s.run.link(state.step, BEST)
        self.evaluated = Evaluated(state.step, val_loss, train_loss, is_best)
        yield self.evaluated

    def _loss(self, tokens: TokenSequence, n_tokens: int) -> float | None:
        s = self.s
        result = evaluate(
            s.model, tokens, s.compute,
            context=s.config.seq_len, max_tokens=n_tokens, stopped=self.stop.requested,
        )  # fmt: skip
        return None if result is None else result.loss

    def _sample(self) -> Sampled:
        """Draw a text with the network as it is."""
        s = self.s
        config, prompt = s.config.generate, s.config.generate.prompt
        ids = encode_prompt(s.tokenizer, prompt, s.config.model.block_size)
        s.model.eval()
        tokens = stream(
            s.model, ids, config, s.compute,
            eot=s.tokenizer.eot, n_tokens=s.tokenizer.vocab_size, seed=s.config.seed,
        )  # fmt: skip
        text = "".join(TextStream(tokens, s.tokenizer, config))
        s.model.train()
        return Sampled(s.state.step, prompt or "", text)

    def _started(self) -> Started:
        s = self.s
        return Started(
            run_dir=s.run.folder,
            step=s.state.step,
            max_steps=s.max_steps,
            n_params=s.model.n_params(),
            n_windows=s.loader.n_windows,
            tokens_per_step=s.config.tokens_per_step,
            grad_accum_steps=s.config.grad_accum_steps,
            train_tokens=len(s.train_tokens),
            val_tokens=len(s.val_tokens) if s.val_tokens is not None else 0,
            device=str(s.compute.device),
            dtype=str(s.compute.dtype).removeprefix("torch."),
            compiled=self.network is not s.model,
            tokenizer=s.tokenizer.name,
            vocab_size=s.tokenizer.vocab_size,
            notes=tuple(s.notes),
        )

    def _summary(self) -> Summary:
        s, state = self.s, self.s.state
        paths = (s.run.folder / name for name in (BEST, LAST))
        checkpoint: Path | None = next((path for path in paths if path.exists()), None)
        return Summary(
            run_dir=str(s.run.folder),
            step=state.step,
            tokens=state.step * s.config.tokens_per_step,
            train_loss=self.evaluated.train_loss if self.evaluated else None,
            val_loss=self.evaluated.val_loss if self.evaluated else None,
            best_val_loss=state.best_loss if s.val_tokens is not None else None,
            tokens_per_second=self.last_rate,
            seconds=state.seconds,
            checkpoint=str(checkpoint) if checkpoint else None,
        )


def _network(
    model: GPT, compute: Compute, config: Config
) -> tuple[Callable[[Tensor, Tensor], GPTOutput], str | None]:
    """Return the network as it is trained, compiled where asked for and possible.

    Compilers fail in many ways, and late: one forward and backward pass tries it. The second
    value says why a network that should have been compiled is not.
    """
    if not compute.compile:
        return model, None
    compiled = torch.compile(model)
    tokens = torch.zeros(
        config.train.micro_batch_size, config.seq_len, dtype=torch.int64, device=compute.device
    )
    try:
        with compute.autocast():
            torch.autograd.backward(compiled(tokens, tokens).loss)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        return model, f"not compiled: {reason}"
    finally:
        model.zero_grad(set_to_none=True)
    return compiled, None


@contextlib.contextmanager
def _memory_errors(config: Config) -> Iterator[None]:
    """Turn running out of memory into an error that names a smaller micro-batch."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not is_memory and "can't allocate memory" not in str(error):
            raise
        size = config.train.micro_batch_size
        raise MemoryLimitError(
            f"out of memory with micro_batch_size {size} and seq_len {config.seq_len}",
            f"-s train.micro_batch_size={size // 2} -s train.tokens_per_step="
            f"{config.tokens_per_step} --resume does the same steps in half the memory"
            if size > 1 and size % 2 == 0
            else "use a smaller network, a shorter data.seq_len, or dtype=bfloat16",
        ) from error
