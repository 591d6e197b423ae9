"""What a user can get wrong: one to three lines on stderr, the contract's exit code, no trace."""

import errno
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gptcli.data.shards import read_manifest
from gptcli.errors import GptError
from support.commands import Gpt


def assert_refused(done: Any, code: int, *parts: str) -> None:
    """Check the exit code, the shape of the message, and what it must say."""
    assert done.code == code, done.err
    assert 1 <= len(done.err_lines) <= 3, done.err
    assert "Traceback" not in done.err
    assert done.out == ""
    for part in parts:
        assert part in done.err, done.err


def prepared(folder: Path) -> list[str]:
    """Return what a preparation left behind."""
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize("name", ["missing.txt", "no/such/folder", "*.nothing", "./absent"])
def test_missing_source(gpt: Any, name: str) -> None:
    assert_refused(gpt("prepare", name), 3, name)
    assert prepared(Path("data")) == []


def test_unreadable_source(gpt: Any) -> None:
    Path("bad.txt").write_bytes(b"fine so far \xff\xfe and not here")
    assert_refused(gpt("prepare", "bad.txt"), 3, "bad.txt: not UTF-8 at byte 12", "hint")
    assert prepared(Path("data")) == []


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf"])
def test_empty_corpus(gpt: Any, content: bytes) -> None:
    Path("empty.txt").write_bytes(content)
    assert_refused(gpt("prepare", "empty.txt"), 3, "empty.txt: no text in it")
    assert prepared(Path("data")) == []


def test_wrong_text_field(gpt: Any) -> None:
    Path("rows.jsonl").write_text(json.dumps({"content": "x", "url": "y"}) + "\n")
    assert_refused(gpt("prepare", "rows.jsonl"), 3, "no field 'text'", "content, url")
    Path("rows.csv").write_text("title,body\na,b\n")
    assert_refused(gpt("prepare", "rows.csv"), 3, "no field 'text'", "title, body")


def test_unknown_preset(gpt: Any) -> None:
    assert_refused(gpt("prepare", "opnwebtext"), 2, "opnwebtext", "did you mean 'openwebtext'?")
    assert_refused(gpt("prepare", "qqq"), 2, "qqq", "presets: ")


def test_no_source(gpt: Any) -> None:
    assert_refused(gpt("prepare"), 2, "no dataset named")
    assert_refused(gpt("train"), 2, "neither data.source nor data.dir is set")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model:\n  n_heads: 3\n", ("run.yaml:2:3", "model.n_heads", "model.n_head", "n_heads: 3")),
        ("seed: 1\nseed: 2\n", ("run.yaml:2:1", "'seed' is already set on line 1")),
        ("model:\n  n_layer: twelve\n", ("run.yaml:2:3", "a whole number", "twelve")),
        ("optim: [\n", ("run.yaml:2:1",)),
        ("model: {n_embd: 100}\n", ("run.yaml:1:9", "100 is not divisible by n_head = 12")),
        ("train: {tokens_per_step: 9000}\n", ("9000 is not a multiple of", "= 8192; 8192 is")),
        ("optim: {lr: .nan}\n", ("run.yaml:1:9", "finite")),
        ("data: &a {}\nmodel: *a\n", ("run.yaml:2:8", "aliases")),
    ],
)
def test_broken_configuration(gpt: Any, text: str, parts: tuple[str, ...]) -> None:
    Path("run.yaml").write_text(text)
    for command in ("prepare", "train", "eval", "generate"):
        assert_refused(gpt(command, "-c", "run.yaml"), 2, *parts)


def test_missing_configuration(gpt: Any) -> None:
    assert_refused(gpt("train", "-c", "none.yaml"), 2, "none.yaml: no such configuration file")
    assert_refused(gpt("train", "-c", "quickstat"), 2, "quickstat", "did you mean 'quickstart'?")


