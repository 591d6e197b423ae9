"""Sampling: a prompt's ids to new ids, and the text around them."""

from gptcli.generation.decode import Row, Rows
from gptcli.generation.text import Sample, encode_prompt, extend_context, sample_start

__all__ = ["Row", "Rows", "Sample", "encode_prompt", "extend_context", "sample_start"]
