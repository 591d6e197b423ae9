"""Compressed files: any bytes come back, and take as many bits as the model says."""

import math
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptcli.checkpoint import Checkpoint, TrainedModel
from gptcli.config.model import ModelConfig
from gptcli.device import Runtime
from gptcli.errors import CheckpointError, ConfigError, DataError
from gptcli.evaluation import TokenArray, TokenStats, evaluate
from gptcli.evaluation.compress import Packed, _fingerprint, compress, decompress
from gptcli.model import GPT
from gptcli.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer
from gptcli.tokenizers.bpe import train_bpe
from support.texts import sentences

TEXT = sentences(150)
BYTES = ByteTokenizer()
TOKENIZERS = {
    "bytes": BYTES, "char": CharTokenizer.of([TEXT]), "bpe": train_bpe([TEXT], 300),
}  # fmt: skip
PARTS = (b"The cat sat.", b"\xff", b"\xe6\x97", "é日".encode(), b"\0" * 9, b"\r\n")
contents = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=40).map(str.encode),
    st.lists(st.sampled_from(PARTS), max_size=12).map(b"".join),
)


def model_of(tokenizer: Tokenizer, seed: int = 1, n_tokens: int | None = None) -> TrainedModel:
    """Return a tiny model whose predictions are far from even."""
    n_tokens = n_tokens or tokenizer.vocab_size
    shape = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=n_tokens + 3)
    model = GPT(shape, n_tokens)
    model.init_weights(seed)
    model.wte.weight.data.mul_(20)
    checkpoint = Checkpoint({}, {}, {}, {}, {}, {"step": 7})
    return TrainedModel(Path("runs/t/best.pt"), model.eval(), tokenizer, checkpoint)


def reread(packed: Packed) -> Packed:
    """Return what is read from the file of `packed`."""
    return Packed.from_bytes(packed.to_bytes())


MODELS = {name: model_of(tokenizer) for name, tokenizer in TOKENIZERS.items()}


@pytest.mark.parametrize("name", MODELS)
@given(content=contents)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_bytes_come_back(name: str, content: bytes) -> None:
    packed = compress(content, MODELS[name])
    assert decompress(reread(packed), MODELS[name]) == content


@pytest.mark.parametrize("stride", [None, 3])
def test_a_file_is_as_small_as_its_score_says(stride: int | None) -> None:
    trained, text = MODELS["bytes"], TEXT[:1500].encode()
    packed = compress(text, trained, stride=stride)
    assert packed.n_streams == 1 and decompress(reread(packed), trained).decode()
    compute = Runtime(torch.device("cpu"), torch.float32, False)
    score = evaluate(
        trained.model, TokenArray(np.frombuffer(text, np.uint8).astype(np.uint32)), compute,
        context=8, stride=stride, units=TokenStats(BYTES),
    )  # fmt: skip
    assert score is not None
    bits = score.nats / math.log(2) + math.log2(257)  # the first token has no prediction
    assert 8 * len(packed.payload) == pytest.approx(bits, rel=1e-4, abs=16)


def test_many_streams_advance_together_and_come_back() -> None:
    text = TEXT[:4500].encode()
    packed = compress(text, MODELS["bytes"])
    assert packed.n_streams == 4
    assert decompress(reread(packed), MODELS["bytes"]) == text


def test_text_beside_bytes_is_still_predicted() -> None:
    text = TEXT[:600].encode()
    mixed = text + bytes(range(128, 256)) + text
    packed = compress(mixed, MODELS["bpe"])
    assert packed.n_tokens >= 2 * len(TOKENIZERS["bpe"].encode(TEXT[:600])) - 2
    assert 0 < len(packed.aside) < 200


def test_tokens_that_the_model_does_not_have_are_kept_aside() -> None:
    trained = model_of(BYTES, n_tokens=100)
    packed = compress(b"012 zz 34", trained)
    assert packed.aside and decompress(reread(packed), trained) == b"012 zz 34"


def test_a_damaged_or_shortened_file_is_refused() -> None:
    packed = compress(b"The cat sat on a mat.\xff", MODELS["bytes"])
    data = packed.to_bytes()
    for place in range(len(data)):
        flipped = data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :]
        for broken in (flipped, data[:place]):
            with pytest.raises(DataError, match=r"damaged|not a file"):
                Packed.from_bytes(broken)


def test_another_model_is_refused() -> None:
    packed = compress(b"The cat", MODELS["bytes"])
    with pytest.raises(CheckpointError, match="another model") as caught:
        decompress(reread(packed), model_of(BYTES, seed=2))
    assert "t/best.pt (step 7)" in str(caught.value.hint)
    with pytest.raises(CheckpointError):
        decompress(reread(packed), model_of(TOKENIZERS["char"]))


def test_bits_of_another_machine_are_found_before_anything_is_returned() -> None:
    packed = compress(TEXT[:40].encode(), MODELS["bytes"])
    other = model_of(BYTES)
    other.model.lm_head.weight.data[97] *= 1.001
    claimed = replace(packed, model=_fingerprint(other))
    with pytest.raises(DataError, match="part 1 of 5 decodes differently here"):
        decompress(claimed, other)
    packed.sums[2] ^= 1
    with pytest.raises(DataError, match="part 3 of 5"):
        decompress(packed, MODELS["bytes"])


def test_the_number_of_threads_is_that_of_the_file_and_then_as_before() -> None:
    packed = compress(b"The cat", MODELS["bytes"])
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert decompress(reread(packed), MODELS["bytes"]) == b"The cat"
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_a_stride_beyond_the_context_is_refused() -> None:
    with pytest.raises(ConfigError, match="the context is 8"):
        compress(b"abc", MODELS["bytes"], stride=9)


@pytest.mark.parametrize(
    "wrong",
    [{"n_threads": 0}, {"n_streams": 0}, {"n_streams": "two"}, {"stride": -1}, {"stride": 99},
     {"n_tokens": -5}, {"context": None}, {"n_tokens": 1.5}, {"n_streams": 10**9},
     {"stride": 8.0}, {"n_threads": 2**40}, {"n_tokens": 2**70}, {"sums": None}, {"sums": [None]}],
)  # fmt: skip
def test_a_head_that_cannot_be_is_refused_though_its_checksum_fits(wrong: dict[str, Any]) -> None:
    packed = compress(TEXT.encode()[:200], MODELS["bytes"])
    vars(packed).update(wrong)
    with pytest.raises(DataError, match="damaged"):
        reread(packed)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [({"context": 9}, "its context"), ({"sums": []}, "part 1 of 0"),
     ({"aside": b"x"}, "kept aside"),
     ({"aside": zlib.compress(struct.pack("<Q", 2**60))}, "kept aside"),
     ({"aside": zlib.compress(struct.pack("<QQ", 1, 9))}, "kept aside")],
)  # fmt: skip
def test_a_file_that_was_made_to_break_the_reader_is_refused(
    wrong: dict[str, Any], why: str
) -> None:
    packed = compress(TEXT.encode()[:20] + b"\xff", MODELS["bytes"])
    vars(packed).update(wrong)
    with pytest.raises(DataError, match=why):
        decompress(reread(packed), MODELS["bytes"])