def test_data_not_prepared(gpt: Any) -> None:
    done = gpt("train", "-s", "data.dir=data/none")
    assert_refused(done, 3, "does not exist", "`gpt prepare -s data.dir=data/none DATASET`")
    Path("data/shakespeare").mkdir(parents=True)
    for words in (["-c", "finetune-gpt2"], ["-c", "finetune-gpt2", "--dry-run"]):
        done = gpt("train", *words)
        assert_refused(done, 3, "is not prepared", "prepare it: `gpt prepare -c finetune-gpt2`;")


def test_a_missing_run_yaml_says_how_to_start_one(gpt: Any) -> None:
    done = gpt("train", "--config", "run.yaml", "--resume")
    assert_refused(done, 2, "run.yaml: no such", "write it with `gpt config init run.yaml`, or use")


def test_validation_split_shorter_than_a_window(gpt: Any, tiny_set: list[str]) -> None:
    done = gpt("train", *tiny_set, "-s", "model.block_size=4096")
    assert_refused(done, 3, "the val split has", "seq_len + 1 = 4097", "data.seq_len=")
    assert not Path("runs/tiny/checkpoints/step-00000000.pt").exists()


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ("tokenizer.name=gpt2", "tokenizer.name = bytes, the configuration says gpt2"),
        ("data.val_fraction=0.3", "data.val_fraction = 0.1, the configuration says 0.3"),
    ],
)
def test_shards_prepared_otherwise(gpt: Any, tiny_set: list[str], change: str, part: str) -> None:
    refused = gpt("train", *tiny_set, "-s", change)
    assert_refused(refused, 3, part)
    again = re.search(r"prepare it again: `gpt (prepare .*)`$", refused.err_lines[-1])
    assert again is not None and gpt(*shlex.split(again[1])).code == 0
    assert gpt("train", *tiny_set, "-s", change, "--dry-run").code == 0


def test_two_texts_prepared_otherwise(gpt: Any, corpus: Path) -> None:
    Path("val.txt").write_text(corpus.read_text()[:2000])
    source = ["-s", f"data.source={{train: {corpus}, val: val.txt}}", "-s", "data.dir=data/two"]
    assert gpt("prepare", *source, "-s", "tokenizer.name=bytes").code == 0
    refused = gpt("train", *source, "-s", "tokenizer.name=char")
    assert_refused(refused, 3, "tokenizer.name = bytes, the configuration says char")
    again = re.search(r"prepare it again: `gpt (prepare .*)`$", refused.err_lines[-1])
    assert again is not None and gpt(*shlex.split(again[1])).code == 0
    assert read_manifest(Path("data/two")).recipe.tokenizer.name == "char"


def test_the_command_that_prepares_again_names_the_subset(gpt: Any, data: Path) -> None:
    words = [
        "-s",
        "data.source=wikipedia",
        "-s",
        "data.config=20231101.de",
        "-s",
        f"data.dir={data}",
    ]
    refused = gpt("train", *words, "-s", "tokenizer.name=char")
    assert "-s data.config=20231101.de" in refused.err_lines[-1]


def test_shards_of_a_larger_vocabulary(gpt: Any, tiny_set: list[str]) -> None:
    done = gpt("train", *tiny_set, "-s", "model.vocab_size=100")
    assert_refused(done, 2, "100 is smaller than the 257 tokens")


def test_evaluating_on_data_of_another_tokenizer(gpt: Any, run: Path, corpus: Path) -> None:
    gpt("prepare", str(corpus), "--out", "data/gpt2")
    done = gpt("eval", "--checkpoint", str(run), "--data", "data/gpt2")
    assert_refused(done, 3, "another tokenizer (gpt2, 50,257 ids)")
    assert "the checkpoint's (bytes, 257 ids)" in done.err


@pytest.mark.parametrize("command", ["eval", "generate"])
def test_a_checkpoint_that_is_none(gpt: Any, command: str) -> None:
    Path("fake.pt").write_bytes(pickle.dumps({"model": 1}))
    assert_refused(gpt(command, "--checkpoint", "fake.pt"), 4, "fake.pt", "hint")
    assert_refused(gpt(command, "--checkpoint", "none.pt"), 4, "none.pt: no such checkpoint")
    assert_refused(gpt(command), 4, "no run with a checkpoint in runs/")


