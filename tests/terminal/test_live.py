"""The live display: every width and height, what it says, and how it leaves the terminal."""

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gptcli.config import load_config
from gptcli.data.shards import Counts, Manifest, Recipe, TokenizerRecord
from gptcli.terminal.console import Terminal
from gptcli.terminal.live import TrainScreen, draw_curve, frame
from gptcli.terminal.run_state import RunState
from gptcli.terminal.text import summary_text
from gptcli.tokenizers.base import ByteTokenizer
from gptcli.training.advice import Advice
from gptcli.training.events import (
    EpochDone,
    Evaluated,
    Event,
    Finished,
    Sampled,
    Saved,
    Started,
    StepDone,
    Stopped,
    Summary,
    Working,
)
from gptcli.training.memory import Disk, Memory, ModelSize
from gptcli.training.plan import Plan
from gptcli.training.spec import RunSpec
from support.processes import until

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def started(peak_flops: float | None = None, val_tokens: int = 5_000, **more: Any) -> Started:
    """Return the start of a run of 100 steps of 1,000 tokens, which are two epochs."""
    config = load_config(None, ["name=one", "data.dir=data", "data.seq_len=5", "device=cpu",
                                "train.tokens_per_step=1000", "train.micro_batch_size=200",
                                "dtype=float32", "compile=false",
                                "model.vocab_size=257"])  # fmt: skip
    tokens = Counts(train=50_000, val=val_tokens)
    tokenizer = TokenizerRecord(name="bytes", vocab_size=257, sha256="")
    recipe = Recipe.model_construct(tokenizer=tokenizer)
    manifest = Manifest.model_construct(recipe=recipe, tokens=tokens)
    size = ModelSize(1_000_000, 1_000_000, 0, 1_000_000, 8_000_000, 100)
    memory = Memory(4_000_000, 4_000_000, 8_000_000, 10_000_000, 0, 16_000_000_000)
    advice = Advice("warm-up of 90 steps in a run of 100", "most of it", "-s optim.warmup_steps=2")
    spec = RunSpec(config, manifest, ByteTokenizer(), size, n_windows=10_000, max_steps=100,
                   rows=200, n_processes=2 if peak_flops else 1)  # fmt: skip
    disk = Disk(1_000_000, 4_000_000, 0, 10**10)
    plan = Plan(spec, memory, disk, 6_000_000, peak_flops, (advice,))
    return Started(plan, **{"step": 0, **more})


def done(step: int, loss: float, **more: Any) -> StepDone:
    """Return a step, one a second."""
    known: dict[str, Any] = {
        "tokens": step * 1000, "lr": 1e-3, "grad_norm": 0.7, "tokens_per_second": 12_345.0,
        "memory_bytes": 333_000_000, "seconds": float(step), "logged": True,
    }  # fmt: skip
    return StepDone(step, loss=loss, **{**known, **more})


def board(*events: Event, n_steps: int = 60) -> RunState:
    """Return the board of a run in which the loss falls, one step a second, and then events."""
    found = RunState(0.0)
    found.update(started(), 0.0)
    for step in range(1, n_steps + 1):
        found.update(done(step, 5.0 - step / 30), float(step))
    for event in events:
        found.update(event, float(n_steps))
    return found


def text(found: RunState, width: int = 80, height: int = 24, at: float = 60.0) -> str:
    """Return the display as plain text."""
    return "\n".join(line.plain for line in frame(found, width, height, at))


FULL: tuple[Event, ...] = (
    Evaluated(30, 4.25, 4.0, True), Evaluated(60, 4.5, 4.0, False), Saved(60, Path("x.pt")),
    Sampled(60, "Once", " upon a time\nthere\x1b[2J was " + "a very long story " * 40),
)  # fmt: skip


