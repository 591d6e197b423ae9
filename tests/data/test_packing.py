"""Rows of whole conversations: each once an epoch, the same rows however they are asked for."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptcli.data.packing import ConversationLoader, PackedRows, Packing
from gptcli.model.loss import IGNORED
from support.chats import Chats, chats_of


def rows_of(packing: Packing, epoch: int) -> list[list[int]]:
    return [packing.row(index, epoch).tolist() for index in range(packing.n_rows)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 33), max_size=300), st.integers(0, 5), st.integers(0, 2**62))
@example([], 0, 0)
@example([0, 0], 0, 0)
@example([33] * 40 + [1] * 70, 1, 7)
def test_an_epoch_has_each_conversation_once(lengths: list[int], epoch: int, seed: int) -> None:
    packing = Packing(np.array(lengths, dtype=np.int64), 33, seed)
    rows = rows_of(packing, epoch)
    assert all(0 < sum(lengths[n] for n in row) <= 33 for row in rows)
    assert sorted(n for row in rows for n in row) == [n for n, each in enumerate(lengths) if each]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 33), min_size=1, max_size=100))
def test_rows_are_those_of_first_fit_decreasing(lengths: list[int]) -> None:
    bins: list[int] = []
    for length in sorted(lengths, reverse=True):
        place = next((i for i, used in enumerate(bins) if used + length <= 33), len(bins))
        bins[place:] = [sum(bins[place : place + 1]) + length, *bins[place + 1 :]]
    assert Packing(np.array(lengths), 33, 1).n_rows == len(bins)


def test_little_is_padding() -> None:
    lengths = np.random.default_rng(1).geometric(0.02, 5000).clip(1, 257)
    packing = Packing(lengths, 257, 1)
    assert lengths.sum() / (packing.n_rows * 257) > 0.99


def test_another_epoch_and_another_seed_pack_others_together() -> None:
    lengths = np.random.default_rng(1).integers(5, 30, 500)
    kinds = [
        {tuple(sorted(row)) for row in rows_of(Packing(lengths, 64, seed), epoch)}
        for seed, epoch in ((1, 0), (1, 1), (2, 0))
    ]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert len(kinds[one] & kinds[other]) < len(kinds[one]) / 4


def test_the_rule_stays_as_it_is() -> None:
    packing = Packing(np.array([5, 9, 3, 9, 12, 1, 7, 5, 5]), 16, 1337)
    assert rows_of(packing, 0) == [[4, 2, 5], [3, 6], [1, 0], [8, 7]]
    assert rows_of(packing, 3) == [[4, 2, 5], [3, 6], [1, 7], [0, 8]]


def packed(chats: Chats, seq_len: int, seed: int = 1) -> PackedRows:
    return PackedRows(chats.lengths, chats.read, seq_len, seed)


def loader(rows: PackedRows, windows_per_step: int = 4) -> ConversationLoader:
    return ConversationLoader(rows, windows_per_step=windows_per_step, seed=3)


def test_a_batch_says_what_counts_and_where_each_conversation_starts() -> None:
    chats = chats_of(6, 4, 3)
    batch, numbers = packed(chats, 15).read([0], [0])
    tokens, targets, starts = (part[0].tolist() for part in batch)
    row = [*chats.read(0)[0], *chats.read(1)[0], *chats.read(2)[0]]
    assert tokens == [*row, 0, 0]
    assert starts == [0] * 6 + [6] * 4 + [10] * 3 + [13] * 2
    # Conversations of 6, 4 and 3 tokens train on their last half but the very last.
    counted = {3: 0, 4: 0, 8: 1, 11: 2}
    assert targets == [row[at + 1] if at + 1 in counted else IGNORED for at in range(15)]
    assert [n for n in numbers[0].tolist() if n >= 0] == [0] * 5 + [1] * 4 + [2] * 3


def test_a_conversation_as_long_as_a_row_and_its_last_target_is_whole() -> None:
    [tokens, targets, _], _ = packed(chats_of(16), 15).read([0], [0])
    assert tokens.shape == (1, 15) and (targets != IGNORED).sum() == 7


def test_the_first_token_is_no_target_whatever_the_mask_says() -> None:
    chats = Chats([(np.arange(1, 5), np.ones(4, bool)), (np.arange(5, 8), np.ones(3, bool))])
    [_, targets, _], _ = packed(chats, 9).read([0], [0])
    assert targets[0].tolist() == [2, 3, 4, IGNORED, 6, 7, IGNORED, IGNORED, IGNORED]


@pytest.mark.parametrize(
    ("answers", "length", "n_cut", "n_left_out"),
    [
        ([(4, 8), (12, 20)], 8, 1, 0),  # the second answer does not end in a row of 16
        ([(4, 8), (12, 16)], 16, 1, 0),  # it ends with the row: what follows is a third turn
        ([(4, 8)], 8, 0, 0),  # nothing trained on is lost
        ([(4, 17)], 0, 0, 1),
        ([(4, 24)], 0, 0, 1),
    ],
)
def test_what_is_too_long_ends_after_an_answer(
    answers: list[tuple[int, int]], length: int, n_cut: int, n_left_out: int
) -> None:
    trained = np.zeros(24, bool)
    for start, end in answers:
        trained[start:end] = True
    if length == 16:
        trained[20:22] = True
    rows = packed(Chats([(np.arange(24), trained)]), 15)
    assert rows.lengths.tolist() == [length]
    assert (rows.n_cut, rows.n_left_out) == (n_cut, n_left_out)


def test_steps_are_the_same_however_they_are_divided() -> None:
    rows = packed(chats_of(*np.random.default_rng(2).integers(3, 20, 60).tolist()), 31, 5)
    assert rows.n_rows % 4  # an epoch ends within a step
    for step in (0, 7, 1000):
        [whole] = loader(rows).micro_batches(step, 4)
        parts = list(loader(rows).micro_batches(step, 1))
        ranks = [list(loader(rows).micro_batches(step, 1, (rank, 2))) for rank in (0, 1)]
        for i, full in enumerate(whole):
            assert (full == np.concatenate([part[i] for part in parts])).all()
            mixed = [ranks[n % 2][n // 2][i] for n in range(4)]
            assert (full == np.concatenate(mixed)).all()