def test_resuming_with_a_changed_model(gpt: Any, tiny_set: list[str], run: Path) -> None:
    before = (run / "last.pt").read_bytes()
    done = gpt("train", *tiny_set, "-s", "model.n_embd=64", "--resume")
    assert_refused(done, 2, "model.n_embd (32 there, 64 here)")
    assert (run / "last.pt").read_bytes() == before


def test_training_into_a_folder_that_holds_a_run(gpt: Any, tiny_set: list[str], run: Path) -> None:
    assert_refused(gpt("train", *tiny_set), 2, "already holds a run", "--resume", "--overwrite")
    both = gpt("train", *tiny_set, "--resume", "--overwrite")
    assert_refused(both, 2, "use one of them")


def test_a_prompt_with_unknown_characters(gpt: Any, tiny_set: list[str], corpus: Path) -> None:
    gpt("prepare", str(corpus), "--out", "data/chars", "-s", "tokenizer.name=char")
    gpt("train", *tiny_set, "-s", "data.dir=data/chars", "-s", "name=chars")
    done = gpt("generate", "--checkpoint", "chars", "the 猫")
    assert_refused(done, 2, "'猫' (U+732B)")


def test_a_prompt_longer_than_the_context(gpt: Any, run: Path) -> None:
    done = gpt("generate", "--checkpoint", str(run), "x" * 17)
    assert_refused(done, 2, "the prompt has 17 tokens, the model's context holds 16")


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--temperature", "-1"],
        ["generate", "--top-p", "1.5"],
        ["generate", "--top-k", "0"],
        ["generate", "--max-new-tokens", "0"],
        ["generate", "--temperature", "warm"],
        ["generate", "--unknown"],
        ["generate", "one", "-p", "two"],
        ["eval", "--stride", "0"],
        ["eval", "--max-tokens", "-5"],
        ["eval", "--split", "test"],
        ["eval", "--data", "x", "--text", "y"],
        ["prepare", "x.txt", "--workers", "0"],
        ["train", "-s", "optim.lr"],
        ["nonsense"],
    ],
    ids=" ".join,
)
def test_impossible_options(gpt: Any, arguments: list[str]) -> None:
    assert_refused(gpt(*arguments), 2)


def test_a_text_to_score_that_is_missing_or_too_short(gpt: Any, run: Path) -> None:
    assert_refused(gpt("eval", "--text", "none.txt"), 3, "none.txt: No such file")
    Path("short.txt").write_text("x")
    assert_refused(gpt("eval", "--text", "short.txt"), 3, "at least 2")


def test_a_failure_with_json_is_one_object_too(gpt: Any) -> None:
    done = gpt("generate", "--checkpoint", "none.pt", "--json")
    assert done.code == 4
    assert list(done.json) == ["error", "hint", "exit_code"] and done.json["exit_code"] == 4
    assert done.json["error"] == "none.pt: no such checkpoint, run folder or run"
    assert done.json["hint"].startswith("runs here: none; or name gpt2")
    assert gpt("generate", "--unknown", "--json").json["exit_code"] == 2


@pytest.mark.parametrize("words", [("runs", "list"), ("plot", "-o")])
def test_a_name_too_long_is_no_bug_whoever_finds_it(gpt: Any, words: tuple[str, ...]) -> None:
    done = gpt(*words, "x" * 300 + ".png")
    assert done.code == 5 and "x.png: File name too long" in done.err_lines[0], done.err
    assert "Traceback" not in done.err


