"""The program `gpt`: names the commands, and turns errors into a line, a hint and an exit code."""

import atexit
import contextlib
import difflib
import errno
import importlib
import os
import re
import shlex
import signal
import sys
import threading
import traceback
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from gptcli import __version__
from gptcli.distributed import environment
from gptcli.errors import (
    EXIT_BUG,
    ConfigError,
    GptError,
    MemoryLimitError,
    PeerError,
    StorageError,
    is_out_of_memory,
)
from gptcli.terminal import console

_FILES = os.strerror(errno.EMFILE)
_HELP = ["-h", "--help"]
_EXAMPLES = """[bold]Examples[/bold]
  gpt train -c quickstart                 [dim]a small GPT, in two minutes on a CPU[/dim]
  gpt config init && gpt train -c run.yaml          [dim]a model of your own text[/dim]
  gpt generate "Once upon a time"                    [dim]sample from the newest run[/dim]
"""
_LESS_MEMORY = (
    "free memory or raise the limit of this process; a smaller model, a shorter context or fewer"
    " --num-samples need less"
)
# Name: panel, module and function or group, first line of help. A list of commands imports none of
# them, and a command only its own module.
_COMMANDS = {
    "prepare": ("Data", "prepare:prepare", "Download, tokenize and write uint16 shards."),
    "data": ("Data", "data:app", "Inspect prepared data."),
    "train": ("Model", "train:train", "Train a model; Ctrl-C saves, --resume continues."),
    "sweep": (
        "Model", "sweep:sweep",
        "Train with several settings and rank them; the same command continues.",
    ),
    "eval": (
        "Model", "eval:evaluate",
        "Measure loss, perplexity and bits per byte; compare checkpoints.",
    ),
    "generate": ("Model", "generate:generate", "Sample text from a checkpoint."),
    "chat": (
        "Model", "chat:chat", "Chat with a model that was trained on conversations.",
    ),
    "serve": (
        "Model", "serve:serve", "Serve checkpoints to OpenAI's clients, with a page to try them.",
    ),
    "export": ("Model", "export:export", "Export a checkpoint to other programs' formats."),
    "compress": ("Model", "compress:compress", "Compress a file with a checkpoint's predictions."),
    "decompress": (
        "Model", "compress:decompress",
        "Restore a file that gpt compress wrote, with the same checkpoint.",
    ),
    "runs": ("Inspect", "runs:app", "List, show and compare training runs."),
    "plot": ("Inspect", "plot:plot", "Plot loss and learning rate of runs, also during training."),
    "report": ("Inspect", "plot:report", "Write a self-contained HTML report of a run."),
    "config": ("Setup", "config:app", "Create, inspect and explain configurations."),
    "doctor": ("Setup", "doctor:doctor", "Check this machine and show how to fix problems."),
}  # fmt: skip


def _show_version(requested: bool) -> None:
    if requested:
        typer.echo(f"gpt {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line of this process and exit."""
    console.take_output()
    arguments = sys.argv[1:]
    code = run(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the work is done
    if "torch" not in sys.modules:
        sys.exit(code)
    # To free torch module by module takes the interpreter half a second, and torch's threads for
    # several processes outlive it now and then, which torchrun takes for a crash.
    if _place(arguments).size == 1:
        # As the interpreter does: pools end first, what is registered waits for their processes.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        # Nobody reads it, as `run` has said.
        with contextlib.suppress(OSError, ValueError, console.OutputLostError):
            stream.flush()
    os._exit(code)


def run(arguments: list[str]) -> int:
    """Run a command line and return its exit code; Ctrl-C is left to the caller."""
    try:
        program = _program()
        variable = f"_{program.upper()}_COMPLETE"
        if not arguments or not set(_HELP).isdisjoint(arguments):
            _import_help()
        command = _command(None if variable in os.environ else arguments)
        if variable in os.environ:
            command.main(arguments, program)  # answers the shell, and exits
        # Not by `main`, which ends at once, and with 1, where stdout is a pipe nobody reads.
        with command.make_context(program, arguments or ["--help"]) as context, console.notes():
            try:
                Path.cwd()
            except OSError as error:  # libraries abort there
                hint = "change to a folder that exists: cd ~"
                raise StorageError("the current folder is gone", hint) from error
            command.invoke(context)
        sys.stdout.flush()
        return 0
    except typer.Exit as done:
        return done.exit_code
    except Exception as error:
        return _fail(arguments, error)


def _place(arguments: list[str]) -> environment.Place:
    """Return which of several processes this is, for the one command that several run."""
    try:
        return environment.place() if arguments[:1] == ["train"] else environment.ALONE
    except ConfigError:  # train says so itself
        return environment.ALONE


def _command(arguments: list[str] | None = None) -> Any:
    """Return the parser of all commands; its help shows no type behind a flag, which has none.

    With arguments, the commands that these do not name have a line of help only.
    """
    app = typer.Typer(
        name="gpt",
        rich_markup_mode="rich",
        context_settings={"help_option_names": _HELP},
        help="From text to a trained, evaluated, talking GPT.",
        epilog=_EXAMPLES,
    )
    app.callback()(_root)
    for name, (panel, place, help_) in _COMMANDS.items():
        if arguments is not None and name not in arguments:
            app.command(name, rich_help_panel=panel, help=help_)(lambda: None)  # only listed
            continue
        module, _, attribute = place.partition(":")
        found = getattr(importlib.import_module(f"gptcli.commands.{module}"), attribute)
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=name, rich_help_panel=panel)
        else:
            app.command(name, rich_help_panel=panel)(found)
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


def _import_help() -> None:
    """Import what typer draws help with, but not the Markdown and the tracebacks it may contain.

    With their parser and highlighter they would take a third of the time of `gpt --help`.
    """
    unused = {"rich.markdown": "Markdown", "rich.traceback": "Traceback"}
    missing = [name for name in unused if name not in sys.modules]
    for name in missing:
        sys.modules[name] = module = ModuleType(name)
        setattr(module, unused[name], object)
    try:
        importlib.import_module("typer.rich_utils")
    finally:
        for name in missing:
            del sys.modules[name]


def _program() -> str:
    """Return which of its names this program was called by."""
    return "gptcli" if Path(sys.argv[0]).stem == "gptcli" else "gpt"


def _usage_error(error: Exception, arguments: list[str]) -> ConfigError | None:
    """Turn an error of the command-line parser into one of ours.

    Typer has its own parser and does not export its errors, so their method identifies them.
    """
    format_message = getattr(error, "format_message", None)
    if format_message is None:
        return None
    path = " ".join(_walk(arguments)[1])
    text = " ".join(str(format_message()).split()).replace("Value error, ", "")
    wrong, known = getattr(error, "option_name", None), getattr(error, "possibilities", None)
    if isinstance(wrong, str) and known:
        [nearest] = difflib.get_close_matches(wrong, known, 1) or sorted(known)[:1]
        text = f"No such option: {wrong}. Did you mean {nearest}?"
    if (instead := _foreign_option(arguments)) is not None:
        return ConfigError(text.partition(". Did")[0], instead)
    if file := re.search(r"unexpected extra argument\S* \((\S+\.ya?ml)\)", text):
        return ConfigError(text, f"use `{path} -c {shlex.quote(file[1])}`")
    return ConfigError(text, f"see `{path} --help`")


def _walk(arguments: list[str]) -> tuple[Any, list[str], list[str]]:
    """Return the command that a command line names, its words, and the rest of them."""
    command, path, rest = _command(arguments), [_program()], list(arguments)
    while rest and rest[0] in getattr(command, "commands", {}):
        command, path = command.commands[rest[0]], [*path, rest.pop(0)]
    return command, path, rest


def _foreign_option(arguments: list[str]) -> str | None:
    """Return what to write in place of the first option that is another program's."""
    from gptcli.config.words import option_for

    command, path, rest = _walk(arguments)
    params = [param for param in command.params if param.param_type_name == "option"]
    known = {name: param.is_flag for param in params for name in param.opts + param.secondary_opts}
    return option_for(rest, path[-1], known)


def _as_ours(error: Exception, arguments: list[str]) -> GptError | None:
    """Return the error with a message, a hint and an exit code; None for a bug."""
    if isinstance(error, GptError):
        if isinstance(error, ConfigError) and (instead := _foreign_option(arguments)):
            error.hint = instead  # -config FILE was read as -c onfig
        return error
    if is_out_of_memory(error):
        return MemoryLimitError("out of memory", _LESS_MEMORY)
    if (usage := _usage_error(error, arguments)) is not None:
        return usage
    cause: BaseException | None = error
    while cause is not None:  # a limit of this process, in the words of whichever library met it
        if _FILES in str(cause):
            return StorageError(_FILES.lower(), "raise the limit: ulimit -n 1024")
        if isinstance(cause, OSError) and cause.errno == errno.ENAMETOOLONG:
            return StorageError(f"{cause.filename}: {cause.strerror}", "choose a shorter name")
        cause = cause.__cause__ or cause.__context__
    return None


def _fail(arguments: list[str], error: Exception) -> int:
    """Print an error, as JSON too where that is requested; return the exit code."""
    ours, where = _as_ours(error, arguments), _place(arguments)
    if ours is None or os.environ.get("GPT_DEBUG") == "1":
        traceback.print_exc()
    if ours is None:
        text = f"a bug in gptcli {__version__}: {type(error).__name__}: {error}"
        ours = GptError(text, "please report it with the lines above")
        ours.exit_code = EXIT_BUG
    if ours.exit_code and not isinstance(ours, PeerError):
        prefix = "" if where.is_main else f"rank {where.rank}: "
        console.error(prefix + ours.message, ours.hint)
    # With --gpus, the launcher prints the object: the processes may be restarted.
    is_launched = where.size > 1 and "--gpus" in arguments
    if "--json" in arguments and where.is_main and not is_launched:
        with contextlib.suppress(console.OutputLostError):
            console.result_json(
                {"error": ours.message, "hint": ours.hint, "exit_code": ours.exit_code}
            )
    if where.size > 1:
        environment.report(ours.message, ours.exit_code, ours.hint)
        # The run is done: torchrun must not restart it because nobody can read its output.
        return 0 if isinstance(ours, console.OutputLostError) else ours.exit_code
    return ours.exit_code
