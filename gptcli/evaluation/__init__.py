"""The loss of a model on text, its units, and the difference between two models."""

from gptcli.evaluation.metrics import Evaluation, TokenStats
from gptcli.evaluation.score import SpanOf, TokenArray, TokenSequence, evaluate, windows

__all__ = ["Evaluation", "SpanOf", "TokenArray", "TokenSequence", "TokenStats", "evaluate",
           "windows"]  # fmt: skip
