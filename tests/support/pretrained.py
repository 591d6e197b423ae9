"""Models of other programs, small, with random weights, and what they are compared by."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from gptcli.checkpoint import load_weights
from gptcli.interop.pretrained import open_pretrained
from gptcli.model import GPT

IDS = {"bos_token_id": 0, "eos_token_id": 0}
LLAMA = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 24, **IDS,
}  # fmt: skip
KINDS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "llama-tied-biased": lambda: LlamaForCausalLM(
        LlamaConfig(
            **LLAMA,
            tie_word_embeddings=True,
            attention_bias=True,
            mlp_bias=True,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        )
    ),
    "llama-attention-biased": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, attention_bias=True)),
    "llama-mlp-biased": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, mlp_bias=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**LLAMA, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**LLAMA, head_dim=8)),
    "qwen3-wide-heads": lambda: Qwen3ForCausalLM(Qwen3Config(**LLAMA, head_dim=16)),
    "gpt2": lambda: gpt2(2, 4, 32),
    "gpt2-untied": lambda: gpt2(2, 4, 32, tie_word_embeddings=False, n_inner=72),
    "gpt2-exact-gelu": lambda: gpt2(2, 4, 32, activation_function="gelu"),
}


def gpt2(n_layer: int, n_head: int, n_embd: int, **more: Any) -> GPT2LMHeadModel:
    """Return a GPT-2 of transformers."""
    shape = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "vocab_size": 97}
    shape |= {"n_positions": 24, **IDS, **more}
    return GPT2LMHeadModel(GPT2Config(**shape))


def shaken(model: PreTrainedModel) -> PreTrainedModel:
    """Move weights away from their initialisation, where biases are zero and norms one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def ours_of(name: str | Path) -> GPT:
    """Return our network with the weights that `name` names."""
    origin = open_pretrained(str(name))
    weights = origin.weights()
    model = GPT(origin.model)
    load_weights(model, weights, Path(origin.place))
    return model.eval()


def difference(one: Any, two: Any, vocab_size: int = 97, length: int = 24) -> float:
    """Return the largest absolute difference of two networks' logits."""
    tokens = torch.randint(vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        first, second = (model(tokens).logits[..., :vocab_size] for model in (one, two))
    assert float(first.std()) > 1e-3, "logits that say something"
    return float((first - second).abs().max())


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
