"""GGUF files, read by the reader of the gguf package."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from gptcli.errors import ConfigError
from gptcli.interop.export import export
from gptcli.interop.gguf import read_back
from gptcli.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer
from gptcli.tokenizers.bpe import gpt2, train_bpe

from .exports import GGUF_SHAPES, LLAMA, SHAPES, TEXT, loaded, trained


def fields(path: Path) -> dict[str, Any]:
    """Return a file's metadata."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("name", GGUF_SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gguf_reads_back(name: str, dtype: Any) -> None:
    shape = SHAPES[name][1]
    made = trained(train_bpe([TEXT], 300), rows=320, **shape)
    done = export(made, "gguf", Path("out.gguf"), dtype=dtype)
    assert done.logit_difference < (1e-4 if dtype == "float32" else 2e-2)
    reader = gguf.GGUFReader("out.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    embedding = tensors["token_embd.weight"]
    assert embedding.data.dtype == (np.float32 if dtype == "float32" else np.float16)
    expected = made.model.wte.weight.detach()[: made.tokenizer.vocab_size]
    assert np.allclose(embedding.data, expected, atol=2e-3 if dtype == "float16" else 0)
    assert tensors["output_norm.weight"].data.dtype == np.float32
    assert ("output.weight" in tensors) == (not made.model.config.tie_embeddings)
    model, _ = read_back(Path("out.gguf"))
    assert (
        model.n_layer == made.model.config.n_layer and model.vocab_size == made.tokenizer.vocab_size
    )


def test_gguf_in_eight_bits() -> None:
    made = trained(train_bpe([TEXT], 300), **LLAMA, n_kv_head=2, n_inner=72)
    done = export(made, "gguf", Path("out.gguf"), dtype="q8_0")
    assert 1e-5 < done.logit_difference < 0.2
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader("out.gguf").tensors}
    assert kinds["token_embd.weight"] == kinds["blk.1.attn_q.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_down.weight"] == "F16", "72 is not a multiple of 32"
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    found = fields(Path("out.gguf"))
    assert found["general.file_type"] == 7 and found["general.quantization_version"] == 2


def test_gguf_metadata_of_gpt2() -> None:
    export(trained(gpt2(), n_layer=1), "gguf", Path("out.gguf"), dtype="float16")
    found = fields(Path("out.gguf"))
    expected = {
        "general.architecture": "gpt2", "general.name": "out", "general.file_type": 1,
        "general.type": "model", "general.quantization_version": 2,
        "gpt2.block_count": 1, "gpt2.context_length": 24, "gpt2.embedding_length": 32,
        "gpt2.feed_forward_length": 128, "gpt2.attention.head_count": 4,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 50256, "tokenizer.ggml.eos_token_id": 50256,
        "tokenizer.ggml.add_bos_token": False,
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    assert found["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-5)
    assert len(found["tokenizer.ggml.tokens"]) == 50257
    assert found["tokenizer.ggml.tokens"][50256] == "<|endoftext|>"
    assert len(found["tokenizer.ggml.merges"]) == 50000
    assert found["tokenizer.ggml.merges"][:2] == ["Ġ t", "Ġ a"], "as in OpenAI's merges"
    assert found["tokenizer.ggml.token_type"][50255:] == [1, 3]


def test_gguf_turns_the_rows_of_llama_as_llama_cpp_does() -> None:
    made = trained(train_bpe([TEXT], 300), **LLAMA, n_kv_head=2)
    export(made, "gguf", Path("out.gguf"))
    export(made, "hf", Path("out"))
    theirs = loaded(Path("out")).state_dict()
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader("out.gguf").tensors}
    for part, n_head in (("q", 4), ("k", 2)):
        # LlamaModel.permute of convert_hf_to_gguf.py.
        weight = theirs[f"model.layers.0.self_attn.{part}_proj.weight"].numpy()
        turned = weight.reshape(n_head, 2, weight.shape[0] // n_head // 2, *weight.shape[1:])
        turned = turned.swapaxes(1, 2).reshape(weight.shape)
        assert np.array_equal(found[f"blk.0.attn_{part}.weight"], turned)
    value = theirs["model.layers.0.self_attn.v_proj.weight"].numpy()
    assert np.array_equal(found["blk.0.attn_v.weight"], value)
    metadata = fields(Path("out.gguf"))
    assert metadata["llama.attention.head_count_kv"] == 2
    assert metadata["llama.rope.freq_base"] == 10000.0
    assert metadata["llama.rope.dimension_count"] == 8


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharTokenizer("abc")])
def test_gguf_refuses_vocabularies_it_cannot_hold(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=f"tokenizer.name={tokenizer.name}") as caught:
        export(trained(tokenizer), "gguf", Path("out.gguf"))
    assert "-s tokenizer.name=bpe" in str(caught.value.hint)


def test_gguf_refuses_a_vocabulary_without_merges_which_llama_cpp_does_not_load() -> None:
    with pytest.raises(ConfigError, match="257 tokens and no merges") as caught:
        export(trained(train_bpe([TEXT], 257)), "gguf", Path("out.gguf"))
    assert "tokenizer.vocab_size" in str(caught.value.hint) and not Path("out.gguf").exists()


def test_the_other_gelu_is_said_and_measured() -> None:
    made = trained(train_bpe([TEXT], 300), mlp="gelu_erf")
    done = export(made, "gguf", Path("out.gguf"))
    assert "GELU" in done.notes[0] and 1e-7 < done.logit_difference < 0.05
