"""The training loop on one page: train, log, save, evaluate, link the best.

`train` yields events; their reader draws, prints or ignores them.
"""

import contextlib
import math
import time
from collections.abc import Collection, Generator, Iterator
from dataclasses import asdict, replace
from typing import Any

from gptcli import atomic
from gptcli.checkpoint import Checkpoint
from gptcli.config.schema import Config
from gptcli.config.windows import MOST_EVAL_TOKENS
from gptcli.device import memory_bytes
from gptcli.distributed.process_group import process_group
from gptcli.errors import GptError, StorageError
from gptcli.evaluation import TokenSequence, evaluate
from gptcli.generation import Decoding, TextStream, encode_prompt
from gptcli.runs import BEST, METRICS, SAMPLES, STATUS
from gptcli.runs.folder import ReadOnlyRun, Run, open_run
from gptcli.training.clock import Clock, Spent, spent_before
from gptcli.training.estimate import requirements_of
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
    Working,
    describe,
    metrics_of,
    sample_of,
    summary_of,
)
from gptcli.training.failures import propagate_to_peers, report_to_torchrun, start_watchdog
from gptcli.training.parallel import sharded_inference
from gptcli.training.saver import AsyncCheckpointWriter
from gptcli.training.setup import Session, set_up
from gptcli.training.signals import StopRequest
from gptcli.training.step import LARGE, Stepper, not_finite


