"""The arithmetic coder: what is written is read back, in as many bits as its frequencies say."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from gptcli.evaluation.coder import Decoder, Encoder


@st.composite
def symbols(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """Return (start, frequency, total) of some symbols, of totals up to 40 bits."""
    found = []
    for _ in range(draw(st.integers(0, 60))):
        total = draw(st.integers(1, 1 << draw(st.integers(0, 40))))
        start = draw(st.integers(0, total - 1))
        found.append((start, draw(st.integers(1, total - start)), total))
    return found


@given(symbols())
@settings(max_examples=400, deadline=None)
def test_symbols_are_read_back_and_take_their_bits(symbols: list[tuple[int, int, int]]) -> None:
    encoder, bits = Encoder(), 0.0
    for start, frequency, total in symbols:
        encoder.encode(start, frequency, total)
        bits += math.log2(total / frequency)
    data = encoder.finish()
    assert len(data) * 8 <= bits + 9 + len(symbols) * 0.01
    decoder = Decoder(data)
    for start, frequency, total in symbols:
        assert start <= decoder.target(total) < start + frequency
        decoder.decode(start, frequency)


def test_a_carry_passes_through_many_bytes() -> None:
    encoder = Encoder()
    n = 1 << 40
    narrow = [(n - 1, 1, n)] * 20  # all ones so far
    for symbol in [*narrow, (n // 2, n // 2, n)]:
        encoder.encode(*symbol)
    decoder = Decoder(encoder.finish())
    for start, frequency, total in [*narrow, (n // 2, n // 2, n)]:
        assert start <= decoder.target(total) < start + frequency
        decoder.decode(start, frequency)


def test_damaged_data_decodes_to_something_within_the_total() -> None:
    for data in (b"", b"\xff" * 40, bytes(range(40))):
        decoder = Decoder(data)
        for _ in range(100):
            target = decoder.target(1000)
            assert 0 <= target < 1000
            decoder.decode(target, 1)


def test_nothing_takes_no_bytes() -> None:
    assert Encoder().finish() == b""
