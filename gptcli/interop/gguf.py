"""GGUF, the file of llama.cpp: written with the `gguf` package, and read back through it.

The tensors and keys are those of llama.cpp's convert_hf_to_gguf.py (https://github.com/ggml-org/
llama.cpp). Its GPT-2 has the GELU by tanh.
"""

import contextlib
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from gptcli.config.model import ModelConfig
from gptcli.errors import CheckpointError, ConfigError
from gptcli.interop.hf_config import Family
from gptcli.interop.hf_tokenizer import merges_of, vocabulary_of
from gptcli.interop.names import GGUF_GPT2, GGUF_LLAMA, Table, from_format, to_format
from gptcli.interop.weights import Shapes, require_shapes
from gptcli.tokenizers import Tokenizer
from gptcli.tokenizers.bpe import GPT2_PATTERN, BpeTokenizer

FileDtype = Literal["float32", "float16", "q8_0"]
_TURNED = (".attn_q.weight", ".attn_k.weight", ".attn_q.bias", ".attn_k.bias")


def require_gguf(model: ModelConfig, tokenizer: Tokenizer) -> BpeTokenizer:
    """Refuse what a GGUF file cannot hold, beyond what no format can; return the tokenizer.

    Raises:
        ConfigError: Naming the key, or the package that is missing.
    """
    _package()
    if model.mlp == "relu2":
        raise ConfigError(
            "GGUF does not hold this model: model.mlp=relu2 (not gelu)",
            "train a model that can be exported: -s model.mlp=gelu; --to hf holds this one",
        )
    if not isinstance(tokenizer, BpeTokenizer) or tokenizer.pattern != GPT2_PATTERN:
        raise ConfigError(
            f"GGUF does not hold this vocabulary: tokenizer.name={tokenizer.name}"
            " (not gpt2 or bpe)",
            "prepare and train with -s tokenizer.name=bpe or gpt2; --to hf holds every vocabulary",
        )
    return tokenizer


def _package() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(
            "--to gguf needs the package gguf", "install it: pip install 'gptcli[gguf]'"
        ) from error
    package: ModuleType = gguf
    return package


def write_gguf(
    path: Path,
    weights: dict[str, Tensor],
    model: ModelConfig,
    tokenizer: BpeTokenizer,
    family: Family,
    dtype: FileDtype,
    name: str,
) -> None:
    """Write a file that llama.cpp loads.

    Args:
        path: The file.
        weights: By our names, with the biases that the family has.
        model: Their network.
        tokenizer: Byte-pair, with GPT-2's split.
        family: Becomes `general.architecture`.
        dtype: Of the matrices; vectors and positions stay float32. q8_0 has 8 bits and a float16
            scale for each 32 weights of a row; rows that 32 does not divide become float16.
        name: Becomes `general.name`.
    """
    gguf = _package()
    with contextlib.closing(gguf.GGUFWriter(path, family)) as writer:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(name)
        kinds = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
        writer.add_file_type(gguf.LlamaFileType[kinds[dtype]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_shape(writer, model, family)
        writer.add_vocab_size(tokenizer.vocab_size)
        _add_tokenizer(writer, tokenizer, gguf)
        for tensor_name, tensor in to_format(weights, _table(family), model).items():
            if family == "llama" and tensor_name.endswith(_TURNED):
                tensor = _to_pairs(tensor, model.head_size)
            is_matrix = tensor.dim() == 2 and tensor_name != "position_embd.weight"
            _add_tensor(writer, tensor_name, tensor, dtype if is_matrix else "float32", gguf)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def _add_shape(writer: Any, model: ModelConfig, family: Family) -> None:
    writer.add_block_count(model.n_layer)
    writer.add_context_length(model.block_size)
    writer.add_embedding_length(model.n_embd)
    writer.add_feed_forward_length(model.mlp_width)
    writer.add_head_count(model.n_head)
    if family == "gpt2":
        writer.add_layer_norm_eps(model.norm_eps)
        return
    writer.add_head_count_kv(model.n_kv_head or model.n_head)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_rope_dimension_count(model.head_size)
    writer.add_key_length(model.head_size)
    writer.add_value_length(model.head_size)


def _add_tensor(writer: Any, name: str, tensor: Tensor, dtype: FileDtype, gguf: ModuleType) -> None:
    values = tensor.detach().float().contiguous().numpy()
    if dtype == "q8_0" and tensor.shape[-1] % 32 == 0:
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, values if dtype == "float32" else values.astype("float16"))


def _table(family: str) -> Table:
    return GGUF_GPT2 if family == "gpt2" else GGUF_LLAMA


def _add_tokenizer(writer: Any, tokenizer: BpeTokenizer, gguf: ModuleType) -> None:
    spelled = {id: token for token, id in vocabulary_of(tokenizer).items()}
    special = set(tokenizer.specials.values())
    tokens, types = [], []
    for id in range(tokenizer.vocab_size):
        tokens.append(spelled.get(id, f"[PAD{id}]"))
        kind = "CONTROL" if id in special else "NORMAL" if id in spelled else "UNUSED"
        types.append(gguf.TokenType[kind])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in merges_of(tokenizer)])
    writer.add_bos_token_id(tokenizer.eot)
    writer.add_eos_token_id(tokenizer.eot)
    writer.add_add_bos_token(False)


