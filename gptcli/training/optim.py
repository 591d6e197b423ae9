"""The optimizer and its learning rate: which parameters decay, which go to Muon, how far."""

import contextlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, assert_never

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from gptcli.config.schema import Config, OptimConfig
from gptcli.distributed.process_group import SINGLE_PROCESS, World
from gptcli.errors import CheckpointError
from gptcli.model import GPT
from gptcli.model.kernels import sum_of_squares
from gptcli.training.parallel import all_local, as_dtensor, is_dtensor, scatter_from_rank0, to_local

# Usual learning rates, as multiples of AdamW's; 1 for an optimizer that is not named.
LR_SCALE = {"muon": 4.0}
OptimizerState = dict[str, dict[str, Tensor]]
_FUSED = ("cuda", "cpu", "mps")  # devices on which one kernel does all of AdamW
_WSD_DECAY_FRACTION = 0.2


class Optimizer:
    """AdamW (Loshchilov and Hutter 2019), or Muon for the blocks' matrices and AdamW for the rest.

    Calls torch's functions, not its classes: their state is by position, ours by name, and making
    the first one imports torch's compiler, which takes most of a second. Parameters that do not
    require gradients have no decay and no state.
    """

    def __init__(
        self,
        model: GPT,
        config: OptimConfig,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        # A CPU without instructions for bfloat16 takes 30 times as long for Muon's products in it
        # as in float32; other devices have these, whatever the dtype of a run.
        is_float32 = device.type == "cpu" and dtype == torch.float32
        self._products = torch.float32 if is_float32 else torch.bfloat16
        self._config, self._fused = config, device.type in _FUSED
        named = dict(model.named_parameters())
        self._parameters = {name: p for name, p in named.items() if p.requires_grad}
        self._frozen = named.keys() - self._parameters.keys()
        inner = [name for name, p in self._parameters.items()
                 if config.name == "muon" and p.dim() == 2 and name.startswith("h.")]  # fmt: skip
        others = [name for name in self._parameters if name not in inner]
        self._stacks: list[list[str]] = []
        if inner:
            from gptcli.training.muon import stacks  # which few runs need

            matrices = [self._parameters[name] for name in inner]
            self._stacks = [[inner[index] for index in stack] for stack in stacks(matrices, device)]
        self._groups: dict[tuple[float, float], list[str]] = {}  # by rate and decay
        for name in others:
            rate = _peak_lr(name, self._parameters[name], config) / config.lr
            # Matrices decay, vectors (norms and biases) do not; all at the pace of lr, for rows of
            # rare tokens would be gone before they come again.
            decay = config.weight_decay / rate if self._parameters[name].dim() >= 2 else 0.0
            self._groups.setdefault((rate, decay), []).append(name)
        # Allocated here and not in the first step: what steps need and free then lies behind it.
        self._state = {name: self._fresh(name, name in inner) for name in self._parameters}
        self._has_stepped = False

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameters, as torch's GradScaler asks for them."""
        return [{"params": list(self._parameters.values())}]

    @property
    def can_skip(self) -> bool:
        """Whether its kernels can leave out an update on the device's own word."""
        return self._fused and not self._stacks

    @torch.no_grad()
    def step(self, lr: float, skip: Tensor | None = None) -> None:
        """Update the parameters from their gradients.

        Args:
            lr: The learning rate; those of embeddings, head and vectors are in proportion.
            skip: A scalar on the device, 1 to change nothing; only where it `can_skip`.
        """
        assert skip is None or self.can_skip
        self._has_stepped = True
        for names in self._stacks:
            self._update_by_muon(names, lr)
        for (rate, weight_decay), names in self._groups.items():
            adamw(
                all_local(self._parameters[name] for name in names),
                self._gradients(names),
                [self._state[name]["exp_avg"] for name in names],
                [self._state[name]["exp_avg_sq"] for name in names],
                [],
                [self._state[name]["step"] for name in names],
                fused=self._fused,
                found_inf=skip,
                amsgrad=False,
                beta1=self._config.beta1,
                beta2=self._config.beta2,
                lr=lr * rate,
                weight_decay=weight_decay,
                eps=1e-8,
                maximize=False,
            )

    def _update_by_muon(self, names: list[str], lr: float) -> None:
        from gptcli.training.muon import muon

        muon(
            [self._parameters[name] for name in names],
            self._gradients(names),
            [self._state[name]["momentum_buffer"] for name in names],
            lr=lr,
            momentum=self._config.momentum,
            weight_decay=self._config.weight_decay,
            dtype=self._products,
        )

    def _gradients(self, names: Collection[str]) -> list[Tensor]:
        found = [self._parameters[name].grad for name in names]
        return [to_local(gradient) for gradient in found if gradient is not None]

    def _fresh(self, name: str, is_muon: bool) -> dict[str, Tensor]:
        """Return the state of a parameter before its first step."""
        parameter = to_local(self._parameters[name])
        device = parameter.device
        # Not by zeros_like: for a model on "meta", whose state is only counted, torch then imports
        # SymPy, which takes a third of the time of a start.
        zeros = partial(torch.zeros, parameter.shape, dtype=parameter.dtype, device=device)
        if is_muon:
            return {"momentum_buffer": zeros()}
        # The count of steps stays on the CPU unless the update is fused.
        n_steps = torch.zeros((), device=device if self._fused else "cpu")
        return {"step": n_steps, "exp_avg": zeros(), "exp_avg_sq": zeros()}

    @torch.no_grad()
    def reset(self) -> None:
        """Put the state back to what it is before the first step."""
        self._has_stepped = False
        for state in self._state.values():
            for tensor in state.values():
                tensor.zero_()

    def bytes_by_name(self) -> dict[str, int]:
        """Return the bytes of each parameter's state."""
        return {name: sum(tensor.nbytes for tensor in state.values())
                for name, state in self._state.items()}  # fmt: skip

    def zero_grad(self) -> None:
        """Set the gradients to None."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def state(self) -> OptimizerState:
        """Return the state by parameter name, sharded as they are; empty before the first step."""
        if not self._has_stepped:
            return {}
        return {
            name: {key: as_dtensor(value, self._parameters[name]) for key, value in state.items()}
            for name, state in self._state.items()
        }

    def load_state(
        self,
        states: Mapping[str, Mapping[str, Tensor]],
        were_frozen: Collection[str] = (),
        world: World = SINGLE_PROCESS,
    ) -> None:
        """Load the state of a checkpoint, bit for bit; rank 0 has it and scatters it.

        The state of a parameter frozen since is dropped; one that was frozen starts fresh.

        Raises:
            CheckpointError: It is the state of other parameters.
        """

        def named() -> list[str]:
            foreign = states.keys() - self._parameters.keys() - self._frozen
            missing = self._parameters.keys() - states.keys() - set(were_frozen)
            if states and (foreign or missing):
                differing = ", ".join(sorted(foreign | missing)[:3])
                raise CheckpointError(f"optimizer state of other parameters ({differing})")
            # That of another optimizer is of no use: this one starts fresh.
            return [name for name, fresh in self._state.items()
                    if states.get(name, {}).keys() == fresh.keys()]  # fmt: skip

        names = world.broadcast_object(named)
        self._has_stepped = bool(names)
        for name in names:
            parameter = self._parameters[name]
            own = {key: as_dtensor(tensor, parameter) for key, tensor in self._state[name].items()}
            scatter_from_rank0(world, own, states.get(name, {}))


class WeightAverage:
    """An exponential average of the weights that are trained (Polyak and Juditsky 1992).

    Bias is corrected as Adam's is: after n steps, the weights of each count decay^age, normalized,
    and the first ones, which were drawn, count nothing.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float | None) -> None:
        self._decay = decay
        self._parameters = {name: p for name, p in parameters.items() if decay and p.requires_grad}
        self._average = {name: to_local(p.detach()).clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, n_steps: int) -> None:
        """Add the weights after the `n_steps`-th step."""
        if self._decay is not None:
            share = (1 - self._decay) / (1 - self._decay**n_steps)
            weights = all_local(self._parameters.values())
            torch._foreach_lerp_(list(self._average.values()), weights, share)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Put the average in the place of the weights during the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in self._average.items():
            weight = to_local(self._parameters[name])
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def tensors(self) -> dict[str, Tensor]:
        """Return the average by name, sharded as the weights are; empty without one."""
        return {name: as_dtensor(average, self._parameters[name])
                for name, average in self._average.items()}  # fmt: skip


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[Tensor], max_norm: float, world: World = SINGLE_PROCESS
) -> Tensor:
    """Scale the gradients to a global norm of at most `max_norm` (0: any); return the norm.

    The norm, a float32 scalar, stays on the device: reading it would wait for all of the step.
    """
    gradients = [gradient for p in parameters if (gradient := p.grad) is not None]
    local = all_local(gradients)
    # Squares are summed in float64 and the norm is rounded to float32: so it has the same bits
    # whether one process has a full gradient or several have shards of it. Muon's bfloat16 would
    # amplify a difference in the last bit.
    squared = sum_of_squares(local)
    if is_dtensor(gradients[0]):
        squared = squared.new_tensor(world.all_reduce_sum(float(squared))[0])
    norm = squared.sqrt().float()
    # On a CPU it costs nothing to ask, and small gradients are left alone.
    if max_norm and (norm.device.type != "cpu" or not norm <= max_norm):
        torch._foreach_mul_(local, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _peak_lr(name: str, parameter: Tensor, config: OptimConfig) -> float:
    """Return the peak learning rate of a parameter, by its kind."""
    if parameter.dim() < 2:
        own = config.scalar_lr
    else:
        own = {"h": None, "lm_head": config.head_lr}.get(name.split(".")[0], config.embed_lr)
    return config.lr if own is None else own


def lr_at(step: int, max_steps: int, config: Config) -> float:
    """Return the learning rate of the step that follows `step` finished ones.

    A linear warm-up, then the configured decay, which reaches min_lr at the last step. "wsd"
    (Hu et al. 2024) holds the peak and falls linearly over the last fifth.
    """
    optim, lr, min_lr = config.optim, config.optim.lr, config.min_lr
    if step < optim.warmup_steps:
        return lr * (step + 1) / optim.warmup_steps
    first, last = optim.warmup_steps, max(max_steps - 1, optim.warmup_steps + 1)
    done = min(1.0, (step - first) / (last - first))
    match optim.schedule:
        case "cosine":
            left = 0.5 * (1.0 + math.cos(math.pi * done))
        case "linear":
            left = 1.0 - done
        case "wsd":
            left = min(1.0, (1.0 - done) / _WSD_DECAY_FRACTION)
        case "constant":
            return lr
        case unreachable:
            assert_never(unreachable)
    return min_lr + left * (lr - min_lr)
