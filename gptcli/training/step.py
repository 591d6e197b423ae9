"""One optimizer step: forward, backward, clip, update; a non-finite update is never applied.

A step reads its position and changes only weights and optimizer state.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gptcli.data.loader import Prefetcher
from gptcli.device import trim_malloc
from gptcli.errors import MemoryLimitError, NonFiniteError, is_out_of_memory
from gptcli.model import GPT
from gptcli.runs import BEST
from gptcli.seeding import derive_seed
from gptcli.training.optim import clip_gradients
from gptcli.training.parallel import compile_failure, gradient_sync, quiet_compiler, wrap_ddp
from gptcli.training.schedule import lr_at
from gptcli.training.setup import Session

MAX_SKIPPED = 3  # steps in a row
ASK_EVERY = 5.0  # seconds within a step after which several processes ask whether to stop
LARGE = 50_000_000  # parameters from which a step's holes in memory are worth giving back


@dataclass(frozen=True)
class StepResult:
    """What a step measured: the sum of its losses in nats, its rate, the norm before clipping.

    A step that was skipped changed nothing: its loss or norm was not finite.
    """

    loss: float
    lr: float
    grad_norm: float
    skipped: bool = False


class Stepper:
    """Steps through a session's data with its network and optimizer.

    Attributes:
        compiled: Whether the network runs compiled.
        compile_seconds: What that took.
        feed: Where its batches come from.
    """

    def __init__(self, session: Session) -> None:
        self.s = session
        self._recompute = session.config.train.activation_checkpointing
        turn = (session.world.rank, session.world.size)
        self.feed = Prefetcher(session.loader, session.rows, session.compute.device, turn)
        began = time.perf_counter()
        with _memory_errors(session), session.world.busy():  # compiling may take minutes
            network, failure = _network(session)
        self.compiled = network.is_compiled
        self.compile_seconds = time.perf_counter() - began
        self._network: nn.Module = network
        if session.kind == "ddp":
            self._network = wrap_ddp(network, session.compute, _zeros(session), self._recompute)
        if failure is not None:
            session.notes.append(failure)
            # Stored with the run: eager and compiled dropout draw different bits.
            session.config = session.config.model_copy(update={"compile": False})
        self._asks_every = 1  # micro-batches; asking is a message to every rank, and waits for it
        self._scaler = torch.amp.GradScaler(
            session.compute.device.type, enabled=session.compute.dtype == torch.float16
        )
        self._is_large = session.compute.device.type == "cpu" and session.model.n_params() >= LARGE
        if session.state.scaler:
            self._scaler.load_state_dict(session.state.scaler)

    def step(self, stopped: Callable[[], bool]) -> StepResult | None:
        """Do the step that follows the session's position.

        Args:
            stopped: Asked between micro-batches, by every rank; if true, None is returned and
                nothing changed.

        Raises:
            NonFiniteError: The loss or a gradient is not finite; the weights are as before.
            MemoryLimitError: The device has too little memory.
        """
        s, config = self.s, self.s.config
        lr, began = lr_at(s.state.step, s.max_steps, config), time.perf_counter()
        with _memory_errors(s):
            total = self._accumulate(stopped)
            if total is None:
                s.optimizer.zero_grad()
                return None
            s.optimizer.unscale(self._scaler)
            clipped = clip_gradients(s.parameters.values(), config.optim.grad_clip, s.world)
            # The one time that a step waits for the device.
            nats, norm = torch.stack((total, clipped)).tolist()
            loss, seconds = s.world.all_reduce_sum(nats, time.perf_counter() - began)
            # As many on every rank: a question that not all ask is never answered.
            per_batch = seconds / s.world.size / s.grad_accum_steps
            self._asks_every = 1 if s.world.size == 1 else max(1, int(ASK_EVERY / per_batch))
            if not self._is_sound(loss, norm):
                s.optimizer.zero_grad()
                return StepResult(loss, lr, norm, skipped=True)
            s.optimizer.step(lr, self._scaler)
            s.optimizer.zero_grad()
            if self._is_large:
                trim_malloc()
        if self._scaler.is_enabled():
            s.state.scaler = dict(self._scaler.state_dict())
        return StepResult(loss, lr, norm)

    def _accumulate(self, stopped: Callable[[], bool]) -> Tensor | None:
        """Add up the gradients of a step's micro-batches; return the sum of its losses, nats.

        Of several ranks, each does its own; the last backward pass sums the gradients over all.
        """
        s, step, world = self.s, self.s.state.step, self.s.world
        total = torch.zeros((), device=s.compute.device)
        last = s.grad_accum_steps - 1
        for turn, (tokens, targets) in enumerate(self.feed.micro_batches(step)):
            if turn % self._asks_every == 0 and stopped():
                return None
            if s.config.model.dropout:
                index = turn * world.size + world.rank
                torch.manual_seed(derive_seed("dropout", s.config.seed, step, index))
            with gradient_sync(self._network, turn == last):
                with s.compute.autocast():
                    loss = self._network(tokens, targets, recompute=self._recompute).loss
                assert loss is not None
                world.heartbeat()
                torch.autograd.backward(self._scaler.scale(loss / s.config.tokens_per_step))
            total += loss.detach()
        return total

    def _is_sound(self, loss: float, norm: float) -> bool:
        """Keep a loss or gradient that is not finite away from the weights.

        Raises:
            NonFiniteError: That is to end the run, or came too often in a row.
        """
        state, skip = self.s.state, self.s.config.train.on_nonfinite == "skip"
        adapting = self._scaler.is_enabled() and math.isfinite(loss)  # the scaler skips by itself
        if math.isfinite(loss) and (math.isfinite(norm) or adapting):
            state.skipped, self.s.sound_step = 0, state.step
            return True
        state.skipped += 1
        if skip and state.skipped <= MAX_SKIPPED:
            return False
        hint = "" if skip else "; train.on_nonfinite=skip skips up to three steps in a row"
        if math.isfinite(loss):
            good = state.step + 1 - state.skipped
            raise not_finite(self.s, "gradient", good, step=state.step + 1, hint=hint)
        raise not_finite(self.s, "loss", self.s.sound_step, step=state.step + 1, hint=hint)


def not_finite(
    s: Session, what: str, good: int | None, *, step: int | None = None, hint: str = ""
) -> NonFiniteError:
    """Rename the checkpoints that gave a non-finite loss, and return the error to raise.

    Args:
        s: The session.
        what: Is not finite.
        good: The last step known to be good; None if none is since the run was resumed.
        step: At which it came to light; None for an evaluation of the present one.
        hint: More to try.
    """
    last = s.state.step - (s.state.skipped if what == "loss" else 1) if good is None else good
    files = s.run.step_files()
    kept = [path for path in files if path <= s.run.step_file(max(0, last))]
    if what != "gradient" and kept:  # resuming from these would end as this does
        s.run.set_aside(files[: len(files) - len(kept)])
    best = s.run.folder / BEST
    file = kept[0] if kept and last >= 0 else best if best.exists() else None
    message = f"step {s.state.step if step is None else step}: the {what} is not finite"
    if good is not None:
        message += f"; step {good} was the last good one"
        if file == s.run.step_file(good):
            message, file = f"{message}, saved: {file}", None
    message += f"; the last good checkpoint is {file}" if file is not None else ""
    advice = "try a lower optim.lr, more optim.warmup_steps, or dtype=float32"
    return NonFiniteError(message, advice + hint)


def _network(session: Session) -> tuple[GPT, str | None]:
    """Return the network as it is trained, compiled where asked for and possible.

    What is returned has the model's own parameters. Compilers fail in many ways, and late: one
    forward and backward pass tries it. The second value says why a network that should have been
    compiled is not.
    """
    model, compute = session.model, session.compute
    sharded = session.kind == "fsdp"  # its blocks were compiled before, if at all
    if not compute.compile or (sharded and not model.is_compiled):
        return model, None
    torch._dynamo.reset()  # or the ninth model that a process trains would not be compiled
    compiled = model if sharded else model.compiled()
    tokens = _zeros(session)
    failure = None
    try:
        with quiet_compiler():
            with compute.autocast():
                recompute = session.config.train.activation_checkpointing
                loss = compiled(tokens, tokens, recompute=recompute).loss
            assert loss is not None
            torch.autograd.backward(loss)
    except Exception as error:
        if sharded:
            raise
        failure = compile_failure(error)
    finally:
        model.zero_grad(set_to_none=True)
    if session.world.all_reduce_max(failure is not None):  # on one rank is enough: all do the same
        return model, failure or "not compiled: it failed on another rank"
    return compiled, None


def _zeros(session: Session) -> Tensor:
    """Return a micro-batch of nothing but the first token, (B, T)."""
    shape = session.rows, session.config.seq_len
    return torch.zeros(shape, dtype=torch.int64, device=session.compute.device)


@contextlib.contextmanager
def _memory_errors(session: Session) -> Iterator[None]:
    """Turn running out of memory into an error that names a smaller micro-batch."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        config, size = session.config, session.rows
        raise MemoryLimitError(
            f"out of memory with micro_batch_size {size} and seq_len {config.seq_len}",
            f"-s train.micro_batch_size={size // 2} -s train.tokens_per_step="
            f"{config.tokens_per_step} --resume does the same steps in half the memory"
            if size > 1 and size % 2 == 0
            else "use a smaller network, a shorter data.seq_len, or dtype=bfloat16",
        ) from error
