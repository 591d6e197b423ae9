"""Make the pictures of docs/img from what `gpt` really prints, and from its page in a browser.

Prepares and trains a small network in a temporary folder, which takes some minutes. To be run where
nothing else runs, for the pictures show how fast it was.

    python docs/pictures.py [NAME...]
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import CONSOLE_SVG_FORMAT, Console
from rich.text import Text

from gptcli import load_config, train
from gptcli.terminal.live import frame
from gptcli.terminal.run_state import RunState
from gptcli.training.events import StepDone

if TYPE_CHECKING:
    from support.browser import Tab

WIDTH = 98
PLACE = Path(__file__).resolve().parent / "img"
# A browser shows its own monospaced font: no picture asks a server for one.
SVG = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)


@dataclass(frozen=True)
class Picture:
    """Command lines, and how much of what they print is shown.

    Attributes:
        name: Of the file.
        commands: Run one after the other in the same folder; shown behind a prompt.
        most_lines: Shown of each command; where it prints more, its beginning and its end.
        colour: Whether the program is told that it may use colours.
    """

    name: str
    commands: tuple[str, ...]
    most_lines: int = 36
    colour: bool = True


SHOWN_STEP = 330  # of the training run, when its display is drawn
PICTURES = (
    Picture("help", ("gpt --help",)),
    Picture("error", ("gpt train -c quickstart -s model.n_heads=8",)),
    Picture("explain", ("gpt config explain train.loggers", "gpt config explain optim.lr")),
    Picture("prepare", ("gpt prepare stdlib -c quickstart",), colour=False),
    Picture("train", ("gpt train -c quickstart -s train.sample_every=100",)),
    Picture("eval", ("gpt eval quickstart --baselines",), colour=False),
    Picture("generate", ('gpt generate --seed 1 --max-new-tokens 90 "def read("',), colour=False),
)


def output_of(command: str, folder: Path, colour: bool) -> str:
    """Run a command in `folder` and return all it prints, stdout and stderr as they come."""
    env = {**os.environ, "COLUMNS": str(WIDTH), "PYTHONPATH": str(Path(__file__).parents[1])}
    env |= {"FORCE_COLOR": "1"} if colour else {"NO_COLOR": "1"}
    program = Path(folder, "bin", "gpt")
    if not program.exists():
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m gptcli "$@"\n')
        program.chmod(0o755)
    env["PATH"] = f"{program.parent}{os.pathsep}{env['PATH']}"
    done = subprocess.run(
        command, shell=True, cwd=folder, env=env, stdin=subprocess.DEVNULL, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.stdout


def display_of(command: str, folder: Path) -> str:
    """Train as a command does, and return its display in the middle of the run."""
    words = shlex.split(command)
    sets = [word for word, before in zip(words[1:], words, strict=False) if before == "-s"]
    os.chdir(folder)
    config = load_config(words[words.index("-c") + 1], sets)
    board, shown = RunState(time.monotonic()), ""
    for event in train(config):
        board.update(event, time.monotonic())
        if isinstance(event, StepDone) and event.step == SHOWN_STEP:
            taken = Console(width=WIDTH, force_terminal=True, color_system="standard")
            with taken.capture() as capture:
                for line in frame(board, WIDTH, 30, time.monotonic()):
                    taken.print(line)
            shown = capture.get()
    return shown


def draw(picture: Picture, folder: Path) -> Path:
    """Write a picture and return its file."""
    console = Console(record=True, width=WIDTH, file=open(os.devnull, "w"))
    for command in picture.commands:
        found = (
            display_of(command, folder)
            if picture.name == "train"
            else output_of(command, folder, picture.colour)
        )
        lines = found.rstrip("\n").split("\n")
        console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
        if (left_out := len(lines) - picture.most_lines) > 0:
            lines[-8 - left_out : -8] = ["..."]
        console.print(Text.from_ansi("\n".join(lines)))
    console.print()  # in the last line, letters lose what hangs below them
    file = PLACE / f"{picture.name}.svg"
    PLACE.mkdir(exist_ok=True)
    svg = console.export_svg(title="gpt", code_format=SVG, unique_id=f"gpt-{picture.name}")
    file.write_text(re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE), encoding="utf-8")
    return file


def photograph(folder: Path) -> Path:
    """Save what a browser shows of the newest run: a text, and the alternatives of a token."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from support.browser import Browser

    words = [sys.executable, "-m", "gptcli", "serve", "--port", "0", "--json", "--drain", "1"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(words, cwd=folder, env=env, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            answer = json.loads(server.stdout.readline())
            assert "url" in answer, answer
            with (
                tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
                Browser(Path(profile)) as browser,
            ):
                url = f"{answer['url']}/#seed=1&max_tokens=120&mono=1"
                return show_alternatives(browser.open(url, 1120, 700))
        finally:  # also if the browser fails: who waits for a server has to end it
            server.terminate()


def show_alternatives(tab: "Tab") -> Path:
    """Let the model continue a text, point at a token, and save what is seen."""
    from support.browser import CONTROL
    from support.page import finish

    tab.until("document.documentElement.dataset.ready")
    tab.click("#write textarea")
    tab.type("def read(")
    tab.press("Enter", CONTROL)
    finish(tab)
    words_drawn = "[...document.querySelectorAll('.t b')].filter((b) => b.innerText[3])"
    tab.value(f"{words_drawn}[6].id = 'shown'")
    tab.point("#shown")
    tab.until("!document.querySelector('#pop').hidden")
    time.sleep(0.5)  # until it has appeared
    file = PLACE / "page.png"
    tab.picture(file)
    return file


def main() -> None:
    """Write the pictures named on the command line, or all; later ones need what earlier made."""
    wanted = sys.argv[1:] or [*(picture.name for picture in PICTURES), "page"]
    with tempfile.TemporaryDirectory() as folder:
        for picture in PICTURES:
            if picture.name in wanted:
                file = draw(picture, Path(folder))
                print(f"{file}: {file.stat().st_size / 1000:.1f} kB")
        if "page" in wanted:
            file = photograph(Path(folder))
            print(f"{file}: {file.stat().st_size / 1000:.1f} kB")


if __name__ == "__main__":
    main()