def _to_pairs(rows: Tensor, head_size: int) -> Tensor:
    """Return query or key rows with each rotary pair side by side, as llama.cpp's Llama turns them.

    Here, as in Hugging Face's files, the halves of a head are the pairs.
    """
    heads = rows.reshape(-1, 2, head_size // 2, *rows.shape[1:])
    return heads.transpose(1, 2).reshape(rows.shape)


def _to_halves(rows: Tensor, head_size: int) -> Tensor:
    """Undo `_to_pairs`."""
    heads = rows.reshape(-1, head_size // 2, 2, *rows.shape[1:])
    return heads.transpose(1, 2).reshape(rows.shape)


def read_gguf(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Read a file back: the network that llama.cpp would compute, and its weights by our names.

    Raises:
        CheckpointError: It is not what `write_gguf` writes.
    """
    gguf = _package()
    try:
        reader = gguf.GGUFReader(path)
        family = reader.get_field("general.architecture").contents()
        model = _network(reader, family)
    except (ValueError, KeyError, AttributeError, IndexError, OSError) as error:
        raise CheckpointError(f"{path}: not a GGUF file of these networks ({error})") from error
    theirs = {
        tensor.name: torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        for tensor in reader.tensors
    }
    if family == "llama":
        theirs = {
            name: _to_halves(tensor, model.head_size) if name.endswith(_TURNED) else tensor
            for name, tensor in theirs.items()
        }
    shapes: Shapes = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    names = require_shapes(shapes, model, _table(family), str(path), lambda name: False)
    return model, from_format(theirs, names, _table(family))


def _network(reader: Any, family: str) -> ModelConfig:
    def value(key: str) -> Any:
        return reader.get_field(f"{family}.{key}").contents()

    shapes = {tensor.name: tensor.data.shape for tensor in reader.tensors}
    shape: dict[str, Any] = {
        "n_layer": value("block_count"),
        "n_head": value("attention.head_count"),
        "n_embd": value("embedding_length"),
        "n_inner": value("feed_forward_length"),
        "block_size": value("context_length"),
        "vocab_size": shapes["token_embd.weight"][0],
        "tie_embeddings": "output.weight" not in shapes,
    }
    if family == "gpt2":
        return ModelConfig(**shape, norm_eps=float(value("attention.layer_norm_epsilon")))
    return ModelConfig(
        **shape,
        n_kv_head=value("attention.head_count_kv"),
        head_dim=value("attention.key_length"),
        norm="rmsnorm",
        norm_eps=float(value("attention.layer_norm_rms_epsilon")),
        position="rope",
        rope_theta=float(value("rope.freq_base")),
        mlp="swiglu",
        qk_norm=family == "qwen3",
        bias="blk.0.ffn_up.bias" in shapes,
        qkv_bias="blk.0.attn_q.bias" in shapes,
    )
