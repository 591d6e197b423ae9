"""What `gpt eval` says of conversations and of questions with known answers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from support.chat import parrot
from support.chats import CHATTY, prepare_chats
from support.runs import settings

HOW = [part for word in settings(*CHATTY, "model.block_size=256") for part in ("-s", word)]


@pytest.fixture
def chat_run(gpt: Any) -> str:
    """A tiny run on conversations."""
    prepare_chats()
    done = gpt("train", *HOW, "-s", "train.eval_tokens=1000000")
    assert done.code == 0, done.err
    return "runs/tiny"


def test_the_loss_of_a_run_is_that_of_its_last_evaluation(chat_run: str, gpt: Any) -> None:
    lines = Path(chat_run, "metrics.jsonl").read_text().splitlines()
    val_loss = json.loads(lines[-1])["val_loss"]
    facts = gpt("eval", f"{chat_run}/last.pt", "--json").json
    assert facts["loss"] == pytest.approx(val_loss, rel=1e-6)
    assert facts["perplexity"] == pytest.approx(math.exp(val_loss), rel=1e-5)
    assert facts["conversations"] > 10 and facts["standard_error"] > 0
    text = gpt("eval", f"{chat_run}/last.pt").out
    assert f"trained tokens of {facts['conversations']} conversations" in text
    some = gpt("eval", chat_run, "--max-tokens", "512", "--json").json
    assert 0 < some["tokens"] < facts["tokens"]


def test_a_base_model_is_compared_on_the_same_tokens(chat_run: str, gpt: Any) -> None:
    Path("text.txt").write_text("what is abc\n" * 500)
    base = ["-s", "data.dir=data/text", "-s", "data.source=text.txt", "-s", "tokenizer.name=bytes"]
    done = gpt("train", *HOW, *base, "-s", "name=base")
    assert done.code == 0, done.err
    found = gpt("eval", "tiny", "base", "--data", "data/tiny", "--json").json
    chat, plain = found["results"]
    assert chat["tokens"] == plain["tokens"] and chat["loss"] != plain["loss"]
    [difference] = found["differences"]
    assert difference["low"] < difference["bits_per_byte"] < difference["high"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--stride", "8"], "stride: data/tiny holds conversations"),
        (["--adapt"], "adapt: data/tiny holds conversations"),
        (["--baselines"], "data/tiny holds conversations"),
        (["--questions", "x", "--split", "train"], "omit the options that name one"),
    ],
)
def test_what_only_text_has_is_refused(
    chat_run: str, gpt: Any, words: list[str], says: str
) -> None:
    done = gpt("eval", chat_run, *words)
    assert done.code == 2 and says in done.err


def write(*rows: object) -> str:
    Path("questions.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return "questions.jsonl"


def test_questions_are_counted_right_by_choice_and_by_answer(gpt: Any) -> None:
    parrot("yes", name="x")
    user = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "is it?"}]
    file = write(
        {"prompt": "is it?", "choices": ["no", "yes"], "answer": 1},
        {"messages": user, "choices": ["yes", "no"], "answer": "no"},
        {"prompt": "is it?", "answer": ["certainly", " yes\n"]},
        {"prompt": "is it?", "answer": "Yes"},
    )
    found = gpt("eval", "x", "--questions", file, "--json").json
    assert (found["choice_questions"], found["free_questions"]) == (2, 2)
    assert found["choice_accuracy"] == found["choice_accuracy_per_token"] == found["chance"] == 0.5
    assert found["exact_match"] == 0.5 and found["ended"] == 1
    text = gpt("eval", "x", "--questions", file).out
    assert "50.0% of 2 choices right" in text and "50.0% of 2 answers match exactly" in text


def test_per_token_a_long_choice_is_not_worse_for_its_length(gpt: Any) -> None:
    parrot("yes", then=ord("!"), name="x")  # each further letter costs a little
    file = write({"prompt": "?", "choices": ["q", "yes!"], "answer": "yes!"})
    found = gpt("eval", "x", "--questions", file, "--json").json
    assert found["choice_accuracy_per_token"] == 1


def test_lines_end_only_where_json_lines_do(gpt: Any) -> None:
    parrot("yes", name="x")
    row = json.dumps({"prompt": "a\u2028b\x85c", "answer": "yes"}, ensure_ascii=False)
    Path("questions.jsonl").write_text(f"{row}\r\n{row}\n", encoding="utf-8")
    done = gpt("eval", "x", "--questions", "questions.jsonl", "--json")
    assert done.json["free_questions"] == 2, done.err


def test_a_base_model_continues_the_prompt(run: Path, gpt: Any) -> None:
    file = write(
        {"prompt": "ab", "choices": ["c", "d"], "answer": 0}, {"prompt": "ab", "answer": "c"}
    )
    found = gpt("eval", "tiny", "--questions", file, "--json").json
    assert found["choice_questions"] == found["free_questions"] == 1


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "questions.jsonl:1: not JSON"),
        ([1], "questions.jsonl:1: not an object"),
        ({"answer": "x"}, "needs messages"),
        ({"prompt": " ", "answer": "x"}, "needs messages"),
        ({"messages": [{"role": "tool", "content": "x"}], "answer": "x"}, "needs messages"),
        ({"messages": [1], "answer": "x"}, "questions.jsonl:1: needs messages"),
        ({"messages": "x", "answer": "x"}, "questions.jsonl:1: needs messages"),
        ({"messages": {"role": "user"}, "answer": "x"}, "questions.jsonl:1: needs messages"),
        ({"messages": [{"role": "user"}], "answer": "x"}, "questions.jsonl:1: needs messages"),
        ({"prompt": "x", "choices": "ab", "answer": 0}, "two texts or more"),
        ({"prompt": "x", "choices": {"a": 1, "b": 2}, "answer": 0}, "two texts or more"),
        ({"prompt": "x", "choices": 5, "answer": 0}, "two texts or more"),
        ({"prompt": "x", "choices": ["a"], "answer": 0}, "two texts or more"),
        ({"prompt": "x", "choices": ["a", "b"], "answer": 2}, "answer: expected a text"),
        ({"prompt": "x", "choices": ["a", "b"], "answer": True}, "answer: expected a text"),
        ({"prompt": "x", "choices": ["a", "b"], "answer": "c"}, "'c' is not one of the choices"),
        ({"prompt": "x"}, "answer: expected a text"),
        ({"prompt": "x" * 99, "choices": ["a", "b"], "answer": 0}, "the model's context is 64"),
    ],
)
def test_a_row_that_is_no_question_is_named(gpt: Any, row: object, says: str) -> None:
    parrot("yes", name="x")
    file = write(row)
    if row == "{":
        Path(file).write_text("{\n")
    done = gpt("eval", "x", "--questions", file)
    assert done.code == 3 and says in done.err, done.err
