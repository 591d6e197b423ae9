"""Batches are encoded in order, by whatever does it, and none is lost to a later error."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gptcli.config import load_config
from gptcli.data.encode import Encoder, TextBatch
from gptcli.data.prepare import make_plan, prepare
from gptcli.data.units import Unit
from gptcli.errors import DataError
from gptcli.tokenizers import CharTokenizer, bpe, gigatoken

UNIT = Unit(0, "some.txt", (), "documents")


def batches(count: int, words: int = 50) -> list[TextBatch]:
    """Return batches that differ."""
    return [TextBatch(UNIT, [f"batch {i} \u00e9 " * words, ""], [i, i + 1]) for i in range(count)]


def ids_of(workers: int, given: list[TextBatch | None]) -> list[list[int]]:
    """Return the ids of each batch, and see to it that they come with their own batch."""
    with Encoder(bpe.gpt2(), workers) as encoder:
        found = list(encoder.encode(given))
    assert [batch for batch, _ in found] == [batch for batch in given if batch is not None]
    return [encoded.ids.tolist() for _, encoded in found]


def test_who_encodes_makes_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [*batches(30), None, *batches(5)]
    alone = ids_of(1, given)
    assert alone[3] == bpe.gpt2().encode(given[3].texts[0]).tolist()  # type: ignore[union-attr]
    assert ids_of(2, given) == alone
    monkeypatch.delenv("GPTCLI_FAST")
    monkeypatch.setattr("gptcli.data.encode._COMPARED_CHARS", 1000)
    assert ids_of(1, given) == ids_of(3, given) == alone


def test_gigatoken_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPTCLI_FAST")
    asked: list[int] = []

    def wrong(self: gigatoken.FastBpe, texts: list[str]) -> list[np.ndarray]:
        asked.append(len(texts))
        return [np.array([1], dtype=np.uint32) for _ in texts]

    monkeypatch.setattr(gigatoken.FastBpe, "encode", wrong)
    given = list(batches(10))
    found = ids_of(1, given)
    assert len(asked) == 1
    monkeypatch.setenv("GPTCLI_FAST", "0")
    assert found == ids_of(1, given)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_comes_after_what_came_before_it(workers: int) -> None:
    def failing() -> Iterator[TextBatch]:
        yield from batches(3)
        raise DataError("the next file is damaged")

    done = []
    with Encoder(bpe.gpt2(), workers) as encoder, pytest.raises(DataError, match="damaged"):
        for batch, _ in encoder.encode(failing()):
            done.append(batch)
    assert done == batches(3)


def test_a_long_wait_is_not_spent_with_work_unfinished() -> None:
    taken: list[int] = []

    def waiting() -> Iterator[TextBatch | None]:
        for number, batch in enumerate(batches(4)):
            taken.append(number)
            yield batch
        yield None
        assert len(done) == 4
        yield from batches(1)

    done: list[TextBatch] = []
    with Encoder(bpe.gpt2(), 2) as encoder:
        for batch, _ in encoder.encode(waiting()):
            done.append(batch)
    assert len(done) == 5


@pytest.mark.parametrize("workers", [1, 2])
def test_an_unknown_character_names_the_unit(workers: int) -> None:
    with (
        Encoder(CharTokenizer("ab"), workers) as encoder,
        pytest.raises(DataError, match=r"some\.txt: .*'c'"),
    ):
        list(encoder.encode([TextBatch(UNIT, ["abc"], [0])]))


def test_shards_are_the_same_by_gigatoken(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptcli.data.encode._COMPARED_CHARS", 100)
    for out in ("slow", "quick"):
        prepare(make_plan(load_config(None, [f"data.source={corpus}", f"data.dir={out}"])))
        monkeypatch.delenv("GPTCLI_FAST", raising=False)
    for path in Path("slow").iterdir():
        assert path.read_bytes() == (Path("quick") / path.name).read_bytes(), path.name
