"""The four commands end to end: what they print, write and return."""

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptcli.checkpoint import load_checkpoint, load_model, save_checkpoint
from gptcli.data.shards import read_manifest, write_manifest


def test_prepare_returns_the_object_of_the_contract(gpt: Any, corpus: Path) -> None:
    done = gpt("prepare", str(corpus), "-s", "tokenizer.name=bytes", "--json")
    assert done.code == 0
    found = done.json
    assert list(found) == ["dir", "tokenizer", "vocab_size", "documents", "tokens", "bytes",
                           "shards", "seconds"]  # fmt: skip
    n = corpus.stat().st_size
    assert found["dir"] == str(Path("data/corpus")) and found["tokenizer"] == "bytes"
    assert found["documents"] == 1 and found["vocab_size"] == 257 and found["shards"] == 2
    assert found["tokens"]["train"] + found["tokens"]["val"] == n + 1
    assert found["bytes"]["train"] + found["bytes"]["val"] == n


def test_prepare_names_the_next_command(gpt: Any, corpus: Path) -> None:
    done = gpt("prepare", str(corpus))
    assert "next: gpt train -s data.dir=data/corpus" in done.err
    settings = f"data: {{source: {corpus}, dir: data/other}}\nmodel: {{block_size: 64}}\n"
    Path("run.yaml").write_text(settings)
    assert "next: gpt train -c run.yaml" in gpt("prepare", "-c", "run.yaml").err


def test_prepare_dry_run_writes_nothing(gpt: Any, corpus: Path) -> None:
    done = gpt("prepare", str(corpus), "--dry-run", "--json")
    assert done.code == 0 and done.json["source_bytes"] == corpus.stat().st_size
    assert not Path("data").exists()


def test_prepare_lists_the_presets(gpt: Any) -> None:
    done = gpt("prepare", "--list")
    assert done.code == 0 and "stdlib" in done.out and "openwebtext" in done.out


def test_train_returns_the_object_of_the_contract(gpt: Any, tiny_set: list[str]) -> None:
    found = gpt("train", *tiny_set, "--json").json
    contract = ["run_dir", "step", "tokens", "train_loss", "val_loss", "best_val_loss",
                "tokens_per_second", "seconds", "checkpoint"]  # fmt: skip
    assert list(found) == [*contract, "val_tokens", "val_split_tokens", "best_epoch_loss"]
    assert found["val_tokens"] == 64 < found["val_split_tokens"]
    assert found["best_epoch_loss"] is None
    assert found["step"] == 6 and found["tokens"] == 6 * 64
    assert found["run_dir"] == str(Path("runs/tiny"))
    assert found["checkpoint"] == str(Path("runs/tiny/best.pt"))
    assert found["best_val_loss"] <= found["val_loss"]


def test_train_logs_plain_lines_off_a_terminal(gpt: Any, tiny_set: list[str]) -> None:
    done = gpt("train", *tiny_set)
    assert "\x1b" not in done.err and "\r" not in done.err
    assert "step 6  loss " in done.err and "eval at step 6  val_loss " in done.err
    assert "sample at step 6" in done.err
    assert "next: gpt generate --checkpoint runs/tiny/best.pt" in done.err.replace("\\", "/")
    log = Path("runs/tiny/log.txt").read_text(encoding="utf-8")
    assert "eval at step 6" in log


def test_train_prepares_local_text_that_is_not_prepared(
    gpt: Any, tiny_set: list[str], corpus: Path
) -> None:
    words = [word for word in tiny_set if not word.startswith("data.dir")]
    words = [*words[: words.index("-s")], *" -s ".join(w for w in words if w != "-s").split(" ")]
    done = gpt("train", "-s", *words, "-s", f"data.source={corpus}", "-s", "tokenizer.name=char")
    assert done.code == 0, done.err
    assert "is not there yet: preparing" in done.err
    assert (
        json.loads(Path("data/corpus/manifest.json").read_text())["recipe"]["tokenizer"]["name"]
        == "char"
    )


