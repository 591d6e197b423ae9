"""The loss of a model on text, its units, and the difference between two models."""

from gptcli.evaluation.compare import Difference, paired_difference, spans_of_bytes
from gptcli.evaluation.metrics import Evaluation, TokenStats
from gptcli.evaluation.score import SpanOf, TokenArray, TokenSequence, evaluate, windows

__all__ = ["Difference", "Evaluation", "SpanOf", "TokenArray", "TokenSequence", "TokenStats",
           "evaluate", "paired_difference", "spans_of_bytes", "windows"]  # fmt: skip
