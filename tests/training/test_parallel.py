"""How work is dealt out to several processes, decided without any."""

from collections.abc import Callable

import pytest

from gptcli.config import Config
from gptcli.errors import ConfigError
from gptcli.training import memory
from gptcli.training.memory import choose_parallelism, estimate_memory, model_size
from gptcli.training.spec import rows_of


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


def test_copies_while_they_fit_and_shards_beyond(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_vocabulary(*sets: str) -> Config:
        return tiny("model.vocab_size=257", *sets)

    config = with_vocabulary()
    size = model_size(config)
    monkeypatch.setattr(memory, "memory_bytes", lambda device: -memory._KERNELS)  # no program
    needed = 2 * estimate_memory(config, size, 1, "ddp", 2).total
    for free, expected in ((needed / 0.6 + 9, "ddp"), (needed / 0.6 - 9, "fsdp")):
        monkeypatch.setattr(memory, "available_memory", lambda *_, free=free: int(free))
        assert choose_parallelism(config, size, 2) == expected
    assert choose_parallelism(config, size, 1) == "none"
    assert choose_parallelism(with_vocabulary("train.parallel=ddp"), size, 2) == "ddp"
    assert choose_parallelism(with_vocabulary("train.parallel=fsdp"), size, 2) == "fsdp"
    with pytest.raises(ConfigError, match="float16"):
        choose_parallelism(with_vocabulary("train.parallel=fsdp", "dtype=float16"), size, 2)
