"""Sampling: a prompt's ids to new ids, and the text around them."""

from gptcli.generation.decoding import Decoding, Drawn
from gptcli.generation.samples import Clock, Sample, draw_samples, rows_together
from gptcli.generation.text import Text, continued_prompt, encode_prompt
from gptcli.generation.weights import exchange_weights

__all__ = [
    "Clock",
    "Decoding",
    "Drawn",
    "Sample",
    "Text",
    "continued_prompt",
    "draw_samples",
    "encode_prompt",
    "exchange_weights",
    "rows_together",
]