def test_train_dry_run_trains_nothing(gpt: Any, tiny_set: list[str]) -> None:
    found = gpt("train", *tiny_set, "--dry-run", "--json").json
    assert found["max_steps"] == 6 and found["tokens_per_step"] == 64
    assert not Path("runs").exists()
    least = [f"-s{key}=1" for key in ("model.block_size", "train.micro_batch_size")]
    said = gpt("train", *tiny_set, *least, "-s", "train.tokens_per_step=1", "--dry-run").out
    assert "6 of 1 token (rows:" in said


def test_the_run_folder_is_complete(run: Path) -> None:
    names = {path.name for path in run.iterdir()} - {".lock"}
    assert names == {"config.yaml", "run.json", "status.json", "metrics.jsonl", "log.txt",
                     "samples.jsonl", "loss.pdf", "checkpoints", "best.pt", "last.pt"}  # fmt: skip


def test_a_run_can_be_repeated_from_its_own_configuration(gpt: Any, run: Path) -> None:
    done = gpt("train", "-c", str(run / "config.yaml"), "-s", "run_dir=runs/again")
    assert done.code == 0, done.err
    one, two = (load_checkpoint(Path(folder) / "last.pt") for folder in (run, "runs/again"))
    assert all(torch.equal(one.model[name], two.model[name]) for name in one.model)


def test_without_a_name_a_run_is_called_after_its_file_or_data(
    gpt: Any, tiny_set: list[str]
) -> None:
    words = [word for word in tiny_set if word != "name=tiny"]
    words = [w for i, w in enumerate(words) if w != "-s" or words[i + 1 : i + 2] != ["-s"]]
    words = words[:-1] if words[-1] == "-s" else words
    Path("my-run.yaml").write_text("seed: 3\n")
    assert gpt("train", "-c", "my-run.yaml", *words, "-s", "train.max_steps=1").code == 0
    assert Path("runs/my-run/best.pt").exists()
    assert gpt("train", *words, "-s", "train.max_steps=1").code == 0
    assert Path("runs/tiny/best.pt").exists()
    for name in ("my-run", "tiny"):
        assert "name" not in gpt("runs", "show", name, "--json").json["settings"]


def test_eval_returns_the_object_of_the_contract(gpt: Any, run: Path) -> None:
    found = gpt("eval", "--checkpoint", str(run / "best.pt"), "--json").json
    assert list(found) == ["checkpoint", "step", "split", "tokens", "bytes", "context", "stride",
                           "loss", "perplexity", "bits_per_byte", "seconds",
                           "standard_error", "words", "word_perplexity", "data"]  # fmt: skip
    manifest = json.loads(Path("data/tiny/manifest.json").read_text())
    assert found["split"] == "val" and found["stride"] == found["context"] == 16
    assert found["tokens"] == manifest["tokens"]["val"] - 1 == found["bytes"]
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2))


def test_eval_of_a_text_equals_a_plain_loop(gpt: Any, run: Path) -> None:
    text = "The cat sat on a mat and the big red dog ran."
    Path("text.txt").write_text(text)
    found = gpt("eval", "--text", "text.txt", "--stride", "4", "--json").json
    model = load_model(run / "best.pt", torch.device("cpu")).model
    ids, total = list(text.encode()), 0.0
    for target in range(1, len(ids)):
        start = 0 if target <= 16 else math.ceil((target - 16) / 4) * 4
        with torch.no_grad():
            logits = model(torch.tensor([ids[start:target]])).logits[0, -1]
        total -= float(logits.log_softmax(0)[ids[target]])
    assert found["tokens"] == found["bytes"] == len(ids) - 1
    assert found["loss"] == pytest.approx(total / (len(ids) - 1), rel=1e-5)
    assert found["split"] == "text"


def test_eval_prints_loss_perplexity_and_bits(gpt: Any, run: Path) -> None:
    done = gpt("eval", "--max-tokens", "64", "--yardsticks")
    assert done.code == 0, done.err
    for part in ("nats per token", "perplexity", "bits per byte", "gzip -9", "xz -9e", "on val"):
        assert part in done.out
    assert "GPT-2" not in done.out  # published figures are of another text


