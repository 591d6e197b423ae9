"""Options of other programs, and ours with a dash too few: the command line to write instead."""

import re
import shlex
from contextlib import suppress

from gptcli.config import words
from gptcli.config.reference import find_key, keys
from gptcli.errors import ConfigError

# Where a key of several sections is looked for, the likeliest first.
_SECTIONS = {
    "prepare": ("data", "tokenizer"),
    "train": ("train", "model", "optim"),
    "eval": ("train",),
    "generate": ("generate",),
}


def translate(path: list[str], rest: list[str], known: dict[str, bool]) -> tuple[str, str] | None:
    """Return the first option that is another program's, and a hint: what to write for all of them.

    `path` is the program and its command, `rest` the words after it; `known` says of the command's
    options whether each is a flag.
    """
    line, rest, advised, is_complete = [*path], [*rest], list[tuple[str, list[str], str]](), True
    while rest and rest[0] != "--":
        word = rest.pop(0)
        typed, equals, value = word.partition("=")
        if typed in known or not re.fullmatch(r"--?[A-Za-z][\w-]+", typed):
            takes_next = not equals and not known.get(typed, True)
            line += [word, *rest[:takes_next]]
            del rest[:takes_next]
            continue
        has_next = not equals and bool(rest) and rest[0][:1] != "-"
        given = value if equals else rest.pop(0) if has_next else None
        if (advice := _meant(typed, given, path[-1], known)) is None:
            is_complete = False  # the parser names that option once these are mended
        else:
            advised.append((typed, *advice))
            line += advice[0]
    line += rest
    if not advised:
        return None
    if not is_complete:
        del advised[1:]
        line = path + advised[0][1]
    text = " ".join(line)
    if "tokenizer.vocab_size=" in text and "tokenizer.name=" not in text:  # only bpe has a choice
        line[len(path) : len(path)] = ["-s", "tokenizer.name=bpe"]
    hint = "; ".join(note for _, _, note in advised if note)
    if any(instead for _, instead, _ in advised):
        hint = f"use `{shlex.join(line)}`" + f" ({hint})" * bool(hint)
    return advised[0][0], hint


def _meant(
    typed: str, value: str | None, command: str, known: dict[str, bool]
) -> tuple[list[str], str] | None:
    """Return the words for an option and its value, and a note; None if nothing is known of it."""
    word = words.plain(typed)
    if (why := words.NEEDLESS.get(word)) and word not in words.OPTIONS["--workers"]:
        return [], f"leave {typed} out: {why}"
    key = _key_of(word, _SECTIONS.get(command, ("",)))
    candidates = [f"--{word.replace('_', '-')}"]
    candidates += [option for option, others in words.OPTIONS.items() if word in others.split()]
    if key is not None:
        candidates.append(f"--{key.rpartition('.')[2].replace('_', '-')}")
    if word == "init_from" and value == "resume":
        candidates.insert(0, "--resume")
    note, fixed = words.note_for(word), words.VALUES.get(word)
    value = fixed or ("VALUE" if value is None or note else value)
    note = "" if note == fixed else note
    for option in candidates:
        if option in known:
            return [option, *([] if known[option] else [value])], note
    if key == "data.source" and command == "prepare":
        return [value], note
    if key is None or "--set" not in known:
        return None
    value = f"[{value}]" if isinstance(keys()[key].default, list) else value
    return ["-s", f"{key}={value}"], note


def _key_of(word: str, sections: tuple[str, ...]) -> str | None:
    """Return the key that a word means, of several the one in the first of `sections`."""
    if (key := words.key_for(word, sections[0])) is not None:
        return key
    with suppress(ConfigError):
        return find_key(word).key
    return next((f"{part}.{word}" for part in sections if f"{part}.{word}" in keys()), None)
