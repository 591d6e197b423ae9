"""gigatoken gives tiktoken's ids, or is not asked."""

import random
import sys
import unicodedata

import numpy as np
import pytest

from gptcli.tokenizers import ByteTokenizer, Tokenizer, bpe, gigatoken

STRANGE = "\u088f\u0c5c\u1c89\ua7cb\U0001fae9\U0001e6c0\U00033480\uffff\ufdd0\U0010ffff"


@pytest.fixture(autouse=True)
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPTCLI_FAST")


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    words = "the cat sat on the mat, and 12 dogs\n\n  didn't; caf\u00e9 \u4f60\u597d \u0431\u044b "
    return bpe.train_bpe([words * 20], 400)


def random_text(generator: random.Random) -> str:
    """Return a few characters of all planes that hold any, with much that splits words."""
    ranges = [(32, 126), (9, 0x24F), (0x250, 0xD7FF), (0xE000, 0x3FFFF)]

    def one() -> str:
        if generator.random() < 0.4:
            return generator.choice(" \n'a1." + STRANGE)
        return chr(generator.randint(*generator.choice(ranges)))

    return "".join(one() for _ in range(generator.randint(0, 20)))  # fmt: skip


@pytest.mark.parametrize("name", ["gpt2", "bpe"])
def test_the_ids_are_tiktokens(name: str, trained: Tokenizer) -> None:
    tokenizer = bpe.gpt2() if name == "gpt2" else trained
    quick = gigatoken.fast_bpe(tokenizer)
    assert quick is not None
    generator = random.Random(0)
    for _ in range(500):
        texts = [random_text(generator) for _ in range(40)]
        for text, ids in zip(texts, quick.encode(texts), strict=True):
            assert ids.tolist() == tokenizer.encode(text).tolist(), repr(text)


@pytest.mark.parametrize(
    "texts",
    [[], [""], ["", ""], ["a", "", " b"], ["<|endoftext|>"], ["\x00\x00"], ["a " * 300_000, "b"],
     [" " * 300_000 + "x"], ["\uffff\ufdd0", "\uffff", "a\ufdd0"], ["  ", " x"]],
)  # fmt: skip
def test_texts_that_are_no_words(texts: list[str]) -> None:
    quick = gigatoken.fast_bpe(bpe.gpt2())
    assert quick is not None
    found = [ids.tolist() for ids in quick.encode(texts)]
    assert found == [bpe.gpt2().encode(text).tolist() for text in texts]


def test_characters_they_see_differently_are_left_to_tiktoken() -> None:
    kinds = gigatoken.Kinds()
    differing = [chr(point) for point in range(128, 0x20000) if not kinds.agree_on(chr(point))]
    assert "\uffff" in differing and "\ud800" in differing
    letters = [char for char in differing if not 0xD800 <= ord(char) < 0xE000]
    # All of them are newer than this Python's Unicode, or no characters at all.
    assert 0 < len(letters) < 10_000
    assert {unicodedata.category(char) for char in letters} <= {"Cn"} or sys.version_info > (3, 11)
    assert all(kinds.agree_on(text) for text in ("caf\u00e9", "\u4f60\u597d", "\U0001f600 \u0431"))


def test_without_it_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gigatoken.fast_bpe(ByteTokenizer()) is None
    tokenizer = bpe.BpeTokenizer("x", r"\S+|\s+", bpe.gpt2().ranks, {"<|endoftext|>": 50256})
    assert gigatoken.fast_bpe(tokenizer) is None  # another split than GPT-2's
    monkeypatch.setenv("GPTCLI_FAST", "0")
    assert gigatoken.fast_bpe(bpe.gpt2()) is None
    monkeypatch.delenv("GPTCLI_FAST")
    monkeypatch.setattr(gigatoken.importlib.util, "find_spec", lambda name: None)
    assert gigatoken.fast_bpe(bpe.gpt2()) is None


def test_the_ids_are_of_the_right_type() -> None:
    quick = gigatoken.fast_bpe(bpe.gpt2())
    assert quick is not None and all(
        ids.dtype == np.uint32 for ids in quick.encode(["a", "\u00e9"])
    )
