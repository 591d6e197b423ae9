"""What all tokenizers promise, on text that has broken tokenizers before."""

import json
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptcli.config import GenerateConfig
from gptcli.generation.text import TextStream
from gptcli.tokenizers import (
    CharTokenizer,
    Tokenizer,
    UnknownCharacters,
    tokenizer_from,
)

For = Callable[[str], Tokenizer]


def check_round_trip(tokenizer: Tokenizer, text: str) -> None:
    """Check every promise about the ids of one text."""
    ids = tokenizer.encode(text)
    raw = text.encode()
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == raw
    assert int(tokenizer.token_lengths()[ids].sum()) == len(raw)
    assert tokenizer.eot not in ids
    assert ids.ndim == 1
    assert all(0 <= token < tokenizer.vocab_size for token in set(ids.tolist()))
    decoder = TextStream(tokenizer, GenerateConfig())
    pieces = [decoder.push(token) for token in ids.tolist()]
    assert "".join(pieces) == text
    assert decoder.finish() == ""


def test_hostile_text_comes_back(tokenizer_for: For, hostile: str) -> None:
    check_round_trip(tokenizer_for(hostile), hostile)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=200))
@example(text="\ud7ff\ue000")
def test_any_text_comes_back(tokenizer_for: For, text: str) -> None:
    check_round_trip(tokenizer_for(text), text)


@pytest.mark.parametrize("text", ["\ud800", "caf\udce9", "a\udfff\ud800b"])
def test_half_a_surrogate_pair_is_refused(tokenizer_for: For, text: str) -> None:
    with pytest.raises(UnknownCharacters, match=r"U\+D") as caught:
        tokenizer_for("abcdef").encode(text)
    assert caught.value.exit_code == 3


def test_a_definition_makes_the_same_tokenizer_again(
    tokenizer_for: For, hostile_texts: tuple[str, ...]
) -> None:
    text = "".join(hostile_texts)
    tokenizer = tokenizer_for(text)
    again = tokenizer_from(json.loads(json.dumps(tokenizer.definition())))
    assert type(again) is type(tokenizer)
    assert (again.name, again.vocab_size, again.eot) == (
        tokenizer.name,
        tokenizer.vocab_size,
        tokenizer.eot,
    )
    assert again.fingerprint == tokenizer.fingerprint
    assert again.safe_cut == tokenizer.safe_cut
    assert again.encode(text).tolist() == tokenizer.encode(text).tolist()


def test_end_of_text_is_the_last_id_and_stands_for_nothing(tokenizer_for: For) -> None:
    tokenizer = tokenizer_for("abc")
    assert tokenizer.eot == tokenizer.vocab_size - 1
    assert tokenizer.token_bytes(tokenizer.eot) == b""
    assert tokenizer.token_lengths().shape == (tokenizer.vocab_size,)
    assert tokenizer.decode([tokenizer.eot]) == ""


def test_different_vocabularies_have_different_fingerprints(
    gpt2: Tokenizer, bpe: Tokenizer
) -> None:
    definitions = [{"name": "bytes"}, {"name": "char", "alphabet": "ab"},
                   {"name": "char", "alphabet": "abc"}]  # fmt: skip
    others = [tokenizer_from(definition) for definition in definitions]
    assert len({tokenizer.fingerprint for tokenizer in (gpt2, bpe, *others)}) == 5


def test_fingerprints_are_fixed_forever() -> None:
    """Manifests and checkpoints hold them."""
    assert tokenizer_from({"name": "bytes"}).fingerprint == (
        "f98386685668b686fbc8e18bf88c167c6ba06370b7f5cbe370156f6a1b49364b"
    )
    assert tokenizer_from({"name": "char", "alphabet": "\n ab\u00e9"}).fingerprint == (
        "64d71c6a1ebf64114e7128eef7b50ca2e41cadc6815f669b4d2fb1746ce5f453"
    )
    assert tokenizer_from({"name": "gpt2"}).fingerprint == (
        "f39ba2ea86b37b8a1c3d2371fb2c22c4d426549cc5ed4cd52161c0025f8e42ca"
    )


@settings(max_examples=60, deadline=None)
@given(tokens=st.lists(st.integers(0, 256), max_size=40))
@example(tokens=[0xF0, 0x9F, 0x98, 0x80])
@example(tokens=[0xF0, 0x9F, 0x98])
@example(tokens=[0xED, 0xA0, 0x80, 0x41])
def test_a_stream_decodes_to_what_the_whole_does(tokens: list[int]) -> None:
    tokenizer = tokenizer_from({"name": "bytes"})
    decoder = TextStream(tokenizer, GenerateConfig())
    pieces = [decoder.push(token) for token in tokens]
    assert "".join(pieces) + decoder.finish() == tokenizer.decode(tokens)


def test_a_stream_shows_a_character_only_when_it_is_whole() -> None:
    decoder = TextStream(tokenizer_from({"name": "bytes"}), GenerateConfig())
    shown = [decoder.push(byte) for byte in "a\u00e9\U0001f600".encode()]
    assert shown == ["a", "", "\u00e9", "", "", "", "\U0001f600"]
    assert decoder.finish() == ""


def test_a_stream_that_ends_inside_a_character_says_so() -> None:
    decoder = TextStream(tokenizer_from({"name": "bytes"}), GenerateConfig())
    assert [decoder.push(byte) for byte in b"a\xf0\x9f"] == ["a", "", ""]
    assert decoder.finish() == "\ufffd"


def test_an_alphabet_is_collected_from_pieces() -> None:
    assert CharTokenizer.of([]).definition()["alphabet"] == ""
    made = CharTokenizer.of(["b\U0010ffff", "", "\0a", "ab"])
    assert made.definition()["alphabet"] == "\0ab\U0010ffff"
