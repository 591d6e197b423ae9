"""Exports, each read by the program it is for: transformers, gguf's reader, nanoGPT's network."""

import json
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptcli.checkpoint import Checkpoint, TrainedModel, load_model, save_checkpoint
from gptcli.config import load_config
from gptcli.errors import CheckpointError, ConfigError, StorageError
from gptcli.interop.export import export
from gptcli.interop.gguf_file import read_gguf
from gptcli.model import GPT
from gptcli.tokenizers import Tokenizer
from gptcli.tokenizers.bpe import BpeTokenizer, gpt2, train_bpe
from gptcli.tokenizers.simple import ByteTokenizer, CharTokenizer

from ..tokenizers.conftest import HOSTILE as HOSTILE_ELSEWHERE
from .conftest import difference, ours_of
from .nanogpt_network import NanoGPT

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
    "qwen2": ("Qwen2ForCausalLM", {**LLAMA, "qkv_bias": True, "n_kv_head": 1}),
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


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_loads_it_and_has_the_same_logits(name: str) -> None:
    kind, shape = SHAPES[name]
    made = trained(rows=320, **shape)
    done = export(made, "hf", Path("out"))
    theirs = loaded(Path("out"))
    assert type(theirs).__name__ == kind
    assert theirs.get_input_embeddings().weight.shape[0] == 257, "the padding is trimmed"
    assert done.logit_difference < 1e-4
    assert difference(made.model, theirs, 257) < 1e-4
    # And back again.
    assert difference(ours_of("out"), theirs, 257) < 1e-4


@pytest.mark.parametrize(
    ("shape", "keys"),
    [
        ({"norm": "rmsnorm"}, ["model.position=learned (not rope)", "model.mlp=gelu (not swiglu)"]),
        ({"mlp": "swiglu"}, ["model.mlp=swiglu (not gelu"]),
        ({"position": "rope"}, ["model.position=rope (not learned)"]),
        ({"qk_norm": True}, ["model.qk_norm=true"]),
        ({"n_kv_head": 2}, ["model.n_kv_head=2"]),
        ({**LLAMA, "mlp": "relu2"}, ["model.mlp=relu2 (not swiglu)"]),
        ({**LLAMA, "qk_norm": True, "qkv_bias": True}, ["model.qkv_bias=true (not false)"]),
        ({**LLAMA, "bias": True, "qkv_bias": False}, ["model.qkv_bias=false (not true)"]),
    ],
)
@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_what_no_format_holds_is_refused_by_key(
    shape: dict[str, Any], keys: list[str], to: Any
) -> None:
    with pytest.raises(ConfigError) as caught:
        export(trained(gpt2(), **shape), to, Path("out"))
    assert all(key in caught.value.message for key in keys), caught.value.message
    assert not Path("out").exists()


def test_the_folder_is_complete_and_says_what_it_is() -> None:
    export(trained(rows=320), "hf", Path("some/folder/mine"))
    folder = Path("some/folder/mine")
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    card = (folder / "README.md").read_text()
    for part in ("# mine", "corpus.txt", "5,000", "bytes, 257 tokens", "7 of 8,192 tokens",
                 "2.5000", "random weights", "library_name: transformers"):  # fmt: skip
        assert part in card, part
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["temperature"] == 0.8 and generation["top_p"] == 0.9
    assert generation["top_k"] == 0, "the run samples from all tokens, transformers from 50"
    assert [path.name for path in folder.parent.iterdir()] == ["mine"]


@pytest.mark.parametrize("kind", ["gpt2", "bpe", "bytes", "cl100k-like"])
def test_autotokenizer_gives_the_same_ids(kind: str) -> None:
    bpe = train_bpe([TEXT], 400)
    pattern = (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    )
    tokenizers: dict[str, Tokenizer] = {
        "gpt2": gpt2(),
        "bpe": bpe,
        "bytes": ByteTokenizer(),
        "cl100k-like": BpeTokenizer("other", pattern, bpe.ranks, bpe.specials),
    }
    ours = tokenizers[kind]
    export(trained(ours), "hf", Path("out"))
    theirs = AutoTokenizer.from_pretrained("out")
    for text in [*HOSTILE, *HOSTILE_ELSEWHERE, "\n".join(HOSTILE), TEXT]:
        ids = ours.encode(text).tolist()
        assert theirs(text)["input_ids"] == ids, repr(text)
        assert theirs.decode(ids) == text, repr(text)
    assert theirs.eos_token_id == theirs.bos_token_id == ours.eot
    assert len(theirs) == ours.vocab_size


def test_autotokenizer_of_characters() -> None:
    ours = CharTokenizer("".join(sorted(set("".join(HOSTILE)))))
    export(trained(ours), "hf", Path("out"))
    theirs = AutoTokenizer.from_pretrained("out")
    for text in HOSTILE:
        assert theirs(text)["input_ids"] == ours.encode(text).tolist(), repr(text)
        assert theirs.decode(theirs(text)["input_ids"]) == text
    with pytest.raises(Exception, match="Missing"):
        theirs("Ω is not in it")


