"""Several sources are drawn in their shares: exactly, at random access, within a few windows."""

import contextlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcli.config.windows import MixSource
from gptcli.data.loader import Loader, combined, make_loader, open_parts, read_parts
from gptcli.data.mixture import Shares
from support.mixtures import MIX, prepared_sources
from support.mixtures import mixed as settled


def mixed(*weights: Any) -> list[MixSource]:
    """Return sources a, b, ... of these weights."""
    return [MixSource(source=chr(97 + i), weight=weight) for i, weight in enumerate(weights)]


weight = st.one_of(
    st.floats(0, 1).map(lambda value: round(value, 6)),
    st.lists(st.tuples(st.integers(0, 100), st.floats(0, 10)), min_size=1, max_size=5,
             unique_by=lambda point: point[0])
    .map(lambda points: [[fraction / 100, value] for fraction, value in sorted(points)]),
)  # fmt: skip
mixes = st.lists(weight, min_size=0, max_size=6).map(lambda found: mixed(*found, 0.5))


def expected(mix: list[MixSource], position: int, n_positions: int) -> np.ndarray:
    """Return the integrals of the weights up to a position, added up window by window."""
    total = np.zeros(len(mix))
    for p in range(position):
        at = [each.weight_at((p + 0.5) / n_positions) for each in mix]
        total += np.array(at) / sum(at)
    return total


@settings(max_examples=60, deadline=None)
@given(mix=mixes, seed=st.integers(0, 2**63 - 1), first=st.integers(0, 900), n=st.integers(0, 900))
def test_any_part_of_a_run_is_that_of_the_whole(
    mix: list[MixSource], seed: int, first: int, n: int
) -> None:
    shares = Shares(mix, 1000, seed)
    sources, counts = shares.draw(0, 1800)
    assert counts == [0] * len(mix)
    part, before = shares.draw(first, n)
    assert part.tolist() == sources[first : first + n].tolist()
    assert before == np.bincount(sources[:first], minlength=len(mix)).tolist()


@settings(max_examples=40, deadline=None)
@given(mix=mixes, seed=st.integers(0, 2**63 - 1), position=st.integers(0, 1000))
def test_counts_are_within_a_few_windows_of_the_weights(
    mix: list[MixSource], seed: int, position: int
) -> None:
    counts = np.array(Shares(mix, 1000, seed).counts(position))
    assert (counts >= 0).all() and counts.sum() == position
    assert np.abs(counts - expected(mix, position, 1000)).max() < len(mix) / 2 + 2


@pytest.mark.parametrize("weights", [(7, 3), (1, 1, 1, 1, 1), (0.9, 0.05, 0.03, 0.02), (1, 1e-3)])
def test_shares_hold_in_every_thousand_windows(weights: tuple[float, ...]) -> None:
    sources, _ = Shares(mixed(*weights), 0, 1337).draw(0, 100_000)
    for k, share in enumerate(np.array(weights) / sum(weights)):
        drawn = np.cumsum(np.insert(sources == k, 0, 0))
        in_thousand = drawn[1000:] - drawn[:-1000]
        assert np.abs(in_thousand - 1000 * share).max() <= len(weights)


def test_shares_are_within_a_thousandth_after_ten_thousand_steps() -> None:
    shares = Shares(mixed(0.5, 0.2, 0.15, 0.1, 0.05), 0, 7)
    counts = np.array(shares.counts(10_000 * 32)) / 320_000
    assert np.abs(counts / [0.5, 0.2, 0.15, 0.1, 0.05] - 1).max() < 1e-3


def test_a_schedule_ends_with_other_shares_and_draws_its_integral() -> None:
    mix = mixed([[0, 0.9], [0.8, 0.9], [1.0, 0.2]], [[0.8, 0.1], [1.0, 0.8]])
    n = 200_000
    shares = Shares(mix, n, 1337)
    assert abs(shares.counts(n)[0] - n * (0.8 * 0.9 + 0.2 * 0.55)) < 3
    for fraction, share in ((0.1, 0.9), (0.75, 0.9), (0.9, 0.55), (0.99, 0.235)):
        sources, _ = shares.draw(int(fraction * n) - 500, 1000)
        assert (sources == 0).mean() == pytest.approx(share, abs=0.01)


def test_a_source_that_ends_or_begins_is_not_drawn_elsewhere() -> None:
    mix = mixed([[0.4, 1.0], [0.5, 0.0]], [[0.4, 0.0], [0.5, 1.0]], 0)
    sources, _ = Shares(mix, 10_000, 3).draw(0, 10_000)
    assert (sources[:4000] == 0).all() and (sources[5000:] == 1).all()


