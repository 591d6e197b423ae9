"""`gpt chat`: a conversation with a model that was trained on conversations."""

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptcli import atomic
from gptcli.commands import generate, options
from gptcli.errors import ConfigError, StorageError
from gptcli.formatting import plural, printable
from gptcli.terminal import console

if TYPE_CHECKING:
    from gptcli.api.generate import Chat

_HELP = """\
/reset      start over
/undo       take back the last turn
/save FILE  save it for `gpt prepare`
/help       show this
Ctrl-C      stop the answer
Ctrl-D      exit
Lines pasted together are one message.
A space before / makes it a message."""

MessageArgument = Annotated[
    str | None,
    typer.Argument(metavar="MESSAGE", help="Message to answer once; default: stdin, or a chat."),
]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.")]


def chat(
    context: typer.Context,
    message: MessageArgument = None,
    checkpoint: options.CheckpointOption = None,
    config: options.ConfigOption = None,
    set_: options.SetOption = None,
    system: System = None,
    temperature: generate.Temperature = None,
    top_k: generate.TopK = None,
    top_p: generate.TopP = None,
    min_p: generate.MinP = None,
    repetition_penalty: generate.Penalty = None,
    max_new_tokens: generate.MaxNewTokens = None,
    seed: generate.Seed = None,
    stop: generate.Stop = None,
    quantize: generate.Quantize = None,
    raw: generate.Raw = False,
    json_: options.JsonOption = False,
) -> None:
    """Chat with a model that was trained on conversations."""
    flags = options.sampling(context) | {"generate.num_samples": 1}
    given = generate.given_text(message, "message")
    is_once = given is not None or sys.stdin is None or not sys.stdin.isatty()
    if is_once and not (given or "").strip():
        raise ConfigError("no message to answer", "for example `gpt chat 'Hello'`")
    if json_ and not is_once:
        raise ConfigError("--json answers one message", "for example `gpt chat --json 'Hello'`")
    settings = options.over_run(config, set_, flags)
    with options.importing():
        from gptcli.api.generate import Chat, Sampler

    sampler = Sampler(checkpoint, settings, int8=quantize is not None, chat=True)
    chat_, clean = Chat(sampler, system), str if raw else printable
    if json_:
        answer, timings = "".join(chat_.ask(given or "")), sampler.timings
        assert chat_.prompt is not None and chat_.last is not None
        console.result_json({
            "answer": answer, "tokens": chat_.last.text.n_tokens,
            "prompt_tokens": len(chat_.prompt.ids), "finish_reason": chat_.last.finish_reason,
            "seed": sampler.config.seed, "tokens_per_second": timings.tokens_per_second,
            "seconds_to_first_token": timings.to_first_token,
        })  # fmt: skip
    elif is_once:
        _answer(chat_, given or "", clean)
    else:
        converse(chat_, clean)


def _answer(chat_: "Chat", text: str, clean: Callable[[str], str]) -> None:
    """Print the answer to a message as it comes, and what to know about it."""
    n_dropped = chat_.prompt.n_dropped if chat_.prompt else 0
    with contextlib.closing(chat_.ask(text)) as pieces:
        for piece in pieces:
            console.write(clean(piece))
    console.write("\n")
    prompt, answer = chat_.prompt, chat_.last
    assert prompt is not None and answer is not None
    if prompt.n_dropped > n_dropped:
        oldest = plural(prompt.n_dropped, "message is", "messages are")
        console.message(f"the context is full: the oldest {oldest} left out", "dim")
    if answer.finish_reason == "length":
        is_cut = prompt.room < chat_.sampler.config.generate.max_new_tokens
        why = ", where the context is full" if is_cut else "; --max-new-tokens sets the limit"
        console.message(f"stopped after {plural(answer.text.n_tokens, 'token')}{why}", "dim")


def converse(chat_: "Chat", clean: Callable[[str], str]) -> None:
    """Answer the messages of a terminal until Ctrl-D."""
    console.message(f"{chat_.sampler.trained.path}\n/help lists the commands, Ctrl-D exits", "dim")
    saved: set[Path] = set()
    while True:
        try:
            if (text := console.ask("> ", message=True)) is None:
                break
            if re.fullmatch(r"/[a-z]+", text.partition(" ")[0]):
                _command(chat_, *text.split(maxsplit=1), saved=saved)
            elif text.strip():
                _answer(chat_, text, clean)
        except KeyboardInterrupt:
            console.write("\n")
        except (ConfigError, StorageError) as error:
            console.error(error.message, error.hint)


def _command(chat_: "Chat", name: str, argument: str = "", *, saved: set[Path]) -> None:
    """Do what a line that begins with a slash says."""
    match name:
        case "/reset":
            chat_.reset()
            done = "a new conversation"
        case "/undo":
            done = "took back the last turn" if chat_.undo() else "nothing to take back"
        case "/save" if argument:
            done = _save(chat_, Path(argument.strip()), saved)
        case "/save":
            done = "/save needs the name of a file, for example: /save chat.jsonl"
        case "/help":
            done = _HELP
        case _:
            done = f"{name} is not a command; /help lists them"
    console.message(done, "dim")


def _save(chat_: "Chat", path: Path, saved: set[Path]) -> str:
    """Write the conversation to a file that does not exist, or that this chat wrote."""
    if len(chat_.messages) < 2:
        return "nothing to save yet"
    with contextlib.suppress(RuntimeError):  # no such user: then it is a name like others
        path = path.expanduser()
    if path not in saved and os.path.lexists(path):
        return f"{path} exists; choose another name"
    messages = [message._asdict() for message in chat_.messages]
    row = json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
    atomic.write_bytes(path, row.encode("utf-8", "replace"))
    saved.add(path)
    return f"saved {plural(len(messages), 'message')} to {path}"
