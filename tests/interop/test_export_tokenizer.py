"""The vocabulary of a Hugging Face folder, read by transformers' AutoTokenizer."""

import functools
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from gptcli.errors import CheckpointError
from gptcli.interop.export import export
from gptcli.interop.hf import require_same_ids
from gptcli.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer
from gptcli.tokenizers.bpe import BpeTokenizer, gpt2, train_bpe
from support.pretrained import edit_json
from support.texts import HOSTILE as HOSTILE_ELSEWHERE

from .exports import HOSTILE, LLAMA, TEXT, trained

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": LLAMA,
    "qwen2": {**LLAMA, "qkv_bias": True},
    "qwen3": {**LLAMA, "qk_norm": True},
}
TEXTS = [*HOSTILE, *HOSTILE_ELSEWHERE, "\n".join(HOSTILE), TEXT, "To be, or not", "in 2026: 31415"]
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    """Return a tokenizer of a kind."""
    match kind:
        case "gpt2":
            return gpt2()
        case "bytes":
            return ByteTokenizer()
        case "char":
            return CharTokenizer("".join(sorted(set("".join(TEXTS)))))
    bpe = train_bpe([TEXT], 400)
    return bpe if kind == "bpe" else BpeTokenizer("other", CL100K, bpe.ranks, bpe.specials)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["gpt2", "bpe", "bytes", "char", "cl100k-like"])
def test_autotokenizer_gives_the_same_ids_for_every_shape(kind: str, family: str) -> None:
    ours = tokenizer_of(kind)
    export(trained(ours, n_layer=1, **FAMILIES[family]), "hf", Path("out"))
    theirs = AutoTokenizer.from_pretrained("out")
    for text in TEXTS:
        ids = ours.encode(text).tolist()
        assert theirs(text)["input_ids"] == ids, repr(text)
        assert theirs.decode(ids) == text, repr(text)
    assert theirs.eos_token_id == theirs.bos_token_id == ours.eot
    assert len(theirs) == ours.vocab_size


def test_a_character_that_training_never_saw_is_refused_there_too() -> None:
    export(trained(CharTokenizer("abc")), "hf", Path("out"))
    with pytest.raises(Exception, match="Missing"):
        AutoTokenizer.from_pretrained("out")("Ω is not in it")


@pytest.mark.parametrize("kind", ["gpt2", "char", "bytes"])
def test_an_export_asks_transformers_for_the_ids_of_a_few_texts(kind: str) -> None:
    ours = tokenizer_of(kind)
    export(trained(ours, n_layer=1, **FAMILIES["qwen2"]), "hf", Path("out"))
    require_same_ids(Path("out"), ours)
    edit_json(Path("out/config.json"), model_type="qwen2")  # splits text in a way of its own
    with pytest.raises(CheckpointError, match=f"with other ids than the tokenizer '{kind}'"):
        require_same_ids(Path("out"), ours)
    Path("out/tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="does not read the vocabulary"):
        require_same_ids(Path("out"), ours)
