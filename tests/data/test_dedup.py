"""Repeated documents: which are left out, the same bytes however it is done, and bounded memory."""

import json
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcli.config import load_config
from gptcli.data import dedup, readers, writer
from gptcli.data.conversations import skipped_rows
from gptcli.data.encode import TextBatch
from gptcli.data.estimate import left_out
from gptcli.data.prepare import finalize, make_plan, prepare, prepare_share
from gptcli.data.shards import Manifest, read_manifest
from gptcli.data.units import Unit
from gptcli.seeding import derive_uniform
from gptcli.tokenizers import tokenizer_from
from support.folders import Encoded, Prepared, Refusal, TokensOf, Write, content
from support.texts import as_jsonl

BYTES = tokenizer_from({"name": "bytes"})
EXACT = "data.dedup=exact"
REPEATS = dedup.REPEATED["exact"]


def write_repeats(write: Write, n_files: int = 5, n_rows: int = 60) -> list[list[str]]:
    """Write files of rows, many of which repeat one of the same or of another file."""
    generator = random.Random(1)
    texts = [[f"text {generator.randrange(n_rows * 2)} of many\n" * 20 for _ in range(n_rows)]
             for _ in range(n_files)]  # fmt: skip
    for index, rows in enumerate(texts):
        write(f"rows/{index}.jsonl", as_jsonl(rows))
    return texts


def test_the_first_of_equal_documents_stays_in_its_split(
    write: Write, prepared: Prepared, tokens_of: TokensOf, encoded: Encoded
) -> None:
    texts = write_repeats(write)
    manifest = prepared("rows", EXACT)
    kept: dict[str, list[str]] = {"train": [], "val": []}
    n_repeats = [0] * len(texts)
    seen: set[str] = set()
    for unit, rows in enumerate(texts):
        for i, text in enumerate(rows):
            if text in seen:
                n_repeats[unit] += 1
            else:
                kept["val" if derive_uniform("split", 1337, unit, i) < 0.1 else "train"] += [text]
            seen.add(text)
    assert tokens_of(manifest, "train") == encoded(BYTES, *kept["train"])
    assert tokens_of(manifest, "val") == encoded(BYTES, *kept["val"])
    assert manifest.documents == len(seen)
    assert manifest.bytes.total == sum(map(len, seen))
    counted = [(unit.skipped or {})[REPEATS].rows for unit in manifest.units]
    assert counted == n_repeats and min(n_repeats) > 0
    first = (manifest.units[0].skipped or {})[REPEATS].first
    number = int(first.removeprefix("rows/0.jsonl: document "))
    assert texts[0][number - 1] in texts[0][: number - 1]
    assert manifest.recipe.dedup == "exact" and read_manifest(Path("data/out")) == manifest
    assert not Path("data/out/.progress").exists()


def test_kinds_of_white_space_and_that_at_the_ends_make_no_difference(
    write: Write, prepared: Prepared
) -> None:
    same = ["One two\n", "One two", "\r\nOne\ttwo ", "One\r\ntwo"]
    others = ["one two", "One  two", "Onetwo", ""]
    write("a.jsonl", as_jsonl([*same, *others, " \n"]))
    manifest = prepared("a.jsonl", EXACT, "data.val_fraction=0")
    assert manifest.documents == 1 + len(others)
    assert skipped_rows(manifest.units)[REPEATS].rows == len(same)


def test_without_repeats_the_tokens_are_those_of_a_plain_preparation(
    write: Write, prepared: Prepared
) -> None:
    write("rows/a.jsonl", as_jsonl([f"row {i} " * 9 for i in range(120)]))
    write("rows/b.txt", "a text file whose tail is held out " * 30)
    plain = prepared("rows", out=Path("data/plain"))
    deduplicated = prepared("rows", EXACT)
    assert deduplicated.fingerprint == plain.fingerprint
    assert deduplicated.documents == plain.documents
    assert all(unit.skipped == {} for unit in deduplicated.units)