@pytest.mark.parametrize("height", [2, 5, 10, 20, 24, 50])
@pytest.mark.parametrize("width", [1, 10, 20, 40, 60, 80, 132, 200])
def test_no_line_is_wider_and_no_display_higher_than_the_terminal(width: int, height: int) -> None:
    for found in (RunState(0.0), board(n_steps=0), board(n_steps=1), board(*FULL)):
        lines = frame(found, width, height, 60.0)
        assert len(lines) < height and all(line.cell_len <= width for line in lines)


def test_all_of_it_is_there_on_eighty_columns() -> None:
    shown = text(board(*FULL), 80, 30, at=72.0)
    for part in ("60/100", "60%", "48 s left", "loss       3.0000", "smoothed", "val loss   4.5000",
                 "best val   4.2500 at 30", "lr         1.00e-03", "grad norm  0.7",
                 "tokens/s   12.3k", "memory     333 MB of 16 GB", "epochs     1.20 of 2.00",
                 "time       72 s", "saved      12 s ago, step 60", "sample at step 60",
                 "Once upon a time"):  # fmt: skip
        assert part in shown, part


def test_on_sixty_columns_no_number_is_cut() -> None:
    shown = text(board(*FULL), 60, 24)
    for part in ("best val   4.2500 at 30", "333 MB of 16 GB", "0 s ago, step 60"):
        assert part in shown
    assert "…" not in shown


def test_mfu_is_told_where_the_device_is_known() -> None:
    assert "MFU" not in text(board())
    found = RunState(0.0)
    found.update(started(peak_flops=1e12), 0.0)
    found.update(done(1, 5.0), 1.0)
    assert found.mfu() == pytest.approx(12_345 * 6_000_000 / 2e12)
    assert "MFU 4%" in text(found)


def test_samples_cannot_steer_the_terminal() -> None:
    shown = text(board(*FULL), 80, 40)
    assert "\x1b" not in shown and "there[2J was" in shown


def test_it_says_what_takes_long() -> None:
    found = board()
    for work in ("evaluating", "saving", "sampling"):
        found.update(Working(60, work), 60.0)
        assert text(found).startswith(work)
    found.update(done(61, 3.0), 61.0)
    assert text(found).startswith("training")


def test_the_best_goes_on_from_a_resumed_run_and_counts_epochs_without_validation() -> None:
    found = RunState(0.0)
    found.update(started(step=50, best_loss=2.5, best_step=40), 0.0)
    found.update(Evaluated(60, 3.0, 3.0, False), 1.0)
    assert "best val   2.5000 at 40" in text(found)
    found = RunState(0.0)
    found.update(started(val_tokens=0), 0.0)
    for epoch, loss in enumerate((3.0, 2.0, 2.5), 1):
        found.update(EpochDone(epoch * 10, epoch, loss), 1.0)
    assert "epoch loss 2.0000 at 20" in text(found) and "val" not in text(found)


def test_steps_that_are_not_finite_are_counted_and_not_drawn() -> None:
    found = board(done(61, float("nan"), skipped=True), done(62, float("inf"), skipped=True))
    assert "2 steps, not finite" in text(found)
    assert found.smoothed is not None and 2.9 < found.smoothed < 5


def test_the_smoothed_loss_begins_at_the_first_loss() -> None:
    assert board(n_steps=1).smoothed == pytest.approx(5.0 - 1 / 30)


def test_a_peak_survives_a_hundred_thousand_steps() -> None:
    found = RunState(0.0)
    for step in range(1, 100_001):
        found.update(done(step, 9.0 if step == 70_001 else 3.0), float(step))
    assert len(found.losses) < 2500 and (70_001, 9.0) in found.losses
    lines = [line.plain for line in draw_curve(found.losses, [], None, 60, 10)]
    assert lines[0].lstrip().startswith("9.000")
    assert any(0x2800 < ord(sign) < 0x2900 for sign in lines[0])  # dots in the top row
    assert lines[-1].split()[0] == "1" and lines[-1].split()[-1] == "100,000"


