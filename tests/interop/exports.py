"""Small trained models to export, and the texts to try their vocabularies on."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from gptcli.checkpoint import Checkpoint, TrainedModel, load_model, save_checkpoint
from gptcli.config import load_config
from gptcli.model import GPT
from gptcli.tokenizers import ByteTokenizer, Tokenizer

LLAMA = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": False}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", {"n_head": 12, "n_embd": 48}),
    "gpt2-medium": ("GPT2LMHeadModel", {"n_layer": 3, "n_head": 16, "n_embd": 64}),
    "gpt2-large": ("GPT2LMHeadModel", {"n_layer": 4, "n_head": 20, "n_embd": 80}),
    "gpt2-xl": ("GPT2LMHeadModel", {"n_layer": 6, "n_head": 25, "n_embd": 100}),
    "no-biases": ("GPT2LMHeadModel", {"bias": False}),
    "qkv-biases": ("GPT2LMHeadModel", {"bias": False, "qkv_bias": True}),
    "untied": ("GPT2LMHeadModel", {"tie_embeddings": False, "n_inner": 72}),
    "exact-gelu": ("GPT2LMHeadModel", {"mlp": "gelu_erf", "norm_eps": 1e-3}),
    "squared-relu": ("GPT2LMHeadModel", {"mlp": "relu2"}),
    "llama": ("LlamaForCausalLM", {**LLAMA, "n_kv_head": 2, "tie_embeddings": False}),
    "llama-theta": ("LlamaForCausalLM", {**LLAMA, "rope_theta": 5e5, "norm_eps": 1e-3}),
    "llama-biases": ("LlamaForCausalLM", {**LLAMA, "bias": True}),
    "llama-heads": ("LlamaForCausalLM", {**LLAMA, "head_dim": 16, "n_inner": 88}),
    "qwen2": ("LlamaForCausalLM", {**LLAMA, "qkv_bias": True, "n_kv_head": 1}),
    "qwen3": ("Qwen3ForCausalLM", {**LLAMA, "qk_norm": True, "n_kv_head": 2}),
    "qwen3-heads": (
        "Qwen3ForCausalLM", {**LLAMA, "qk_norm": True, "head_dim": 16, "tie_embeddings": False}
    ),
}  # fmt: skip
GGUF_SHAPES = [name for name in SHAPES if name not in ("squared-relu", "exact-gelu")]
TEXT = "the cat sat on the mat, and the dog don't mind; it's 1234 o'clock  \n\n" * 20
HOSTILE = [
    "", " ", "  ", "\n", " \n \t ", "a  b", "don't DON'T won't'll", "x" * 300, "1234567 89",
    "<|endoftext|>", "a<|endoftext|>b", "<|unknown|>", "naïve café ÀÉ", "日本語とemoji 🙂👩‍👩‍👧",
    "\u200b\u00a0\u3000 \ufeff", "\x00\x01\x7f", "\r\n\r\n", "e\u0301\u0327", "ﬁ ﬂ Ⅷ ½", "ᚠᛇᚻ ١٢٣",
    "tabs\t\tand trailing   ", "'s't're've'm'll'd", "!!!???...---", "\U0010ffff\ue000", "İıſK",
    "the cat sat on the mat", " leading", "trailing \n", "\n\n\nthree", "Ġ Ċ ĉ",
]  # fmt: skip


def trained(
    tokenizer: Tokenizer | None = None, rows: int | None = None, **shape: Any
) -> TrainedModel:
    """Return a network with random weights, away from those of the start, by way of a file."""
    tokenizer = tokenizer or ByteTokenizer()
    config = load_config(None, ["train.tokens_per_step=8192", "generate.top_p=0.9"])
    small = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 24}
    small |= {"vocab_size": rows or tokenizer.vocab_size, **shape}
    model = config.model.model_validate(small)
    network = GPT(model)
    network.init_weights(1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    save_checkpoint(
        Path("made.pt"),
        Checkpoint(
            model=dict(network.named_parameters()),
            optimizer={},
            config=config.model_copy(update={"model": model}).model_dump(mode="json"),
            tokenizer=tokenizer.definition(),
            data={"dir": "data/x", "source": "corpus.txt", "revision": None, "fingerprint": "f",
                  "tokenizer": "t", "tokens": {"train": 5000, "val": 500}, "bytes": {}},
            state={"step": 7, "best_loss": 2.5, "best_step": 7, "origin": {}},
        ),
    )  # fmt: skip
    return load_model(Path("made.pt"), torch.device("cpu"))


def loaded(folder: Path) -> Any:
    """Load a folder with transformers, which must find every tensor and no other."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()