def test_long_documents_are_compared_to_their_ends(
    write: Write, monkeypatch: pytest.MonkeyPatch, prepared: Prepared
) -> None:
    monkeypatch.setattr(readers, "_BLOCK_BYTES", 64)
    monkeypatch.setattr(writer, "_BATCH_TEXTS", 3)
    write("texts/a.txt", "some words " * 90 + "end")
    write("texts/b.txt", "some\twords\n" * 90 + "end ")
    write("texts/c.txt", "some words " * 90 + "End")
    write("texts/d.txt", "other words " * 90)
    manifest = prepared("texts", EXACT)
    assert manifest.documents == 3
    assert skipped_rows(manifest.units)[REPEATS].first == "texts/a.txt: document 2"


def test_training_text_that_repeats_the_validation_text_goes(
    write: Write, prepared: Prepared
) -> None:
    write("train.jsonl", as_jsonl(["one", "two", "three", "two"]))
    write("val.jsonl", as_jsonl(["two", "four"]))
    config = load_config(
        None, ["data.source={train: train.jsonl, val: val.jsonl}", EXACT, "tokenizer.name=bytes"]
    )
    manifest = prepare(make_plan(config))
    assert [unit.documents for unit in manifest.units] == [2, 2]
    assert manifest.bytes.model_dump() == {"train": len("onethree"), "val": len("twofour")}


def test_conversations_are_the_same_if_the_same_is_said_by_the_same(
    write: Write, prepared: Prepared
) -> None:
    rows = [{"prompt": f"Question {i % 110}?", "completion": "An answer."} for i in range(130)]
    rows += [{"prompt": "Question 1?An", "completion": "answer."}]
    write("chat.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    manifest = prepared("chat.jsonl", EXACT)
    assert manifest.documents == 111 and manifest.is_chat
    assert skipped_rows(manifest.units)[REPEATS].rows == 20


def test_filters_come_before(write: Write, prepared: Prepared) -> None:
    write("a.jsonl", as_jsonl(["gone", "stays here", "gone", "stays here"]))
    manifest = prepared("a.jsonl", EXACT, "data.filters.min_chars=5", "data.val_fraction=0")
    found = {reason: each.rows for reason, each in skipped_rows(manifest.units).items()}
    assert found == {"shorter than min_chars": 2, REPEATS: 1}
    assert manifest.documents == 1


@pytest.mark.parametrize("kind", ["exact", "near"])
def test_workers_and_ranks_change_no_byte(write: Write, prepared: Prepared, kind: str) -> None:
    write_repeats(write)
    how = (f"data.dedup={kind}", "data.shard_tokens=9000")
    prepared("rows", *how)
    prepared("rows", *how, out=Path("data/two"), workers=2)
    settings_ = ("data.source=rows", "data.dir=data/ranks", "tokenizer.name=bytes", *how)
    plan = make_plan(load_config(None, settings_))
    for rank in (2, 0, 1):
        prepare_share(plan, rank, 3)
    finalize(plan)
    whole = content(Path("data/out"))
    assert whole == content(Path("data/two")) == content(Path("data/ranks"))


Keys = list[list[list[bytes]]]


@given(
    units=st.lists(
        st.lists(st.lists(st.binary(min_size=1, max_size=1), max_size=3), max_size=9), min_size=1
    ),
    run=st.integers(1, 9),
)
@settings(max_examples=60, deadline=None)
def test_what_is_repeated_equals_a_plain_count(
    tmp_path_factory: pytest.TempPathFactory, units: Keys, run: int
) -> None:
    folder = tmp_path_factory.mktemp("keys")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedup, "_RUN_KEYS", run)
        files = write_keys(
            folder, [[[16 * key for key in keys] for keys in unit] for unit in units]
        )
        found = dedup.repeated(files, [len(unit) for unit in units])
    seen: set[bytes] = set()
    for unit, marks in zip(units, found, strict=True):
        for keys, is_repeated in zip(unit, marks, strict=True):
            # A document's own keys differ in what is used; here they may not.
            assert is_repeated == (bool(seen & set(keys)) or len(set(keys)) < len(keys))
            seen |= set(keys)


