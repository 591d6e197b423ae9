"""Batches are a pure function of (seed, step), drawn without replacement."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptcli.data.loader import TokenLoader, permuted, read_windows, require_window
from gptcli.data.shard_writer import ShardWriter
from gptcli.data.shards import (
    Counts,
    Manifest,
    Recipe,
    TokenizerRecord,
    TokenReader,
    UnitRecord,
)
from gptcli.errors import DataError

Split = Callable[[int], TokenReader]


def batch(loader: TokenLoader, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and targets of a whole step."""
    [found] = loader.micro_batches(step, 1 << 20)
    return found


@pytest.fixture
def split(tmp_path: Path) -> Split:
    """Return a function that makes a split of n tokens 0, 1, 2 ..., in several shards."""

    def make(n: int) -> TokenReader:
        folder = tmp_path / str(n)
        folder.mkdir(exist_ok=True)
        with ShardWriter(folder, "train", 0, "uint16", max(50, n // 8)) as writer:
            writer.append(np.arange(n, dtype=np.uint32))
        counts = Counts(train=n)
        record = TokenizerRecord(name="x", vocab_size=60_000, sha256="")
        recipe = Recipe(
            source="x", revision=None, text_field="", encoding_errors="", val_fraction=0, seed=0,
            shard_tokens=50, max_vocab_size=None, tokenizer=record,
        )  # fmt: skip
        unit = UnitRecord(
            name="x", sha256="", documents=1, tokens=counts, bytes=counts, shards=writer.shards
        )
        manifest = Manifest(
            recipe=recipe, dtype="uint16", documents=1, tokens=counts, bytes=counts, units=[unit]
        )
        return TokenReader(folder, manifest, "train")

    return make


def loader_over(tokens: TokenReader, **options: int) -> TokenLoader:
    """Return a loader with small numbers unless told otherwise."""
    sizes = {"seq_len": 4, "stride": 4, "windows_per_step": 3, "seed": 1337} | options
    return TokenLoader(tokens, **sizes)


def starts(loader: TokenLoader, step: int) -> npt.NDArray[np.int64]:
    """Return the first token of each window of a step."""
    return loader.starts(*loader.windows(step))


def epoch_starts(loader: TokenLoader, epoch: int) -> list[int]:
    """Return the windows of an epoch in the order they are drawn; one window is one step."""
    assert loader._windows_per_step == 1
    first = epoch * loader.n_windows
    return [int(starts(loader, first + i)[0]) for i in range(loader.n_windows)]


@pytest.mark.parametrize(
    "n", [*range(1, 70), 100, 127, 128, 129, 255, 256, 257, 1000, 4095, 4096, 4097, 65_537, 100_003]
)
def test_a_permutation_takes_each_place_once(n: int) -> None:
    indices = np.arange(n, dtype=np.uint64)
    places = permuted(indices, n, "windows", 1, 0)
    assert np.array_equal(np.sort(places), indices)
    assert np.array_equal(indices, np.arange(n, dtype=np.uint64))  # the argument is left alone


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 2**40), key=st.integers(0, 2**64), data=st.data())
@example(n=2**40, key=0, data=None)
def test_a_place_does_not_depend_on_what_is_asked_with_it(
    n: int, key: int, data: st.DataObject | None
) -> None:
    indices = [0, n - 1, n // 2] if data is None else data.draw(
        st.lists(st.integers(0, n - 1), min_size=1, max_size=6)
    )  # fmt: skip
    together = permuted(np.array(indices, dtype=np.uint64), n, key)
    assert (together < n).all()
    alone = [int(permuted(np.array([i], dtype=np.uint64), n, key)[0]) for i in indices]
    assert together.tolist() == alone
    assert len(set(alone)) == len(set(indices))


def test_permutations_are_fixed_forever() -> None:
    """Runs that are resumed after an update must see the data in the same order."""
    places = permuted(np.arange(10, dtype=np.uint64), 10, "windows", 1337, 0)
    assert places.tolist() == [6, 5, 8, 1, 4, 0, 2, 3, 9, 7]
    big = permuted(np.array([0, 1, 10**9], dtype=np.uint64), 10**10, "windows", 1337, 1)
    assert big.tolist() == [6169688021, 6867328726, 609182295]


