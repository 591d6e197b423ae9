"""One tokenizer of each kind, and the texts that have broken tokenizers before."""

import argparse
import inspect
import json
from collections.abc import Callable

import pytest

from gptcli.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer
from gptcli.tokenizers import bpe as byte_pairs

HOSTILE = (
    "",
    " ",
    "a",
    "\0",
    "\0a\0\0b",
    "line\r\nline\rline\n\n\n  \t indented\n",
    "<|endoftext|>",
    "before<|endoftext|>after<|endoftext|>",
    "<|fim_prefix|><|endofprompt|>",
    "e\u0301\u0301\u0301 n\u0303o \u0915\u094d\u0937\u093f",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0001f44d\U0001f3ff",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u3053\u3093\u306b\u3061\u306f",
    "\u0645\u0631\u062d\u0628\u0627 \u202egnorw\u202c \u05e9\u05dc\u05d5\u05dd",
    "\ufeffbyte-order mark \ufffd replacement \ufffe\uffff\U0010ffff",
    "\x1c\x1d\x1e\x1f\x85\u00a0\u1680\u180e\u2000\u2028\u2029\u202f\u205f\u3000",
    "it's we'll I'VE they'd 'tis ''s \u2019s",
    " " * 10_000,
    "\n" * 5_000 + "\t" * 5_000,
    "a" * 5_000 + "1" * 5_000 + "!" * 5_000,
    "x = {\n    'a': [1, 2.50, 0x1F],\n\n\n    # comment   \n}\n",
    "\u00bd \u00b2 \u2167 1\u2070 \u0661\u0662",
)  # fmt: skip


@pytest.fixture(scope="session")
def gpt2() -> byte_pairs.BpeTokenizer:
    """GPT-2's vocabulary."""
    return byte_pairs.gpt2()


@pytest.fixture(scope="session")
def training_text() -> str:
    """Some code and prose to learn a vocabulary from."""
    return inspect.getsource(json) + inspect.getsource(argparse)[:40_000] + "\n".join(HOSTILE)


@pytest.fixture(scope="session")
def bpe(training_text: str) -> byte_pairs.BpeTokenizer:
    """A trained vocabulary."""
    return byte_pairs.train_bpe([training_text], 700)


@pytest.fixture(scope="session", params=["gpt2", "bytes", "char", "bpe"])
def tokenizer_for(
    request: pytest.FixtureRequest, gpt2: Tokenizer, bpe: Tokenizer
) -> Callable[[str], Tokenizer]:
    """Return a function from a text to a tokenizer that knows it, for each kind of tokenizer."""

    kinds: dict[str, Callable[[str], Tokenizer]] = {
        "gpt2": lambda text: gpt2,
        "bytes": lambda text: ByteTokenizer(),
        "char": lambda text: CharTokenizer.of([text]),
        "bpe": lambda text: bpe,
    }
    return kinds[request.param]


@pytest.fixture(scope="session")
def hostile_texts() -> tuple[str, ...]:
    """Every text that has broken tokenizers."""
    return HOSTILE


@pytest.fixture(scope="session", params=HOSTILE, ids=[ascii(text[:12]) for text in HOSTILE])
def hostile(request: pytest.FixtureRequest) -> str:
    """A text that has broken tokenizers."""
    text: str = request.param
    return text