def write_keys(folder: Path, units: Keys) -> list[Path]:
    """Write the keys of units' documents to files."""
    files = []
    for number, unit in enumerate(units):
        files.append(folder / f"{number}.keys")
        with files[-1].open("wb") as file:
            keys = dedup.KeyFile(file)
            for document, each in enumerate(unit):
                for key in each:
                    keys.append(document, key)
            keys.flush()
    return files


def test_a_million_documents_need_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, run = 1_000_000, 1 << 14
    monkeypatch.setattr(dedup, "_RUN_KEYS", run)
    with (tmp_path / "a.keys").open("wb") as file:
        keys = dedup.KeyFile(file)
        for document in range(n):
            value = document if document % 10 else document // 2
            mixed = value * 0x9E3779B97F4A7C15 % (1 << 64)
            keys.append(document, mixed.to_bytes(8, "little") + b"same end")
        keys.flush()
    assert file.closed and (tmp_path / "a.keys").stat().st_size == 20 * n
    tracemalloc.start()
    [found] = dedup.repeated([tmp_path / "a.keys"], [n])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    halves = np.arange(0, n, 10) // 2
    # Of every tenth document, half has a key that another one has or had.
    expected = np.zeros(n, np.bool_)
    seen: set[int] = set(np.flatnonzero(np.arange(n) % 10).tolist())
    taken: set[int] = set()
    for document, half in zip(range(0, n, 10), halves.tolist(), strict=True):
        expected[document] = (half in seen and half < document) or half in taken
        taken.add(half)
    assert np.array_equal(found, expected) and 0 < found.sum() < n
    # A byte for each document; a run has some 80 bytes for each key, and the list of runs is small.
    assert peak < n + 200 * run + (1 << 20)


def near_keys(*texts: str) -> list[set[bytes]]:
    """Return the keys of documents."""
    found: list[set[bytes]] = [set() for _ in texts]
    keys = dedup.keys_of("near", lambda document, key: found[document].add(key))
    unit = Unit(0, "a", (), "documents")
    keys.add(TextBatch(unit, list(texts), list(range(len(texts)))))
    keys.finish()
    return found


def words(generator: random.Random, n: int) -> list[str]:
    """Draw words of five letters."""
    return ["".join(generator.choices("abcdefghijklmnop", k=5)) for _ in range(n)]


@pytest.mark.parametrize(
    ("n_changed", "least", "most"), [(1, 0.99, 1), (8, 0.4, 0.98), (60, 0, 0.1)]
)
def test_near_duplicates_are_found_by_how_much_they_share(
    n_changed: int, least: float, most: float
) -> None:
    generator = random.Random(n_changed)
    n_found = 0
    for _ in range(100):
        text = words(generator, 200)
        other = text.copy()
        for place in generator.sample(range(200), n_changed):
            other[place] = words(generator, 1)[0]
        one, two = near_keys(" ".join(text), " ".join(other).upper())
        n_found += bool(one & two)
    assert least <= n_found / 100 <= most


def test_near_duplicates_are_left_out(write: Write, prepared: Prepared) -> None:
    generator = random.Random(0)
    texts = [" ".join(words(generator, 100)) for _ in range(120)]
    texts += [text.replace(text[:5], "other", 1) for text in texts[:20]] + ["short", "Short "]
    write("a.jsonl", as_jsonl(texts))
    manifest = prepared("a.jsonl", "data.dedup=near")
    assert manifest.documents == 121
    assert skipped_rows(manifest.units)[dedup.REPEATED["near"]].rows == 21


def test_keys_do_not_depend_on_pieces_or_batches(write: Write) -> None:
    text = " ".join(words(random.Random(3), 50))
    unit = Unit(0, "a", (), "documents")
    for kind, n_keys in (("exact", 1), ("near", 16)):
        found: list[list[bytes]] = [[], []]
        for keys, cuts in zip(found, ([text], [text[:100], text[100:]]), strict=True):
            making = dedup.keys_of(kind, lambda _, key, keys=keys: keys.append(key))  # type: ignore
            for cut in cuts:
                making.add(TextBatch(unit, [cut], [0]))
            making.finish()
        shared = set(found[0]) & set(found[1])
        assert len(found[0]) == n_keys and len(shared) >= n_keys / 4  # those of the cut are missing


