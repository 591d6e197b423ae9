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
from gptcli.generation.product import GROUP, GROUP_WORDS, KINDS, Product
from gptcli.model import GPT, KVCache
from gptcli.model.extras import bigram_rows, rope_cache
from gptcli.model.gpt import Block, Linear

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


def one_call(model: GPT) -> "Step | None":
    """Return what does a step of a model on a CPU by step.c; None where that is not possible."""
    config = model.config
    if hasattr(model, "unshard") or config.mlp not in _MLPS:  # each process has shards
        return None
    products = [_product(layer) for block in model.h for layer in _layers(block)]
    head = _product(model.lm_head)
    is_known = (
        all(product is not None and product.few for product in [*products, head])
        and config.head_size % 16 == 0
        and config.head_size <= 256
        and config.mlp_width % 8 == 0
        and all(product.shape[0] % 8 == 0 for product in products if product is not None)
    )
    return Step(model) if is_known else None


def _layers(module: nn.Module) -> list[Any]:
    block = cast(Block, module)
    gate = [block.mlp.c_gate] if block.mlp.c_gate is not None else []
    return [block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj, *gate]


def _product(layer: Any) -> Product | None:
    """Return a layer as a product by matvec.c; one of float32 weights, as pointers to them."""
    if isinstance(layer, Product):
        return layer
    if type(layer) is not Linear or layer.weight.device.type != "cpu":
        return None
    weight, bias = layer.weight, layer.bias
    is_same = weight.dtype == torch.float32 and weight.is_contiguous()  # or it would be a copy
    return Product(torch.float32, weight, bias) if is_same else None


class Step:
    """Called as `next_logits` of the model, whose tensors it points to.

    It takes a token of each text, or the first tokens of one.

    Attributes:
        few: Tokens up to which it is faster than the model.
    """

    def __init__(self, model: GPT) -> None:
        library, head = native.library(), _product(model.lm_head)
        assert library is not None and head is not None
        self._model, self._call, self._threads = model, library.decode_step, torch.get_num_threads()
        self.few = head.few
        # Who asks for bfloat16 may need its range.
        self._is_half = KINDS[head.kind] in (torch.float16, torch.int8)
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
        heads = config.n_head * config.head_size
        widest = max(config.mlp_width, config.n_embd, heads)
        of_thread = config.n_embd + widest * GROUP_WORDS // GROUP + 1
        self._row_floats = (
            2 * (config.n_embd + widest + heads + G * config.head_size) + self._threads * of_thread
        )

    def cache_dtype(self, n_texts: int) -> torch.dtype:
        """Return the precision for keys and values of so many texts, by that of the weights.

        More than a call takes are float32: torch would widen them for every token.
        """
        return torch.float16 if self._is_half and n_texts <= self.few else torch.float32

    @torch.no_grad()
    def __call__(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Return the logits (B, n_tokens) after tokens (B, 1); or (1, T), the first of a text."""
        model, (B, T), net = self._model, tokens.shape, self._net
        assert T == 1 or (B == 1 and not cache.length and cache.position is None)
        assert cache.length + T <= model.config.block_size, "more tokens than the context holds"
        x = model.wte(tokens)  # (B, T, C)
        if model.bigram is not None:
            x = x + model.bigram(bigram_rows(tokens, cache.before, model.config.bigram_rows))
        if model.wpe is not None:
            here = slice(cache.length, cache.length + T)
            x = x + (
                model.wpe.weight[here] if cache.position is None else model.wpe(cache.position)
            )
        values = [table(tokens) for table in model.value_embeds or ()]  # (B, T, G D) each
        if not cache.layers:
            shape = B, 2 * net.G, cache.size + net.offset, net.D
            cache.layers = [x.new_zeros(shape, dtype=cache.dtype) for _ in self._layers]
        first_value = len(self._layers) - len(values)
        for at, (layer, stored) in enumerate(zip(self._layers, cache.layers, strict=True)):
            layer.cache = stored.data_ptr()
            if at >= first_value:
                layer.value = values[at - first_value].data_ptr()
        stored, lengths = cache.layers[0], cache.position if T == 1 else torch.arange(T)
        assert stored.dtype in (torch.float32, torch.float16)
        logits = x.new_empty(B, model.config.vocab_size)
        scratch = x.new_empty(B * T * self._row_floats)
        self._call(
            ctypes.addressof(net), x.data_ptr(), logits.data_ptr(), scratch.data_ptr(),
            None if lengths is None else lengths.data_ptr(), cache.length,
            stored.stride(0) if T == 1 else 0, stored.stride(1), KINDS.index(stored.dtype), B * T,
            self._threads,
        )  # fmt: skip
        cache.length, cache.before = cache.length + T, tokens[:, -1:]
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


def _matrix(layer: Any) -> _Matrix:
    product = _product(layer)
    if product is None:
        return _Matrix()
    return _Matrix(*product.pointers, *product.shape, product.kind)


def _norm(norm: Any) -> _Norm:
    bias: Tensor | None = getattr(norm, "bias", None)
    return _Norm(norm.weight.data_ptr(), None if bias is None else bias.data_ptr())
