"""`gpt generate` end to end: what it prints and returns."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def test_generate_returns_the_object_of_the_contract(gpt: Any, run: Path) -> None:
    found = gpt("generate", "The cat", "--num-samples", "2", "--json").json
    assert list(found) == ["samples", "seed", "tokens_per_second", "seconds_to_first_token"]
    assert [list(sample) for sample in found["samples"]] == [
        ["text", "tokens", "finish_reason"]
    ] * 2
    assert found["seed"] == 1337
    assert all(sample["tokens"] == 8 for sample in found["samples"])
    assert found["samples"][0]["text"] != found["samples"][1]["text"]
    assert found["tokens_per_second"] > 0 and found["seconds_to_first_token"] > 0


def test_the_same_seed_gives_the_same_text(gpt: Any, run: Path) -> None:
    def text(*arguments: str) -> list[str]:
        found = gpt("generate", "--json", *arguments).json
        return [sample["text"] for sample in found["samples"]]

    assert text("--seed", "3") == text("--seed", "3") != text("--seed", "4")
    assert text("--seed", "3", "--num-samples", "3")[:1] == text("--seed", "3")


def test_a_prompt_comes_from_argument_option_or_stdin(gpt: Any, run: Path) -> None:
    command = ("generate", "--json", "--logprobs")
    outputs = [
        gpt(*command, "The cat"),
        gpt(*command, "-p", "The cat"),
        gpt(*command, stdin=b"The cat\n"),
        gpt(*command, "-s", "generate.prompt=The cat"),
    ]
    empty = [gpt(*command, stdin=b""), gpt(*command, "")]
    given = [output.json["samples"] for output in (*outputs, *empty)]
    assert given[1:4] == [given[0]] * 3 and given[4] == given[5]
    assert given[4][0]["logprobs"] != given[0][0]["logprobs"]


def test_flags_beat_set_beats_the_run(gpt: Any, run: Path) -> None:
    assert gpt("generate", "--json").json["samples"][0]["tokens"] == 8
    by_set = gpt("generate", "--json", "-s", "generate.max_new_tokens=5")
    assert by_set.json["samples"][0]["tokens"] == 5
    by_flag = gpt("generate", "--json", "-s", "generate.max_new_tokens=5", "--max-new-tokens", "3")
    assert by_flag.json["samples"][0]["tokens"] == 3


def test_text_goes_to_stdout_and_the_rest_to_stderr(gpt: Any, run: Path) -> None:
    done = gpt("generate", "The cat", "--temperature", "0")
    expected = gpt("generate", "The cat", "--temperature", "0", "--json").json["samples"][0]["text"]
    assert done.out.rstrip("\n") == "".join(c for c in expected if c == "\n" or c >= " ").rstrip(
        "\n"
    )
    assert "seed 1337" in done.err and "tokens/s" in done.err


def test_samples_are_told_one_after_the_other(gpt: Any, run: Path) -> None:
    command = ("generate", "The", "--num-samples", "3", "--raw")
    texts = [sample["text"] for sample in gpt(*command, "--json").json["samples"]]
    assert gpt(*command).out == "\n---------------\n".join(texts) + "\n"


def test_control_characters_are_stripped_unless_raw(gpt: Any, run: Path) -> None:
    command = ("generate", "The", "--max-new-tokens", "200", "--temperature", "5")
    raw, clean = gpt(*command, "--raw").out, gpt(*command).out
    assert any(c < " " and c != "\n" for c in raw)
    assert not any(c < " " and c not in "\n\t" for c in clean)


def test_log_probabilities_come_with_json(gpt: Any, run: Path) -> None:
    (sample,) = gpt("generate", "The", "--json", "--logprobs").json["samples"]
    assert len(sample["logprobs"]) == sample["tokens"] == 8
    assert all(found["logprob"] < 0 and 0 <= found["id"] < 257 for found in sample["logprobs"])
    assert gpt("generate", "--logprobs").code == 2


@pytest.mark.parametrize("extra", [("--quantize", "int8"), ("-s", "dtype=bfloat16")])
def test_weights_in_few_bits_draw_text_too(
    gpt: Any, run: Path, extra: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    done = gpt("generate", "The", "--num-samples", "2", *extra)
    assert done.code == 0 and extra[1].removeprefix("dtype=") in done.err, done.err


def test_a_conversation_keeps_what_was_said(gpt: Any, run: Path) -> None:
    command = ("generate", "--interactive", "--temperature", "0", "--raw")
    both = gpt(*command, stdin=b"The cat\n sat\n")
    assert both.code == 0, both.err
    first = gpt("generate", "The cat", "--temperature", "0", "--json").json["samples"][0]["text"]
    assert both.out.startswith(first + "\n")
    said = f"The cat{first} sat"[-8:]  # the later half of the context of 16
    second = gpt("generate", said, "--temperature", "0", "--json").json["samples"][0]["text"]
    assert both.out == f"{first}\n{second}\n"
    assert gpt(*command, stdin=b"").out == ""
    set_ = gpt(*command, "-s", "generate.prompt=The cat", stdin=b" sat\n")
    assert set_.out == both.out
    odd = gpt(*command, stdin=b"caf\xe9\nThe cat\n")
    assert odd.code in (0, 2) and "Traceback" not in odd.err
    for wrong in ("--json", "--num-samples=2"):
        assert gpt(*command, wrong, stdin=b"The\n").code == 2


def test_a_conversation_goes_on_after_a_character_it_does_not_know(
    gpt: Any, tiny_set: list[str]
) -> None:
    chars = [
        "-s",
        "data.dir=data/chars",
        "-s",
        "tokenizer.name=char",
        "-s",
        "data.source=corpus.txt",
    ]
    assert gpt("train", *tiny_set, *chars).code == 0
    done = gpt("generate", "-i", stdin="日本\nthe cat\n".encode())
    assert done.code == 0 and "日" in done.err and done.out.strip()


def test_stop_strings_end_the_text(gpt: Any, run: Path) -> None:
    whole = gpt("generate", "--temperature", "0", "--json").json["samples"][0]["text"]
    cut = gpt("generate", "--temperature", "0", "--json", "--stop", whole[2:4]).json["samples"][0]
    assert cut["text"] == whole[: whole.index(whole[2:4])] and cut["finish_reason"] == "stop"


def test_checkpoints_work_on_another_machine_offline(gpt_process: Any, run: Path) -> None:
    Path("elsewhere").mkdir()
    (run / "best.pt").rename("elsewhere/model.pt")
    Path("data").rename("gone")
    proxy = {"HTTPS_PROXY": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    done = gpt_process("generate", "--checkpoint", "elsewhere/model.pt", "The", "--json", **proxy)
    assert done.code == 0 and done.json["samples"][0]["tokens"] == 8


def test_generate_without_the_reader_ends_quietly(run: Path) -> None:
    command = f"{sys.executable} -m gptcli generate --max-new-tokens 200 </dev/null | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=120)
    assert b"Traceback" not in done.stderr and b"Error" not in done.stderr
