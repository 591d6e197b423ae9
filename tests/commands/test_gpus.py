"""`gpt train --gpus N` and torchrun itself: real processes, real signals, the contract's codes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptcli.checkpoint import load_checkpoint
from support.processes import children_of, until

LONG = os.environ.get("GPTCLI_CHAOS") == "long"
MOMENTS = 10 if LONG else 1
HOW = ("train.tokens_per_step=128", "train.max_steps=100000", "train.eval_every=50000",
       "optim.schedule=constant", "train.save_every=20")  # fmt: skip

if not hasattr(os, "fork"):
    pytest.skip("no signals to send", allow_module_level=True)

Started = subprocess.Popen[str]


@pytest.fixture
def start(tiny_set: list[str]) -> Callable[..., Started]:
    """Start `gpt train --gpus 2`, or torchrun with as many, in a process of its own."""

    def begin(*how: str, by: tuple[str, ...] = (), options: tuple[str, ...] = ()) -> Started:
        sets = [word for one in (*HOW, *how) for word in ("-s", one)]
        command = [*(by or (sys.executable,)), "-m", "gptcli", "train", *tiny_set, *sets, *options]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    return begin


def status(name: str = "tiny") -> dict[str, Any]:
    path = Path("runs") / name / "status.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"step": -1}
    return found


def wait_for_step(step: int) -> None:
    until(lambda: status()["step"] >= step, 90)


@pytest.mark.slow
def test_a_signal_saves_at_any_moment_and_resuming_goes_on(start: Callable[..., Started]) -> None:
    generator = random.Random("torchrun")
    for moment in range(MOMENTS):
        before = status()["step"]
        launched = start(options=("--gpus", "2", "--resume"))
        wait_for_step(before + 20)
        time.sleep(generator.uniform(0, 1))
        pids = children_of(launched.pid)
        launched.send_signal(generator.choice([signal.SIGTERM, signal.SIGUSR1]))
        _, err = launched.communicate(timeout=60)
        assert launched.returncode == 75, err
        assert status()["exit_code"] == 75 and status()["state"] == "stopped"
        saved = load_checkpoint(Path("runs/tiny/last.pt")).state["step"]
        assert saved == status()["step"] > before, moment
        assert "--gpus 2 --resume" in err and "Traceback" not in err
        assert len(pids) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in pids)
    history = Path("runs/tiny/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in history if '"loss"' in line]
    assert steps == list(range(1, saved + 1))


@pytest.mark.slow
def test_stopped_before_training_begins_nothing_has_changed(
    gpt: Any, tiny_set: list[str], start: Callable[..., Started]
) -> None:
    assert gpt("train", *tiny_set).code == 0
    before = Path("runs/tiny/status.json").read_bytes()
    launched = start("train.max_steps=6", options=("--gpus", "2", "--resume"))
    until(lambda: len(children_of(launched.pid)) >= 2)
    launched.send_signal(signal.SIGTERM)
    _, err = launched.communicate(timeout=60)
    assert launched.returncode == 75, err
    assert Path("runs/tiny/status.json").read_bytes() == before


@pytest.mark.slow
def test_a_killed_process_has_all_started_again_and_the_run_goes_on(
    start: Callable[..., Started],
) -> None:
    launched = start("train.max_steps=400", options=("--gpus", "2", "--json"))
    wait_for_step(40)
    os.kill(random.Random("victim").choice(children_of(launched.pid)), signal.SIGKILL)
    out, err = launched.communicate(timeout=120)
    assert launched.returncode == 0, err
    assert json.loads(out)["step"] == 400 == status()["step"]  # one object, though twice started
    assert "Traceback" not in err


@pytest.mark.slow
def test_torchrun_itself_does_the_same(start: Callable[..., Started]) -> None:
    torchrun = (
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1",
    )  # fmt: skip
    launched = start(by=torchrun, options=("--resume",))
    wait_for_step(20)
    launched.send_signal(signal.SIGUSR1)
    _, err = launched.communicate(timeout=60)
    assert launched.returncode == 1  # torchrun's own
    assert status()["exit_code"] == 75 and status()["state"] == "stopped", err


def test_what_cannot_be_dealt_out_is_refused_before_anything_is_started(
    gpt: Any, tiny_set: list[str]
) -> None:
    done = gpt("train", *tiny_set, "-s", "train.tokens_per_step=192", "--gpus", "5")
    assert done.code == 2 and len(done.err_lines) == 2
    assert "12 rows of 16 tokens" in done.err and "use 4 processes" in done.err
    assert "-s train.tokens_per_step=240" in done.err
    assert not Path("runs").exists()


def test_gpus_must_be_there_and_fit_the_other_options(gpt: Any, tiny_set: list[str]) -> None:
    assert gpt("train", *tiny_set, "--gpus", "0").code == 2
    done = gpt("train", *tiny_set, "--gpus", "2", "--verify-resume", "2")
    assert done.code == 2 and "--gpus" in done.err
    done = gpt("train", *tiny_set, "--gpus", "1")
    assert done.code == 0 and "cpu," in done.err  # one process needs no torchrun


@pytest.mark.slow
def test_the_code_of_a_run_that_is_held_comes_through(
    start: Callable[..., Started], tiny: Callable[..., Any]
) -> None:
    from gptcli.runs.folder import open_run

    with open_run(tiny(), resume=False, overwrite=False):
        launched = start(options=("--gpus", "2", "--json"))
        out, err = launched.communicate(timeout=90)
    assert launched.returncode == 6, err
    assert json.loads(out)["exit_code"] == 6
    assert err.count("is training in this folder") == 1


@pytest.mark.slow
def test_what_all_processes_find_is_said_once_and_json_has_its_hint(
    start: Callable[..., Started],
) -> None:
    launched = start("optim.lr=1e12", "optim.grad_clip=0", options=("--gpus", "2", "--json"))
    out, err = launched.communicate(timeout=90)
    said = json.loads(out)
    assert launched.returncode == 7 == said["exit_code"], err
    assert "not finite" in said["error"] and "optim.lr" in said["hint"]
    assert err.count("error: ") == 1 == err.count("hint: ")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_results_that_are_lost_are_exit_5_and_start_nothing_again(tiny_set: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "gptcli", "train", *tiny_set, "--gpus", "2"],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=120,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    assert done.returncode == 5, done.stderr
    assert done.stderr.count("error: stdout: No space left on device") == 1
    assert done.stderr.count("finished at step 6") == 1 and status()["state"] == "finished"


@pytest.mark.slow
def test_ctrl_c_twice_after_the_processes_start_is_130_with_one_object(
    start: Callable[..., Started],
) -> None:
    launched = start(options=("--gpus", "2", "--json"))

    def have_torch() -> bool:  # and are past the start of the interpreter itself
        maps = [Path(f"/proc/{pid}/maps").read_text() for pid in children_of(launched.pid)]
        return len(maps) == 2 and all("torch" in text for text in maps)

    until(have_torch)
    for _ in range(3):
        launched.send_signal(signal.SIGINT)
        time.sleep(0.1)
    out, err = launched.communicate(timeout=60)
    assert launched.returncode == 130, err
    assert isinstance(json.loads(out), dict) and "Traceback" not in err


def test_too_few_open_files_are_refused_before_anything_is_started(
    gpt: Any, tiny_set: list[str]
) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (79, before[1]))
    try:
        done = gpt("train", *tiny_set, "--gpus", "2")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert done.code == 5 and "only 79 files may be open" in done.err and "ulimit -n" in done.err
