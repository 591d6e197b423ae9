"""What `gpt eval` says of a score beside the yardsticks."""

import pytest

from gptcli.commands.scores import describe

FACTS = {
    "checkpoint": "best.pt", "step": 9, "data": "data/t", "split": "val", "tokens": 100,
    "bytes": 400, "context": 8, "stride": 8, "loss": 4.0, "standard_error": 0.1,
    "perplexity": 54.6, "word_perplexity": 99.0,
    "yardsticks": {"gzip": 3.0, "xz": 2.5, "xz_after_training_text": 2.0},
}  # fmt: skip


@pytest.mark.parametrize(
    ("bits_per_byte", "verdict"),
    [
        (3.5, "the model beats none of the three"),
        (2.7, "the model beats gzip, but not xz or xz after the training text"),
        (2.2, "the model beats gzip and xz, but not xz after the training text"),
        (1.5, "the model beats gzip and xz and xz after the training text"),
    ],
)
def test_the_verdict_is_about_every_yardstick(bits_per_byte: float, verdict: str) -> None:
    assert describe(FACTS | {"bits_per_byte": bits_per_byte}).endswith(verdict)
