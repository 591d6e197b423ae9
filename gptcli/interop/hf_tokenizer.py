"""Tokenizers as Hugging Face's `tokenizer.json`, which gives `AutoTokenizer` the same ids."""

import json
import re
from typing import Any

from gptcli.errors import ConfigError
from gptcli.tokenizers import (
    CHAT_TEMPLATE,
    END_OF_TURN,
    START_OF_TURN,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
)
from gptcli.tokenizers.bpe import END_OF_TEXT, GPT2_PATTERN, BpeTokenizer, byte_level_alphabet
from gptcli.tokenizers.foreign import ForeignTokenizer

Vocabulary = dict[str, int]
CHAT_WORDS = (START_OF_TURN, END_OF_TURN)
_CHARACTERS = {byte: char for char, byte in byte_level_alphabet().items()}


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """Return every token as `tokenizer.json` spells it, with its id; special tokens are among them.

    Raises:
        ConfigError: No other program has such a tokenizer.
    """
    match tokenizer:
        case CharTokenizer():
            words = {char: id for id, char in enumerate(tokenizer.definition()["alphabet"])}
        case BpeTokenizer():
            words = {_spell(token): rank for token, rank in tokenizer.ranks.items()}
        case ByteTokenizer():
            words = {_spell(bytes([byte])): byte for byte in range(256)}
        case ForeignTokenizer():
            raise ConfigError(
                "the tokenizer of these weights is in Hugging Face's format only",
                "--to nanogpt writes the weights without it",
            )
        case _:
            raise ConfigError(f"tokenizer.name: a {tokenizer.name!r} tokenizer cannot be exported")
    return words | specials_of(tokenizer)


def specials_of(tokenizer: Tokenizer) -> Vocabulary:
    """Return the special tokens, with their ids."""
    own = tokenizer.specials if isinstance(tokenizer, BpeTokenizer) else {}
    chat = zip(CHAT_WORDS, tokenizer.chat or (), strict=False)
    return own | {END_OF_TEXT: tokenizer.eot} | dict(chat)


def _spell(token: bytes) -> str:
    return "".join(_CHARACTERS[byte] for byte in token)


def merges_of(tokenizer: BpeTokenizer) -> list[tuple[str, str]]:
    """Return the pairs that byte-pair encoding merges, in order.

    A token's pair is what it falls into when only tokens of lower rank may form.

    Raises:
        ConfigError: The vocabulary is not made by merging pairs.
    """
    merges = []
    for token, rank in sorted(tokenizer.ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = _split(token, rank, tokenizer.ranks)
            if len(parts) != 2:
                raise ConfigError(
                    f"tokenizer.name: the vocabulary of {tokenizer.name!r} is not made of merges"
                )
            merges.append((_spell(parts[0]), _spell(parts[1])))
    return merges


def _split(token: bytes, limit: int, ranks: dict[bytes, int]) -> list[bytes]:
    """Merge the bytes of a token with the ranks below `limit`, lowest and leftmost first."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while True:
        pairs = [
            (rank, i)
            for i in range(len(parts) - 1)
            if (rank := ranks.get(parts[i] + parts[i + 1], limit)) < limit
        ]
        if not pairs:
            return parts
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of `tokenizer.json`; a ConfigError if it cannot hold the tokenizer."""
    import tokenizers as hf

    vocabulary, specials = vocabulary_of(tokenizer), specials_of(tokenizer)
    if isinstance(tokenizer, CharTokenizer):
        # An unknown character has no id here, and there neither: it is an error when it occurs.
        made = hf.Tokenizer(hf.models.WordLevel(vocabulary, unk_token="<|unknown|>"))
        made.pre_tokenizer = hf.pre_tokenizers.Split(hf.Regex(r"[\s\S]"), "isolated")
        made.decoder = hf.decoders.Fuse()
    else:
        merges, pattern = [], ""
        if isinstance(tokenizer, BpeTokenizer):
            merges, pattern = merges_of(tokenizer), tokenizer.pattern
        made = hf.Tokenizer(hf.models.BPE(vocabulary, merges))
        is_gpt2 = pattern == GPT2_PATTERN
        split: Any = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=is_gpt2)
        if pattern and not is_gpt2:
            words = hf.pre_tokenizers.Split(hf.Regex(_plain(pattern)), "isolated")
            split = hf.pre_tokenizers.Sequence([words, split])
        made.pre_tokenizer, made.decoder = split, hf.decoders.ByteLevel()
    ordered = sorted(specials, key=specials.__getitem__)
    made.add_special_tokens([hf.AddedToken(word, normalized=False) for word in ordered])
    content: dict[str, Any] = json.loads(made.to_str())
    if isinstance(tokenizer, BpeTokenizer | ByteTokenizer):  # as the split; decoding needs neither
        use_regex = isinstance(tokenizer, BpeTokenizer)
        content["decoder"] |= {"add_prefix_space": False, "use_regex": use_regex}
    return content


def _plain(pattern: str) -> str:
    """Return a pattern of tiktoken's for `tokenizers`, which reads two things otherwise.

    Its `$` is any line's end, and its `{1,3}+` repeats instead of not giving back.
    """
    return re.sub(r"(\{\d+,\d*\})\+", r"\1", pattern).replace("$", r"\z")


def tokenizer_config(tokenizer: Tokenizer, context: int) -> dict[str, Any]:
    """Return the content of `tokenizer_config.json`."""
    is_chat = tokenizer.chat is not None
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TURN if is_chat else END_OF_TEXT,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        # Text that spells `<|endoftext|>` is ordinary text, as in training: a document cannot end
        # itself. With False, passed to AutoTokenizer there, it is read as the token. A conversation
        # is rendered as text with such tokens in it, which must be read as tokens.
        "split_special_tokens": not is_chat,
        **({"chat_template": CHAT_TEMPLATE} if is_chat else {}),
    }
