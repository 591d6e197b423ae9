"""Shell completion, asked as the shells ask: through the environment."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.commands import Gpt

Press = Callable[..., list[str]]


@pytest.fixture
def ask(gpt_process: Gpt) -> Press:
    """Ask as a shell does, by variables; return the lines of the answer."""

    def answer(**env: str) -> list[str]:
        done = gpt_process(**env)
        assert done.code == 0 and done.err == "", done.err
        return done.out.split("\n")[:-1] if done.out.strip() else []

    return answer


@pytest.fixture
def press(ask: Press) -> Press:
    """Press Tab in bash behind these words, as bash takes them apart."""

    def press_tab(*words: str) -> list[str]:
        return ask(COMP_WORDS="\n".join(["gpt", *words]), COMP_CWORD=str(len(words)),
                   _GPT_COMPLETE="complete_bash")  # fmt: skip

    return press_tab


def test_commands_and_options(press: Press) -> None:
    assert press("tr") == ["train"] and press("ch") == ["chat"]
    assert press("chat", "--sys") == ["--system"]
    assert press("config", "") == ["init", "show", "schema", "explain"]
    assert press("train", "--over") == ["--overwrite"]


def test_keys_of_the_configuration(press: Press) -> None:
    assert press("train", "-s", "optim.m") == ["optim.min_lr=", "optim.momentum="]
    assert "seed=" in press("train", "-s", "")
    assert press("train", "--set", "optim.sch") == ["optim.schedule=", "optim.schedule=cosine"], (
        "of one key its default too: the shell then adds no space behind the `=`"
    )


def test_keys_behind_settings_that_bash_takes_apart(press: Press) -> None:
    before = ["-s", "optim.lr", "=", "1e-3", "-s", "generate.prompt", "=", "a", ":", "b"]
    assert press("train", *before, "-s", "optim.na")[0] == "optim.name="


def test_other_shells_are_answered_too(ask: Press) -> None:
    fish = ask(_TYPER_COMPLETE_ARGS="gpt train -s optim.na",
               _TYPER_COMPLETE_FISH_ACTION="get-args", _GPT_COMPLETE="complete_fish")  # fmt: skip
    assert [line.split("\t")[0] for line in fish] == ["optim.name=", "optim.name=adamw"]
    zsh = ask(_TYPER_COMPLETE_ARGS="gpt train -s optim.na", _GPT_COMPLETE="complete_zsh")
    assert '"optim.name="' in "".join(zsh)


def test_examples_and_otherwise_the_files_of_the_shell(press: Press) -> None:
    assert "quickstart" in press("train", "-c", "")
    assert press("config", "init", "--from", "qui") == ["quickstart"]
    assert press("train", "-c", "nowhere/x") == []


def test_data_sets(press: Press) -> None:
    assert press("prepare", "ti") == ["tinystories"]


def test_runs_and_checkpoints(press: Press) -> None:
    for name in ("one", "two"):
        Path("runs", name).mkdir(parents=True)
        Path("runs", name, "run.json").touch()
    os.utime("runs/one/run.json", (1, 1))
    assert press("runs", "show", "") == ["two", "one"]
    assert press("runs", "compare", "one", "t") == ["two"]
    assert press("generate", "--checkpoint", "") == ["two", "one"]
    assert press("eval", "on") == ["one"]


def test_keys_to_explain(press: Press) -> None:
    assert press("config", "explain", "opt")[:2] == ["optim.name=", "optim.lr="]


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_the_script_for_bash_offers_what_bash_asks_for(tmp_path: Path) -> None:
    program = tmp_path / "bin" / "gpt"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m gptcli "$@"\n')
    program.chmod(0o755)
    lines = (
        'eval "$(gpt --show-completion bash)"',
        "COMP_WORDS=(gpt train -s optim.mo) COMP_CWORD=3",
        "_gpt_completion gpt",
        'echo "${COMPREPLY[@]}"',
        "complete -p gpt",
    )
    env = {**os.environ, "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "--norc", "-c", "\n".join(lines)], env=env, capture_output=True, text=True
    )
    offered, how = done.stdout.splitlines()
    assert offered == "optim.momentum= optim.momentum=0.95" and "-o default" in how, (
        "where we offer nothing, bash offers files"
    )


def test_completing_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom gptcli.cli import run\ntry: run([])\nexcept SystemExit: pass\n"
        "heavy = ('torch', 'numpy', 'datasets', 'pyarrow', 'tiktoken')\n"
        "print('HEAVY', [name for name in heavy if name in sys.modules])"
    )
    env = {**os.environ, "COMP_WORDS": "gpt\ntrain\n-s\noptim.", "COMP_CWORD": "3",
           "_GPT_COMPLETE": "complete_bash"}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"
    assert "optim.lr=" in done.stdout
