"""Weights for decoding: in as few bits as they are worth, multiplied by matvec.c where it is built.

A token needs every weight once, so decoding takes as long as reading them. Residuals and norms stay
float32.
"""

import torch
from torch import nn

from gptcli.device import multiplies_bfloat16
from gptcli.errors import ConfigError
from gptcli.generation import native
from gptcli.generation.product import FEW, Product
from gptcli.model import GPT

# Parameters from which a token's time is that of reading weights: below, fewer bits gain nothing.
LARGE = 20_000_000
_MANY = 8  # texts decoded together up to which products of bfloat16 matrices are no faster


@torch.no_grad()
def prepare_for_decoding(
    model: GPT, dtype: torch.dtype | None = None, *, rows: int = 1, int8: bool = False
) -> str:
    """Replace the weights of `model` by those it decodes best with; it cannot be trained then.

    Args:
        model: In evaluation mode, float32.
        dtype: None on a CPU is 16 bits, or float32 where fewer bits gain nothing.
        rows: Texts that are decoded together.
        int8: Quantize the matrices, the head too, with a scale for every 32 weights of a row.

    Returns:
        What it decodes with, in a few words.
    """
    device = model.wte.weight.device.type
    if device != "cpu":
        if int8:
            raise ConfigError(
                f"--quantize int8: it is slower than 16 bits on {device}", "leave --quantize out"
            )
        model.to(dtype)  # all of it: there, what lies between the products has this precision too
        return f"{_name(model.wte.weight.dtype)} weights"
    is_many = rows > _MANY and multiplies_bfloat16()
    held = torch.int8 if int8 else dtype or _fastest(model, is_many)
    few = _MANY if is_many and held == torch.bfloat16 else FEW
    if held == torch.float32:
        return "float32"
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        module = model.get_submodule(parent)
        delattr(module, last)  # a function takes the module's place: calling it costs less
        setattr(module, last, Product(held, layer.weight, layer.bias, few))
    return f"{_name(held)} weights"


def _fastest(model: GPT, is_many: bool) -> torch.dtype:
    """Return the precision that is fastest on this CPU."""
    if model.n_params() < LARGE:
        return torch.float32
    if is_many:
        return torch.bfloat16
    # It rounds 8 times finer than bfloat16. Without matvec.c, torch is no faster with 16 bits.
    return torch.float32 if native.library() is None else torch.float16


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
