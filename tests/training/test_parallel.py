"""How work is dealt out to several processes, decided without any."""

from collections.abc import Callable

import pytest
import torch

from gptcli.config import Config
from gptcli.distributed.process_group import World
from gptcli.errors import ConfigError
from gptcli.training import parallel
from gptcli.training.parallel import choose_parallelism, rows_of

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("asked", "n_rows", "processes", "rows"),
    [(4, 16, 1, 4), (4, 16, 2, 4), (4, 16, 8, 2), (4, 16, 16, 1), (6, 12, 4, 3), (4, 12, 2, 3)],
)
def test_every_process_has_as_many_rows(
    tiny: Callable[..., Config], asked: int, n_rows: int, processes: int, rows: int
) -> None:
    config = tiny(f"train.micro_batch_size={asked}", f"train.tokens_per_step={16 * asked * 8}")
    section = config.train.model_copy(update={"tokens_per_step": 16 * n_rows})
    config = config.model_copy(update={"train": section})
    found = rows_of(config, processes)
    assert found == rows and n_rows % (found * processes) == 0


def test_whole_while_it_fits_and_in_shards_beyond(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "available_memory", lambda device: 1000)
    two = World(0, 2)
    assert choose_parallelism(tiny(), World(), 10**9, CPU) == "none"
    assert choose_parallelism(tiny(), two, 37, CPU) == "ddp"
    assert choose_parallelism(tiny(), two, 38, CPU) == "fsdp"
    assert choose_parallelism(tiny("train.parallel=ddp"), two, 10**9, CPU) == "ddp"
    assert choose_parallelism(tiny("train.parallel=fsdp"), two, 1, CPU) == "fsdp"
    with pytest.raises(ConfigError, match="float16"):
        choose_parallelism(tiny("train.parallel=fsdp", "dtype=float16"), two, 1, CPU)
