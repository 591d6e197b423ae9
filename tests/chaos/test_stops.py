"""Being asked to stop: saved within a step, the right exit code, whatever was going on."""

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import gptcli.training.loop as loop
from gptcli import __main__, cli
from gptcli.config import Config
from gptcli.plotting import figure
from gptcli.terminal import console, text
from gptcli.training.setup import Session
from gptcli.training.step import Stepper
from support.processes import forked, wait
from support.runs import (
    LONG,
    THOROUGH,
    Figures,
    Tiny,
    Trained,
    finish,
    result_of,
    stop_after,
)

TERMS = 100 if LONG else 20
Command = Callable[..., list[str]]


@pytest.fixture
def command(tiny_set: list[str]) -> Command:
    """Make the command line that trains as `tiny` with the same settings does."""

    def make(config: Config, *how: str) -> list[str]:
        sets = [f"name={config.name}", *how]
        return ["train", *tiny_set, *(word for one in sets for word in ("-s", one))]

    return make


def saved_step(config: Config) -> int:
    """Return the step of the newest checkpoint, which status.json must name."""
    status = json.loads((config.run_folder / "status.json").read_text())
    newest = max((config.run_folder / "checkpoints").glob("step-*.pt"))
    assert newest.stem == f"step-{status['step']:08d}"
    return int(status["step"])


@contextlib.contextmanager
def signalling(owner: object, name: str, number: int, call: int) -> Iterator[None]:
    """Send this process a signal as the given call of something begins."""
    real, calls = getattr(owner, name), [0]

    def wrapped(*args: object, **kwargs: object) -> object:
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    setattr(owner, name, wrapped)
    yield


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)]
)
@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [(Session, "write", 1), (Session, "write", 3), (loop, "evaluate", 1),
     (loop, "evaluate", 2), (Stepper, "step", 1), (Stepper, "step", 7),
     (loop.Rows, "join", 2)],
    ids=["first save", "third save", "evaluation", "its second half", "first step", "step 7",
         "sample"],
)  # fmt: skip
def test_a_signal_in_the_middle_of_something(
    tiny: Tiny, trained: Trained, command: Command, number: int, code: int,
    owner: object, name: str, call: int,
) -> None:  # fmt: skip
    how = (*THOROUGH, "train.sample_every=9")
    stopped, straight = tiny(*how, name="stopped"), trained.straight(*how)

    def work() -> None:
        with signalling(owner, name, number, call):
            raise SystemExit(cli.run(command(stopped, *how)))

    assert wait(forked(work)) == code
    assert json.loads((stopped.run_folder / "status.json").read_text())["exit_code"] == code
    before = saved_step(stopped)
    if owner is Stepper:
        assert before == call - 1  # the unfinished step is dropped
    assert wait(forked(lambda: finish(stopped, resume=True))) == 0
    assert result_of(stopped) == straight


def test_a_signal_while_the_finished_run_is_drawn_ends_nothing(
    tiny: Tiny, command: Command
) -> None:
    config = tiny(name="drawn")

    def work() -> None:
        with signalling(figure, "draw_figure", signal.SIGTERM, 1):
            raise SystemExit(cli.run(command(config)))

    assert wait(forked(work)) == 0
    assert (config.run_folder / "loss.pdf").exists()


def test_sigterm_at_random_moments(
    tiny: Tiny, trained: Trained, command: Command, figures: Figures
) -> None:
    generator = random.Random("term")
    how = (*THOROUGH, "train.max_steps=60")
    straight = trained.straight(*how)
    began = time.perf_counter()
    assert wait(forked(lambda: finish(tiny(*how, name="timed")))) == 0
    seconds = time.perf_counter() - began
    terms = runs = 0
    slowest = 0.0
    while terms < TERMS:
        stopped = tiny(*how, name=f"stopped-{runs}")
        runs += 1
        code = 75
        for _ in range(8):
            if code == 0:
                break
            reader, writer = os.pipe()
            child = forked(lambda: _train_and_say(command(stopped, *how), stopped, writer))  # noqa: B023
            os.close(writer)
            assert os.read(reader, 1) == b"s", "it never began"
            time.sleep(generator.uniform(0, seconds / 2))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGTERM)
            asked = time.perf_counter()
            code = wait(child)
            slowest = max(slowest, time.perf_counter() - asked)
            os.close(reader)
            assert code in (0, 75)
            terms += code == 75
            saved_step(stopped)
        assert wait(forked(lambda: finish(stopped, resume=True))) == 0  # noqa: B023
        assert result_of(stopped) == straight
    figures(f"SIGTERM: {terms} at random moments, each saved, exit 75, within"
            f" {slowest:.2f} s; {runs} runs, all bit-identical")  # fmt: skip


