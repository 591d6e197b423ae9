"""Characters and bytes as ids."""

import numpy as np
import pytest

from gptcli.tokenizers import ByteTokenizer, CharTokenizer, UnknownCharacters


def test_characters_are_numbered_in_code_point_order() -> None:
    tokenizer = CharTokenizer("\n ab\u00e9")
    assert tokenizer.encode("\u00e9ba \n").tolist() == [4, 3, 2, 1, 0]
    assert (tokenizer.eot, tokenizer.vocab_size) == (5, 6)
    assert tokenizer.token_lengths().tolist() == [1, 1, 1, 1, 2, 0]


def test_unknown_characters_are_named() -> None:
    tokenizer = CharTokenizer("abc")
    with pytest.raises(UnknownCharacters) as caught:
        tokenizer.encode("aXbYc\u20acX")
    assert caught.value.message == (
        "the char vocabulary of 3 characters does not have:"
        " 'X' (U+0058) 'Y' (U+0059) '\u20ac' (U+20AC)"
    )
    assert caught.value.exit_code == 3


def test_of_many_unknown_characters_five_are_shown() -> None:
    with pytest.raises(UnknownCharacters, match=r"'0' .* '4' \(U\+0034\) and 5 more$"):
        CharTokenizer("abc").encode("0123456789")


@pytest.mark.parametrize("text", ["`", "d", "\0", "\U0010ffff"])
def test_the_neighbours_of_an_alphabet_are_unknown(text: str) -> None:
    with pytest.raises(UnknownCharacters):
        CharTokenizer("abc").encode(text)


def test_an_empty_alphabet_knows_only_the_empty_text() -> None:
    tokenizer = CharTokenizer("")
    assert (tokenizer.eot, tokenizer.vocab_size) == (0, 1)
    assert tokenizer.encode("").tolist() == []
    with pytest.raises(UnknownCharacters):
        tokenizer.encode("\0")


@pytest.mark.parametrize("alphabet", ["ba", "aa", "aab"])
def test_an_alphabet_out_of_order_is_refused(alphabet: str) -> None:
    with pytest.raises(ValueError, match="order of its code points"):
        CharTokenizer(alphabet)


def test_bytes_are_their_own_ids() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("\0a\u00e9").tolist() == [0, 97, 0xC3, 0xA9]
    assert (tokenizer.eot, tokenizer.vocab_size) == (256, 257)
    assert tokenizer.token_lengths().tolist() == [1] * 256 + [0]
    assert tokenizer.encode("a").dtype == np.uint32
