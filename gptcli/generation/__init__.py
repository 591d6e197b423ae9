"""Sampling: a prompt's ids to new ids, and the text around them."""

from gptcli.generation.decode import (
    DecodeTimings,
    Decoding,
    Sample,
    draw_samples,
    rows_together,
)
from gptcli.generation.text import TextStream, encode_prompt, extend_context

__all__ = ["DecodeTimings", "Decoding", "Sample", "TextStream", "draw_samples", "encode_prompt",
           "extend_context", "rows_together"]  # fmt: skip
