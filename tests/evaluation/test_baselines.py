"""What compressors and n-grams need, and what a text has in common with the training text."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from gptcli.evaluation import TokenArray
from gptcli.evaluation.baselines import Baselines, measure
from gptcli.tokenizers import ByteTokenizer

RNG = np.random.default_rng(0)
RANDOM = bytes(RNG.integers(97, 123, 4000).tolist())


def measured(train: bytes, val: bytes) -> Baselines:
    """Measure texts as bytes, each after an end-of-text."""
    tokens = [np.array([256, *text], np.uint16) for text in (train, val)]
    return measure(TokenArray(tokens[0]), TokenArray(tokens[1]), ByteTokenizer())


def test_text_that_was_read_before_costs_next_to_nothing() -> None:
    found = measured(RANDOM, RANDOM[1000:2000])
    for name in ("xz", "ppmd"):
        assert found.bits_per_byte[name] > 4.5
        assert found.bits_per_byte[f"{name}_after_training_text"] < 0.6
    assert found.bits_per_byte["gzip"] > 4.5


def test_text_of_another_kind_gains_nothing() -> None:
    found = measured(b"0123456789" * 400, RANDOM).bits_per_byte
    assert found["ppmd_after_training_text"] == pytest.approx(found["ppmd"], rel=0.02)
    assert found["ngram"] > 7


def test_lines_that_the_training_text_has_are_counted() -> None:
    found = measured(b"one\ntwo\n\nthree\n", b"two\n\nfour\nfive\none\n")
    assert found.lines_in_training_text == 0.5
    assert (found.bytes, found.training_bytes) == (19, 15)
    assert found.sha256 == hashlib.sha256(b"two\n\nfour\nfive\none\n").hexdigest()


def test_spans_that_the_training_text_has_are_counted() -> None:
    found = measured(RANDOM, RANDOM[:100] + b"#" + RANDOM[200:250])
    # 51 + 1 of the 102 spans of 50 bytes, and 88 + 38 of the 139 of 13.
    assert found.spans_in_training_text == {13: 126 / 139, 50: 52 / 102}


def test_texts_of_no_bytes_need_none() -> None:
    assert measured(b"", b"").bits_per_byte["xz"] >= 0


def test_without_pyppmd_the_others_are_measured() -> None:
    code = """
import sys
sys.modules["pyppmd"] = None
from gptcli.evaluation import baselines
assert not baselines.HAS_PPMD
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