def train(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    stop: StopRequest | None = None,
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
    stop = stop or StopRequest()
    with contextlib.ExitStack() as stack:
        stack.enter_context(report_to_torchrun())
        world = stack.enter_context(process_group(config.device))
        stack.enter_context(propagate_to_peers(world))
        resume = resume or world.restarts > 0  # torchrun repeats the command as it was
        stop.join(world)
        run: Run = ReadOnlyRun(config.run_folder)
        if world.is_main:
            run = stack.enter_context(open_run(config, resume=resume, overwrite=overwrite))
        stack.enter_context(contextlib.closing(start_watchdog(world, config, stop)))
        session = stack.enter_context(contextlib.closing(set_up(run, config, world, resume=resume)))
        yield from _events(session, resume, stop)
        if stop.exit_code is not None:
            world.post_failure("stopped, and saved", stop.exit_code)


def _events(session: Session, resume: bool, stop: StopRequest) -> Iterator[Event]:
    """Run a session and write down what it yields; one that was finished has nothing to do."""
    run, step = session.run, session.state.step
    ended = session.world.broadcast_object(run.read_status)
    if resume and step >= session.max_steps:
        if (summary := summary_of(ended)) is not None and summary.step == step:
            recorded = ended.get("best_step")
            best_step = recorded if isinstance(recorded, int) else session.state.best_step
            run.restore_links(step, best_step)
            yield Finished(step, replace(summary, **run.places()), best_step=best_step)
            return
        session.notes.append(f"{run.folder / STATUS} does not say how the run ended")
    trainer = Trainer(session, stop, ended)
    with contextlib.closing(trainer):
        try:
            for event in trainer.events():
                again = event.step == step  # a look at the step that was resumed
                if (line := metrics_of(event)) is not None:
                    run.append(METRICS, line, again=again)
                if (line := sample_of(event)) is not None:
                    run.append(SAMPLES, line, again=again)
                if (text := describe(event)) is not None:
                    run.log(text)
                yield event
        except StorageError as error:
            raise trainer.rescued(error) from error


class Trainer:
    """The loop and its tallies."""

    def __init__(self, session: Session, stop: StopRequest, status: dict[str, Any]) -> None:
        self.s = session
        self.stop = stop
        self.clock = Clock(spent_before(status, session.state.step, session.state.seconds))
        self.stepper = Stepper(session)
        self.clock.add("compiling", self.stepper.compile_seconds)
        self.saver = AsyncCheckpointWriter(session.saves_in_background)
        self.step_seconds = 0.0
        self.steps_timed = 0
        self.last_rate: float | None = None
        self.evaluated: Evaluated | None = None
        self.best_epoch: Checkpoint | None = None  # still to be written
        self.saved_step = session.state.step if session.is_resumed else None
        self.sampled_step: int | None = None

    def close(self) -> None:
        """End the threads that read ahead and save."""
        self.saver.close()
        self.stepper.feed.close()

    def events(self) -> Iterator[Event]:
        """Run to the last step, or until asked to stop."""
        s, state, train = self.s, self.s.state, self.s.config.train
        looked, left_out = s.world.broadcast_object(lambda: s.run.cut_history(state.step))
        s.notes += left_out
        yield self._started()
        s.run.write_config(s.config)
        s.run.write_status("running", state.step, None, seconds_by_work=self.clock.spent())
        if self.saved_step is None:
            yield from self._save()  # also shows at once whether the disk takes a checkpoint
        else:
            self.s.run.link_newest(state.step, state.best_step)  # the crash may have come before
            yield from self._look(again=looked)
        while state.step < s.max_steps:
            done = self._step()
            if done is None:
                break
            yield done
            yield from self.saver.finished()
            is_best_epoch = yield from self._end_epoch()
            if self._due(train.save_every) or self._due(train.eval_every):
                yield from self._save()
            elif is_best_epoch:
                yield from self._keep_best_epoch()
            yield from self._look()
        is_stopped = self.stop.requested()
        if is_stopped and self.saved_step != state.step:
            yield from self._save()
        elif not is_stopped and self.sampled_step != state.step and not train.sample_every:
            yield from self._sample()
        yield from self.saver.finished(wait=True)
        yield self._end(is_stopped)

    def _end(self, is_stopped: bool) -> Event:
        """Write down how the run has ended."""
        step, best, spent = self.s.state.step, self.s.state.best_step, self.clock.spent()
        summary, write = self._summary(spent), self.s.run.write_status
        if is_stopped:
            write("stopped", step, self.stop.exit_code, seconds_by_work=spent)
            return Stopped(step, summary, spent, best)
        write("finished", step, 0, summary=asdict(summary), best_step=best, seconds_by_work=spent)
        return Finished(step, summary, spent, best)

    def _look(self, again: Collection[str] = ()) -> Iterator[Event]:
        """Evaluate and sample, where it is due or, on resuming, was done `again` already."""
        sample_every = self.s.config.train.sample_every
        if self._due(self.s.config.train.eval_every) or METRICS in again:
            yield from self._evaluate()
        if (sample_every and self._due(sample_every)) or SAMPLES in again:
            yield from self._sample()

    def _due(self, every: int) -> bool:
        """Tell whether something done every so many steps, and at the last, is due now."""
        step = self.s.state.step
        return step > 0 and (step % every == 0 or step == self.s.max_steps)

    def _step(self) -> StepDone | None:
        """Do one optimizer step and its bookkeeping; None if asked to stop before it was done."""
        state, config = self.s.state, self.s.config
        began, waited = time.perf_counter(), self.stepper.feed.waited
        result = self.stepper.step(self.stop.requested)
        if result is None:
            return None
        state.step += 1
        if not result.skipped:
            state.epoch_loss += result.loss
            state.epoch_tokens += config.tokens_per_step
        seconds = time.perf_counter() - began
        waited = self.stepper.feed.waited - waited
        self.clock.add("steps", seconds - waited)
        self.clock.add("waiting for data", waited)
        self.step_seconds += seconds
        self.steps_timed += 1
        state.seconds = self.clock.seconds
        rate = self.steps_timed * config.tokens_per_step / self.step_seconds
        done = StepDone(
            step=state.step,
            tokens=state.step * config.tokens_per_step,
            loss=result.loss / config.tokens_per_step,
            lr=result.lr,
            grad_norm=result.grad_norm,
            tokens_per_second=rate,
            memory_bytes=memory_bytes(self.s.compute.device),
            seconds=state.seconds,
            logged=self._due(config.train.log_every) or result.skipped,
            skipped=result.skipped,
        )
        if done.logged:
            self.last_rate, self.step_seconds, self.steps_timed = rate, 0.0, 0
        return done

    def _end_epoch(self) -> Generator[Event, None, bool]:
        """Report the epoch the last step completed; tell whether it is the best to keep.

        Without validation the best is by epoch loss, and a run too short for one still has a best.
        """
        s, state = self.s, self.s.state
        epoch = s.loader.epoch_of(state.step)
        completed = epoch > s.loader.epoch_of(state.step - 1)
        loss = state.epoch_loss / state.epoch_tokens if state.epoch_tokens else math.nan  # skipped
        if completed:
            state.epoch_loss, state.epoch_tokens = 0.0, 0
            yield EpochDone(state.step, epoch, loss)
        elif state.step < s.max_steps or state.best_loss is not None:
            return False
        if s.val_tokens is not None or not state.is_better(loss):
            return False
        state.best_loss, state.best_step = loss, state.step
        return True

    def _save(self, *, tell: bool = True) -> Iterator[Event]:
        """Write a checkpoint, or have it written while training goes on; let go of old ones."""
        s, step = self.s, self.s.state.step
        if tell:
            yield Working(step, "saving")
        with self.clock.during("saving"), s.world.busy():
            yield from self.saver.finished(wait=True)
            s.state.seconds, spent = self.clock.seconds, self.clock.spent()
            checkpoint = s.snapshot(copy=self.saver.in_background)
            best_step, best_epoch, self.best_epoch = s.state.best_step, self.best_epoch, None
            s.run.sync_metrics()

            def commit() -> Saved | None:
                if best_epoch is not None and best_epoch.state["step"] == best_step:
                    s.write(best_epoch, s.run.folder / BEST)
                path = s.write(checkpoint)
                s.run.write_status("running", step, None, seconds_by_work=spent)
                s.run.link_newest(step, best_step)
                s.run.retain(s.config.train.keep_last)
                return Saved(step, path) if tell else None

            if s.world.is_main:
                self.saver.submit(commit)
            self.saved_step = step
        yield from self.saver.finished()

    def _keep_best_epoch(self) -> Iterator[Event]:
        """Keep the best so far for the next checkpoint to write; epochs may be short."""
        if self.s.model.n_params() >= LARGE:  # too large to be kept twice
            yield from self._save()
        else:
            self.best_epoch = self.s.snapshot(copy=True)

    def rescued(self, error: StorageError) -> StorageError:
        """Save the state if only files were taken away; return the error, which then says so."""
        s, step, is_gone = self.s, self.s.state.step, FileNotFoundError | IsADirectoryError
        # A full disk takes no checkpoint that its history lacks; other ranks would not give theirs.
        alone = s.world.size == 1 and s.run.folder.is_dir()
        if not alone or not isinstance(error.__cause__, is_gone):
            return error
        with contextlib.suppress(GptError, OSError):
            self.saver.close()
            atomic.make_folder(s.run.checkpoints)
            s.state.seconds = self.clock.seconds
            path = s.write(s.snapshot(copy=False))
            with contextlib.suppress(GptError):  # one of the names may be what was taken
                s.run.link_newest(step, s.state.best_step)
            hint = "move what is in the way elsewhere, then run the same command with --resume"
            return StorageError(f"{error.message}; step {step} is saved in {path}", hint)
        return error

    def _evaluate(self) -> Iterator[Event]:
        """Score fixed windows of both splits; the best so far is saved again, with its loss."""
        s, state = self.s, self.s.state
        yield Working(state.step, "evaluating")
        val_loss = None
        n_tokens = s.config.train.eval_tokens or MOST_EVAL_TOKENS
        if s.val_tokens is not None:
            val_loss = self._loss(s.val_tokens, n_tokens)
            n_tokens = min(n_tokens, len(s.val_tokens))
        train_loss = self._loss(s.train_tokens, n_tokens)
        if train_loss is None or (val_loss is None and s.val_tokens is not None):
            return  # asked to stop; resuming evaluates again
        s.sound_step, is_best = state.step, state.is_better(val_loss)
        if is_best and (state.best_step, state.best_loss) != (state.step, val_loss):
            state.best_step, state.best_loss = state.step, val_loss
            yield from self._save(tell=False)
        scored = (s.eval_tokens, s.n_val_tokens)
        self.evaluated = Evaluated(state.step, val_loss, train_loss, is_best, scored)
        yield self.evaluated

    def _loss(self, tokens: TokenSequence, n_tokens: int) -> float | None:
        s = self.s
        with self.clock.during("evaluating"), sharded_inference(s.model, s.compute):
            result = evaluate(
                s.model, tokens, s.compute,
                context=s.config.seq_len, max_tokens=n_tokens, stopped=self.stop.requested,
                turn=(s.world.rank, s.world.size),
            )  # fmt: skip
        if result is None:
            return None
        nats, n_scored = s.world.all_reduce_sum(result.nats, result.tokens)
        if not math.isfinite(nats):
            self.saver.close()  # first, the checkpoint that is still being written
            split = "validation" if tokens is s.val_tokens else "training"
            raise not_finite(s, f"{split} loss", s.sound_step)
        return nats / n_scored

    def _sample(self) -> Iterator[Event]:
        """Draw a text with the network as it is."""
        s = self.s
        yield Working(s.state.step, "sampling")
        config, prompt = s.config.generate, s.config.generate.prompt
        context, ends, seed = s.config.trained_context, s.tokenizer.ends, s.config.seed
        ids = encode_prompt(s.tokenizer, prompt, context)
        s.model.eval()
        decoding = iter(Decoding(s.model, ids, config, ends=ends, seed=seed, context=context))
        text = TextStream(s.tokenizer, config)
        with self.clock.during("sampling"), sharded_inference(s.model, s.compute):
            while True:  # every rank draws the same, for shards compute only together
                drawn = next(decoding, None)
                if drawn is not None:
                    text.push(drawn.token)
                is_done = s.world.all_reduce_max(drawn is None or text.is_stopped)
                if is_done or self.stop.requested():
                    break
            text.finish()
        s.model.train()
        self.sampled_step = s.state.step
        yield Sampled(s.state.step, prompt or "", text.text)

    def _started(self) -> Started:
        s = self.s
        return Started(
            run_dir=s.run.folder,
            step=s.state.step,
            max_steps=s.max_steps,
            n_params=s.model.n_params(),
            n_windows=s.loader.n_windows,
            epochs=s.epochs,
            tokens_per_step=s.config.tokens_per_step,
            grad_accum_steps=s.grad_accum_steps,
            train_tokens=len(s.train_tokens),
            val_tokens=s.n_val_tokens,
            eval_tokens=s.eval_tokens,
            device=str(s.compute.device),
            processes=s.world.size,
            parallel=s.kind,
            dtype=str(s.compute.dtype).removeprefix("torch."),
            compiled=self.stepper.compiled,
            tokenizer=s.tokenizer.name,
            vocab_size=s.tokenizer.vocab_size,
            model_vocab_size=s.model.wte.num_embeddings,
            outlook=requirements_of(s),
            best_loss=s.state.best_loss,
            best_step=s.state.best_step,
            notes=tuple(s.notes),
        )

    def _summary(self, spent: Spent) -> Summary:
        s, state = self.s, self.s.state
        return Summary(
            **s.run.places(),
            step=state.step,
            tokens=state.step * s.config.tokens_per_step,
            train_loss=self.evaluated.train_loss if self.evaluated else None,
            val_loss=self.evaluated.val_loss if self.evaluated else None,
            best_val_loss=state.best_loss if s.val_tokens is not None else None,
            tokens_per_second=self.last_rate,
            seconds=sum(spent.values()),
            val_tokens=s.eval_tokens if s.val_tokens is not None else None,
            val_split_tokens=s.n_val_tokens or None,
            best_epoch_loss=state.best_loss if s.val_tokens is None else None,
        )
