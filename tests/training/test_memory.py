"""Memory and disk: the rows of a micro-batch that fit, and room for the checkpoints."""

import pytest
import torch

from gptcli.config import load_config
from gptcli.device import available_memory
from gptcli.errors import ConfigError, MemoryLimitError, StorageError
from gptcli.training import memory, spec
from gptcli.training.events import Started, StepDone
from gptcli.training.loop import train
from gptcli.training.memory import model_size
from support.folders import Usage
from support.runs import Tiny, stop_after


def test_auto_needs_to_know_a_step() -> None:
    with pytest.raises(ConfigError, match=r"auto needs train\.tokens_per_step"):
        load_config(None, ["train.micro_batch_size=auto"])


def test_the_most_rows_that_fit_divide_a_step(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny("train.micro_batch_size=auto", "train.tokens_per_step=192",  # 12 rows of 16
                  "model.vocab_size=257")  # fmt: skip
    size = model_size(config)
    monkeypatch.setattr(memory, "memory_bytes", lambda device: 0)

    def fitting(free: float) -> int:
        monkeypatch.setattr(memory, "available_memory", lambda *_: int(free))
        return memory.fitting_rows(config, size, "none", 1)

    def needed(rows: int) -> int:
        estimate = memory.estimate_memory(config, size, rows, "none", 1)
        return estimate.total - estimate.program

    share = memory._SHARE
    wanted = (1, 2, 3, 5, 6, 11, 12, 1000)
    assert [fitting((needed(rows) + 9) / share) for rows in wanted] == [1, 2, 3, 4, 6, 6, 12, 12]
    assert fitting(needed(1) + 9) == 1  # it fits, if only just
    with pytest.raises(MemoryLimitError) as caught:
        fitting(needed(1) / 2)
    assert caught.value.exit_code == 8


def test_the_rows_are_settled_once_and_kept(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    how = ("train.micro_batch_size=auto", "train.tokens_per_step=96", "train.max_steps=6")
    monkeypatch.setattr(spec, "fitting_rows", lambda *args: 2)
    events = stop_after(tiny(*how), 3)
    started = events[0]
    assert isinstance(started, Started) and started.spec.grad_accum_steps == 3
    assert any("micro_batch_size is 2" in note for note in started.notes)
    monkeypatch.setattr(spec, "fitting_rows", lambda *args: 6)
    resumed = next(iter(train(tiny(*how), resume=True)))
    assert isinstance(resumed, Started) and resumed.spec.grad_accum_steps == 3
    straight = stop_after(tiny(*how[1:], "train.micro_batch_size=2", name="straight"), 3)
    losses = [[e.loss for e in run if isinstance(e, StepDone)] for run in (events, straight)]
    assert losses[0] == losses[1]


def test_memory_of_this_machine_is_known() -> None:
    free = available_memory(torch.device("cpu"))
    assert free is not None and 1 << 26 < free < 1 << 45


def test_a_disk_without_room_for_the_checkpoints_is_refused(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny()
    with monkeypatch.context() as patch, pytest.raises(StorageError) as caught:
        patch.setattr(memory.shutil, "disk_usage", lambda path: Usage(10, 0, 1_000_000))
        list(train(config))
    assert caught.value.exit_code == 5 and "keep_last" in (caught.value.hint or "")
    assert "checkpoints of 468 kB need 1.87 MB" in caught.value.message
    assert not list((config.run_folder / "checkpoints").iterdir())
    list(train(config))  # the failure left nothing in the way
    size = sum(path.stat().st_size for path in (config.run_folder / "checkpoints").iterdir())
    assert size < 2_000_000  # so the estimate was not too low
    # What is there already need not be there a second time.
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda path: Usage(10, 0, 2_000_000 - size))
    list(train(tiny("train.max_steps=40"), resume=True))
