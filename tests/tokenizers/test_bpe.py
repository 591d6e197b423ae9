"""Byte-pair vocabularies: the published ids, the trained ones, and where text may be cut."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
import tiktoken.registry
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from gptcli.errors import ConfigError, DataError
from gptcli.tokenizers import SAFE_CUT, Tokenizer, bpe, tokenizer_from
from gptcli.tokenizers.bpe import BpeTokenizer

NOWHERE = "http://127.0.0.1:9"  # the discard port: connections are refused at once


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world", [15496, 995]),
        ("hello world", [31373, 995]),
        (" hello world", [23748, 995]),
        ("Hello, my dog is cute", [15496, 11, 616, 3290, 318, 13779]),
        ("<|endoftext|>", [27, 91, 437, 1659, 5239, 91, 29]),
        ("\n", [198]),
        ("\n\n", [628]),
        (" ", [220]),
        ("The quick brown fox jumps over the lazy dog",
         [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290]),
    ],
)  # fmt: skip
def test_gpt2_ids_are_the_published_ones(gpt2: Tokenizer, text: str, ids: list[int]) -> None:
    assert gpt2.encode(text).tolist() == ids


def test_gpt2s_vocabulary(gpt2: Tokenizer) -> None:
    assert (gpt2.name, gpt2.vocab_size, gpt2.eot) == ("gpt2", 50257, 50256)
    assert gpt2.token_bytes(15496) == b"Hello"
    assert gpt2.token_bytes(50256) == b""
    assert sum(gpt2.token_lengths() == 1) == 256


def test_gpt2_needs_no_network_and_no_home(tmp_path: Path) -> None:
    environment = {
        **{k: v for k, v in os.environ.items() if "PROXY" not in k.upper()},
        **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), NOWHERE),
        "HOME": str(tmp_path), "TIKTOKEN_CACHE_DIR": str(tmp_path / "cache"),
    }  # fmt: skip
    code = (
        "from gptcli.tokenizers import bpe; print(bpe.gpt2().encode('Hello world').tolist());"
        "bpe.from_tiktoken('cl100k_base')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[15496, 995]"
    # The other vocabularies are not in the package, and say so.
    assert "DataError: the vocabulary of 'cl100k_base' is not in tiktoken's cache" in done.stderr


def test_a_damaged_gpt2_vocabulary_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gpt2.tiktoken").write_bytes(bpe.GPT2_FILE.read_bytes()[:-1])
    monkeypatch.setattr(bpe, "GPT2_FILE", tmp_path / "gpt2.tiktoken")
    bpe.gpt2.cache_clear()
    with pytest.raises(DataError, match="damaged GPT-2 vocabulary"):
        bpe.gpt2()


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown tokenizer 'gtp2'") as caught:
        bpe.from_tiktoken("gtp2")
    assert (caught.value.hint or "").startswith("known: gpt2, char, bytes, bpe, r50k_base")


def test_tiktokens_encodings_are_taken_whole(
    gpt2: Tokenizer, hostile_texts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """r50k_base is GPT-2's vocabulary, so its ranks are at hand without a download."""
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: dict(bpe.gpt2().ranks))
    tokenizer = bpe.from_tiktoken("r50k_base")
    assert (tokenizer.name, tokenizer.eot, tokenizer.vocab_size) == ("r50k_base", 50256, 50257)
    text = "".join(hostile_texts)
    assert tokenizer.encode(text).tolist() == gpt2.encode(text).tolist()
    again = tokenizer_from(json.loads(json.dumps(tokenizer.definition())))
    assert again.fingerprint == tokenizer.fingerprint


def test_trained_ids_are_the_trainers(training_text: str) -> None:
    """Whatever the `tokenizers` library makes of a text, tiktoken makes the same."""
    trained = bpe.train_tokenizers([training_text], 600)
    ours = bpe.train_bpe([training_text], 601)
    assert ours.vocab_size == 601
    byte_of = bpe.byte_level_alphabet()
    theirs = {
        rank: bytes(byte_of[char] for char in token) for token, rank in trained.get_vocab().items()
    }
    assert {rank: ours.token_bytes(rank) for rank in range(256, 600)} == {
        rank: token for rank, token in theirs.items() if rank >= 256
    }

    @settings(max_examples=150, deadline=None)
    @given(text=fragments)
    @example(text=training_text)
    def check(text: str) -> None:
        expected = [theirs[rank] for rank in trained.encode(text).ids]
        assert [ours.token_bytes(token) for token in ours.encode(text).tolist()] == expected

    check()


def test_runs_of_newlines_and_indents_become_tokens(training_text: str) -> None:
    """The trainer must split words as GPT-2 does, also around newlines."""
    code = "def f():\n    return 1\n\n\n    # done\n"
    tokenizer = bpe.train_bpe([code * 50], 400)
    assert b"\n\n\n   " in [tokenizer.token_bytes(i) for i in tokenizer.encode(code).tolist()]


def test_a_vocabulary_size_is_a_maximum(training_text: str) -> None:
    assert bpe.train_bpe([training_text], 300).vocab_size == 300
    assert bpe.train_bpe(["abababab"], 5000).vocab_size < 270
    empty = bpe.train_bpe([], 300)
    assert (empty.vocab_size, empty.eot) == (257, 256)
    assert empty.encode("\u00e9").tolist() == [0xC3, 0xA9]


def test_training_does_not_depend_on_how_the_text_is_cut(training_text: str) -> None:
    places = [match.start() for match in SAFE_CUT.finditer(training_text)][::7]
    ends = [*places, len(training_text)]
    pieces = [training_text[a:b] for a, b in zip([0, *places], ends, strict=True)]
    assert len(pieces) > 100
    whole = bpe.train_bpe([training_text], 500)
    assert bpe.train_bpe(pieces, 500).fingerprint == whole.fingerprint