def test_a_falling_loss_falls_and_validation_is_marked() -> None:
    losses = [(step, 5 - step / 25) for step in range(100)]
    lines = [line.plain for line in draw_curve(losses, [(50, 3.0), (99, 1.2)], (99, 1.2), 60, 9)]
    first = [re.search("[⠁-⣿]", line) for line in lines[:-1]]
    places = [found.start() for found in first if found is not None]
    assert places == sorted(places) and places[-1] > 40
    assert sum(line.count("o") for line in lines[:-1]) == 1 and "*" in lines[-2]


def test_a_terminal_without_unicode_gets_none() -> None:
    lines = frame(board(*FULL), 80, 24, 60.0, plain=True)
    assert all(line.plain.isascii() for line in lines)


def screen(width: int, height: int = 24, live: bool = True, **more: Any) -> tuple[Any, Any]:
    """Return a screen on a terminal that is a string, and the string."""
    file = io.StringIO()
    console = Terminal(file=file, width=width, height=height, force_terminal=live, **more)
    return TrainScreen(console, live=live), file


END = Stopped(
    60, Summary("runs/one", 60, 60_000, 4.0, 4.5, 4.25, 1.0, 60.0, None), {"steps": 60.0}, 30
)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_run_leaves_its_last_picture(width: int) -> None:
    shown, file = screen(width, color_system=None, legacy_windows=False)
    with shown:
        for event in (started(), *(done(step, 4.0) for step in range(1, 61)), *FULL, END):
            shown.show(event)
    out = file.getvalue()
    assert "\x1b[?25l" not in out  # a cursor that is hidden stays so after Ctrl-\\ or kill -9
    plain = ESCAPE.sub("", out)
    assert "advice: warm-up of 90 steps" in " ".join(plain.split())
    assert "stopped at step 60, saved" in plain and "60/100" in plain
    assert all(len(line.rstrip("\r")) <= width for line in plain.splitlines() if "\r" not in line)
    assert "38;5" not in out and "\x1b[1" not in out.replace("\x1b[1A", "")  # no colours


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_the_cursor_is_there_when_training_fails(error: type[BaseException]) -> None:
    shown, file = screen(80)
    with pytest.raises(error), shown:
        shown.show(started())
        shown.show(done(1, 4.0))
        raise error
    out = file.getvalue()
    assert "\x1b[?25l" not in out
    assert "failed" in out
    assert not shown._thread.is_alive()


def test_a_resized_terminal_is_drawn_anew() -> None:
    shown, file = screen(80)
    with shown:
        shown.show(started())
        shown.show(done(1, 4.0))
        shown.show(done(2, 3.9))
        shown._terminal.size = (40, 20)
        before = len(file.getvalue())
        until(lambda: "\x1b[2J" in file.getvalue()[before:])
    after = ESCAPE.sub("", file.getvalue()[before:].partition("\x1b[2J")[2])
    assert "run: runs/one" in after  # the head comes again
    assert all(len(line) <= 40 for line in after.replace("\r", "\n").splitlines())


def test_without_a_terminal_there_are_the_lines_of_the_log() -> None:
    shown, file = screen(80, live=False)
    with shown:
        for event in (started(), done(1, 4.0), *FULL, Working(60, "saving"), END):
            shown.show(event)
    out = file.getvalue()
    assert "\x1b" not in out and "eval at step 30  val_loss 4.2500" in out
    assert "step 1  loss 4.0000" in out and "saved x.pt" in out and "⠁" not in out


def test_the_summary_says_what_the_loss_means() -> None:
    lines = summary_text(END).splitlines()
    assert lines[1] == "train_loss 4.0000  val_loss 4.5000  best_val_loss 4.2500"
    assert lines[2] == "perplexity 70.11 per token, best at step 30"
    few = Summary("runs/one", 60, 60_000, 4.0, None, None, 1.0, 60.0, None)
    assert "perplexity" not in summary_text(Finished(60, few))


