"""nanoGPT's network, written from its published architecture, and files as its train.py writes.

A pre-norm GPT-2 with optional biases, the exact GELU and a tied head.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional


class _Block(nn.Module):
    def __init__(self, n_embd: int, n_head: int, bias: bool) -> None:
        super().__init__()
        self.n_head = n_head
        self.ln_1, self.ln_2 = (nn.LayerNorm(n_embd, bias=bias) for _ in range(2))
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=bias)
        self.attn.c_proj = nn.Linear(n_embd, n_embd, bias=bias)
        self.mlp.c_fc = nn.Linear(n_embd, 4 * n_embd, bias=bias)
        self.mlp.c_proj = nn.Linear(4 * n_embd, n_embd, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        parts = self.attn.c_attn(self.ln_1(x)).split(width, dim=2)
        q, k, v = (p.view(batch, length, self.n_head, -1).transpose(1, 2) for p in parts)
        scores = q @ k.transpose(-2, -1) / math.sqrt(k.size(-1))
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        seen = scores.masked_fill(later, float("-inf")).softmax(-1) @ v
        x = x + self.attn.c_proj(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp.c_proj(functional.gelu(self.mlp.c_fc(self.ln_2(x))))


class NanoGPT(nn.Module):
    """nanoGPT's network, under its names."""

    def __init__(self, args: dict[str, Any]) -> None:
        super().__init__()
        width, bias = args["n_embd"], args["bias"]
        blocks = [_Block(width, args["n_head"], bias) for _ in range(args["n_layer"])]
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(args["vocab_size"], width),
                "wpe": nn.Embedding(args["block_size"], width),
                "h": nn.ModuleList(blocks),
                "ln_f": nn.LayerNorm(width, bias=bias),
            }
        )
        self.lm_head = nn.Linear(width, args["vocab_size"], bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.transformer["wte"](tokens)
        x = x + self.transformer["wpe"](torch.arange(tokens.shape[1]))
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


def save_nanogpt(path: Path, *, bias: bool, prefix: str = "", **more: Any) -> NanoGPT:
    """Write a `ckpt.pt` as nanoGPT's train.py does."""
    torch.manual_seed(0)
    args = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 24, "bias": bias,
            "vocab_size": 257, "dropout": 0.0}  # fmt: skip
    model = NanoGPT(args)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint = {
        "model": {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "model_args": args | more,
        "iter_num": 7,
        "best_val_loss": torch.tensor(3.0),
        "config": {"dataset": "bytes"},
    }
    torch.save(checkpoint, path)
    return model
