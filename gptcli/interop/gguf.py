"""`--to gguf`: the file of llama.cpp, written and read back with the `gguf` package.

The tensors and keys are those of llama.cpp's convert_hf_to_gguf.py (https://github.com/ggml-org/
llama.cpp). Its GPT-2 has the GELU by tanh.
"""

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptcli.checkpoint import TrainedModel
from gptcli.config.model import ModelConfig
from gptcli.data.archives import shown
from gptcli.errors import ConfigError
from gptcli.interop import optional_package
from gptcli.interop.hf_config import family_of
from gptcli.interop.hf_tokenizer import merges_of, specials_of, vocabulary_of
from gptcli.interop.names import GGUF_GPT2, GGUF_LLAMA, Table, from_format, to_format
from gptcli.interop.weights import Form, Source, require_shapes
from gptcli.tokenizers import CHAT_TEMPLATE, Tokenizer
from gptcli.tokenizers.bpe import GPT2_PATTERN, BpeTokenizer

_PERMUTED = (".attn_q.weight", ".attn_k.weight", ".attn_q.bias", ".attn_k.bias")
_FILE_TYPES = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}


def check(trained: TrainedModel, out: Path) -> Form:
    """Return the model's form there; a ConfigError also if the package is missing."""
    family, mlp = family_of(trained.model.config), trained.model.config.mlp
    _package()
    if mlp == "relu2":
        raise ConfigError(
            "GGUF does not hold this model: model.mlp=relu2 (not gelu)",
            "train a model that can be exported: -s model.mlp=gelu; --to hf holds this one",
        )
    _byte_pair(trained.tokenizer)
    if mlp == "gelu_erf":
        note = "llama.cpp computes GELU by tanh, this model the exact one"
        return Form(family, (note,), is_exact=False)
    return Form(family)


def _byte_pair(tokenizer: Tokenizer) -> BpeTokenizer:
    """Return the tokenizer, or raise a ConfigError if llama.cpp has no such vocabulary."""
    if not isinstance(tokenizer, BpeTokenizer) or tokenizer.pattern != GPT2_PATTERN:
        raise ConfigError(
            f"GGUF does not hold this vocabulary: tokenizer.name={tokenizer.name}"
            " (not gpt2 or bpe)",
            "prepare and train with -s tokenizer.name=bpe or gpt2; --to hf holds every vocabulary",
        )
    if not merges_of(tokenizer):
        raise ConfigError(
            f"GGUF does not hold this vocabulary: {tokenizer.vocab_size} tokens and no merges,"
            " which llama.cpp does not load",
            "prepare and train with a larger tokenizer.vocab_size; --to hf holds every vocabulary",
        )
    return tokenizer


def _package() -> Any:
    return optional_package("gguf", "--to gguf", "gguf")


def write(path: Path, source: Source) -> int:
    """Write a file that llama.cpp loads; return the number of parameters.

    Matrices have the dtype asked for; vectors and positions stay float32. q8_0 has 8 bits and a
    float16 scale for each 32 weights of a row; rows that 32 does not divide become float16.
    """
    gguf, family, model = _package(), source.form.family, source.model
    weights, tokenizer = source.with_biases(), _byte_pair(source.trained.tokenizer)
    with contextlib.closing(gguf.GGUFWriter(path, family)) as writer:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(shown(source.out.stem))
        writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[source.dtype]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        shape, table = dict(model.resolved()), _table(family)
        for key, ours, _ in table.settings:
            add = writer.add_float32 if isinstance(shape[ours], float) else writer.add_uint32
            add(f"{family}.{key}", shape[ours])
        writer.add_vocab_size(tokenizer.vocab_size)
        _add_tokenizer(writer, tokenizer, gguf)
        for name, tensor in to_format(weights, table, model).items():
            if family == "llama" and name.endswith(_PERMUTED):
                # llama.cpp's Llama turns pairs side by side; here, as in Hugging Face's files,
                # the halves of a head are the pairs.
                tensor = _swapped(tensor, (2, model.head_size // 2))
            is_matrix = tensor.dim() == 2 and name != "position_embd.weight"
            _add_tensor(writer, name, tensor, source.dtype if is_matrix else "float32", gguf)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return sum(weight.numel() for weight in weights.values())


def _table(family: str) -> Table:
    return GGUF_GPT2 if family == "gpt2" else GGUF_LLAMA


def _add_tensor(writer: Any, name: str, tensor: Tensor, dtype: str, gguf: Any) -> None:
    values = tensor.detach().float().contiguous().numpy()
    if dtype == "q8_0" and tensor.shape[-1] % 32 == 0:
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, values if dtype == "float32" else values.astype("float16"))


def _add_tokenizer(writer: Any, tokenizer: BpeTokenizer, gguf: Any) -> None:
    spelled = {id: token for token, id in vocabulary_of(tokenizer).items()}
    special, ids = set(specials_of(tokenizer).values()), range(tokenizer.vocab_size)
    kinds = ("CONTROL" if id in special else "NORMAL" if id in spelled else "UNUSED" for id in ids)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([spelled.get(id, f"[PAD{id}]") for id in ids])
    writer.add_token_types([gguf.TokenType[kind] for kind in kinds])
    writer.add_token_merges([" ".join(pair) for pair in merges_of(tokenizer)])
    writer.add_bos_token_id(tokenizer.eot)
    writer.add_eos_token_id(tokenizer.eot)
    writer.add_add_bos_token(False)
    if tokenizer.chat is not None:
        writer.add_eot_token_id(tokenizer.chat.end)
        writer.add_chat_template(CHAT_TEMPLATE)


def _swapped(rows: Tensor, parts: tuple[int, int]) -> Tensor:
    """Return the rows of each head, which are `parts` of rows, with the two axes exchanged."""
    return rows.reshape(-1, *parts, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def read_back(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return the shape of the model that llama.cpp would compute, and its weights by our names."""
    gguf = _package()
    reader = gguf.GGUFReader(path)
    family = reader.get_field("general.architecture").contents()
    model = _model(reader, family)
    theirs = {
        tensor.name: torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        for tensor in reader.tensors
    }
    for name in theirs:
        if family == "llama" and name.endswith(_PERMUTED):
            theirs[name] = _swapped(theirs[name], (model.head_size // 2, 2))
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    table = _table(family)
    return model, from_format(theirs, require_shapes(shapes, model, table, str(path)), table)


def _model(reader: Any, family: str) -> ModelConfig:
    shapes = {tensor.name: tensor.data.shape for tensor in reader.tensors}
    values: dict[str, Any] = {
        ours: reader.get_field(f"{family}.{key}").contents()
        for key, ours, _ in _table(family).settings
    }
    values["vocab_size"] = shapes["token_embd.weight"][0]
    values["tie_embeddings"] = "output.weight" not in shapes
    if family != "gpt2":
        values |= {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu"}
        values |= {
            "qk_norm": family == "qwen3",
            "bias": "blk.0.ffn_up.bias" in shapes,
            "qkv_bias": "blk.0.attn_q.bias" in shapes,
        }
    return ModelConfig(**values)
