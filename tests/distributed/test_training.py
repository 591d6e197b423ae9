"""One run on several processes: the same data in the same order, the same network at the end."""

from collections.abc import Callable

import pytest

from gptcli.checkpoint import Checkpoint, load_checkpoint
from gptcli.config import Config
from gptcli.training.loop import train

from .conftest import Start

# Without biases: that of a key has a gradient of nothing but rounding, which AdamW makes large.
MODERN = (
    "model.bias=false", "model.position=rope", "model.norm=rmsnorm", "model.qk_norm=true",
    "train.micro_batch_size=2", "train.tokens_per_step=64", "train.max_steps=8",
    "train.eval_every=4", "train.save_every=4",
)  # fmt: skip
BOTH = pytest.mark.parametrize("kind", ["ddp", "fsdp"])


def finish(config: Config, resume: bool = False) -> None:
    for _ in train(config, resume=resume):
        pass


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
    tiny: Callable[..., Config], start: Start, kind: str, optimizer: str
) -> None:
    how = (*MODERN, f"optim.name={optimizer}", f"train.parallel={kind}")
    alone, shared = tiny(*how, name="alone"), tiny(*how, name="shared")
    finish(alone)
    assert start(2, lambda rank: finish(shared)).wait() == [0, 0]
    assert gap(end_of(shared), end_of(alone)) < 1e-5