@pytest.fixture
def two_runs(gpt: Any, run: Path, tiny_set: list[str]) -> tuple[str, str]:
    """Two runs on the same text, the second with a tokenizer of its own and a shorter context."""
    other = ["-s", "name=other", "-s", "data.dir=data/other", "-s", "tokenizer.name=char"]
    other += ["-s", "data.source=corpus.txt", "-s", "model.block_size=8"]
    assert gpt("train", *tiny_set, *other).code == 0
    return "tiny", "other"


def test_eval_compares_networks_with_different_tokenizers(
    gpt: Any, two_runs: tuple[str, str]
) -> None:
    text = "The cat sat on a mat and the big red dog ran.\n" * 60
    Path("text.txt").write_text(text)
    found = gpt("eval", *two_runs, "--text", "text.txt", "--json").json
    one, two = found["results"]
    assert one["tokens"] == two["tokens"] == len(text) - 1
    assert (one["context"], two["context"]) == (16, 8)
    (difference,) = found["differences"]
    expected = one["bits_per_byte"] - two["bits_per_byte"]
    assert difference["bits_per_byte"] == pytest.approx(expected)
    assert difference["low"] < expected < difference["high"]
    done = gpt("eval", *two_runs, "--text", "text.txt")
    assert "95% interval" in done.out and "nats/token" in done.out
    Path("text.txt").write_text("The cat.")
    done = gpt("eval", *two_runs, "--text", "text.txt")
    assert "too short to tell" in done.out
    found = gpt("eval", *two_runs, "--text", "text.txt", "--json").json
    assert found["differences"][0]["low"] is None


def test_eval_compares_on_a_split_with_one_tokenizer_only(
    gpt: Any, two_runs: tuple[str, str], run: Path
) -> None:
    done = gpt("eval", *two_runs)
    assert done.code == 3 and "another tokenizer" in done.err and "--text" in done.err
    found = gpt("eval", str(run / "best.pt"), str(run / "last.pt"), "tiny", "--json").json
    assert len(found["results"]) == 3 and len(found["differences"]) == 2
    assert found["differences"][1]["bits_per_byte"] == 0


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--max-tokens", "32", "--text", "text.txt"], "whole of a text"),
        (["--stride", "12", "--text", "text.txt"], "the context is 8"),
        (["--checkpoint", "tiny"], "given twice"),
    ],
)
def test_eval_refuses_comparisons_that_would_not_be_fair(
    gpt: Any, two_runs: tuple[str, str], arguments: list[str], part: str
) -> None:
    Path("text.txt").write_text("The cat sat on a mat.")
    done = gpt("eval", *two_runs, *arguments)
    assert done.code == 2 and part in done.err


def test_eval_on_openwebtext_names_the_published_losses(gpt: Any, run: Path) -> None:
    Path("text.txt").write_text("The cat sat on a mat.\n" * 200)
    assert gpt("prepare", "text.txt", "--out", "data/owt", "-s", "tokenizer.name=gpt2").code == 0
    manifest = read_manifest(Path("data/owt"))
    recipe = manifest.recipe.model_copy(update={"source": "openwebtext"})
    write_manifest(Path("data/owt"), manifest.model_copy(update={"recipe": recipe}))
    words = ["-s", "train.max_steps=1", "-s", "data.dir=data/owt", "-s", "name=owt"]
    shape = ["-s", "model.n_layer=1", "-s", "model.n_head=1", "-s", "model.n_embd=8"]
    assert gpt("train", *words, *shape, "-s", "model.block_size=16").code == 0
    assert gpt("eval", "owt", "--json").json["references"]["124M"] == 3.12
    assert "124M 3.12" in gpt("eval", "owt").out


def test_eval_works_without_the_data_of_the_run(gpt: Any, run: Path) -> None:
    Path("text.txt").write_text("The cat sat.")
    Path("data").rename("moved")
    assert gpt("eval", "--text", "text.txt").code == 0
    assert gpt("eval").code == 3
    assert gpt("eval", "--data", "moved/tiny").code == 0


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


