"""A tokenizer.json of another program: its library's ids, our rules for special tokens."""

import json
from typing import Any

import pytest

import tokenizers as hf
from gptcli.config import GenerateConfig
from gptcli.errors import DataError
from gptcli.generation.text import TextStream, encode_prompt
from gptcli.tokenizers import UnknownCharacters
from gptcli.tokenizers.bpe import train_tokenizers
from gptcli.tokenizers.foreign import ForeignTokenizer

BEGIN, END = "<|begin|>", "<|end|>"
TEXT = "the cat sat on the mat, and the dog ran; naïve 😀 café\n" * 3


@pytest.fixture(scope="module")
def library() -> hf.Tokenizer:
    """A byte-level vocabulary that puts a token before each text, as Llama 3 does."""
    made = train_tokenizers([TEXT * 20], 300)
    made.decoder = hf.decoders.ByteLevel()
    made.add_special_tokens([BEGIN, END])
    first = (BEGIN, made.token_to_id(BEGIN))
    made.post_processor = hf.processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[first]
    )
    return made


@pytest.fixture
def ours(library: hf.Tokenizer) -> ForeignTokenizer:
    """The same, read from its file."""
    return ForeignTokenizer(library.to_str(), [library.token_to_id(END)])


def test_ids_are_those_of_the_library(library: hf.Tokenizer, ours: ForeignTokenizer) -> None:
    ids = ours.encode(TEXT).tolist()
    assert ids == library.encode(TEXT, add_special_tokens=False).ids
    assert ours.decode(ids) == TEXT
    decoder = TextStream(ours, GenerateConfig())
    assert "".join(map(decoder.push, ids)) + decoder.finish() == TEXT
    assert int(ours.token_lengths()[ids].sum()) == len(TEXT.encode())
    assert ours.vocab_size == library.get_vocab_size()


def test_special_tokens_are_never_made_by_text(
    library: hf.Tokenizer, ours: ForeignTokenizer
) -> None:
    begin, end = library.token_to_id(BEGIN), library.token_to_id(END)
    assert not {begin, end} & set(ours.encode(f"{BEGIN}the cat{END}").tolist())
    assert ours.eot == end and ours.ends == (end,) and ours.token_bytes(end) == b""
    # A prompt stands after what the model was trained to see first; without one it is all there is.
    assert encode_prompt(ours, "the", 24) == [begin, *ours.encode("the").tolist()]
    assert encode_prompt(ours, None, 24) == [begin]


def test_a_vocabulary_trained_with_dropout_encodes_without_it(library: hf.Tokenizer) -> None:
    content = json.loads(library.to_str())
    content["model"]["dropout"] = 0.5
    ours = ForeignTokenizer(json.dumps(content), [library.token_to_id(END)])
    ids = library.encode(TEXT, add_special_tokens=False).ids
    assert all(ours.encode(TEXT).tolist() == ids for _ in range(3))


def test_a_character_that_it_lacks_is_named_as_everywhere() -> None:
    words = hf.Tokenizer(hf.models.WordLevel({"a": 0, "b": 1}, unk_token="<unk>"))
    words.pre_tokenizer = hf.pre_tokenizers.Split(hf.Regex(r"[\s\S]"), "isolated")
    words.decoder = hf.decoders.Fuse()
    found = ForeignTokenizer(words.to_str(), [])
    assert found.decode(found.encode("abba")) == "abba" and found.eot == 2
    for text in ("abc", "a\ud800"):
        with pytest.raises(UnknownCharacters):
            found.encode(text)


@pytest.mark.parametrize(
    "change", [{"decoder": None}, {"model": {"type": "BPE"}}, {"added_tokens": 3}]
)
def test_what_is_no_tokenizer_is_an_error(library: hf.Tokenizer, change: Any) -> None:
    with pytest.raises(DataError):
        ForeignTokenizer(json.dumps(json.loads(library.to_str()) | change), [])