def test_permutations_of_different_keys_differ_and_look_random() -> None:
    indices = np.arange(1000, dtype=np.uint64)
    orders = [permuted(indices, 1000, "windows", seed, epoch).astype(np.int64)
              for seed in (1, 2) for epoch in (0, 1)]  # fmt: skip
    assert len({tuple(order.tolist()) for order in orders}) == 4
    for order in orders:
        assert abs(np.corrcoef(indices.astype(float), order)[0, 1]) < 0.1
        assert int((np.diff(order) == 1).sum()) < 10


def test_every_order_of_a_few_windows_comes_up() -> None:
    indices = np.arange(3, dtype=np.uint64)
    orders = Counter(tuple(permuted(indices, 3, seed).tolist()) for seed in range(1200))
    assert len(orders) == 6
    assert all(120 < count < 280 for count in orders.values()), orders


@pytest.mark.parametrize(
    ("n_tokens", "seq_len", "stride", "n_windows"),
    [
        # (N - 1 - seq_len - (stride - 1)) // stride + 1, at least 1
        (101, 10, 10, 9),
        (100, 10, 10, 9),
        (111, 10, 10, 10),
        (110, 10, 10, 10),
        (109, 10, 10, 9),
        (101, 10, 1, 91),
        (101, 10, 3, 30),
        (101, 10, 25, 3),
        (11, 10, 1, 1),
        (11, 10, 10, 1),  # one window: no room for an offset
        (15, 10, 10, 1),
        (21, 10, 100, 1),
        (2, 1, 1, 1),
        (3, 1, 1, 2),
    ],
)
def test_the_number_of_windows(
    split: Split, n_tokens: int, seq_len: int, stride: int, n_windows: int
) -> None:
    with split(n_tokens) as tokens:
        loader = loader_over(tokens, seq_len=seq_len, stride=stride)
    assert loader.n_windows == n_windows


@pytest.mark.parametrize("stride", [1, 3, 4, 7, 30])
@pytest.mark.parametrize("n_tokens", [5, 6, 8, 9, 30, 61, 103])
def test_an_epoch_takes_each_window_once(split: Split, n_tokens: int, stride: int) -> None:
    """Windows start at offset + i * stride and end within the split, in every epoch."""
    with split(n_tokens) as tokens:
        loader = loader_over(tokens, stride=stride, windows_per_step=1)
        offsets = set()
        for epoch in range(12):
            starts = sorted(epoch_starts(loader, epoch))
            offset = starts[0]
            assert starts == [offset + i * stride for i in range(loader.n_windows)]
            assert 0 <= offset < stride
            assert starts[-1] + 4 + 1 <= n_tokens
            offsets.add(offset)
    room = min(stride, n_tokens - 4)
    assert len(offsets) > 1 or room == 1
    assert len(offsets) <= room


def test_all_tokens_are_trained_on_when_the_stride_is_the_length(split: Split) -> None:
    """Each token but the few that the offset leaves out is a target exactly once an epoch."""
    with split(201) as tokens:
        loader = loader_over(tokens, seq_len=8, stride=8, windows_per_step=1)
        targets = [
            t for i in range(loader.n_windows) for t in batch(loader, i)[1].flatten().tolist()
        ]
    assert len(targets) == len(set(targets)) == loader.n_windows * 8
    assert len(targets) > 200 - 2 * 8


def test_targets_are_the_next_tokens(split: Split) -> None:
    with split(103) as tokens:
        loader = loader_over(tokens, seq_len=7, windows_per_step=5)
        inputs, targets = batch(loader, 3)
        of_step = starts(loader, 3)
    assert inputs.shape == targets.shape == (5, 7)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.tolist() == [list(range(s, s + 7)) for s in of_step]
    assert targets.tolist() == [list(range(s + 1, s + 8)) for s in of_step]