def test_white_space_at_the_end_does_not_count_in_whatever_pieces() -> None:
    unit = Unit(0, "a", (), "documents")
    found: list[bytes] = []
    for pieces in (["a b"], [" a", " b"], ["\na", " ", "b ", "\n ", "\t"], ["a b\n", ""]):
        making = dedup.keys_of("exact", lambda _, key: found.append(key))
        for piece in pieces:
            making.add(TextBatch(unit, [piece], [0]))
        making.finish()
    assert len(found) == 4 and len(set(found)) == 1


def test_another_setting_is_other_data(write: Write, prepared: Prepared, refusal: Refusal) -> None:
    write("a.jsonl", as_jsonl(["one", "two", "two", "three"]))
    first = prepared("a.jsonl", EXACT, "data.val_fraction=0")
    assert prepared("a.jsonl", EXACT, "data.val_fraction=0") == first
    error = refusal("a.jsonl", "data.val_fraction=0", code=2)
    assert "differs in: dedup" in error.message
    plain = prepared("a.jsonl", "data.val_fraction=0", force=True)
    assert plain.documents == 4 and plain.recipe.dedup is None
    assert "dedup" not in Path("data/out/manifest.json").read_text()


def test_training_on_data_of_other_settings_is_refused(write: Write, prepared: Prepared) -> None:
    from gptcli.data.loader import read_parts
    from gptcli.data.settings import require_same_settings
    from gptcli.errors import DataError

    write("a.txt", "some text " * 90)
    how = ("data.dedup=exact", "data.filters.min_chars=9")
    prepared("a.txt", *how)
    folder = ("data.dir=data/out", "tokenizer.name=bytes")
    require_same_settings(read_parts(load_config(None, [*folder, *how])))
    require_same_settings(read_parts(load_config(None, [*folder])))
    for other in ("data.dedup=near", "data.filters.min_chars=8"):
        with pytest.raises(DataError, match="was prepared with data") as caught:
            require_same_settings(read_parts(load_config(None, [*folder, *how, other])))
        assert "data.filters=" in str(caught.value.hint)


def test_what_is_no_document_is_not_compared(write: Write, refusal: Refusal) -> None:
    Path("tokens").mkdir()
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 9
    for split in ("train", "val"):
        Path(f"tokens/x_{split}_0.bin").write_bytes(header.tobytes() + bytes(18))
    from gptcli.api.prepare import prepare as prepare_data
    from gptcli.errors import ConfigError

    config = load_config(None, ["data.source=tokens", EXACT])
    with pytest.raises(ConfigError, match="token files are used as they are"):
        prepare_data(config)


def test_a_sample_shows_what_would_go(write: Write) -> None:
    write("a.jsonl", as_jsonl([f"text number {i % 20}" for i in range(30)]))
    found = left_out(make_plan(load_config(None, ["data.source=a.jsonl", EXACT])))
    assert (found.documents, found.rows) == (30, {REPEATS: 10})
    assert found.examples[REPEATS][0] == "a.jsonl: document 21: 'text number 0'"


@pytest.mark.parametrize("suffix", [".tokens", ".keys", "-stored.2.json"])
def test_a_unit_whose_stored_files_are_damaged_is_done_again(
    write: Write, prepared: Prepared, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    import gptcli.data.prepare as module

    write("rows/a.jsonl", as_jsonl(["one", "two", "two"]))
    write("rows/b.jsonl", as_jsonl(["two", "three"]))
    prepared("rows", EXACT, out=Path("data/whole"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "write_without_repeats", interrupt)
        prepared("rows", EXACT)
    stored = Path(f"data/out/.progress/unit-000001{suffix}")
    stored.write_bytes(stored.read_bytes()[:-3])
    prepared("rows", EXACT)
    assert content(Path("data/out")) == content(Path("data/whole"))


def interrupt(*args: object) -> list[Manifest]:
    """Raise what Ctrl-C does."""
    raise KeyboardInterrupt
