"""The training loop on one page: train, log, save, evaluate, link the best.

`train` yields events; their reader draws, prints or ignores them.
"""

import contextlib
import math
import time
from collections.abc import Collection, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

from gptcli import atomic
from gptcli.checkpoint import Checkpoint
from gptcli.config.schema import Config
from gptcli.data.loader import Split
from gptcli.device import memory_bytes, restored_threads
from gptcli.distributed.process_group import process_group
from gptcli.errors import GptError, StorageError
from gptcli.evaluation import evaluate
from gptcli.generation import Row, Rows, Sample, sample_start
from gptcli.runs import BEST, METRICS, SAMPLES, STATUS
from gptcli.runs.folder import ReadOnlyRun, Run, open_run
from gptcli.runs.record import SourceLoss
from gptcli.training import events
from gptcli.training.parallel import all_local
from gptcli.training.setup import Session, set_up
from gptcli.training.signals import StopRequest, propagate_to_peers, watched
from gptcli.training.step import LARGE, not_finite


def train(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    stop: StopRequest | None = None,
) -> Iterator[events.Event]:
    """Train a model, yielding what happens.

    Args:
        config: The run.
        resume: Resume from the newest checkpoint that verifies.
        overwrite: Rename an old run in the folder and start over.
        stop: Read between micro-batches; on request, the state is saved and the run ends.

    Raises:
        GptError: Every kind that a user can cause; what is saved stays usable.
    """
    stop = stop or StopRequest()
    with contextlib.ExitStack() as stack:
        stack.enter_context(restored_threads())
        world = stack.enter_context(process_group(config.device))
        stack.enter_context(propagate_to_peers(world))
        resume = resume or world.restarts > 0  # torchrun repeats the command as it was
        stop.join(world)
        run: Run = ReadOnlyRun(config.run_folder)
        if world.is_main:
            run = stack.enter_context(open_run(config, resume=resume, overwrite=overwrite))
        stack.enter_context(watched(world, config, stop))
        session = stack.enter_context(contextlib.closing(set_up(run, config, world, resume=resume)))
        yield from _events(session, resume, stop)
        if stop.exit_code is not None:
            world.post_failure("stopped, and saved", stop.exit_code)


def _events(session: Session, resume: bool, stop: StopRequest) -> Iterator[events.Event]:
    """Run a session and record its events; a finished one has nothing to do."""
    run, step = session.run, session.state.step
    status = session.world.broadcast_object(run.read_status)
    if resume and (step >= session.spec.max_steps or session.stalled):
        if (summary := events.summary_of(status)) is not None and summary.step == step:
            recorded = status.get("best_step")
            best_step = recorded if isinstance(recorded, int) else session.state.best_step
            run.link_newest(step, best_step)
            places, why = run.places(), session.stalled
            yield events.Finished(step, replace(summary, **places), best_step=best_step, reason=why)
            return
    if resume and step >= session.spec.max_steps:
        session.notes.append(f"{run.folder / STATUS} does not say how the run ended")
    trainer = Trainer(session, stop, status)
    with contextlib.closing(trainer):
        try:
            for event in trainer.train():
                again = event.step == step  # an evaluation of the step that was resumed
                if (recorded := events.history_line(event)) is not None:
                    run.append(*recorded, again=again)
                if (text := events.describe(event)) is not None:
                    run.log(text)
                yield event
        except StorageError as error:
            raise trainer.rescued(error) from error