def test_a_run_ends_with_its_files_and_the_next_commands(gpt: Any, tiny_set: list[str]) -> None:
    ended = gpt("train", *tiny_set)
    assert "perplexity" in ended.out and "best at step" in ended.out
    err = ended.err.replace("\\", "/")
    for part in ("files in runs/tiny:", "  best.pt  ", "  loss.pdf  ",
                 "next: gpt generate --checkpoint",
                 "gpt eval runs/tiny/best.pt", "gpt report runs/tiny", "time: "):  # fmt: skip
        assert part in err
    assert "\x1b" not in ended.err and "⣀" not in ended.err


def test_what_a_run_without_validation_suggests_works(gpt: Any, tiny_set: list[str]) -> None:
    sets = ("-s", "data.val_fraction=0", "-s", "data.dir=data/whole", "-s", "tokenizer.name=bytes")
    assert gpt("prepare", "corpus.txt", *sets).code == 0
    ended = gpt("train", *tiny_set, "-s", "data.dir=data/whole", "-s", "data.val_fraction=0")
    assert ended.code == 0, ended.err
    commands = [line[6:] for line in ended.err_lines if line[6:].startswith("gpt ")]
    commands += gpt("runs", "show", "--json").json["next"]
    assert len(commands) == 5 and sum("--split train" in command for command in commands) == 2
    for command in commands:
        done = gpt(*shlex.split(command)[1:])
        assert done.code == 0, (command, done.err)


@pytest.mark.parametrize("env", [{"FORCE_COLOR": "1"}, {"NO_COLOR": "1"}, {}], ids=str)
def test_a_pipe_is_never_redrawn(env: dict[str, str], gpt_process: Any, tiny_set: Any) -> None:
    ended = gpt_process("train", *tiny_set, **env)
    assert ended.code == 0 and "step 6  loss" in ended.err
    assert "\x1b[?25" not in ended.err and "\x1b[1A" not in ended.err and "━" not in ended.err


def on_terminal(command: list[str], kill_after: bytes | None = None, **env: str) -> tuple[int, str]:
    """Run a command on a pseudo-terminal of 80 columns; return its exit code and its stderr."""
    pty = pytest.importorskip("pty")
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, b"\x18\x00\x50\x00\x00\x00\x00\x00")
    process = subprocess.Popen(
        [sys.executable, "-m", "gptcli", *command],
        stdin=slave, stdout=subprocess.DEVNULL, stderr=slave,
        env={**os.environ, "TERM": "xterm-256color", **env},
    )  # fmt: skip
    os.close(slave)
    out = b""
    while True:
        try:
            read = os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        if not read:
            break
        out += read
        if kill_after is not None and kill_after in out:
            process.send_signal(signal.SIGTERM)
            kill_after = None
    os.close(master)
    return process.wait(60), out.decode()


def test_a_terminal_shows_it_live_and_never_hides_its_cursor(tiny_set: Any) -> None:
    command = ["train", *tiny_set, "-s", "train.max_steps=100000"]
    code, out = on_terminal(command, kill_after=b"training")
    assert code == 75
    assert "stopped" in out and "resume with: gpt train" in out
    assert "\x1b[?25l" not in out  # a cursor that is hidden stays so after Ctrl-\\ or kill -9


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(tiny_set: Any) -> None:
    code, out = on_terminal(["train", *tiny_set], TERM="dumb")
    assert code == 0 and "step 6  loss" in out and "\x1b" not in out


def test_without_colour_the_display_has_none(tiny_set: Any) -> None:
    code, out = on_terminal(["train", *tiny_set], NO_COLOR="1")
    assert code == 0 and "finished" in out
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", out)


def test_json_stays_alone_on_stdout(gpt: Any, tiny_set: list[str]) -> None:
    assert json.loads(gpt("train", *tiny_set, "--json").out)["step"] == 6
