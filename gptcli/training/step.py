"""One optimizer step: forward, backward, clip, update; a non-finite update is never applied.

A step reads its position and changes only weights and optimizer state.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptcli.data.loader import Batch, Prefetcher
from gptcli.device import memory_is_short, trim_malloc
from gptcli.errors import MemoryLimitError, NonFiniteError, is_out_of_memory
from gptcli.model import GPT
from gptcli.runs import BEST
from gptcli.seeding import derive_seed
from gptcli.training.optim import WeightAverage, clip_gradients, lr_at
from gptcli.training.parallel import all_local, compiler_failure, gradient_sync, wrap_ddp
from gptcli.training.setup import Session

MAX_SKIPPED = 3  # steps in a row
MAX_ADAPTING = 20  # likewise, while float16's loss scale is halved: it begins at 2^16
_DDP_PARTS = 4  # runs of blocks that are compiled apart, so that DDP has gradients to sum early
_EARLY = ("cuda",)  # devices whose update is launched before the step is known to be finite
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
    n_targets: int  # tokens that the losses are of, over all micro-batches and processes
    skipped: bool = False


class Stepper:
    """Steps through a session's data with its model and optimizer."""

    def __init__(self, session: Session) -> None:
        self.s = session
        self._recompute = session.config.train.activation_checkpointing
        rank_and_size = (session.world.rank, session.world.size)
        device = session.compute.device
        self.feed = Prefetcher(session.loader, session.spec.rows, device, rank_and_size)
        began = time.perf_counter()
        with _memory_errors(session), session.world.busy():  # compiling may take minutes
            model = _compiled(session)
            self.compile_seconds = time.perf_counter() - began
            self._model: nn.Module = model
            if session.spec.parallel == "ddp":
                self._model = wrap_ddp(model, session.compute, _zeros(session), self._recompute)
        self._asks_every = 1  # micro-batches; asking is a message to every rank, and waits for it
        self._scaler: Any = torch.amp.GradScaler(
            device.type, enabled=session.compute.dtype == torch.float16
        )
        # Else the device would have nothing to do while the host reads the loss.
        self._is_early = (
            device.type in _EARLY
            and session.world.size == 1
            and session.optimizer.can_skip
            and not self._scaler.is_enabled()
        )
        self._is_large = device.type == "cpu" and session.spec.size.parameters >= LARGE
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
        lr, began = lr_at(s.state.step, s.spec.max_steps, config), time.perf_counter()
        with _memory_errors(s):
            batches, n_targets = self._read()
            total = self._accumulate(batches, n_targets, stopped)
            if total is None:
                s.optimizer.zero_grad()
                return None
            self._scaler.unscale_(s.optimizer)
            clipped = clip_gradients(s.parameters.values(), config.optim.grad_clip, s.world)
            if self._is_early:  # the kernel changes nothing if the step turns out not to be finite
                is_finite = torch.isfinite(torch.stack((total, clipped))).all()
                s.optimizer.step(lr, (~is_finite).float())
            # The one time that a step waits for the device.
            nats, norm = torch.stack((total, clipped)).tolist()
            loss, seconds = s.world.all_reduce_sum(nats, time.perf_counter() - began)
            # As many on every rank: a question that not all ask is never answered.
            per_batch = seconds / s.world.size / s.spec.grad_accum_steps
            self._asks_every = 1 if s.world.size == 1 else max(1, int(ASK_EVERY / per_batch))
            if is_good := self._is_finite(loss, norm):
                if not self._is_early:
                    self._scaler.step(s.optimizer, lr)
                s.average.update(s.state.step + 1)
            self._scaler.update()  # after a step that is skipped, to a smaller scale
            s.optimizer.zero_grad()
            if self._is_large and memory_is_short():
                trim_malloc()
        s.state.scaler = dict(self._scaler.state_dict())  # empty but for float16
        return StepResult(loss, lr, norm, n_targets, skipped=not is_good)

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Undo at the end all that steps in the block changed, before the first one of a run."""
        s, state = self.s, self.s.state
        assert state.step == 0, "the optimizer's state is not kept"
        before, finite_step, scaler = asdict(state), s.finite_step, self._scaler.state_dict()
        weights = all_local(p.detach() for p in s.parameters.values() if p.requires_grad)
        copies = [weight.clone() for weight in weights]
        try:
            yield
        finally:
            for weight, copy in zip(weights, copies, strict=True):
                weight.copy_(copy)
            s.optimizer.reset()
            s.average = WeightAverage(s.parameters, s.config.train.ema)
            self._scaler.load_state_dict(scaler)
            vars(state).update(before)
            s.finite_step = finite_step

    def _read(self) -> tuple[Iterator[Batch], int]:
        """Return this rank's micro-batches of a step, and the step's targets over all ranks."""
        batches, n_targets = self.feed.micro_batches(self.s.state.step), self.s.spec.tokens_per_step
        if self.s.spec.manifest.is_chat:
            [n_targets] = map(int, self.s.world.all_reduce_sum(self.feed.n_targets))
        return batches, max(1, n_targets)

    def _accumulate(
        self, batches: Iterator[Batch], n_targets: int, stopped: Callable[[], bool]
    ) -> Tensor | None:
        """Sum the gradients of a step's micro-batches; return the sum of its losses, nats.

        Each rank does its own; the last backward pass sums the gradients over all ranks.
        """
        s, step, world = self.s, self.s.state.step, self.s.world
        total = torch.zeros((), device=s.compute.device)
        last = s.spec.grad_accum_steps - 1
        for index, (tokens, targets, *starts) in enumerate(batches):
            if index % self._asks_every == 0 and stopped():
                return None
            if s.config.model.dropout:
                # By position, so that no generator state needs to be saved.
                position = index * world.size + world.rank
                torch.manual_seed(derive_seed("dropout", s.config.seed, step, position))
            with gradient_sync(self._model, index == last):
                with s.compute.autocast():
                    loss = self._model(tokens, targets, *starts, recompute=self._recompute).loss
                assert loss is not None
                world.heartbeat()
                # By the targets of the step, not of the micro-batch: each weighs the same.
                torch.autograd.backward(self._scaler.scale(loss / n_targets))
            total += loss.detach()
        return total

    def _is_finite(self, loss: float, norm: float) -> bool:
        """Tell whether a step may be applied.

        Raises:
            NonFiniteError: It is to end the run, or came too often in a row.
        """
        state, skip = self.s.state, self.s.config.train.on_nonfinite == "skip"
        if math.isfinite(loss) and math.isfinite(norm):
            state.skipped, self.s.finite_step = 0, state.step
            return True
        state.skipped += 1
        adapting = self._scaler.is_enabled() and math.isfinite(loss)
        if state.skipped <= (MAX_ADAPTING if adapting else MAX_SKIPPED * skip):
            return False
        hint = "" if skip else "; train.on_nonfinite=skip skips up to three steps in a row"
        if math.isfinite(loss):
            good = state.step + 1 - state.skipped
            raise not_finite(self.s, "gradient", good, step=state.step + 1, hint=hint)
        raise not_finite(self.s, "loss", self.s.finite_step, step=state.step + 1, hint=hint)


def not_finite(
    s: Session, what: str, good: int | None, *, step: int | None = None, hint: str = ""
) -> NonFiniteError:
    """Rename the checkpoints that gave a non-finite loss, and return the error to raise.

    `good` is the last step known to be good, None if none is since the run was resumed; `step` is
    the one that showed it, None for an evaluation of the current one.
    """
    last = s.state.step - (s.state.skipped if what == "loss" else 1) if good is None else good
    files = s.run.step_files()
    kept = [path for path in files if path <= s.run.step_file(max(0, last))]
    if what != "gradient" and kept:  # resuming from these would end the same way
        s.run.set_aside(files[: len(files) - len(kept)])
    best = s.run.folder / BEST
    file = kept[0] if kept and last >= 0 else best if best.exists() else None
    message = f"step {s.state.step if step is None else step}: the {what} is not finite"
    message += f"; step {good} was the last good one" if good is not None else ""
    message += f"; the last good checkpoint is {file}" if file is not None else ""
    advice = "try a lower optim.lr, more optim.warmup_steps, or dtype=float32"
    return NonFiniteError(message, advice + hint)


def _compiled(session: Session) -> GPT:
    """Return the model as it is trained: compiled, with the same parameters, if so configured.

    Compilers fail in many ways, and late: one forward and backward pass tries it. If it fails,
    the run continues uncompiled, with a note.
    """
    model, compute = session.model, session.compute
    sharded = session.spec.parallel == "fsdp"  # its blocks were compiled before, if at all
    if not compute.compile or (sharded and not model.is_compiled):
        return model
    torch._dynamo.reset()  # or the ninth model that a process trains would not be compiled
    n_parts = _DDP_PARTS if session.spec.parallel == "ddp" else 1
    compiled = model if sharded else model.compiled(n_parts)
    batch, recompute = _zeros(session), session.config.train.activation_checkpointing

    def forward() -> Tensor:
        loss: Tensor = compiled(*batch, recompute=recompute).loss
        return loss

    try:
        failure = compiler_failure(forward, compute, session.world, strict=sharded)
    finally:
        model.zero_grad(set_to_none=True)
    if failure is None:
        return compiled
    session.notes.append(failure)
    session.spec = session.spec.computing(compile=False)
    return model


def _zeros(session: Session) -> Batch:
    """Return a micro-batch of nothing but the first token."""
    shape = session.spec.rows, session.config.seq_len
    tokens = torch.zeros(shape, dtype=torch.int64, device=session.compute.device)
    return (tokens,) * (3 if session.spec.manifest.is_chat else 2)


@contextlib.contextmanager
def _memory_errors(session: Session) -> Iterator[None]:
    """Turn running out of memory into an error that names a smaller micro-batch."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        config, rows = session.config, session.spec.rows
        raise MemoryLimitError(
            f"out of memory with micro_batch_size {rows} and seq_len {config.seq_len}",
            f"-s train.micro_batch_size={rows // 2} -s train.tokens_per_step="
            f"{config.tokens_per_step} --resume does the same steps in half the memory"
            if rows > 1 and rows % 2 == 0
            else "use a smaller model, a shorter data.seq_len, or dtype=bfloat16",
        ) from error