def test_positions_far_beyond_any_run_are_exact() -> None:
    shares, far = Shares(mixed(0.3, 0.3, 0.4), 0, 11), 10**15
    steps = [shares.counts(far + i) for i in range(50)]
    sources, counts = shares.draw(far, 49)
    assert counts == steps[0] and sum(counts) == far
    for (before, after), source in zip(pairwise(steps), sources.tolist(), strict=True):
        moved = np.subtract(after, before)
        assert moved[source] == 1 and moved.sum() == 1 and (moved >= 0).all()


def test_the_order_of_sources_is_fixed_forever() -> None:
    """Runs that are resumed after an update must see the data in the same order."""
    found = Shares(mixed(0.5, 0.3, 0.2), 0, 1337).draw(0, 20)[0].tolist()
    other = Shares(mixed(0.5, 0.3, 0.2), 0, 1338).draw(0, 20)[0].tolist()
    assert found != other and sorted(found) == sorted(other)
    assert found == [0, 2, 0, 1, 0, 1, 0, 2, 0, 1, 0, 2, 0, 1, 0, 1, 0, 2, 0, 1]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two sources; nobody writes here."""
    return prepared_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture
def loader_of(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Loader]]:
    """Return the loader of a run of 100 steps of 16 rows, and close its files at the end."""
    monkeypatch.chdir(prepared)
    with contextlib.ExitStack() as opened:

        def make(mix: str = MIX) -> Loader:
            config = settled("train.micro_batch_size=2", "train.tokens_per_step=256", mix=mix)
            for tokens in (splits := open_parts(read_parts(config), config))[0].values():
                opened.enter_context(tokens)
            return make_loader([*splits[0].values()], config, 100)

        yield make


def rows_of(loader: Loader, steps: range, turn: tuple[int, int] = (0, 1)) -> list[list[int]]:
    """Return the inputs of all rows of some steps, in order."""
    batches = (batch for step in steps for batch in loader.micro_batches(step, 2, turn))
    return [row for batch in batches for row in batch[0].tolist()]


def test_each_source_is_read_as_in_a_run_on_it_alone(loader_of: Any) -> None:
    together = rows_of(loader_of(), range(60))
    alone = [rows_of(loader_of(f"data.dir=data/{name}"), range(60)) for name in "ab"]
    sources = Shares(settled(mix=MIX).data.mix or [], 0, 1337).draw(0, len(together))[0]
    for source, expected in enumerate(alone):
        found = [row for row, drawn in zip(together, sources.tolist(), strict=True)
                 if drawn == source]  # fmt: skip
        assert found == expected[: len(found)] and len(found) > 100


def test_a_source_goes_through_its_epochs_without_replacement(loader_of: Any) -> None:
    loader = loader_of()
    first, n = loader.part_windows
    windows = [window - first for step in range(100)
               for window in loader.windows(step)[0].tolist() if window >= first]  # fmt: skip
    assert len(windows) > 2 * n > 20
    assert sorted(windows[:n]) == sorted(windows[n : 2 * n]) == list(range(n))
    assert windows[:n] != windows[n : 2 * n]


@pytest.mark.parametrize("size", [2, 4, 8])
def test_processes_that_share_a_step_read_what_one_reads(loader_of: Any, size: int) -> None:
    whole = rows_of(loader_of(), range(40, 44))
    parts = [rows_of(loader_of(), range(40, 44), (rank, size)) for rank in range(size)]
    assert sorted(row for part in parts for row in part) == sorted(whole)
    pairs = [part[i : i + 2] for i in range(0, len(parts[0]), 2) for part in parts]
    assert [row for pair in pairs for row in pair] == whole


def test_all_sources_together_have_the_counts_and_content_of_each(prepared: Path) -> None:
    with contextlib.chdir(prepared):
        parts = read_parts(settled())
        alone = read_parts(settled(mix="data.dir=data/a"))
        twisted = read_parts(settled(mix=MIX.replace("a.txt", "x").replace("b.txt", "a.txt")
                                     .replace("{source: x", "{source: b.txt")))  # fmt: skip
    whole = combined(parts)
    assert whole.tokens.train == sum(part.manifest.tokens.train for part in parts)
    assert whole.trained("train") == whole.tokens.train and not whole.is_chat
    fingerprints = {each.fingerprint for each in (whole, combined(twisted), combined(alone))}
    assert len(fingerprints) == 3 and combined(alone) is alone[0].manifest
