"""`gpt train` end to end: what it prints, writes and returns."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcli.checkpoint import load_checkpoint
from support.processes import until


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
    assert "does not exist yet: preparing" in done.err
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
    until(lambda: metrics.exists() or process.poll() is not None, 100)
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
