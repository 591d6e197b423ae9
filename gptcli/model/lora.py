"""Low-rank adapters (LoRA, Hu et al. 2021): frozen matrices with a small learned update.

A matrix `c_attn.weight` has its update beside it, in `c_attn.lora_A` and `c_attn.lora_B`. Letters
as in gpt.py; R rank.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcli.config.model import LoraConfig
from gptcli.model.products import linear

_A, _B = ".lora_A", ".lora_B"


class LoRALinear(nn.Linear):
    """A linear layer of which only a low-rank update is learned: x W^T + b + scale x A^T B^T."""

    def __init__(self, base: nn.Linear, config: LoraConfig) -> None:
        """Take the weights of `base`; the update is zero until it has learned."""
        device = base.weight.device
        super().__init__(base.in_features, base.out_features, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.scale = config.scale
        self.lora_A = nn.Parameter(torch.zeros(config.rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        update = F.linear(F.linear(x, self.lora_A), self.lora_B)  # (B, T, R), then the output
        return linear(x, self.weight, self.bias) + self.scale * update


def add_adapters(blocks: nn.Module, config: LoraConfig) -> None:
    """Replace the layers of `blocks` that `config` names by ones with adapters."""
    for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_gate", "mlp.c_proj"):
        if config.targets is not None and layer not in config.targets:
            continue
        owner, name = layer.split(".")
        for block in blocks.children():
            parent = block.get_submodule(owner)
            if isinstance(base := getattr(parent, name), nn.Linear):
                setattr(parent, name, LoRALinear(base, config))


def is_adapter(name: str) -> bool:
    """Tell whether a parameter is part of an adapter, by its name."""
    return name.endswith((_A, _B))


@torch.no_grad()
def init_adapters(model: nn.Module, seed: int) -> None:
    """Draw A as the paper does, with a deviation of 1 / sqrt(C), and leave B zero.

    As `GPT.init_weights`: from the seed alone, the same on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(_A):
            drawn = torch.empty(parameter.shape).normal_(generator=generator)
            parameter.copy_(drawn / parameter.shape[1] ** 0.5)
        elif name.endswith(_B):
            parameter.zero_()


def merge_adapters(weights: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """Return the weights of a model without adapters that computes the same as one with these."""
    merged = {name: weight for name, weight in weights.items() if not is_adapter(name)}
    for name, A in weights.items():
        if name.endswith(_A):
            layer = name.removesuffix(_A)
            # (out, R) times (R, in)
            update = config.scale * weights[layer + _B].float() @ A.float()
            matrix = merged[f"{layer}.weight"]
            merged[f"{layer}.weight"] = (matrix.float() + update).to(matrix.dtype)
    return merged
