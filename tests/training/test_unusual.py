"""What is called unusual, and that nothing usual is."""

from dataclasses import replace

import pytest

from gptcli.config import load_config
from gptcli.config.schema import Config
from gptcli.training.unusual import Counts, unusual, usual_lr

USUAL = Counts(
    n_params=124_000_000, train_tokens=10**9, val_tokens=10**7, documents=10**6,
    tokenizer_size=50257, max_steps=1000, epochs=0.5, rows=8,
)  # fmt: skip


def settled(*overrides: str) -> Config:
    """Return a configuration of which nothing is unusual, and then `overrides`."""
    usual = ["model.vocab_size=50304", "device=cpu", "train.max_steps=1000"]
    return load_config(None, [*usual, *overrides])


def whats(config: Config, counts: Counts) -> list[str]:
    """Return what is unusual, whole lines."""
    return [str(one) for one in unusual(config, counts)]


def test_nothing_usual_is_unusual() -> None:
    assert whats(settled(), USUAL) == []


@pytest.mark.parametrize(
    ("overrides", "counts", "what", "remedy"),
    [
        (["optim.lr=0.1"], {}, "optim.lr 0.1 is high", "-s optim.lr=0.0006"),
        (["optim.lr=1e-6"], {}, "optim.lr 1e-06 is low", "-s optim.lr=0.0006"),
        (["optim.lr=1", "optim.name=muon"], {}, "optim.lr 1 is high", "-s optim.lr="),
        (["optim.warmup_steps=2000"], {}, "never reaches its peak", "-s optim.warmup_steps=20"),
        (["optim.warmup_steps=900"], {}, "most of the run", "-s optim.warmup_steps=20"),
        ([], {"epochs": 50.0}, "50 epochs over 1,000,000,000 tokens without dropout",
         "-s model.dropout=0.1 or -s train.max_steps=80"),
        (["model.dropout=0.1"], {"epochs": 50.0}, "50 epochs", "-s train.max_steps=80"),
        (["train.eval_tokens=500000"], {"val_tokens": 30_000},
         "validation of 30,000 tokens for evaluations of 500,000", "-s train.eval_tokens=30000"),
        ([], {"val_tokens": 2048}, "2.0 windows", "data.val_fraction"),
        (["train.eval_every=5000"], {}, "one evaluation, at the end", "-s train.eval_every=100"),
        (["model.vocab_size=50257"], {}, "vocabulary of 50,257", "-s model.vocab_size=50304"),
        ([], {"documents": 10**8}, "documents of 10 on average", "-s data.seq_len="),
        ([], {"epochs": 1000.0, "train_tokens": 1025}, "each one sees most of the data",
         "-s train.tokens_per_step=1024"),
    ],
)  # fmt: skip
def test_each_says_what_why_and_what_to_set(
    overrides: list[str], counts: dict[str, float], what: str, remedy: str
) -> None:
    lines = whats(settled(*overrides), replace(USUAL, **counts))  # type: ignore[arg-type]
    found = [line for line in lines if what in line]
    assert len(found) == 1, lines
    assert remedy in found[0].partition("usual: ")[2]
    assert "\n" not in found[0]


def test_one_row_at_a_time_is_unusual_on_a_gpu_only() -> None:
    one = replace(USUAL, rows=1)
    assert whats(settled(), one) == []
    on_gpu = settled().model_copy(update={"device": "cuda"})
    assert any("one row" in line for line in whats(on_gpu, one))


def test_a_small_vocabulary_is_left_alone_on_a_cpu() -> None:
    assert whats(settled("model.vocab_size=257"), USUAL) == []


def test_fine_tuning_may_be_slow_but_not_fast() -> None:
    tuned = settled("model.init_from=gpt2", "optim.lr=1e-6")
    assert not any("optim.lr" in line for line in whats(tuned, USUAL))
    assert any("is high" in line for line in
               whats(settled("model.init_from=gpt2", "optim.lr=0.1"), USUAL))  # fmt: skip


def test_the_usual_rate_falls_with_size_as_published() -> None:
    sizes = (10**6, 10**7, 10**8, 10**9, 10**12)
    rates = [usual_lr(size) for size in sizes]
    assert rates == sorted(rates, reverse=True)
    assert usual_lr(85_000_000) == pytest.approx(6.9e-4, rel=0.01)
    assert usual_lr(10**12) == 6e-5