def _train_and_say(words: list[str], config: Config, writer: int) -> None:
    """Train, telling the parent once signals are caught and a run is there to save."""
    from gptcli.runs.folder import Run

    write_config = Run.write_config

    def told(self: Run, settled: Config) -> None:
        write_config(self, settled)
        os.write(writer, b"s")

    Run.write_config = told  # type: ignore[method-assign]
    resume = ["--resume"] if (config.run_folder / "run.json").exists() else []
    raise SystemExit(cli.run([*words, *resume]))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_leaves_at_once(tiny: Tiny, command: Command, number: int) -> None:
    config = tiny(*THOROUGH)

    def work() -> None:
        def stuck(*args: object) -> None:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            os.write(2, b"still here")
            os._exit(99)

        Stepper.step = stuck  # type: ignore[assignment, method-assign]
        raise SystemExit(cli.run(command(config, *THOROUGH)))

    assert wait(forked(work)) == 130
    assert (config.run_folder / "checkpoints/step-00000000.pt").exists()


@pytest.mark.parametrize("how", [[], ["--json"]], ids=["text", "json"])
def test_a_third_ctrl_c_after_saving_ends_with_130_and_one_result(
    tiny: Tiny, command: Command, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, how: list[str],
) -> None:  # fmt: skip
    config = tiny(*THOROUGH)
    monkeypatch.setattr(sys, "argv", ["gpt", *command(config, *THOROUGH), *how])

    def work() -> None:
        result = "result_json" if how else "result"
        with (
            signalling(Stepper, "step", signal.SIGINT, 7),
            signalling(console, result, signal.SIGINT, 1),
            signalling(text, "say_next", signal.SIGINT, 1),
        ):
            __main__.main()

    assert wait(forked(work)) == 130
    assert saved_step(config) == 6
    out, err = capfd.readouterr()
    assert "Traceback" not in err and err.count("resume with: gpt train") == 1
    assert "val_loss" in out
    if how:
        assert json.loads(out)["run_dir"] == str(config.run_folder)


def test_stopped_after_every_step(tiny: Tiny, trained: Trained, figures: Figures) -> None:
    wanted = trained.straight(*THOROUGH)
    for step in range(1, 21):
        broken = tiny(*THOROUGH, name=f"after-{step}")
        stop_after(broken, step)
        finish(broken, resume=True)
        assert result_of(broken) == wanted, f"after step {step}"
    figures("stopped after each of 20 steps and resumed: 20 of 20 bit-identical")


def test_twenty_starts_in_one_folder(
    tiny: Tiny, command: Command, figures: Figures, tmp_path: Path
) -> None:
    rounds = 10 if LONG else 2
    for turn in range(rounds):
        config = tiny(*THOROUGH, name=f"wanted-{turn}")
        go, losers_done = os.pipe(), os.pipe()

        def work() -> None:
            os.read(go[0], 1)  # noqa: B023  # all of them start together

            def patient(*args: object) -> None:
                os.read(losers_done[0], 1)  # noqa: B023
                raise SystemExit(0)

            Stepper.step = patient  # type: ignore[assignment, method-assign]
            sys.stderr = (tmp_path / f"err-{os.getpid()}").open("w", buffering=1)
            raise SystemExit(cli.run(command(config, *THOROUGH)))  # noqa: B023

        children = [forked(work) for _ in range(20)]
        os.write(go[1], b"x" * 20)
        codes = {}
        for _ in range(19):
            child, status = os.wait()
            codes[child] = os.waitstatus_to_exitcode(status)
        os.write(losers_done[1], b"x")
        [winner] = set(children) - set(codes)
        assert wait(winner) == 0
        assert set(codes.values()) == {6}, codes
        for child in codes:
            text = (tmp_path / f"err-{child}").read_text()
            assert "is training in this folder" in text, text
        named = [(tmp_path / f"err-{child}").read_text() for child in codes]
        assert any(f"process {winner} on" in text for text in named)
        for descriptor in (*go, *losers_done):
            os.close(descriptor)
    figures(f"20 simultaneous starts in one folder, {rounds} times: one won each time")
