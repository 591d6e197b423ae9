"""The loss of a network on text, its units, and the difference between two networks."""

from gptcli.evaluation.compare import Difference, paired_difference, spans_of_bytes
from gptcli.evaluation.result import Evaluation, TextUnits
from gptcli.evaluation.scoring import (
    SpanOf,
    TokenArray,
    TokenSequence,
    evaluate,
    windows,
)

__all__ = [
    "Difference",
    "Evaluation",
    "SpanOf",
    "TextUnits",
    "TokenArray",
    "TokenSequence",
    "evaluate",
    "paired_difference",
    "spans_of_bytes",
    "windows",
]
