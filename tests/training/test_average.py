"""An average of the weights: what it is, that training does not see it, and that it is kept."""

from pathlib import Path

import pytest
import torch

from gptcli import evaluate
from gptcli.checkpoint import load_checkpoint
from gptcli.training.events import Evaluated
from gptcli.training.memory import estimate_disk, model_size
from gptcli.training.optim import WeightAverage
from gptcli.training.setup import RAW
from gptcli.training.spec import settle
from support.runs import THOROUGH, Tiny, Trained, finish, metrics, result_of, stop_after

EMA = "train.ema=0.9"


def test_it_is_the_normalized_exponential_average_of_all_steps() -> None:
    values, decay = [3.0, -1.0, 4.0, 1.0, -5.0], 0.8
    weight = torch.nn.Parameter(torch.tensor([100.0]))
    average = WeightAverage({"w": weight}, decay)
    for step, value in enumerate(values, 1):
        weight.data.fill_(value)
        average.update(step)
        shares = [decay**age for age in range(step)]
        expected = sum(s * v for s, v in zip(shares, reversed(values[:step]), strict=True))
        assert average.tensors()["w"].item() == pytest.approx(expected / sum(shares), rel=1e-5)
    before = average.tensors()["w"].clone()
    with average.in_use():
        assert torch.equal(weight.detach(), before)
    assert weight.item() == values[-1] and torch.equal(average.tensors()["w"], before)


def test_nothing_is_averaged_that_is_frozen_or_without_a_decay() -> None:
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    assert WeightAverage({"w": frozen}, 0.9).tensors() == {}
    off = WeightAverage({"w": torch.nn.Parameter(torch.ones(2))}, None)
    off.update(1)
    assert off.tensors() == {}


def test_training_does_not_see_the_average_and_evaluation_does(tiny: Tiny) -> None:
    finish(plain := tiny(name="plain"))
    events = finish(averaged := tiny(EMA))
    without, of_both = (
        load_checkpoint(Path("runs/plain/last.pt")),
        load_checkpoint(Path("runs/tiny/last.pt")),
    )
    for name, weight in without.model.items():
        assert torch.equal(of_both.optimizer[name][RAW], weight), name
        assert not torch.equal(of_both.model[name], weight) or weight.numel() == 1, name
    losses = [
        [line["loss"] for line in metrics(one) if "loss" in line] for one in (plain, averaged)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    last = [event for event in events if isinstance(event, Evaluated)][-1]
    assert last.val_loss != next(m["val_loss"] for m in metrics(plain)[::-1] if "val_loss" in m)
    scored = evaluate("runs/tiny/last.pt", max_tokens=64, device="cpu")
    assert scored.nats / scored.tokens == pytest.approx(last.val_loss, rel=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resuming_with_an_average_is_exact(tiny: Tiny, trained: Trained, optimizer: str) -> None:
    how = (*THOROUGH, EMA, f"optim.name={optimizer}")
    straight = trained.straight(*how)
    assert any(RAW in name for name in straight.bits)
    for step in (1, 9, 12):
        config = tiny(*how, name=f"cut-{step}")
        stop_after(config, step)
        finish(config, resume=True)
        assert result_of(config) == straight


def test_an_average_may_begin_and_end_when_a_run_is_resumed(tiny: Tiny) -> None:
    finish(whole := tiny(name="whole"))
    stop_after(tiny(EMA), 3)
    stop_after(tiny("train.ema=null"), 4, resume=True)
    finish(tiny(EMA), resume=True)
    last, plain = (load_checkpoint(Path(f"runs/{name}/last.pt")) for name in ("tiny", "whole"))
    assert whole.train.ema is None and all(RAW in state for state in last.optimizer.values())
    for name, weight in plain.model.items():
        assert torch.equal(last.optimizer[name][RAW], weight), name


def test_memory_and_disk_count_the_average(tiny: Tiny) -> None:
    one, other = (settle(tiny(*sets)) for sets in ((), (EMA,)))
    assert other.size.optimizer_bytes == one.size.optimizer_bytes + 4 * one.size.trained
    finish(tiny(EMA))
    size = (Path("runs/tiny") / "last.pt").stat().st_size
    assert estimate_disk(other.config, model_size(other.config)).checkpoint == pytest.approx(
        size, rel=0.05
    )
