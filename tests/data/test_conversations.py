"""Conversations prepared and read: exactly the assistant's turns are trained on."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from gptcli.data import shards
from gptcli.data.conversations import ConversationReader
from gptcli.data.shards import Manifest
from gptcli.errors import DataError
from gptcli.tokenizers import Message, encode_conversation
from support.folders import Prepared, Write, content

OUT = Path("data/out")
Rows = Callable[..., str]


def talk(index: int) -> list[dict[str, str]]:
    """Return the messages of one conversation, of two or four turns, a third with a system one."""
    turns = [{"role": "system", "content": "Be brief."}] * (index % 3 == 0)
    for turn in range(1 + index % 2):
        turns += [
            {"role": "user", "content": f"What is {index}, for the {turn + 1}. time?"},
            {"role": "assistant", "content": f"{index} is {'one more than ' * (index % 5)}it."},
        ]
    return turns


@pytest.fixture
def chat(write: Write) -> Rows:
    """Return a function that writes a file of conversations, 200 unless told otherwise."""

    def make(n: int = 200, name: str = "chat.jsonl") -> str:
        rows = ({"messages": talk(index)} for index in range(n))
        return str(write(name, "".join(json.dumps(row) + "\n" for row in rows)))

    return make


def read_all(
    manifest: Manifest, split: str, folder: Path = OUT
) -> list[tuple[list[int], list[bool]]]:
    """Return (tokens, trained) of each conversation of a split."""
    with ConversationReader(folder, manifest, split) as reader:  # type: ignore[arg-type]
        found = [reader.read(index) for index in range(len(reader))]
        assert reader.lengths.tolist() == [len(tokens) for tokens, _ in found]
        assert reader.trained.tolist() == [trained.sum() for _, trained in found]
    return [(tokens.tolist(), trained.tolist()) for tokens, trained in found]


def encoded(manifest: Manifest, talks: Sequence[Sequence[dict[str, str]]]) -> list[object]:
    """Return (tokens, trained) of conversations as `encode_conversation` gives them."""
    tokenizer = shards.read_tokenizer(OUT, manifest)
    pairs = (encode_conversation(tokenizer, [Message(**turn) for turn in talk])  # type: ignore[arg-type]
             for talk in talks)  # fmt: skip
    return [(tokens.tolist(), trained.tolist()) for tokens, trained in pairs]


def test_conversations_come_back_with_their_masks(chat: Rows, prepared: Prepared) -> None:
    manifest = prepared(chat(), "data.val_fraction=0.2")
    found = {split: read_all(manifest, split) for split in shards.SPLITS}
    assert manifest.is_chat and manifest.documents == 200
    assert 15 < len(found["val"]) < 70
    everything = encoded(manifest, [talk(index) for index in range(200)])
    assert sorted(found["train"] + found["val"]) == sorted(everything)  # type: ignore[type-var]
    assert [one for one in everything if one in found["train"]] == found["train"]


def test_no_conversation_is_in_two_shards(chat: Rows, prepared: Prepared) -> None:
    manifest = prepared(chat(), "data.val_fraction=0", "data.shard_tokens=500")
    records = manifest.shards("train")
    assert len(records) > 20
    assert read_all(manifest, "train") == encoded(manifest, [talk(index) for index in range(200)])
    longest = max(len(tokens) for tokens, _ in read_all(manifest, "train"))
    assert all(500 - longest < record.tokens <= 500 for record in records[:-1])
    for record in records:
        starts = np.fromfile(OUT / record.beside(shards.STARTS), dtype="<u8")
        assert starts[0] == 0 and len(starts) == record.conversations


def test_a_conversation_longer_than_a_shard_gets_one_by_itself(
    chat: Rows, prepared: Prepared
) -> None:
    manifest = prepared(chat(20), "data.val_fraction=0", "data.shard_tokens=40")
    assert [shard.conversations for shard in manifest.shards("train")] == [1] * 20
    assert read_all(manifest, "train") == encoded(manifest, [talk(index) for index in range(20)])


def test_few_conversations_hold_out_the_last(chat: Rows, prepared: Prepared) -> None:
    manifest = prepared(chat(20))
    assert [len(read_all(manifest, split)) for split in shards.SPLITS] == [18, 2]
    assert read_all(manifest, "val") == encoded(manifest, [talk(18), talk(19)])
    manifest = prepared(chat(2), force=True)
    assert [len(read_all(manifest, split)) for split in shards.SPLITS] == [1, 1]


def test_few_conversations_in_many_files_hold_out_the_last_of_all(
    chat: Rows, prepared: Prepared
) -> None:
    for index in range(10):
        chat(1 + index, f"talks/{index}.jsonl")
    manifest = prepared(str(Path(chat(1, "talks/9.jsonl")).parent), "data.val_fraction=0.1")
    assert (manifest.documents, len(manifest.units)) == (46, 1)
    assert len(read_all(manifest, "val")) == 5


@pytest.mark.parametrize("fill", [b"\xff", b"\0"])
def test_a_mask_of_one_kind_is_refused(chat: Rows, prepared: Prepared, fill: bytes) -> None:
    manifest = prepared(chat(20))
    mask = OUT / manifest.shards("train")[0].beside(shards.MASK)
    mask.write_bytes(fill * len(mask.read_bytes()))
    with pytest.raises(DataError, match="does not mark the") as caught:
        ConversationReader(OUT, manifest, "train")
    assert caught.value.exit_code == 3
    units = [unit.model_copy(update={"shards": [
        shard.model_copy(update={"trained": shard.tokens if fill == b"\xff" else 0})
        for shard in unit.shards]}) for unit in manifest.units]  # fmt: skip
    which = "all" if fill == b"\xff" else "none"
    with pytest.raises(DataError, match=f"{which} of the .* train tokens are trained on"):
        ConversationReader(OUT, manifest.model_copy(update={"units": units}), "train")


def test_starts_that_are_none_are_refused(chat: Rows, prepared: Prepared) -> None:
    manifest = prepared(chat(20))
    path = OUT / manifest.shards("train")[0].beside(shards.STARTS)
    whole = path.read_bytes()
    for damage in (whole[:-8], whole[:-1], whole[8:] + whole[:8], bytes(len(whole))):
        path.write_bytes(damage)
        with pytest.raises(DataError, match="starts"):
            ConversationReader(OUT, manifest, "train")


def test_text_has_no_conversations(write: Write, prepared: Prepared) -> None:
    manifest = prepared(str(write("a.txt", "some text")), "data.val_fraction=0")
    assert not manifest.is_chat
    with pytest.raises(DataError, match="holds text, not conversations"):
        ConversationReader(OUT, manifest, "train")


def test_the_manifest_of_text_says_nothing_of_conversations(
    write: Write, prepared: Prepared
) -> None:
    prepared(str(write("a.txt", "some text")), "data.val_fraction=0")
    text = (OUT / shards.MANIFEST).read_text()
    for word in ("conversation", "trained", "mask", "skipped", "bad_rows"):
        assert word not in text


def test_the_bytes_do_not_depend_on_workers(chat: Rows, prepared: Prepared) -> None:
    source = chat(3000)
    for workers in (1, 3):
        prepared(source, "tokenizer.name=gpt2", out=Path(f"data/{workers}"), workers=workers)
    assert content(Path("data/1")) == content(Path("data/3"))


def test_the_fingerprint_covers_the_masks(chat: Rows, prepared: Prepared) -> None:
    manifest = prepared(chat(20))
    shard = manifest.units[0].shards[0].model_copy(update={"mask_sha256": "0" * 64})
    unit = manifest.units[0].model_copy(update={"shards": [shard]})
    assert manifest.model_copy(update={"units": [unit]}).fingerprint != manifest.fingerprint


def test_force_removes_the_files_beside_the_shards(
    chat: Rows, write: Write, prepared: Prepared
) -> None:
    prepared(chat(20))
    assert list(OUT.glob("*.mask")) and list(OUT.glob("*.starts"))
    prepared(str(write("a.txt", "some text " * 50)), force=True)
    assert not list(OUT.glob("*.mask")) and not list(OUT.glob("*.starts"))
