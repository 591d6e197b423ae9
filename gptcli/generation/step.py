"""A step of decoding in one call of step.c, for models whose products are those of matvec.c.

Launching the hundreds of operations of a step one by one takes longer than all but its products.
Letters as in gpt.py.
"""

import ctypes
from typing import Any, cast

import torch
from torch import Tensor, nn

from gptcli.config.model import ModelConfig
from gptcli.generation import native
from gptcli.generation.product import Product
from gptcli.model import GPT, KVCache
from gptcli.model.extras import bigram_rows
from gptcli.model.gpt import Block, rope_cache

_MLPS = ("gelu", "gelu_erf", "relu2", "swiglu")  # step.c's numbers for them
_POINTER, _LONG = ctypes.c_void_p, ctypes.c_long


class _Matrix(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("w", "scales", "bias")),
        *((name, _LONG) for name in ("N", "K", "kind")),
    )


class _Norm(ctypes.Structure):
    _fields_ = (("weight", _POINTER), ("bias", _POINTER))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Norm) for name in ("ln_1", "ln_2")),
        *((name, _Matrix) for name in ("c_attn", "c_proj", "c_fc", "c_gate", "mlp_proj")),
        *((name, _POINTER) for name in ("q_norm", "k_norm", "x0_scale", "value", "cache")),
    )


class _Net(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.POINTER(_Layer)), ("ln_f", _Norm), ("head", _Matrix), ("rope", _POINTER),
        *((name, _LONG) for name in ("n_layer", "C", "H", "G", "D", "width", "places", "norm",
                                     "mlp", "offset")),
        ("eps", ctypes.c_float),
    )  # fmt: skip


def step_in_one_call(model: GPT) -> None:
    """Let `model.next_logits` pass single tokens through step.c, where it knows the model."""
    config, library = model.config, native.library()
    if library is None or not _is_known(model):
        return
    step, of_torch, few = _Step(model, library), model.next_logits, model.lm_head.few

    def next_logits(tokens: Tensor, cache: KVCache) -> Tensor:
        is_step = tokens.shape[1] == 1 and len(cache.layers) == config.n_layer
        takes = is_step and len(tokens) <= few and not cache.is_fixed
        return (step if takes else of_torch)(tokens, cache)

    model.next_logits = next_logits  # type: ignore[method-assign]


def _is_known(model: GPT) -> bool:
    config = model.config
    products = [product for block in model.h for product in _products(block)]
    return (
        all(isinstance(one, Product) and one.few for one in [*products, model.lm_head])
        and config.mlp in _MLPS
        and config.head_size % 16 == 0
        and config.head_size <= 256
        and config.mlp_width % 8 == 0
        and all(product.W.shape[0] % 8 == 0 for product in products)
    )


def _products(module: nn.Module) -> list[Any]:
    block = cast(Block, module)
    gate = [block.mlp.c_gate] if block.mlp.c_gate is not None else []
    return [block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj, *gate]


class _Step:
    """Called as `next_logits` of the model, whose tensors it points to."""

    def __init__(self, model: GPT, library: ctypes.CDLL) -> None:
        self._model, self._call, self._threads = model, library.decode_step, torch.get_num_threads()
        config: ModelConfig = model.config
        places = torch.arange(config.block_size)
        self._rope = None if model.wpe is not None else rope_cache(places, config).contiguous()
        self._layers = (_Layer * config.n_layer)(*map(_layer, model.h))
        G = config.n_kv_head or config.n_head
        self._net = _Net(
            self._layers, _norm(model.ln_f), _matrix(model.lm_head),
            None if self._rope is None else self._rope.data_ptr(), config.n_layer, config.n_embd,
            config.n_head, G, config.head_size, config.mlp_width, config.block_size,
            config.norm == "rmsnorm", _MLPS.index(config.mlp), bool(config.key_offset),
            config.norm_eps,
        )  # fmt: skip
        self._row_floats = (2 + self._threads) * config.n_embd + 2 * max(
            config.mlp_width, config.n_embd
        ) + (2 * config.n_head + 2 * G) * config.head_size  # fmt: skip

    @torch.no_grad()
    def __call__(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Return the logits (B, n_tokens) that follow tokens (B, 1)."""
        model, rows = self._model, len(tokens)
        assert cache.length < model.config.block_size, "more tokens than the context holds"
        x = model.wte(tokens)  # (B, 1, C)
        if model.bigram is not None:
            before = cache.extend_tokens(tokens)
            x = x + model.bigram(bigram_rows(tokens, before, model.config.bigram_rows))
        if model.wpe is not None:
            x = x + model.wpe(torch.tensor([cache.length]) if cache.position is None
                              else cache.position)  # fmt: skip
        values = [table(tokens) for table in model.value_embeds or ()]  # (B, 1, G D) each
        first_value = len(self._layers) - len(values)
        for at, (layer, stored) in enumerate(zip(self._layers, cache.layers, strict=True)):
            layer.cache = stored.data_ptr()
            if at >= first_value:
                layer.value = values[at - first_value].data_ptr()
        stored, lengths = cache.layers[0], cache.position
        logits = x.new_empty(rows, model.config.vocab_size)
        scratch = x.new_empty(rows * self._row_floats)
        self._call(
            ctypes.addressof(self._net), x.data_ptr(), logits.data_ptr(), scratch.data_ptr(),
            None if lengths is None else lengths.data_ptr(), cache.length,
            stored.stride(0), stored.stride(1), rows, self._threads,
        )  # fmt: skip
        cache.length += 1
        seen: Tensor = logits[:, : model.n_tokens]
        return seen


def _layer(module: nn.Module) -> _Layer:
    block = cast(Block, module)
    attn, mlp = block.attn, block.mlp
    heads = (
        None if norm is None else norm.weight.data_ptr() for norm in (attn.q_norm, attn.k_norm)
    )
    x0 = None if block.x0_scale is None else block.x0_scale.data_ptr()
    return _Layer(
        _norm(block.ln_1), _norm(block.ln_2), _matrix(attn.c_attn), _matrix(attn.c_proj),
        _matrix(mlp.c_fc), _matrix(mlp.c_gate), _matrix(mlp.c_proj), *heads, x0,
    )  # fmt: skip


def _matrix(product: Any) -> _Matrix:
    if product is None:
        return _Matrix()
    return _Matrix(*product.pointers, *product.W.shape, product.kind)


def _norm(norm: Any) -> _Norm:
    bias: Tensor | None = getattr(norm, "bias", None)
    return _Norm(norm.weight.data_ptr(), None if bias is None else bias.data_ptr())