def test_eval_of_a_network_that_is_broken_is_an_error(gpt: Any, run: Path) -> None:
    checkpoint = load_checkpoint(run / "best.pt")
    checkpoint.model["ln_f.weight"][0] = float("nan")
    save_checkpoint(Path("nan.pt"), checkpoint)
    done = gpt("eval", "nan.pt", "--json")
    assert done.code == 4 and "not finite" in done.json["error"]


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["x" * 300], 4, "no such checkpoint"),
        (["--text", "x" * 300], 3, "too long"),
        (["--text", "."], 3, ".: is a folder, not a text file"),
        (["--yardsticks", "--split", "train"], 2, "validation text"),
        (["--tasks", "x", "--text", "corpus.txt"], 2, "bring their own"),
        (["--limit", "3"], 2, "--tasks"),
    ],
)
def test_what_eval_refuses(gpt: Any, run: Path, arguments: list[str], code: int, part: str) -> None:
    done = gpt("eval", *arguments)
    assert done.code == code and part in done.err and len(done.err_lines) <= 3, done.err


def test_eval_reads_text_that_is_not_utf8_if_told_to(gpt: Any, run: Path) -> None:
    Path("bad.txt").write_bytes(b"The cat sat on \xff a mat.")
    refused = gpt("eval", "--text", "bad.txt")
    assert refused.code == 3 and "data.encoding_errors=replace" in refused.err
    done = gpt("eval", "--text", "bad.txt", "-s", "data.encoding_errors=replace", "--json")
    assert done.code == 0 and done.json["bytes"] == len("The cat sat on \ufffd a mat.".encode()) - 1


def test_figures_that_are_not_there_are_unknown(gpt: Any, run: Path) -> None:
    Path("short.txt").write_text("ab")
    done = gpt("eval", "--text", "short.txt")
    assert done.code == 0 and "standard error unknown" in done.out
    assert "unknown per word" in done.out and "nan" not in done.out


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
def test_weights_in_few_bits_draw_text_too(gpt: Any, run: Path, extra: tuple[str, ...]) -> None:
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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_stdout_that_is_full_or_closed(run: Path) -> None:
    gpt = f"{sys.executable} -m gptcli"
    full = subprocess.run(
        ["bash", "-c", f"{gpt} eval --json > /dev/full"], capture_output=True, text=True
    )
    assert full.returncode == 5 and len(full.stderr.splitlines()) <= 3, full.stderr
    assert "stdout: No space left on device" in full.stderr
    closed = subprocess.run(["bash", "-c", f"{gpt} eval >&-"], capture_output=True, text=True)
    assert closed.returncode == 5 and "stdout: Bad file descriptor" in closed.stderr


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_saves_and_names_the_command_that_goes_on(
    gpt: Any, tiny_set: list[str], sent: signal.Signals, code: int
) -> None:
    words = [*tiny_set, "-s", "train.max_steps=1000000", "-s", "train.log_every=1000",
             "-s", "train.eval_every=1000000"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "gptcli", "train", *words],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "COLUMNS": "300"},
    )  # fmt: skip
    metrics = Path("runs/tiny/metrics.jsonl")
    deadline = time.monotonic() + 100
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "resume with: gpt train" in err and "--resume" in err and "Traceback" not in err
    status = json.loads(Path("runs/tiny/status.json").read_text())
    assert status["state"] == "stopped" and status["exit_code"] == code
    step = load_checkpoint(Path("runs/tiny/last.pt")).state["step"]
    assert step == status["step"] > 0
    words[words.index("train.max_steps=1000000")] = f"train.max_steps={step + 5}"
    assert gpt("train", *words, "--resume").code == 0


