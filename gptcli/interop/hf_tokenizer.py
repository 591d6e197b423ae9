"""Tokenizers as Hugging Face's `tokenizer.json`, which gives `AutoTokenizer` the same ids.

Knows nothing of networks.
"""

import re
from typing import Any

from gptcli.errors import ConfigError
from gptcli.tokenizers import Tokenizer
from gptcli.tokenizers.bpe import (
    END_OF_TEXT,
    GPT2_PATTERN,
    BpeTokenizer,
    byte_level_alphabet,
)
from gptcli.tokenizers.foreign import ForeignTokenizer
from gptcli.tokenizers.simple import ByteTokenizer, CharTokenizer

Vocabulary = dict[str, int]
_CHARACTERS = {byte: char for char, byte in byte_level_alphabet().items()}


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """Return every token as `tokenizer.json` spells it, with its id; end-of-text is one.

    Raises:
        ConfigError: No other program has such a tokenizer.
    """
    if isinstance(tokenizer, CharTokenizer):
        words = {char: id for id, char in enumerate(tokenizer.definition()["alphabet"])}
        return words | {END_OF_TEXT: tokenizer.eot}
    if isinstance(tokenizer, BpeTokenizer):
        words = {_spell(token): rank for token, rank in tokenizer.ranks.items()}
        return words | tokenizer.specials
    if isinstance(tokenizer, ForeignTokenizer):
        raise ConfigError(
            "the tokenizer of these weights is in Hugging Face's format only",
            "--to nanogpt writes the weights without it",
        )
    if not isinstance(tokenizer, ByteTokenizer):
        raise ConfigError(f"tokenizer.name: a {tokenizer.name!r} tokenizer cannot be exported")
    words = {_spell(bytes([byte])): byte for byte in range(256)}
    return words | {END_OF_TEXT: tokenizer.eot}


def merges_of(tokenizer: BpeTokenizer) -> list[tuple[str, str]]:
    """Return the pairs that byte-pair encoding joins, in order.

    A token's pair is what it falls into when only tokens of lower rank may form.

    Raises:
        ConfigError: The vocabulary is not made by merging pairs.
    """
    ranks = tokenizer.ranks
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = _split(token, rank, ranks)
            if len(parts) != 2:
                raise ConfigError(
                    f"tokenizer.name: the vocabulary of {tokenizer.name!r} is not made of merges"
                )
            merges.append((_spell(parts[0]), _spell(parts[1])))
    return merges


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of `tokenizer.json`.

    Raises:
        ConfigError: There is no such tokenizer in that format.
    """
    if isinstance(tokenizer, BpeTokenizer):
        merges = [list(pair) for pair in merges_of(tokenizer)]
        if tokenizer.pattern == GPT2_PATTERN:
            split: dict[str, Any] = _byte_level(use_regex=True)
        else:
            split = {
                "type": "Sequence",
                "pretokenizers": [_isolated(_plain(tokenizer.pattern)), _byte_level(False)],
            }
        model = _bpe(vocabulary_of(tokenizer), merges)
        return _whole(model, split, _byte_level(True), tokenizer.specials)
    if isinstance(tokenizer, ByteTokenizer):
        model = _bpe(vocabulary_of(tokenizer), [])
        return _whole(model, _byte_level(False), _byte_level(False), {END_OF_TEXT: tokenizer.eot})
    # An unknown character has no id here and there: "no such token" is said when it occurs.
    model = {"type": "WordLevel", "vocab": vocabulary_of(tokenizer), "unk_token": "<|unknown|>"}
    specials = {END_OF_TEXT: tokenizer.eot}
    return _whole(model, _isolated(r"[\s\S]"), {"type": "Fuse"}, specials)


def tokenizer_config(context: int) -> dict[str, Any]:
    """Return the content of `tokenizer_config.json`.

    Text that spells `<|endoftext|>` is ordinary text, as it is in training: a document cannot
    end itself. Pass `split_special_tokens=False` there to have it read as the token.
    """
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "split_special_tokens": True,
    }


def _spell(token: bytes) -> str:
    return "".join(_CHARACTERS[byte] for byte in token)


def _split(token: bytes, limit: int, ranks: dict[bytes, int]) -> list[bytes]:
    """Merge the bytes of a token with the ranks below `limit`, lowest and leftmost first."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while True:
        found = [
            (rank, i)
            for i in range(len(parts) - 1)
            if (rank := ranks.get(parts[i] + parts[i + 1], limit)) < limit
        ]
        if not found:
            return parts
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def _plain(pattern: str) -> str:
    """Return a pattern of tiktoken's for `tokenizers`, which reads two things otherwise.

    Its `$` is any line's end, and its `{1,3}+` repeats instead of not giving back.
    """
    return re.sub(r"(\{\d+,\d*\})\+", r"\1", pattern).replace("$", r"\z")


def _bpe(vocabulary: Vocabulary, merges: list[list[str]]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": merges,
    }


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _isolated(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def _whole(
    model: dict[str, Any], split: dict[str, Any], decoder: dict[str, Any], specials: Vocabulary
) -> dict[str, Any]:
    added = [
        {
            "id": id,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for content, id in sorted(specials.items(), key=lambda item: item[1])
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": split,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }
