"""The program `gpt`: names the commands, and turns errors into a line, a hint and an exit code."""

import difflib
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from gptcli import __version__
from gptcli.commands import complete, configure, data, distributed, options, runs
from gptcli.commands.doctor import doctor
from gptcli.commands.evaluate import evaluate
from gptcli.commands.export import export
from gptcli.commands.generate import generate
from gptcli.commands.plot import plot
from gptcli.commands.prepare import prepare
from gptcli.commands.report import report
from gptcli.commands.train import train
from gptcli.errors import (
    EXIT_BUG,
    EXIT_INTERRUPTED,
    ConfigError,
    GptError,
    MemoryLimitError,
    PeerError,
    is_out_of_memory,
)

_HELP = ["-h", "--help"]
_EXAMPLES = """[bold]Examples[/bold]
  gpt train -c quickstart                 [dim]a small GPT, in two minutes on a CPU[/dim]
  gpt config init && gpt train -c run.yaml          [dim]one on a text of your own[/dim]
  gpt generate "Once upon a time"                    [dim]what the newest run says[/dim]
"""
_LESS_MEMORY = (
    "free memory or raise the limit of this process; a smaller model, a shorter context or fewer"
    " --num-samples need less"
)
app = typer.Typer(
    name="gpt",
    rich_markup_mode="rich",
    context_settings={"help_option_names": _HELP},
    help="From text to a trained, evaluated, talking GPT.",
    epilog=_EXAMPLES,
)
app.command("prepare", rich_help_panel="Data")(prepare)
app.add_typer(data.app, name="data", rich_help_panel="Data")
app.command("train", rich_help_panel="Model")(train)
app.command("eval", rich_help_panel="Model")(evaluate)
app.command("generate", rich_help_panel="Model")(generate)
app.command("export", rich_help_panel="Model")(export)
app.add_typer(runs.app, name="runs", rich_help_panel="Look")
app.command("plot", rich_help_panel="Look")(plot)
app.command("report", rich_help_panel="Look")(report)
app.add_typer(configure.app, name="config", rich_help_panel="Setup")
app.command("doctor", rich_help_panel="Setup")(doctor)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gpt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line of this process and exit with the contract's code."""
    code = run(sys.argv[1:])
    if distributed.is_rank():
        distributed.leave(code)
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run a command line and return its exit code."""
    try:
        program = _program()
        complete.mend_bash_words(os.environ, f"_{program.upper()}_COMPLETE")
        command = _command()
        code: Any = command.main(arguments or ["--help"], program, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except GptError as error:
        if isinstance(error, ConfigError) and (hint := _foreign_option(arguments)[1]):
            error.hint = hint  # -config FILE was read as -c onfig
        return _fail(arguments, error)
    except BrokenPipeError:
        _drop_stdout()  # whoever read our output has seen enough
        return 0
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except Exception as error:
        if is_out_of_memory(error):
            return _fail(arguments, MemoryLimitError("out of memory", _LESS_MEMORY))
        usage = _usage_error(error, arguments)
        if usage is not None:
            return _fail(arguments, usage)
        return _bug(arguments, error)


def _command() -> Any:
    """Return the parser of all commands; its help shows no type behind a flag, which has none."""
    root: Any = typer.main.get_command(app)
    groups = [root]
    while groups:
        command = groups.pop()
        groups += getattr(command, "commands", {}).values()
        help_ = command.get_help_option(typer.Context(command, help_option_names=_HELP))
        for option in (help_, *command.params):
            if getattr(option, "is_flag", False) and option.metavar is None:
                option.metavar = ""
    return root


def _program() -> str:
    """Return the name this program was called by, as far as it is one of its own."""
    return "gptcli" if Path(sys.argv[0]).stem == "gptcli" else "gpt"


def _drop_stdout() -> None:
    """Let go of a stdout that takes no more, or Python would complain of it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _usage_error(error: Exception, arguments: list[str]) -> ConfigError | None:
    """Turn an error of the command-line parser into one of ours.

    Typer carries a parser of its own and does not export its errors, so they are told by their
    method.
    """
    format_message = getattr(error, "format_message", None)
    if format_message is None:
        return None
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "gpt"
    text = str(format_message()).splitlines()[0]
    wrong, known = getattr(error, "option_name", None), getattr(error, "possibilities", None)
    typed, hint = _foreign_option(arguments)
    if hint is not None:
        return ConfigError(f"No such option: {typed}", hint)
    if isinstance(wrong, str) and known:
        [nearest] = difflib.get_close_matches(wrong, known, 1) or sorted(known)[:1]
        text = f"No such option: {wrong}. Did you mean {nearest}?"
    return ConfigError(text, f"see `{path} --help`")


def _foreign_option(arguments: list[str]) -> tuple[str, str | None]:
    """Return the first option that is another program's, and what to write here."""
    command, path, rest = _command(), _program(), list(arguments)
    while rest and rest[0] in getattr(command, "commands", {}):
        command, path = command.commands[rest[0]], f"{path} {rest.pop(0)}"
    params = [param for param in command.params if param.param_type_name == "option"]
    known = {name: bool(param.is_flag) for param in params for name in param.opts}
    for place, word in enumerate(rest):
        typed, equals, value = word.partition("=")
        if word == "--":
            break
        if typed in known or not re.fullmatch(r"--?[A-Za-z][\w-]+", typed):
            continue
        after = rest[place + 1 : place + 2]
        behind = value if equals else after[0] if after and after[0][:1] != "-" else None
        if hint := options.meant(typed, behind, path, known):
            return typed, hint
    return "", None


def _fail(arguments: list[str], error: GptError) -> int:
    from gptcli import console

    if os.environ.get("GPT_DEBUG") == "1":
        traceback.print_exc()
    if not isinstance(error, PeerError):
        console.error(distributed.prefix() + error.message, error.hint)
    if error.message.startswith("stdout:"):
        _drop_stdout()
    elif "--json" in arguments and distributed.may_print_json(arguments):
        console.result_json(
            {"error": error.message, "hint": error.hint, "exit_code": error.exit_code}
        )
    return error.exit_code


def _bug(arguments: list[str], error: Exception) -> int:
    from gptcli import console

    traceback.print_exc()
    text = f"a bug in gptcli {__version__}: {type(error).__name__}: {error}"
    console.error(text, "please report it with the lines above")
    if "--json" in arguments:
        console.result_json({"error": text, "hint": None, "exit_code": EXIT_BUG})
    return EXIT_BUG
