"""The help, and what is said of mistyped commands and options."""

import subprocess
import sys
from typing import Any

import pytest

from gptcli import cli


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")


def test_help_has_panels_and_ends_with_three_examples(gpt: Any) -> None:
    lines = [line.rstrip() for line in gpt("--help").out.splitlines() if line.strip()]
    assert all(len(line) <= 80 for line in lines)
    panels = [line.split("─ ")[1].split(" ─")[0] for line in lines if line.startswith("╭")]
    assert panels == ["Options", "Data", "Model", "Inspect", "Setup"]
    assert lines[-4] == " Examples"
    assert [line.split("  ")[0] for line in lines[-3:]] == [
        " gpt train -c quickstart",
        " gpt config init && gpt train -c run.yaml",
        ' gpt generate "Once upon a time"',
    ]


@pytest.mark.parametrize("command", ["", "train", "config show", "runs compare", "data info"])
def test_a_flag_takes_no_value_and_shows_none(gpt: Any, command: str) -> None:
    done = gpt(*command.split(), "--help")
    assert done.code == 0 and "--help" in done.out and "<bool>" not in done.out


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("trane", "train"),
        ("config shw", "show"),
        ("runs lst", "list"),
        ("doctr", "doctor"),
        ("train --reusme", "--resume"),
        ("train --dry-rum", "--dry-run"),
        ("runs list --jsn", "--json"),
    ],
)
def test_what_was_meant_is_named(gpt: Any, typed: str, meant: str) -> None:
    done = gpt(*typed.split())
    assert done.code == 2
    assert (
        done.err_lines[0]
        .lower()
        .removesuffix("?")
        .replace("'", "")
        .endswith(f"did you mean {meant}")
    )


def test_help_is_named_where_nothing_is_near(gpt: Any) -> None:
    done = gpt("train", "-z")
    assert done.code == 2 and done.err_lines[-1] == "hint: see `gpt train --help`"


def test_the_help_of_the_command_is_named_where_the_parser_does_not_say_which(gpt: Any) -> None:
    assert gpt("train", "-s").err_lines[-1] == "hint: see `gpt train --help`"
    assert gpt("config", "show", "-c").err_lines[-1] == "hint: see `gpt config show --help`"


def test_the_list_says_of_each_command_what_its_help_begins_with() -> None:
    listed, whole = cli._command([]).commands, cli._command().commands
    assert set(listed) == set(whole)
    for name, command in listed.items():
        assert command.get_short_help_str(100) == whole[name].get_short_help_str(100), name
        assert command.rich_help_panel == whole[name].rich_help_panel


def test_only_the_command_that_is_run_is_imported() -> None:
    code = "import sys; from gptcli import cli; cli.run(['runs', 'list', '--json']);"
    code += "print(sorted(m[16:] for m in sys.modules if m.startswith('gptcli.commands.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "['complete', 'options', 'runs']"


def test_help_imports_no_markdown_which_others_still_find() -> None:
    code = "import sys; from gptcli import cli; cli.run(['--help'])\n"
    code += "print('pygments' in sys.modules, 'markdown_it' in sys.modules)\n"
    code += "from rich.markdown import Markdown; from rich.traceback import Traceback, install\n"
    code += "print(Markdown.__module__, Traceback.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    *help_, loaded, found = done.stdout.splitlines()
    assert "prepare" in "".join(help_), done.stderr
    assert (loaded, found) == ("False False", "rich.markdown rich.traceback")
