"""The training loop, on one page: train, log, save, evaluate, link the best.

`train` yields events; whoever reads them draws, prints or waits. Knows no terminal.
"""

import contextlib
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict

from gptcli.checkpoint import BEST, LAST
from gptcli.config.schema import Config
from gptcli.config.windows import MOST_EVAL_TOKENS
from gptcli.device import memory_bytes
from gptcli.distributed.world import joined
from gptcli.evaluation import TokenSequence, evaluate
from gptcli.generation import Decoding, Text, encode_prompt
from gptcli.training.estimate import outlook_of
from gptcli.training.events import (
    EpochDone,
    Evaluated,
    Event,
    Finished,
    Sampled,
    Saved,
    Spent,
    Started,
    StepDone,
    Stopped,
    Summary,
    Working,
    describe,
    metrics_of,
    sample_of,
)
from gptcli.training.parallel import in_parts
from gptcli.training.run import Follower, Run, open_run
from gptcli.training.saver import Saver
from gptcli.training.session import Session, start
from gptcli.training.step import Stepper
from gptcli.training.stop import Stop
from gptcli.training.watch import failures_reported, failures_told, watch


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
    stop = stop or Stop()
    with contextlib.ExitStack() as stack:
        stack.enter_context(failures_reported())
        world = stack.enter_context(joined(config.device))
        stack.enter_context(failures_told(world))
        resume = resume or world.restarts > 0  # torchrun repeats the command as it was
        stop.world = world
        run: Run = Follower(config.run_folder)
        if world.is_main:
            run = stack.enter_context(open_run(config, resume=resume, overwrite=overwrite))
        stack.enter_context(contextlib.closing(watch(world, config, stop)))
        session = stack.enter_context(contextlib.closing(start(run, config, world, resume=resume)))
        yield from _events(session, resume, stop)
        if stop.exit_code is not None:
            world.leave_word("stopped, and saved", stop.exit_code)


def _events(session: Session, resume: bool, stop: Stop) -> Iterator[Event]:
    """Run a session and write down what it yields; one that was finished has nothing to do."""
    run = session.run
    ended = session.world.share(lambda: run.read_status())
    summary = ended.get("summary")
    if resume and summary and session.state.step >= session.max_steps:
        step = session.state.step
        yield Finished(step, Summary(**summary), best_step=ended.get("best_step"))
        return
    run.cut_metrics(session.state.step)
    trainer = Trainer(session, stop)
    with contextlib.closing(trainer):
        for event in trainer.events():
            if (line := metrics_of(event)) is not None:
                run.add_metrics(line)
            if (line := sample_of(event)) is not None:
                run.add_sample(line)
            if (text := describe(event)) is not None:
                run.log(text)
            yield event