# Text made of what the split patterns care about: letters, digits, punctuation, contractions,
# every kind of space, marks, and characters of categories on which libraries disagree.
fragments = st.lists(
    st.sampled_from(
        [" ", "  ", "\n", "\n\n", "\r\n", "\r", "\t", "\x1c", "\x85", "\u00a0", "\u2028", "\u3000",
         "a", "B", "the", "word", "\u00e9", "e\u0301", "\u4f60", "\u0915\u094d", "\u01c5", "\u02b0",
         "1", "2024", "\u00bd", "\u00b2", "\u2167", "\u0661", "_", "'", "'s", "'LL", "\u2019s",
         ".", "!?", "/", "()", "\U0001f600", "\u200d", "\ufeff", "\0", "<|endoftext|>"]
    ),
    max_size=30,
).map("".join)  # fmt: skip


def published_pattern(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the split pattern of a tiktoken encoding without downloading its vocabulary."""
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
    pattern: str = getattr(openai_public, name)()["pat_str"]
    return pattern


def pairs_only(name: str, pattern: str) -> BpeTokenizer:
    """Return a vocabulary of all bytes and all pairs of ASCII bytes and spaces, so that ids show
    where the pattern splits."""
    ranks = {bytes([i]): i for i in range(256)}
    pairs = [bytes([a, b]) for a in range(128) for b in range(128)]
    ranks |= {pair: 256 + i for i, pair in enumerate(pairs)}
    return BpeTokenizer(name, pattern, ranks, {"<|endoftext|>": len(ranks)})


def check_cuts(tokenizer: Tokenizer, text: str) -> None:
    """Check that every place where text may be cut leaves the tokens as they are."""
    whole = tokenizer.encode(text).tolist()
    places = [match.start() for match in tokenizer.safe_cut.finditer(text)]
    for at in places:
        parts = tokenizer.encode(text[:at]).tolist() + tokenizer.encode(text[at:]).tolist()
        assert parts == whole, f"cut before {text[at : at + 2]!r}"
    if len(places) > 1:
        cuts = zip([0, *places], [*places, len(text)], strict=True)
        assert [i for a, b in cuts for i in tokenizer.encode(text[a:b]).tolist()] == whole


@settings(max_examples=300, deadline=None)
@given(text=fragments)
@example(text="end.\nNext it's\nthe end \nlast")
def test_cuts_leave_gpt2s_tokens_alone(gpt2: Tokenizer, text: str) -> None:
    check_cuts(gpt2, text)


@settings(max_examples=150, deadline=None)
@given(text=fragments)
def test_cuts_leave_trained_tokens_alone(bpe: Tokenizer, text: str) -> None:
    check_cuts(bpe, text)


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base", "p50k_base", "r50k_base"])
def test_cuts_leave_the_tokens_of_other_patterns_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = pairs_only(name, published_pattern(name, monkeypatch))

    @settings(max_examples=150, deadline=None)
    @given(text=fragments)
    @example(text="end.\nNext")
    @example(text="a \u00bd b\n c")
    def check(text: str) -> None:
        check_cuts(tokenizer, text)

    check()


def test_the_test_of_cuts_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """cl100k takes a newline together with punctuation before it, so GPT-2's cuts break it."""
    tokenizer = pairs_only("cl100k_base", published_pattern("cl100k_base", monkeypatch))
    assert tokenizer.safe_cut != SAFE_CUT
    tokenizer.safe_cut = SAFE_CUT
    with pytest.raises(AssertionError, match="cut before"):
        check_cuts(tokenizer, "end.\nNext")


def test_text_is_cut_between_a_non_space_and_a_letter() -> None:
    text = "a b\nc  d\n\ne .f\n1 _g \u00e9\r\nh\ti \u4f60\n\u0301x\ry"
    cuts = [match.start() for match in SAFE_CUT.finditer(text)]
    assert [text[at - 1 : at + 2] for at in cuts] == ["a b", "b\nc", "g \u00e9", "i \u4f60"]


def test_ordinary_text_can_be_cut_often(gpt2: Tokenizer) -> None:
    """Memory stays bounded only if there are places to cut."""
    prose = "It was the best of times, it was the worst of times.\nIt was the age of wisdom."
    assert len(gpt2.safe_cut.findall(prose)) == 17
    assert len(bpe.CAREFUL_CUT.findall(prose)) == 15


@pytest.mark.parametrize("space", [" ", "\n", " \n\t\u3000"])
@pytest.mark.parametrize("end", ["", "word", ".", "\x1c a"])
def test_white_space_without_end_is_no_danger(space: str, end: str) -> None:
    # tiktoken ends the process where a run of a million is followed by a word.
    text = "a" + space * (1_500_000 // len(space)) + end
    ids = bpe.gpt2().encode(text)
    assert bpe.gpt2().decode(ids) == text


def test_cutting_long_white_space_changes_no_id(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = bpe.gpt2()
    generator = random.Random(0)
    texts = ["".join(generator.choices("ab '\n\ts.1\u00a0\u3000é\x1c", k=24)) for _ in range(5000)]
    whole = [tokenizer.encode(text).tolist() for text in texts]
    monkeypatch.setattr(bpe, "_LONG_SPACE", 2)
    last = bpe._LAST_OF_SPACE.pattern.replace("249999", "1")
    monkeypatch.setattr(bpe, "_LAST_OF_SPACE", re.compile(last))
    assert sum(len(bpe._tame(text)) > 1 for text in texts) > 1000
    assert [tokenizer.encode(text).tolist() for text in texts] == whole
