"""Optimizers from the configuration: which parameters decay, and which go to Muon."""

from collections.abc import Collection, Iterable, Mapping
from typing import assert_never

import torch
from torch import Tensor, nn

from gptcli.config.schema import OptimConfig
from gptcli.errors import CheckpointError
from gptcli.model import GPT

OptimizerState = dict[str, dict[str, Tensor]]
_AdamWGroups = list[dict[str, object]]


class Optimizer:
    """One or two torch optimizers over a network's parameters, addressed by parameter name.

    Parameters that do not require gradients are left alone: no decay, no state.
    """

    def __init__(self, model: GPT, config: OptimConfig, device: torch.device) -> None:
        named = list(model.named_parameters())
        self._frozen = {name for name, parameter in named if not parameter.requires_grad}
        self._names = {p: name for name, p in named if name not in self._frozen}
        match config.name:
            case "adamw":
                self._parts: list[torch.optim.Optimizer] = [_adamw(self._names, config, device)]
            case "muon":
                inner = {p for p, name in self._names.items() if _is_block_matrix(name, p)}
                others = [p for p in self._names if p not in inner]
                self._parts = [_adamw(others, config, device)] if others else []
                if inner:
                    muon = torch.optim.Muon(
                        [p for p in self._names if p in inner],
                        lr=config.lr,
                        weight_decay=config.weight_decay,
                        adjust_lr_fn="match_rms_adamw",  # so that AdamW's rates carry over
                    )
                    self._parts.insert(0, muon)
            case unreachable:
                assert_never(unreachable)

    def unscale(self, scaler: torch.amp.GradScaler) -> None:
        """Bring gradients of a scaled loss back to size; only float16 scales."""
        if scaler.is_enabled():
            for part in self._parts:
                scaler.unscale_(part)

    def step(self, lr: float, scaler: torch.amp.GradScaler) -> None:
        """Update the parameters from their gradients."""
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = lr
            scaler.step(part)
        scaler.update()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for part in self._parts:
            part.zero_grad(set_to_none=True)

    def state(self) -> OptimizerState:
        """Return the state of each parameter, by its name; no copies are made."""
        return {
            name: dict(part.state[parameter])
            for part in self._parts
            for parameter, name in self._names.items()
            if parameter in part.state
        }

    def load_state(
        self, states: Mapping[str, Mapping[str, Tensor]], were_frozen: Collection[str] = ()
    ) -> None:
        """Take up the state of a checkpoint, bit for bit.

        Args:
            states: By parameter name; that of a parameter frozen since is dropped.
            were_frozen: Parameters without a state there; one that learns now begins anew.

        Raises:
            CheckpointError: It is the state of other parameters.
        """
        by_name = {
            self._names[parameter]: (part, parameter)
            for part in self._parts
            for group in part.param_groups
            for parameter in group["params"]
        }
        foreign = states.keys() - by_name.keys() - self._frozen
        missing = by_name.keys() - states.keys() - set(were_frozen) if states else set()
        if foreign or missing:
            differing = ", ".join(sorted(foreign | missing)[:3])
            raise CheckpointError(f"optimizer state of other parameters ({differing})")
        for name, state in states.items():
            if name in self._frozen:
                continue
            part, parameter = by_name[name]
            fused = any(group.get("fused") for group in part.param_groups)
            # A step count stays on the CPU unless the update is fused. Copied: the checkpoint's
            # tensors are views of a file.
            part.state[parameter] = {
                key: tensor.to(parameter.device if tensor.dim() or fused else "cpu", copy=True)
                for key, tensor in state.items()
            }


def clip_gradients(model: GPT, max_norm: float) -> Tensor:
    """Scale the gradients to a global norm of at most `max_norm` (0: any); return the norm."""
    limit = max_norm or float("inf")
    return nn.utils.clip_grad_norm_(model.parameters(), limit)


def _is_block_matrix(name: str, parameter: Tensor) -> bool:
    return parameter.dim() == 2 and name.startswith("h.")


def _adamw(
    parameters: Iterable[Tensor], config: OptimConfig, device: torch.device
) -> torch.optim.AdamW:
    """Make an AdamW that decays matrices and leaves vectors (norms and biases) alone."""
    parameters = list(parameters)
    groups: _AdamWGroups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        fused=device.type in ("cuda", "cpu", "mps"),
    )