class Trainer:
    """The loop and its tallies."""

    def __init__(self, session: Session, stop: Stop) -> None:
        self.s = session
        self.stop = stop
        self.began = time.perf_counter()
        self.stepper = Stepper(session)
        self.saver = Saver(_saves_in_background(session))
        self.resumed_seconds = session.state.seconds
        self.step_seconds = 0.0
        self.steps_timed = 0
        self.last_rate: float | None = None
        self.spent: Spent = {"compiling": self.stepper.compile_seconds, "steps": 0.0}
        self.evaluated: Evaluated | None = None
        self.saved_step = session.state.step if session.is_resumed else None

    def close(self) -> None:
        """End the threads that read ahead and save."""
        self.saver.close()
        self.stepper.feed.close()

    def events(self) -> Iterator[Event]:
        """Run to the last step, or until asked to stop."""
        state, train = self.s.state, self.s.config.train
        yield self._started()
        self.s.run.write_config(self.s.config)
        self.s.run.write_status("running", state.step, None)
        if self.saved_step is None:
            yield from self._save()  # also shows at once whether the disk takes a checkpoint
        else:
            yield from self._link_resumed()
            if self._due(train.eval_every):
                yield from self._evaluate()
            if train.sample_every and self._due(train.sample_every):
                yield from self._sample()
        while state.step < self.s.max_steps:
            done = self._step()
            if done is None:
                break
            yield done
            yield from self.saver.finished()
            is_best_epoch = yield from self._end_epoch()
            if is_best_epoch or self._due(train.save_every) or self._due(train.eval_every):
                yield from self._save()
            if is_best_epoch:
                yield from self._link_best()
            if self._due(train.eval_every):
                yield from self._evaluate()
            if train.sample_every and self._due(train.sample_every):
                yield from self._sample()
        if self.stop.requested():
            yield from self._stopped()
            return
        if not train.sample_every:
            yield from self._sample()
        yield from self.saver.finished(wait=True)
        spent = self._spent()
        summary = self._summary(spent)
        more = {"summary": asdict(summary), "best_step": state.best_step,
                "seconds": summary.seconds}  # fmt: skip
        self.s.run.write_status("finished", state.step, 0, **more)
        yield Finished(state.step, summary, spent, state.best_step)

    def _stopped(self) -> Iterator[Event]:
        """Save what is not yet saved, and say so."""
        step = self.s.state.step
        if self.saved_step != step:
            yield from self._save()
        yield from self.saver.finished(wait=True)
        spent = self._spent()
        summary = self._summary(spent)
        seconds = summary.seconds
        self.s.run.write_status("stopped", step, self.stop.exit_code, seconds=seconds)
        yield Stopped(step, summary, spent, self.s.state.best_step)

    def _due(self, every: int) -> bool:
        """Tell whether something done every so many steps, and at the last, is due now."""
        step = self.s.state.step
        return step > 0 and (step % every == 0 or step == self.s.max_steps)

    def _step(self) -> StepDone | None:
        """Do one optimizer step and its bookkeeping; None if asked to stop before it was done."""
        state, config = self.s.state, self.s.config
        began = time.perf_counter()
        result = self.stepper.step(self.stop.requested)
        if result is None:
            return None
        state.step += 1
        if not result.skipped:
            state.epoch_loss += result.loss
            state.epoch_tokens += config.tokens_per_step
        now = time.perf_counter()
        self.step_seconds += now - began
        self.spent["steps"] += now - began
        self.steps_timed += 1
        state.seconds = self.resumed_seconds + now - self.began
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
        loss = state.epoch_loss / max(1, state.epoch_tokens)  # all of it may have been skipped
        if completed:
            state.epoch_loss, state.epoch_tokens = 0.0, 0
            yield EpochDone(state.step, epoch, loss)
        elif state.step < s.max_steps or state.best_loss is not None:
            return False
        if s.val_tokens is not None or (state.best_loss is not None and loss >= state.best_loss):
            return False
        state.best_loss, state.best_step = loss, state.step
        return True

    def _save(self) -> Iterator[Event]:
        """Write a checkpoint, or have it written while training goes on; let go of old ones."""
        s, step = self.s, self.s.state.step
        yield Working(step, "saving")
        with self._clock("saving"), s.world.busy():
            yield from self.saver.finished(wait=True)
            checkpoint = s.snapshot(copy=self.saver.in_background)
            s.run.sync_metrics()

            def commit() -> Saved:
                path = s.write(checkpoint)
                s.run.link(step, LAST)
                s.run.retain(s.config.train.keep_last)
                s.run.write_status("running", step, None)
                return Saved(step, path)

            if s.world.is_main:
                self.saver.submit(commit)
            self.saved_step = step
        yield from self.saver.finished()

    def _link_resumed(self) -> Iterator[Event]:
        """Make the links that were still to be made to the checkpoint which the run resumes."""
        s, state = self.s, self.s.state
        s.run.link(state.step, LAST)
        if s.val_tokens is None and state.step == state.best_step:
            yield from self._link_best()

    def _link_best(self) -> Iterator[Event]:
        """Let best.pt be the checkpoint of this step."""
        yield from self.saver.finished(wait=True)
        self.s.run.link(self.s.state.step, BEST)

    def _evaluate(self) -> Iterator[Event]:
        """Score fixed windows of both splits, and link the best so far."""
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
        is_best = val_loss is not None and (state.best_loss is None or val_loss < state.best_loss)
        if is_best:
            state.best_loss, state.best_step = val_loss, state.step
            yield from self._link_best()
        self.evaluated = Evaluated(
            state.step, val_loss, train_loss, is_best, (s.eval_tokens, s.n_val_tokens)
        )
        yield self.evaluated

    def _loss(self, tokens: TokenSequence, n_tokens: int) -> float | None:
        s = self.s
        with self._clock("evaluating"):
            result = evaluate(
                s.model, tokens, s.compute,
                context=s.config.seq_len, max_tokens=n_tokens, stopped=self.stop.requested,
                turn=(s.world.rank, s.world.size),
            )  # fmt: skip
        if result is None:
            return None
        nats, n_scored = s.world.total(result.nats, result.tokens)
        return nats / n_scored

    def _sample(self) -> Iterator[Event]:
        """Draw a text with the network as it is."""
        s = self.s
        yield Working(s.state.step, "sampling")
        config, prompt = s.config.generate, s.config.generate.prompt
        ids = encode_prompt(s.tokenizer, prompt, s.config.trained_context)
        s.model.eval()
        context, ends = s.config.trained_context, s.tokenizer.ends
        decoding = iter(
            Decoding(s.model, ids, config, ends=ends, seed=s.config.seed, context=context)
        )
        text = Text(s.tokenizer, config)
        with self._clock("sampling"), in_parts(s.model, s.compute):
            while True:  # every rank draws the same, for shards compute only together
                drawn = next(decoding, None)
                if drawn is not None:
                    text.push(drawn.token)
                if s.world.most(drawn is None or text.is_stopped) or self.stop.requested():
                    break
            text.finish()
        s.model.train()
        yield Sampled(s.state.step, prompt or "", text.text)

    @contextlib.contextmanager
    def _clock(self, work: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.spent[work] = self.spent.get(work, 0.0) + time.perf_counter() - began

    def _spent(self) -> Spent:
        """Return the seconds since this process took the run up, by work."""
        waited = self.stepper.feed.waited
        spent = {**self.spent, "steps": self.spent["steps"] - waited, "waiting for data": waited}
        return {**spent, "other": time.perf_counter() - self.began - sum(spent.values())}

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
            grad_accum_steps=s.config.tokens_per_step // (s.rows * s.config.seq_len * s.world.size),
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
            outlook=outlook_of(s),
            best_loss=s.state.best_loss,
            best_step=s.state.best_step,
            notes=tuple(s.notes),
        )

    def _summary(self, spent: Spent) -> Summary:
        s, state = self.s, self.s.state
        paths = [s.run.folder / name for name in (BEST, LAST)]
        checkpoint = next((path for path in paths if path.exists()), None)
        return Summary(
            run_dir=str(s.run.folder),
            step=state.step,
            tokens=state.step * s.config.tokens_per_step,
            train_loss=self.evaluated.train_loss if self.evaluated else None,
            val_loss=self.evaluated.val_loss if self.evaluated else None,
            best_val_loss=state.best_loss if s.val_tokens is not None else None,
            tokens_per_second=self.last_rate,
            seconds=self.resumed_seconds + sum(spent.values()),
            checkpoint=str(checkpoint) if checkpoint else None,
            val_tokens=s.eval_tokens if s.val_tokens is not None else None,
            val_split_tokens=s.n_val_tokens or None,
            best_epoch_loss=state.best_loss if s.val_tokens is None else None,
        )


def _saves_in_background(session: Session) -> bool:
    wanted = session.config.train.async_save
    return session.compute.device.type == "cuda" if wanted == "auto" else wanted
