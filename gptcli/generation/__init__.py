"""Sampling: a prompt's ids to new ids, and the text around them."""

from gptcli.generation.decode import Decoding
from gptcli.generation.text import TextStream, encode_prompt, extend_context, sample_start

__all__ = ["Decoding", "TextStream", "encode_prompt", "extend_context", "sample_start"]
