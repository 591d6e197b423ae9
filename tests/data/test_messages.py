"""Rows that hold conversations: their forms, how they are found, and which are refused."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptcli.config.schema import DataConfig
from gptcli.data.conversations import ConversationReader, skipped_rows
from gptcli.data.messages import BadRow, conversation_of
from gptcli.data.shards import Manifest, read_tokenizer
from gptcli.data.sources import find_source
from gptcli.errors import ConfigError, DataError
from support.folders import Prepared, Refusal, Write

OUT = Path("data/out")
SAID = [("user", "Hi"), ("assistant", "Yes.")]
ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [{"role": "user", "content": "Hi"},
                              {"role": "assistant", "content": " Yes.\n"}]},
    "conversations": {"conversations": [{"from": "human", "value": "Hi"},
                                        {"from": "gpt", "value": "Yes."}], "id": 7},
    "prompt": {"prompt": "Hi", "completion": " Yes."},
    "instruction": {"instruction": "Hi", "input": "", "output": "Yes."},
}  # fmt: skip
BAD: dict[str, tuple[list[tuple[object, object]], str]] = {
    "unknown role": ([("user", "a"), ("tool", "b"), ("assistant", "c")], "'tool'"),
    "unknown role ": ([("user", "a"), (None, "b")], "None"),
    "second system message": (
        [("system", "a"), ("system", "b"), ("user", "c"), ("assistant", "d")], "turn 2"),
    "second system message ": ([("user", "c"), ("system", "b"), ("assistant", "d")], "turn 2"),
    "empty turn": ([("user", "a"), ("assistant", " \n\u3000")], "turn 2"),
    "not text": ([("user", [{"type": "text"}]), ("assistant", "b")], "turn 1"),
    "nothing to train on": ([("user", "a"), ("user", "b")], "no turn is the assistant's"),
    "nothing to train on ": ([], "no turn is the assistant's"),
}  # fmt: skip


def as_messages(turns: list[tuple[object, object]]) -> dict[str, Any]:
    """Return a row of messages."""
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def lines(*rows: object) -> str:
    """Return rows as lines of JSON."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def said(manifest: Manifest) -> list[str]:
    """Return each conversation of the training split as text, its turns separated by bars."""
    tokenizer = read_tokenizer(OUT, manifest)
    with ConversationReader(OUT, manifest, "train") as reader:
        talks = [reader.read(index)[0].tolist() for index in range(len(reader))]
    assert tokenizer.chat is not None
    bars = dict.fromkeys(tokenizer.chat, b"|")
    raws = (b"".join(bars.get(id) or tokenizer.token_bytes(id) for id in talk) for talk in talks)
    return [raw.decode() for raw in raws]


@pytest.mark.parametrize("form", ROWS)
def test_each_form_of_row_is_found_by_its_fields(
    form: str, write: Write, prepared: Prepared
) -> None:
    path = write("rows.jsonl", lines(*[ROWS[form]] * 3))
    manifest = prepared(str(path), "data.val_fraction=0")
    assert manifest.recipe.conversation_format == form
    assert said(manifest) == ["|user\nHi|\n|assistant\nYes.|\n"] * 3


@pytest.mark.parametrize("form", ROWS)
def test_parquet_has_the_same_conversations(form: str, write: Write, prepared: Prepared) -> None:
    write("rows.parquet", b"")
    pq.write_table(pa.Table.from_pylist([ROWS[form]] * 3), "rows.parquet")
    manifest = prepared("rows.parquet", "data.val_fraction=0")
    assert manifest.recipe.conversation_format == form
    assert said(manifest) == ["|user\nHi|\n|assistant\nYes.|\n"] * 3


def test_csv_and_gzip_have_them_too(write: Write, prepared: Prepared) -> None:
    write("a.csv.gz", 'id,completion,prompt\n1," Yes.","Hi, ""you"""\n')
    assert said(prepared("a.csv.gz", "data.val_fraction=0")) == [
        '|user\nHi, "you"|\n|assistant\nYes.|\n'
    ]


