"""The feed gives what the loader gives, whatever is read ahead."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gptcli.data.loader import Prefetcher, TokenLoader
from gptcli.data.shards import TokenReader, read_manifest
from gptcli.errors import DataError

CPU = torch.device("cpu")


@pytest.fixture
def tokens(data: Path) -> Iterator[TokenReader]:
    with TokenReader(data, read_manifest(data), "train") as reader:
        yield reader


@pytest.fixture
def loader(tokens: TokenReader) -> TokenLoader:
    return TokenLoader(tokens, seq_len=16, stride=16, windows_per_step=6, seed=3)


@pytest.mark.parametrize("steps", [[0, 1, 2, 3], [5, 5, 2, 3, 3]])
def test_it_gives_the_loaders_batches_in_any_order(loader: TokenLoader, steps: list[int]) -> None:
    feed = Prefetcher(loader, 2, CPU)
    for step in steps:
        found = list(feed.micro_batches(step))
        wanted = list(loader.micro_batches(step, 2))
        assert len(found) == len(wanted) == 3
        for (tokens, targets), (x, y) in zip(found, wanted, strict=True):
            assert torch.equal(tokens, x) and torch.equal(targets, y)
            assert tokens.is_contiguous() and targets.is_contiguous()
    assert feed.waited > 0
    feed.close()


def test_reading_elsewhere_meanwhile_disturbs_nothing(tokens: TokenReader) -> None:
    # Evaluation reads the training split while the next step's batch is read ahead.
    whole = tokens.read(0, len(tokens)).copy()
    loader = TokenLoader(tokens, seq_len=16, stride=16, windows_per_step=64, seed=3)
    feed = Prefetcher(loader, 64, CPU)
    wanted = [next(iter(loader.micro_batches(step, 64)))[0] for step in range(30)]
    for step in range(30):
        found = next(iter(feed.micro_batches(step)))[0]
        for start in range(0, len(whole) - 8, max(1, len(whole) // 50)):
            assert (tokens.read(start, 8) == whole[start : start + 8]).all()
        assert torch.equal(found, wanted[step])
    feed.close()


def test_an_error_of_the_thread_reaches_the_reader(loader: TokenLoader, data: Path) -> None:
    feed = Prefetcher(loader, 2, CPU)
    list(feed.micro_batches(0))
    for shard in data.glob("train_*.bin"):
        shard.write_bytes(shard.read_bytes()[:1030])
    with pytest.raises(DataError, match="became shorter"):
        for step in range(1, 50):
            list(feed.micro_batches(step))
    feed.close()
