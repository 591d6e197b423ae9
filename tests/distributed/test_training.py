"""One run on several processes: the same data in the same order, the same network at the end."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gptcli.checkpoint import Checkpoint, load_checkpoint
from gptcli.config import Config
from gptcli.data import loader
from gptcli.data.shards import TokenReader
from support.mixtures import mixed, prepared_sources
from support.processes import Start
from support.runs import Tiny, Trained, finish

# Without biases: that of a key has a gradient of nothing but rounding, which AdamW makes large.
MODERN = (
    "model.bias=false", "model.position=rope", "model.norm=rmsnorm", "model.qk_norm=true",
    "train.micro_batch_size=2", "train.tokens_per_step=64", "train.max_steps=8",
    "train.eval_every=4", "train.save_every=4",
)  # fmt: skip
BOTH = pytest.mark.parametrize("kind", ["ddp", "fsdp"])


def end_of(config: Config) -> Checkpoint:
    return load_checkpoint(config.run_folder / "last.pt")


def gap(one: Checkpoint, other: Checkpoint) -> float:
    """Return the largest relative distance between two weights or optimizer states."""
    assert one.model.keys() == other.model.keys()
    pairs = [(one.model[name], other.model[name]) for name in one.model]
    for name, state in one.optimizer.items():
        assert state.keys() == other.optimizer[name].keys()
        pairs += [(state[key], other.optimizer[name][key]) for key in state]
    return max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs)


@BOTH
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_processes_end_where_one_does(
    tiny: Tiny, trained: Trained, start: Start, kind: str, optimizer: str
) -> None:
    how = (*MODERN, f"optim.name={optimizer}")
    alone = trained.copy(*how, name="alone")
    shared = tiny(*how, f"train.parallel={kind}", name="shared")
    assert start(2, lambda rank: finish(shared)).wait() == [0, 0]
    assert gap(end_of(shared), end_of(alone)) < 1e-5


@BOTH
def test_a_run_goes_on_with_another_number_of_processes(
    tiny: Tiny, trained: Trained, start: Start, kind: str
) -> None:
    how = (*MODERN, "model.dropout=0.1", "optim.schedule=constant")
    alone = trained.copy(*how, "train.max_steps=12", name="alone")
    moved = partial(tiny, *how, f"train.parallel={kind}", name="moved")
    finish(moved("train.max_steps=4"))
    middle = moved("train.max_steps=8")
    assert start(2, lambda rank: finish(middle, resume=True)).wait() == [0, 0]
    finish(moved("train.max_steps=12"), resume=True)
    assert end_of(moved()).state["step"] == 12
    assert gap(end_of(moved()), end_of(alone)) < 1e-5


@BOTH
def test_what_is_resumed_ends_with_the_bits_of_what_was_not(
    tiny: Tiny, start: Start, kind: str
) -> None:
    how = (
        *MODERN, f"train.parallel={kind}", "train.tokens_per_step=96", "model.dropout=0.1",
        "optim.schedule=constant",
    )  # fmt: skip
    straight, cut = tiny(*how, name="straight"), partial(tiny, *how, name="cut")
    assert start(3, lambda rank: finish(straight)).wait() == [0, 0, 0]
    assert start(3, lambda rank: finish(cut("train.max_steps=4"))).wait() == [0, 0, 0]
    assert start(3, lambda rank: finish(cut(), resume=True)).wait() == [0, 0, 0]
    assert gap(end_of(cut()), end_of(straight)) == 0


def test_every_step_has_the_same_windows_in_the_same_order(
    tiny: Tiny, start: Start, tmp_path: Path
) -> None:
    how = (*MODERN, "train.tokens_per_step=128")

    def noting(name: str) -> Callable[[int], None]:
        def work(rank: int) -> None:
            read = loader.read_windows

            def noted(tokens: TokenReader, starts: Any, seq_len: int) -> Any:
                with (tmp_path / f"{name}-{rank}").open("a") as file:
                    file.write(f"{starts.tolist()}\n")
                return read(tokens, starts, seq_len)

            loader.read_windows = noted
            finish(tiny(*how, name=name))

        return work

    # The thread that reads ahead begins one step more than is done.
    batches = {}
    for size in (1, 2, 4):
        name = f"by-{size}"
        assert start(size, noting(name)).wait() == [0] * size
        read = [(tmp_path / f"{name}-{rank}").read_text().splitlines() for rank in range(size)]
        batches[size] = [batch for dealt in zip(*read, strict=True) for batch in dealt][: 8 * 4]
    assert len(set(batches[1])) == 8 * 4
    assert batches[1] == batches[2] == batches[4]


@BOTH
@pytest.mark.parametrize(
    "option",
    [
        "train.activation_checkpointing=true", "train.freeze=[wte, h.0]", "train.async_save=true",
        "model.tie_embeddings=false", "train.ema=0.9",
    ],
)  # fmt: skip
def test_what_can_be_chosen_can_be_chosen_with_several_too(
    tiny: Tiny, trained: Trained, start: Start, kind: str, option: str
) -> None:
    how = (*MODERN, "train.max_steps=4", "train.sample_every=2", option)
    alone = trained.copy(*how, name="alone")
    shared = tiny(*how, f"train.parallel={kind}", name="shared")
    assert start(2, lambda rank: finish(shared)).wait() == [0, 0]
    assert gap(end_of(shared), end_of(alone)) < 1e-5
    samples = [(run.run_folder / "samples.jsonl").read_text() for run in (alone, shared)]
    assert samples[0] == samples[1]


@BOTH
def test_in_16_bits_the_losses_are_those_of_one_process(
    tiny: Tiny, trained: Trained, start: Start, kind: str
) -> None:
    how = (*MODERN, "dtype=bfloat16")
    alone = trained.copy(*how, name="alone")
    shared = tiny(*how, f"train.parallel={kind}", name="shared")
    assert start(2, lambda rank: finish(shared)).wait() == [0, 0]
    lines = [(run.run_folder / "metrics.jsonl").read_text().splitlines() for run in (alone, shared)]
    losses = [[value for line in found for key, value in json.loads(line).items()
               if "loss" in key] for found in lines]  # fmt: skip
    assert len(losses[0]) > 8 and losses[1] == pytest.approx(losses[0], rel=2e-3)


@BOTH
def test_adapters_learn_on_several_processes(
    tiny: Tiny, trained: Trained, start: Start, kind: str
) -> None:
    origin = trained.copy(*MODERN, "train.max_steps=4", name="origin")
    how = (
        *MODERN, "train.max_steps=4", "model.lora.rank=2", f"model.init_from={origin.run_folder}",
    )  # fmt: skip
    alone = tiny(*how, name="alone")
    shared = tiny(*how, f"train.parallel={kind}", name="shared")
    finish(alone)
    assert start(2, lambda rank: finish(shared)).wait() == [0, 0]
    assert gap(end_of(shared), end_of(alone)) < 1e-5


@BOTH
def test_several_processes_end_together_where_nothing_improves(
    tiny: Tiny, start: Start, kind: str
) -> None:
    config = tiny("train.max_steps=100", "train.eval_every=2", "train.stop_after=2", "optim.lr=0.5",
                  f"train.parallel={kind}", "optim.grad_clip=0")  # fmt: skip
    assert start(2, lambda rank: finish(config)).wait() == [0, 0]
    status = json.loads((config.run_folder / "status.json").read_text())
    assert status["reason"] == "no better validation loss in 2 evaluations" and status["step"] < 100


@BOTH
def test_a_mixture_on_two_processes_ends_where_one_does(start: Start, kind: str) -> None:
    prepared_sources(Path())
    alone = mixed(*MODERN, name="alone")
    shared = mixed(*MODERN, f"train.parallel={kind}", name="shared")
    finish(alone)
    assert start(2, lambda rank: finish(shared)).wait() == [0, 0]
    assert gap(end_of(shared), end_of(alone)) < 1e-5