def test_an_input_follows_the_instruction_and_a_system_field_comes_first() -> None:
    row = {"instruction": "Add.\n", "input": "1, 2", "output": "3", "system": "Count."}
    assert conversation_of(row, "instruction") == [
        ("system", "Count."), ("user", "Add.\n\n1, 2"), ("assistant", "3"),
    ]  # fmt: skip
    assert conversation_of(ROWS["prompt"] | {"system": " "}, "prompt") == SAID
    assert conversation_of(ROWS["prompt"] | {"system": None}, "prompt") == SAID


@pytest.mark.parametrize("reason", BAD)
def test_a_row_that_is_no_conversation_says_why(reason: str) -> None:
    turns, detail = BAD[reason]
    assert conversation_of(as_messages(turns), "messages") in [
        BadRow(reason.strip(), detail), BadRow(reason.strip(), f"the content of {detail}"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "row", [{"messages": None}, {"messages": "hi"}, {"messages": [3]}, {"messages": [[]]},
            {"messages": [{"role": {}, "content": "x"}]}, {"messages": {"role": "user"}}]
)  # fmt: skip
def test_a_row_of_another_shape_is_bad_not_a_crash(row: dict[str, Any]) -> None:
    assert isinstance(conversation_of(row, "messages"), BadRow)


def test_a_bad_row_is_refused_by_its_line(write: Write, refusal: Refusal) -> None:
    write("a.jsonl", lines(ROWS["messages"], as_messages(BAD["unknown role"][0])))
    error = refusal("a.jsonl")
    assert error.message == "a.jsonl: line 2: unknown role ('tool')"
    assert "data.bad_rows=skip" in (error.hint or "")
    assert not OUT.exists()


def test_bad_rows_are_skipped_counted_and_named(write: Write, prepared: Prepared) -> None:
    bad = [as_messages(turns) for turns, _ in BAD.values()]
    write("a.jsonl", lines(*bad, *[ROWS["messages"]] * 3, bad[0]))
    manifest = prepared("a.jsonl", "data.val_fraction=0", "data.bad_rows=skip")
    assert manifest.documents == 3
    found = {reason: each.model_dump() for reason, each in skipped_rows(manifest.units).items()}
    assert found == {
        "unknown role": {"rows": 3, "first": "a.jsonl: line 1"},
        "second system message": {"rows": 2, "first": "a.jsonl: line 3"},
        "empty turn": {"rows": 1, "first": "a.jsonl: line 5"},
        "not text": {"rows": 1, "first": "a.jsonl: line 6"},
        "nothing to train on": {"rows": 2, "first": "a.jsonl: line 7"},
    }
    assert len(said(manifest)) == 3


def test_rows_that_are_all_bad_leave_nothing(write: Write, refusal: Refusal) -> None:
    write("a.jsonl", lines(*[as_messages(BAD["empty turn"][0])] * 2))
    assert "no conversation in it" in refusal("a.jsonl", "data.bad_rows=skip").message
    assert not OUT.exists()


def test_text_wins_where_a_row_has_both(write: Write, prepared: Prepared) -> None:
    write("a.jsonl", lines(*[{"text": "plain", **ROWS["messages"]}] * 3))
    assert not prepared("a.jsonl", "data.val_fraction=0").is_chat
    manifest = prepared("a.jsonl", "data.val_fraction=0", "data.format=messages", force=True)
    assert manifest.is_chat


def test_a_field_that_is_named_is_text(write: Write, prepared: Prepared, refusal: Refusal) -> None:
    write("a.jsonl", lines(*[ROWS["prompt"]] * 3))
    assert not prepared("a.jsonl", "data.val_fraction=0", "data.text_field=prompt").is_chat
    error = refusal("a.jsonl", "data.format=text", out=Path("other"))
    assert error.hint == "these are conversations: -s data.format=prompt"


def test_a_named_form_needs_its_fields(write: Write, refusal: Refusal) -> None:
    write("a.jsonl", lines(ROWS["prompt"]))
    error = refusal("a.jsonl", "data.format=messages")
    assert "no field 'messages'; the fields are: prompt, completion" in error.message
    pq.write_table(pa.Table.from_pylist([ROWS["prompt"]]), "a.parquet")
    assert "no field 'output'" in refusal("a.parquet", "data.format=instruction").message.replace(
        "'instruction'", "'output'"
    )


def test_half_a_surrogate_pair_is_refused_or_replaced(
    write: Write, prepared: Prepared, refusal: Refusal
) -> None:
    row = as_messages([("user", "Hi"), ("assistant", "a\ud800b")])
    write("a.jsonl", lines(row, row))
    assert "a.jsonl: line 1: unpaired surrogate at character 1" in refusal("a.jsonl").message
    manifest = prepared("a.jsonl", "data.val_fraction=0", "data.encoding_errors=replace")
    assert said(manifest) == ["|user\nHi|\n|assistant\na\ufffdb|\n"] * 2


def test_a_folder_of_conversations_has_no_text(write: Write, refusal: Refusal) -> None:
    write("talks/a.jsonl", lines(ROWS["messages"]))
    write("talks/README.md", "about them")
    error = refusal("talks")
    assert "has conversations and text (talks/README.md)" in error.message
    assert "*.jsonl" in (error.hint or "")
    (Path("talks") / "a.jsonl").unlink()
    assert "has text only (talks/README.md)" in refusal("talks", "data.format=messages").message


def test_two_sources_hold_the_same(write: Write) -> None:
    write("a.jsonl", lines(ROWS["messages"]))
    write("b.txt", "text")
    source = {"train": "a.jsonl", "val": "b.txt"}
    with pytest.raises(ConfigError, match="train is messages, but val is text"):
        find_source(DataConfig.model_validate({"source": source}), 1)
    same = {"train": "a.jsonl", "val": "a.jsonl"}
    found = find_source(DataConfig.model_validate({"source": same}), 1)
    assert found.format == "messages"
    assert [unit.held_out for unit in found.units] == ["train", "val"]


def test_a_changed_form_is_other_data(write: Write, prepared: Prepared, refusal: Refusal) -> None:
    row = ROWS["messages"] | ROWS["prompt"]
    write("a.jsonl", lines(*[row] * 3))
    prepared("a.jsonl", "data.val_fraction=0")
    error = refusal("a.jsonl", "data.val_fraction=0", "data.format=prompt", code=2)
    assert "differs in: conversation_format" in error.message
    assert not error.message.endswith("tokenizer")


def test_a_base_models_tokenizer_gets_chat_tokens(
    write: Write, prepared: Prepared, tmp_path: Path
) -> None:
    write("book.txt", "assistant user system\n" * 40)
    base = prepared("book.txt", "tokenizer.name=char", out=Path("data/base"))
    write("a.jsonl", lines(*[as_messages([("user", "is a"), ("assistant", "a is")])] * 3))
    sets = ("data.val_fraction=0", "tokenizer.path=data/base")
    manifest = prepared("a.jsonl", *sets)
    assert manifest.tokenizer.vocab_size == base.tokenizer.vocab_size + 2
    assert prepared("a.jsonl", *sets) == manifest


@pytest.mark.parametrize("name", ["char", "bpe"])
def test_a_learned_vocabulary_can_spell_the_roles(
    name: str, write: Write, prepared: Prepared
) -> None:
    row = as_messages([("user", "xxx"), ("assistant", "zzz")])
    write("a.jsonl", lines(*[row] * 3))
    manifest = prepared("a.jsonl", "data.val_fraction=0", f"tokenizer.name={name}")
    assert said(manifest) == ["|user\nxxx|\n|assistant\nzzz|\n"] * 3


def test_stdin_holds_conversations_where_the_form_is_named(gpt: Any, write: Write) -> None:
    rows = lines(*[ROWS["messages"]] * 20).encode()
    done = gpt("prepare", "-", "--out", "o", "-s", "data.format=messages", "-s",
               "tokenizer.name=bytes", "--json", stdin=rows)  # fmt: skip
    assert (done.code, done.json["documents"]) == (0, 20)


def test_damaged_files_are_errors_of_three_lines(write: Write, refusal: Refusal) -> None:
    write("a.jsonl", lines(ROWS["messages"]) + "{nonsense\n")
    assert refusal("a.jsonl").message.startswith("a.jsonl: line 2 is not JSON")
    write("b.csv", "prompt,completion\nonly\n")
    assert refusal("b.csv").message == "b.csv: line 2 has 1 fields, the header 2"
    write("c.parquet", b"PAR1 no")
    assert "damaged Parquet file" in refusal("c.parquet").message
    write("d.jsonl", "")
    assert isinstance(refusal("d.jsonl", "data.format=messages"), DataError)
