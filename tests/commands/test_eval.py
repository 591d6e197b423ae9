"""`gpt eval` end to end: what it prints, writes and returns."""

import hashlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcli.checkpoint import load_checkpoint, load_model, save_checkpoint
from gptcli.commands.eval import describe
from gptcli.data.shards import TokenReader, read_manifest, write_manifest
from gptcli.tokenizers import ByteTokenizer

FACTS = {
    "checkpoint": "best.pt", "step": 9, "data": "data/t", "split": "val", "tokens": 100,
    "bytes": 400, "context": 8, "stride": 8, "loss": 4.0, "standard_error": 0.1,
    "perplexity": 54.6, "word_perplexity": 99.0,
    "baselines": {
        "bits_per_byte": {"gzip": 3.0, "xz": 2.5, "xz_after_training_text": 2.0},
        "bytes": 400, "sha256": "ab", "training_bytes": 4000, "lines_in_training_text": 0.25,
        "spans_in_training_text": {13: 0.5, 50: 0.125},
    },
}  # fmt: skip


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
    done = gpt("eval", "--max-tokens", "64", "--baselines")
    assert done.code == 0, done.err
    for part in ("nats per token", "perplexity", "bits per byte", "gzip -9", "xz -9e", "on val"):
        assert part in done.out
    assert "GPT-2" not in done.out  # published figures are of another text
    assert "a token sees 8 tokens" in gpt("eval").out and "a token sees 8 tokens" in done.out


def test_baselines_are_of_the_validation_text(gpt: Any, run: Path) -> None:
    found = gpt("eval", "--baselines", "--json").json
    manifest = read_manifest(Path("data/tiny"))
    with TokenReader(Path("data/tiny"), manifest, "val") as reader:
        text = ByteTokenizer().decode_bytes(reader.read(0, len(reader)).tolist())
    beside = found["baselines"]
    assert list(beside["bits_per_byte"]) == ["gzip", "xz", "xz_after_training_text", "ngram",
                                             "ppmd", "ppmd_after_training_text"]  # fmt: skip
    assert beside["sha256"] == hashlib.sha256(text).hexdigest() and beside["bytes"] == len(text)
    assert beside["training_bytes"] == manifest.bytes.train
    shown = gpt("eval", "--baselines", "--adapt", "--stride", "8").out
    for part in (
        beside["sha256"],
        "spans of 50 tokens are in the training text",
        "  the model with --adapt\n",
    ):
        assert part in shown
    assert shown.splitlines()[-1].count("PPMd") == 2 and "--stride" not in shown


def test_a_model_that_learns_while_it_reads_is_scored_beside_the_static_one(
    gpt: Any, run: Path
) -> None:
    before = (run / "best.pt").read_bytes()
    static = gpt("eval", "--json").json
    still = gpt("eval", "--adapt", "--adapt-lr", "0", "--json").json
    assert still["adapted"] == {
        "lr": 0, "loss": still["loss"], "bits_per_byte": still["bits_per_byte"],
    }  # fmt: skip
    assert still["loss"] == pytest.approx(static["loss"], rel=1e-6)
    found = gpt("eval", "--adapt", "--json").json
    assert found["loss"] == still["loss"] and found["adapted"]["lr"] == 0.0003
    assert found["adapted"]["bits_per_byte"] < found["bits_per_byte"] - 0.05
    assert (run / "best.pt").read_bytes() == before
    assert "if it learns from each window once that is scored" in gpt("eval", "--adapt").out
    done = gpt("eval", "--adapt", "--adapt-lr", "1e30")
    assert done.code == 2 and "--adapt-lr" in done.err


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
        (["--max-tokens", "32", "--text", "text.txt"], "on a whole text"),
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
        (["--baselines", "--split", "train"], 2, "validation text"),
        (["--baselines", "--text", "corpus.txt"], 2, "validation text"),
        (["--adapt-lr", "1"], 2, "add --adapt"),
        (["--adapt", "--max-tokens", "9"], 2, "omit --max-tokens"),
        (["tiny", "tiny", "--adapt"], 2, "one checkpoint"),
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


def test_a_run_in_an_absolute_folder_finds_its_data(gpt: Any, run: Path) -> None:
    checkpoint = load_checkpoint(run / "best.pt")
    checkpoint.config["run_dir"] = str(run.resolve())
    save_checkpoint(run / "best.pt", checkpoint)
    assert gpt("eval", str(run / "best.pt")).code == 0


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


@pytest.mark.parametrize(
    ("bits_per_byte", "verdict"),
    [
        (
            3.5,
            "worse than gzip -9 (3.000), xz -9e (2.500) and xz -9e after the training text (2",
        ),
        (2.7, "better than gzip -9 (3.000); worse than xz -9e (2.500) and"),
        (2.5, "better than gzip -9 (3.000); worse than xz -9e (2.500) and"),
        (
            1.5,
            "better than gzip -9 (3.000), xz -9e (2.500) and xz -9e after the training text (2",
        ),
    ],
)
def test_the_last_line_is_about_every_baseline(bits_per_byte: float, verdict: str) -> None:
    lines = describe(FACTS | {"bits_per_byte": bits_per_byte}).splitlines()
    start = f"{bits_per_byte:.3f} bits per byte on text that the model has never seen: "
    assert lines[-1].startswith(start + verdict)
    ranked = [line.split()[0] for line in lines if line.startswith("  ")]
    assert ranked == sorted(ranked) and f"{bits_per_byte:.3f}  the model" in "\n".join(lines)
    assert any(
        "25.0% of its lines and 12.5% of its spans of 50 tokens are in" in line for line in lines
    )