def test_what_is_in_the_way_is_kept() -> None:
    made = trained()
    Path("out").mkdir()
    export(made, "hf", Path("out"))  # an empty folder is not in the way
    Path("out/mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="out is not empty"):
        export(made, "hf", Path("out"))
    export(made, "hf", Path("out"), force=True)
    assert not Path("out/mine.txt").exists() and Path("out~1/mine.txt").read_text() == "mine"
    Path("file").write_text("mine")
    for to in ("hf", "nanogpt"):
        with pytest.raises(ConfigError, match="file exists"):
            export(made, to, Path("file"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="out is a folder"):
        export(made, "nanogpt", Path("out"), force=True)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such limit")
@pytest.mark.parametrize("to", ["hf", "gguf", "nanogpt"])
def test_a_full_disk_leaves_nothing(to: Any) -> None:
    import resource

    made = trained(train_bpe([TEXT], 300))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, limits[1]))
    try:
        with pytest.raises(StorageError):
            export(made, to, Path("exports/out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(Path("exports").iterdir()) == []


def test_a_network_with_nan_is_not_exported() -> None:
    made = trained()
    with torch.no_grad():
        made.model.h[0].mlp.c_fc.weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="reads back"):
        export(made, "hf", Path("out"))
    assert not Path("out").exists()


# GGUF.


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
    model, _ = read_gguf(Path("out.gguf"))
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
    assert fields(Path("out.gguf"))["general.file_type"] == 7


def test_gguf_metadata_of_gpt2() -> None:
    export(trained(gpt2(), n_layer=1), "gguf", Path("out.gguf"), dtype="float16")
    found = fields(Path("out.gguf"))
    expected = {
        "general.architecture": "gpt2", "general.name": "out", "general.file_type": 1,
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
    with pytest.raises(ConfigError, match=f"tokenizer.name={tokenizer.name}"):
        export(trained(tokenizer), "gguf", Path("out.gguf"))


def test_the_other_gelu_is_said_and_measured() -> None:
    made = trained(train_bpe([TEXT], 300), mlp="gelu_erf")
    done = export(made, "gguf", Path("out.gguf"))
    assert "GELU" in done.notes[0] and 1e-7 < done.logit_difference < 0.05


# nanoGPT.


@pytest.mark.parametrize("bias", [False, True])
def test_nanogpt_loads_it(bias: bool) -> None:
    made = trained(rows=320, bias=bias, mlp="gelu_erf")
    done = export(made, "nanogpt", Path("ckpt.pt"))
    assert done.logit_difference < 1e-4 and done.notes == ()
    content = torch.load("ckpt.pt", weights_only=True)
    theirs = NanoGPT(content["model_args"])
    missing, unexpected = theirs.load_state_dict(content["model"], strict=True)
    assert not missing and not unexpected
    tokens = torch.randint(257, (2, 24))
    with torch.no_grad():
        found, expected = theirs(tokens), made.model(tokens).logits[..., :257]
    assert (found - expected).abs().max() < 1e-4
    # As its train.py resumes: two groups, matrices first.
    parameters = list(theirs.parameters())
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in parameters if p.dim() >= 2]},
         {"params": [p for p in parameters if p.dim() < 2]}]
    )  # fmt: skip
    optimizer.load_state_dict(content["optimizer"])
    assert content["iter_num"] == 7 and content["best_val_loss"] == 2.5


def test_nanogpt_of_the_tanh_gelu_says_so() -> None:
    done = export(trained(), "nanogpt", Path("ckpt.pt"))
    assert "exact GELU" in done.notes[0] and done.logit_difference < 0.05


@pytest.mark.parametrize(
    ("shape", "key"),
    [(LLAMA, "model.norm=rmsnorm"), ({"tie_embeddings": False}, "model.tie_embeddings=false"),
     ({"n_inner": 64}, "model.n_inner=64"), ({"mlp": "relu2"}, "model.mlp=relu2")],
)  # fmt: skip
def test_nanogpt_refuses_what_it_does_not_have(shape: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        export(trained(**shape), "nanogpt", Path("ckpt.pt"))


# The command.


def test_the_command(gpt: Any, run: Path) -> None:
    done = gpt("export", "--to", "hf", "out", "--json")
    assert done.code == 0, done.err
    assert done.json["path"] == "out" and done.json["format"] == "hf"
    assert done.json["family"] == "gpt2" and done.json["logit_difference"] < 1e-4
    card = Path("out/README.md").read_text()
    assert "validation loss" in card and "training loss" in card
    again = gpt("export", "--to", "hf", "out")
    assert again.code == 2 and "out is not empty" in again.err and "--force" in again.err
    forced = gpt("export", "--checkpoint", str(run), "--to", "hf", "out", "--force")
    assert forced.code == 0 and "largest logit difference" in forced.out
    plain = gpt("export", "--to", "nanogpt", "ckpt.pt")
    assert plain.code == 0 and "note: nanoGPT computes the exact GELU" in plain.err


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--to", "onnx", "out"), 2, "onnx"),
        (("--to", "hf", "out", "--dtype", "float16"), 2, "--dtype: only --to gguf has a choice"),
        (("--to", "gguf", "out"), 2, "tokenizer.name=bytes"),
        (("--to", "hf", "out", "--checkpoint", "nowhere"), 4, "nowhere"),
        (("--to", "hf"), 2, "OUT"),
    ],
)
def test_what_the_command_refuses(
    gpt: Any, run: Path, words: tuple[str, ...], code: int, says: str
) -> None:
    done = gpt("export", *words)
    assert done.code == code and says in done.err, done.err
    assert len(done.err_lines) <= 3 and not Path("out").exists()


def test_an_export_is_a_start_again(gpt: Any, run: Path, data: Path) -> None:
    settings = [
        "model.init_from=out", f"data.dir={data}", "name=again", "train.max_steps=1",
        "train.micro_batch_size=2", "train.eval_tokens=64", "generate.max_new_tokens=2",
        "device=cpu",
    ]  # fmt: skip
    assert gpt("export", "--to", "hf", "out").code == 0
    words = [part for word in settings for part in ("-s", word)]
    done = gpt("train", *words, "--json")
    assert done.code == 0, done.err