class Trainer:
    """The loop and its tallies."""

    def __init__(self, session: Session, stop: StopRequest, status: dict[str, Any]) -> None:
        from gptcli.training.calibrate import ready_stepper  # what comes before the loop

        self.s, state = session, session.state
        self.stop = stop
        self.clock = events.Clock(events.spent_before(status, state.step, state.seconds))
        self.stepper = ready_stepper(session, self.clock, stop.requested)
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.writing: Future[events.Saved | None] | None = None
        self.memory = memory_bytes(session.compute.device)
        self.step_seconds = 0.0
        self.steps_timed = 0
        self.last_rate: float | None = None
        self.evaluated: events.Evaluated | None = None
        self.best_epoch: Checkpoint | None = None  # not yet written
        self.saved_step = state.step if session.is_resumed else None
        self.sampled_step: int | None = None

    def close(self) -> None:
        """End the threads that write checkpoints and read ahead; what is being written is kept."""
        self.writer.shutdown(wait=True)
        self.stepper.feed.close()

    def train(self) -> Iterator[events.Event]:
        """Run to the last step, or until a stop is requested."""
        from gptcli.training.plan import Plan  # what is only told, and no part of the loop

        s, state, train = self.s, self.s.state, self.s.config.train
        # What was recorded after the checkpoint is cut, so that the files read as one run.
        evaluated_before, problems = s.world.broadcast_object(lambda: s.run.cut_history(state.step))
        s.notes += problems
        allocated = sum(local.nbytes for local in all_local(s.model.parameters()))
        plan, notes = Plan.of(s.spec, allocated), tuple(s.notes)
        yield events.Started(plan, state.step, state.best_loss, state.best_step, notes)
        s.run.write_config(s.config)
        s.run.write_status("running", state.step, None, seconds_by_work=self.clock.spent())
        if self.saved_step is None:
            yield from self._save()  # also shows at once whether the disk takes a checkpoint
        else:
            s.run.link_newest(state.step, state.best_step)  # the crash may have come before
            yield from self._evaluate_and_sample(again=evaluated_before)
        while state.step < s.spec.max_steps and not s.stalled:
            done = self._step()
            if done is None:
                break
            yield done
            yield from self._written()
            is_best_epoch = yield from self._end_epoch()
            # Saved before it is evaluated: a crash during the evaluation then loses no step, and
            # the checkpoint to link as best exists. Resuming first redoes an evaluation due here.
            if self._due(train.save_every) or self._due(train.eval_every):
                yield from self._save()
            elif is_best_epoch and s.spec.size.parameters >= LARGE:  # too large for a second copy
                yield from self._save()
            elif is_best_epoch:  # written with the next checkpoint, for epochs may be short
                self.best_epoch = s.snapshot(copy=True)
            yield from self._evaluate_and_sample()
        is_stopped = self.stop.requested()
        if is_stopped and self.saved_step != state.step:
            yield from self._save()
        elif not is_stopped and self.sampled_step != state.step and not train.sample_every:
            yield from self._sample()
        yield from self._written(wait=True)
        yield self._end(is_stopped)

    def _evaluate_and_sample(self, again: Collection[str] = ()) -> Iterator[events.Event]:
        """Evaluate and sample where due, or where a resumed run did so before it stopped."""
        sample_every = self.s.config.train.sample_every
        if self._due(self.s.config.train.eval_every) or METRICS in again:
            yield from self._evaluate()
        if (sample_every and self._due(sample_every)) or SAMPLES in again:
            yield from self._sample()

    def _due(self, every: int) -> bool:
        """Tell whether something done every so many steps, and at the last, is due now."""
        s, step = self.s, self.s.state.step
        return step > 0 and (step % every == 0 or step == s.spec.max_steps or bool(s.stalled))

    def _step(self) -> events.StepDone | None:
        """Do one optimizer step and count it; None if a stop came before it was done."""
        state, config = self.s.state, self.s.config
        began, waited = time.perf_counter(), self.stepper.feed.waited
        result = self.stepper.step(self.stop.requested)
        if result is None:
            return None
        state.step += 1
        if not result.skipped:
            state.epoch_loss += result.loss
            state.epoch_tokens += result.n_targets
        seconds = time.perf_counter() - began
        waited = self.stepper.feed.waited - waited
        self.clock.add("steps", seconds - waited)
        self.clock.add("waiting for data", waited)
        self.step_seconds += seconds
        self.steps_timed += 1
        state.seconds = self.clock.seconds
        rate = self.steps_timed * config.tokens_per_step / self.step_seconds
        if logged := self._due(config.train.log_every) or result.skipped:
            self.memory = memory_bytes(self.s.compute.device)  # which takes a while on a GPU
            self.last_rate, self.step_seconds, self.steps_timed = rate, 0.0, 0
        return events.StepDone(
            step=state.step,
            tokens=state.step * config.tokens_per_step,
            loss=result.loss / result.n_targets,
            lr=result.lr,
            grad_norm=result.grad_norm,
            tokens_per_second=rate,
            memory_bytes=self.memory,
            seconds=state.seconds,
            logged=logged,
            skipped=result.skipped,
        )

    def _end_epoch(self) -> Generator[events.Event, None, bool]:
        """Report the epoch the last step completed; tell whether it is the best to keep.

        Without validation the best is by epoch loss, and a run too short for one still has a best.
        """
        s, state = self.s, self.s.state
        epoch = s.loader.epoch_of(state.step)
        completed = epoch > s.loader.epoch_of(state.step - 1)
        loss = state.epoch_loss / state.epoch_tokens if state.epoch_tokens else math.nan  # skipped
        if completed:
            state.epoch_loss, state.epoch_tokens = 0.0, 0
            yield events.EpochDone(state.step, epoch, loss)
        elif state.step < s.spec.max_steps or state.best_loss is not None:
            return False
        if s.val_tokens or not state.is_better(loss):
            return False
        state.best_loss, state.best_step = loss, state.step
        return True

    def _save(self, *, report: bool = True) -> Iterator[events.Event]:
        """Write a checkpoint, in the background where configured, and drop old ones."""
        s, step = self.s, self.s.state.step
        if report:
            yield events.Working(step, "saving")
        with self.clock.during("saving"), s.world.busy():
            yield from self._written(wait=True)
            s.state.seconds, spent = self.clock.seconds, self.clock.spent()
            in_background = s.spec.saves_in_background
            checkpoint = s.snapshot(copy=in_background)
            best_step, best_epoch, self.best_epoch = s.state.best_step, self.best_epoch, None
            s.run.sync_metrics()  # a checkpoint must not be newer than its history

            def commit() -> events.Saved | None:
                # In this order a crash at any point leaves files that resume: the checkpoint is
                # complete before anything names it, and old ones go last.
                if best_epoch is not None and best_epoch.state["step"] == best_step:
                    s.write(best_epoch, s.run.folder / BEST)
                path = s.write(checkpoint)
                s.run.write_status("running", step, None, seconds_by_work=spent)
                s.run.link_newest(step, best_step)
                s.run.retain(s.config.train.keep_last)
                return events.Saved(step, path) if report else None

            if s.world.is_main and in_background:
                self.writing = self.writer.submit(commit)
            elif s.world.is_main:
                self.writing = Future()
                self.writing.set_result(commit())
            self.saved_step = step
        yield from self._written()

    def _written(self, *, wait: bool = False) -> Iterator[events.Saved]:
        """Report the checkpoint that has been written meanwhile, or raise what went wrong."""
        if self.writing is not None and (wait or self.writing.done()):
            writing, self.writing = self.writing, None
            if (saved := writing.result()) is not None:
                yield saved

    def rescued(self, error: StorageError) -> StorageError:
        """Save the state if only files were removed; return the error, which then says so."""
        s, step, removed = self.s, self.s.state.step, FileNotFoundError | IsADirectoryError
        # A full disk takes no checkpoint that its history lacks; other ranks would not give theirs.
        alone = s.world.size == 1 and s.run.folder.is_dir()
        if not alone or not isinstance(error.__cause__, removed):
            return error
        with contextlib.suppress(GptError, OSError):
            self.writer.shutdown(wait=True)
            atomic.make_folder(s.run.checkpoints)
            s.state.seconds = self.clock.seconds
            path = s.write(s.snapshot(copy=False))
            with contextlib.suppress(GptError):  # one of the names may be what was removed
                s.run.link_newest(step, s.state.best_step)
            hint = "move what blocks the path elsewhere, then run the same command with --resume"
            return StorageError(f"{error.message}; step {step} is saved in {path}", hint)
        return error

    def _evaluate(self) -> Iterator[events.Event]:
        """Score fixed windows of both splits; the best so far is saved again, with its loss."""
        s, state, step = self.s, self.s.state, self.s.state.step
        yield events.Working(step, "evaluating")
        val, train = self._losses(s.val_tokens), self._losses(s.train_tokens)
        if val is None or train is None:
            return  # a stop was requested; resuming evaluates again
        val_loss, train_loss = s.spec.mean_loss(val) if val else None, s.spec.mean_loss(train)
        s.finite_step, is_best = step, state.is_better(val_loss)
        if is_best and (state.best_step, state.best_loss) != (step, val_loss):
            state.best_step, state.best_loss = step, val_loss
            yield from self._save(report=False)
        scored = (s.spec.eval_tokens[1], s.spec.val_tokens)
        sources = {name: SourceLoss(val.get(name), train[name]) for name in train if name}
        self.evaluated = events.Evaluated(step, val_loss, train_loss, is_best, scored, sources)
        yield self.evaluated

    def _losses(self, splits: dict[str, Split]) -> dict[str, float] | None:
        """Return the losses on fixed windows of each source; None if a stop was requested."""
        s, found = self.s, dict[str, float]()
        for part in (part for part in s.spec.parts if part.name in splits):
            n_tokens = s.spec.most_scored(part, is_val=splits is s.val_tokens)
            with self.clock.during("evaluating"), s.inference():
                result = evaluate(
                    s.model, splits[part.name], s.compute, context=s.config.seq_len,
                    max_tokens=n_tokens, turn=(s.world.rank, s.world.size),
                    stopped=self.stop.requested,
                )  # fmt: skip
            if result is None:
                return None
            nats, n_scored = s.world.all_reduce_sum(result.nats, result.tokens)
            if not math.isfinite(nats):
                self.writer.shutdown(wait=True)  # the newest checkpoint is one of those to rename
                split = "validation" if splits is s.val_tokens else "training"
                raise not_finite(s, f"{split} loss", s.finite_step)
            found[part.name] = nats / n_scored
        return found

    def _sample(self) -> Iterator[events.Event]:
        """Sample a text from the model as it is."""
        s = self.s
        yield events.Working(s.state.step, "sampling")
        config, prompt = s.config.generate, s.config.generate.prompt
        context, tokenizer, seed = s.config.trained_context, s.spec.tokenizer, s.config.seed
        ids = sample_start(tokenizer, config, context)
        s.model.eval()
        sample = Sample(0, Row(ids, config, tokenizer.ends, seed), tokenizer)
        with self.clock.during("sampling"), s.inference():
            rows = Rows(s.model, min(context, len(ids) + config.max_new_tokens))
            [drawn] = rows.join([sample.row])
            # Every rank draws the same, for shards compute only together.
            while not (s.world.all_reduce_max(sample.push(drawn)) or self.stop.requested()):
                [drawn] = rows.step()
            sample.text.finish()  # also where it is stopped early
        s.model.train()
        self.sampled_step = s.state.step
        start = (prompt or "") + "\n" * bool(tokenizer.chat)
        yield events.Sampled(s.state.step, start, sample.text.text)

    def _end(self, is_stopped: bool) -> events.Event:
        """Record how the run has ended."""
        s, step, spent = self.s, self.s.state.step, self.clock.spent()
        best_step, best_loss = s.state.best_step, s.state.best_loss
        has_val = bool(s.val_tokens)
        summary = events.Summary(
            **s.run.places(),
            step=step,
            tokens=step * s.config.tokens_per_step,
            train_loss=self.evaluated.train_loss if self.evaluated else None,
            val_loss=self.evaluated.val_loss if self.evaluated else None,
            best_val_loss=best_loss if has_val else None,
            tokens_per_second=self.last_rate,
            seconds=sum(spent.values()),
            val_tokens=s.spec.eval_tokens[1] if has_val else None,
            val_split_tokens=s.spec.val_tokens or None,
            best_epoch_loss=None if has_val else best_loss,
        )
        if is_stopped:
            s.run.write_status("stopped", step, self.stop.exit_code, seconds_by_work=spent)
            return events.Stopped(step, summary, spent, best_step)
        s.run.write_status("finished", step, 0, summary=asdict(summary), best_step=best_step,
                           seconds_by_work=spent, reason=s.stalled)  # fmt: skip
        return events.Finished(step, summary, spent, best_step, s.stalled)