def test_a_bug_keeps_its_traceback_and_exits_with_70(
    gpt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gptcli.data.prepare

    def broken(config: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(gptcli.data.prepare, "make_plan", broken)
    done = gpt("prepare", "stdlib")
    assert done.code == 70 and "Traceback" in done.err and "a bug in gptcli" in done.err


def test_debugging_adds_the_traceback(gpt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT_DEBUG", "1")
    assert "Traceback" in gpt("prepare", "none.txt").err


def test_every_kind_of_error_has_an_exit_code_of_the_contract() -> None:
    codes = {kind.__name__: kind.exit_code for kind in GptError.__subclasses__()}
    assert sorted(codes.values()) == [2, 3, 4, 5, 6, 7, 8, 9]


def test_control_characters_of_names_do_not_reach_the_terminal(gpt: Any) -> None:
    done = gpt("prepare", "evil\x1b[31m\x07.txt")
    assert_refused(done, 3, "evil[31m.txt")
    assert "\x1b" not in done.err


@pytest.mark.skipif(sys.platform != "linux", reason="reads how much is taken from /proc")
def test_too_little_memory_is_exit_8_with_a_hint(run: Path, fork_server: Gpt) -> None:
    # Of the address space, as much as the interpreter has after torch is loaded, and little more.
    limited = (
        "import resource, sys, torch; from gptcli import cli;"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize();"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (int(sys.argv[1]) << 20),) * 2);"
        "sys.exit(cli.run(sys.argv[2:]))"
    )
    words = (["eval", str(run)], ["generate", "--checkpoint", str(run), "x"])
    for command, room in [(one, room) for one in words for room in ("0", "20")]:
        done = fork_server(room, *command, code=limited)
        if done.code:  # how much is too little depends on the machine
            assert done.code == 8, done.err
            assert "out of memory" in done.err and "hint: free memory" in done.err
            assert "Traceback" not in done.err
        assert room != "0" or done.code == 8


def test_no_room_for_what_comes_on_stdin_is_exit_5(
    gpt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full:
        full.setattr(tempfile, "tempdir", None)
        full.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/dev/full"])
        done = gpt("prepare", "-", stdin=b"some text")
    assert_refused(done, 5, "No usable temporary directory")


def test_a_full_disk_for_stdin_is_named_with_what_is_free_on_it(
    gpt: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = tmp_path / "small"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))  # as TMPDIR, were it not read once
    free = {place: 7_000, place.parent: 9_000}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free[path]))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfileobj", full)
    assert_refused(gpt("prepare", "-", stdin=b"some text"), 5, f"{place}: No space", "7 kB free")


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits, and folders that can go")
def test_a_limit_of_open_files_and_a_folder_that_is_gone_are_named(corpus: Path) -> None:
    def said(shell: str) -> tuple[int, str]:
        done = subprocess.run(
            ["bash", "-c", shell.replace("gpt ", f"{sys.executable} -m gptcli ")],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        return done.returncode, done.stderr

    other = corpus.with_name("other.txt")
    other.write_bytes(corpus.read_bytes())
    glob = corpus.with_name("*.txt")
    prepare = f"gpt prepare '{glob}' -s tokenizer.name=bytes --workers 2"
    for limit in (6, 10):
        code, err = said(f"ulimit -n {limit}; {prepare}")
        assert code == 5 and err.startswith("error: too many open files\nhint: raise the limit")
    for command in (prepare, "gpt runs list", "gpt train -c quickstart"):
        code, err = said(f"mkdir gone; cd gone; rmdir ../gone; {command}")
        assert code == 5 and "error: the current folder is gone\nhint: change to" in err, err


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pipe")
def test_nobody_waits_for_a_pipe_in_a_run_that_is_resumed(
    gpt: Any, run: Path, tiny_set: list[str]
) -> None:
    """Before, status.json as a pipe was waited for without an end."""
    (run / "samples.jsonl").write_bytes(b"")
    for name, code in (("metrics.jsonl", 5), ("samples.jsonl", 5), ("log.txt", 5),
                       ("status.json", 0)):  # fmt: skip
        (run / name).rename("kept")
        os.mkfifo(run / name)
        done = gpt("train", *tiny_set, "-s", "train.max_steps=8", "--resume")
        assert done.code == code and "Traceback" not in done.err, done.err
        assert f"{run / name}: " in done.err_lines[-1] or code == 0
        Path("kept").replace(run / name)