def test_a_batch_is_a_pure_function_of_seed_and_step(split: Split) -> None:
    with split(203) as tokens:
        loader = loader_over(tokens)
        in_order = [batch(loader, step) for step in range(40)]
        again = loader_over(tokens)
        for step in (39, 0, 17, 17, 3):
            assert all(map(torch.equal, batch(again, step), in_order[step]))
        other = loader_over(tokens, seed=1338)
        assert any(not torch.equal(batch(other, s)[0], in_order[s][0]) for s in range(3))
    assert not torch.equal(in_order[0][0], in_order[1][0])


def test_the_order_does_not_depend_on_the_size_of_steps(split: Split) -> None:
    with split(203) as tokens:
        ones = loader_over(tokens, windows_per_step=1)
        sevens = loader_over(tokens, windows_per_step=7)
        one_by_one = [int(starts(ones, i)[0]) for i in range(210)]
        assert [s for step in range(30) for s in starts(sevens, step).tolist()] == one_by_one


def test_a_step_may_straddle_epochs(split: Split) -> None:
    """Position p belongs to epoch p // n, also within a step, and also many epochs in one."""
    with split(45) as tokens:
        ones = loader_over(tokens, windows_per_step=1)
        assert ones.n_windows == 10
        for size in (3, 7, 25):
            loader = loader_over(tokens, windows_per_step=size)
            expected = [int(starts(ones, i)[0]) for i in range(50)][: 50 // size * size]
            assert [s for i in range(50 // size) for s in starts(loader, i).tolist()] == expected
        assert sorted(s // 4 for s in starts(loader, 0)[:10]) == list(range(10))


def test_complete_epochs_are_counted(split: Split) -> None:
    with split(45) as tokens:
        loader = loader_over(tokens, windows_per_step=3)
        assert [loader.epoch_of(step) for step in (0, 3, 4, 6, 7, 10)] == [0, 0, 1, 1, 2, 3]


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_micro_batches_are_the_rows_of_the_batch(split: Split, size: int) -> None:
    with split(103) as tokens:
        loader = loader_over(tokens, windows_per_step=6)
        parts = list(loader.micro_batches(2, size))
        inputs, targets = batch(loader, 2)
    assert [len(part[0]) for part in parts] == [size] * (6 // size)
    assert torch.equal(torch.cat([part[0] for part in parts]), inputs)
    assert torch.equal(torch.cat([part[1] for part in parts]), targets)


def test_batches_are_fixed_forever(split: Split) -> None:
    with split(10_000) as tokens:
        loader = loader_over(tokens, seq_len=64, stride=64, windows_per_step=4)
        assert loader.n_windows == 155
        assert starts(loader, 0).tolist() == [3846, 5574, 5958, 9478]
        assert starts(loader, 1000).tolist() == [4609, 7489, 1089, 7169]


@pytest.mark.parametrize("n_tokens", [2, 3, 4])
def test_a_split_shorter_than_a_window_is_refused(split: Split, n_tokens: int) -> None:
    with split(n_tokens) as tokens, pytest.raises(DataError) as caught:
        loader_over(tokens, seq_len=4)
    assert caught.value.message == (
        f"the train split has {n_tokens} tokens, but one window takes seq_len + 1 = 5"
    )
    assert f"data.seq_len={n_tokens - 1}" in (caught.value.hint or "")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("n_tokens", [0, 1])
def test_a_split_without_any_window_has_no_length_to_suggest(split: Split, n_tokens: int) -> None:
    with split(n_tokens) as tokens, pytest.raises(DataError, match="the val split has") as caught:
        require_window(tokens, 1, "val")
    assert caught.value.hint is None


def test_windows_can_be_read_anywhere(split: Split) -> None:
    with split(103) as tokens:
        inputs, targets = read_windows(tokens, np.array([48, 0, 98]), 4)
    assert inputs.tolist() == [[48, 49, 50, 51], [0, 1, 2, 3], [98, 99, 100, 101]]
    assert targets[:, -1].tolist() == [52, 4, 102]
