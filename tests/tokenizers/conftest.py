"""One tokenizer of each kind, and the texts that have broken tokenizers before."""

import argparse
import inspect
import json
from collections.abc import Callable

import pytest

from gptcli.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer
from gptcli.tokenizers import bpe as byte_pairs
from support.texts import HOSTILE


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