def test_gpt2_tokens_of_the_standard_library(gpt: Any) -> None:
    found = gpt("prepare", "stdlib", "--json").json
    assert found["tokenizer"] == "gpt2" and found["vocab_size"] == 50257
    share = found["bytes"]["val"] / (found["bytes"]["train"] + found["bytes"]["val"])
    assert 0.08 < share < 0.105  # a tenth of the files; their text is a little less
    shard = np.fromfile("data/stdlib/train_000000_000.bin", dtype="<i4", count=3)
    assert shard.tolist() == [20240520, 1, found["tokens"]["train"]]


def test_prepare_proposes_a_network_for_a_small_text(gpt: Any, corpus: Path) -> None:
    [line] = [line for line in gpt("prepare", str(corpus)).err_lines if line.startswith("next: ")]
    assert "data.dir=data/corpus" in line and "model.n_embd=384" in line
    planned = gpt(*shlex.split(line.removeprefix("next: gpt ")), "--dry-run", "--json")
    assert planned.code == 0 and planned.json["parameters"] < 40e6
    chosen = gpt("prepare", str(corpus), "-s", "model.n_layer=3").err
    assert "model.n_layer=3" in chosen and "n_embd" not in chosen


def test_eval_compiles_where_it_is_asked_to(
    gpt: Any, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = ("-s", "device=cpu", "--json")
    plain = gpt("eval", str(run), *sets).json["loss"]
    compiled = []

    def compile_(function: Any, **options: Any) -> Any:
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    assert gpt("eval", str(run), *sets, "-s", "compile=true").json["loss"] == plain
    assert len(compiled) == 1
    said = gpt("generate", "--checkpoint", str(run), "a", *sets[:2], "-s", "compile=true")
    assert said.code == 0 and "note: compile applies to train and eval" in said.err

    def broken(*arguments: Any, **more: Any) -> Any:
        raise RuntimeError("InvalidCxxCompiler: no working C++ compiler\nmore")

    monkeypatch.setattr(torch, "compile", lambda *arguments, **more: broken)
    refused = gpt("eval", str(run), *sets[:2], "-s", "compile=true")
    assert refused.code == 2 and "compile: not possible here (InvalidCxxCompiler" in refused.err


def test_a_run_finds_its_data_from_any_folder(
    gpt: Any, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, file = Path.cwd(), run / "config.yaml"
    loss = gpt("eval", str(run), "-s", "device=cpu", "--json").json["loss"]
    for folder, name in ((here / run, "best.pt"), (here.parent, str(here / run))):
        monkeypatch.chdir(folder)
        done = gpt("eval", "--checkpoint", name, "-s", "device=cpu", "--json")
        assert done.code == 0, done.err
        assert done.json["loss"] == loss
    refused = gpt("train", "-c", str(here / file), "--resume")
    assert refused.code == 2 and f"cd {here}" in refused.err, refused.err
    Path("copy").mkdir(exist_ok=True)
    shutil.copy(here / run / "best.pt", "copy")
    lost = gpt("eval", "copy/best.pt")
    assert lost.code == 3 and "--data DIR" in lost.err, lost.err


def test_rows_that_no_token_has_take_no_probability(gpt: Any, tiny_set: list[str]) -> None:
    sets = ("-s", "model.vocab_size=320", "-s", "name=padded")
    assert gpt("train", *tiny_set, *sets).code == 0
    file, words = Path("runs/padded/best.pt"), ("-s", "device=cpu", "--json")
    before = gpt("eval", str(file), *words).json["loss"]
    lines = Path("runs/padded/metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    checkpoint = load_checkpoint(file)
    start = load_checkpoint(Path("runs/padded/checkpoints/step-00000006.pt"))
    assert not start.optimizer["wte.weight"]["exp_avg_sq"][257:].any(), "and no gradient"
    checkpoint.model["wte.weight"][257:] *= 100
    save_checkpoint(file, checkpoint)
    assert gpt("eval", str(file), *words).json["loss"] == before
    assert before == pytest.approx(
        [row["val_loss"] for row in logged if "val_loss" in row][-1], 1e-2
    )
    assert load_model(file, torch.device("cpu")).model(torch.tensor([[1]])).logits.shape[-1] == 257
