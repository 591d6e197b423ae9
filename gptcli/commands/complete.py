"""What the shell offers when Tab is pressed: keys and values, configurations, runs, data sets.

Nothing here loads torch or prints: a completion that fails offers nothing.
"""

import os
import shlex
from collections.abc import Callable, Iterable, MutableMapping
from functools import wraps
from pathlib import Path

from gptcli.errors import GptError

Offer = tuple[str, str]  # a word, and what it is; some shells show both
_KEY = "_GPT_COMPLETED_KEY"  # of KEY=VALUE, where bash counts VALUE as a separate word
_SET = ("-s", "--set")


def _quietly(offers: Callable[[str], Iterable[Offer]]) -> Callable[[str], list[Offer]]:
    """Let a completion offer what begins with the word typed so far, and nothing when it fails."""

    @wraps(offers)
    def complete(incomplete: str) -> list[Offer]:
        try:
            return [offer for offer in offers(incomplete) if offer[0].startswith(incomplete)]
        except (GptError, OSError, ValueError):
            return []

    return complete


@_quietly
def settings(incomplete: str) -> Iterable[Offer]:
    """Offer keys for KEY=VALUE; behind the `=`, the values there are to choose from."""
    from gptcli.config.reference import keys

    known = keys()
    if (key := os.environ.get(_KEY)) is not None:
        return _values(key, "")
    key, equals, _ = incomplete.partition("=")
    if equals:
        return _values(key, f"{key}=")
    found = [info for info in known.values() if info.key.startswith(incomplete)]
    if len(found) == 1:  # a second offer keeps the shell from ending the word behind the `=`
        return [(f"{found[0].key}=", found[0].meaning), *_values(found[0].key, f"{found[0].key}=")]
    return [(f"{info.key}=", info.meaning) for info in found]


def _values(key: str, prefix: str) -> Iterable[Offer]:
    """Offer the values of a key, or its default and an example."""
    from gptcli.config.reference import keys
    from gptcli.config.render import to_yaml

    if (info := keys().get(key)) is None:
        return []
    default = to_yaml(info.default)
    words = [*info.choices, default] if info.choices else [default, to_yaml(info.example)]
    return [(prefix + word, "default" * (word == default))
            for word in dict.fromkeys(words) if not set(word) & set(" '\"[{\\")]  # fmt: skip


@_quietly
def configurations(incomplete: str) -> Iterable[Offer]:
    """Offer the shipped examples, and YAML files."""
    return [*examples(incomplete), *_files(incomplete, (".yaml", ".yml"), "file")]


@_quietly
def examples(incomplete: str) -> Iterable[Offer]:
    """Offer the shipped examples, each with what it is."""
    from gptcli.config.loader import example_files
    from gptcli.config.render import about_example

    return [(path.stem, about_example(path)) for path in example_files()]


@_quietly
def keys_and_sections(incomplete: str) -> Iterable[Offer]:
    """Offer what `gpt config explain` explains."""
    from gptcli.config.reference import keys, sections

    return [*sections().items(), *((info.key, info.meaning) for info in keys().values())]


@_quietly
def runs(incomplete: str) -> Iterable[Offer]:
    """Offer the runs in runs/, the newest first, and run folders elsewhere."""
    from gptcli.runs import RUN
    from gptcli.runs.find import list_runs

    names = [(folder.name, "run") for folder in list_runs()]
    if "/" not in incomplete:
        return names
    return [(folder, "run") for folder in _folders(incomplete) if Path(folder, RUN).exists()]


@_quietly
def checkpoints(incomplete: str) -> Iterable[Offer]:
    """Offer runs, and checkpoint files."""
    return [*runs(incomplete), *_files(incomplete, (".pt",), "checkpoint")]


@_quietly
def files(incomplete: str) -> Iterable[Offer]:
    """Offer all files."""
    return _files(incomplete, None, "")


@_quietly
def compressed(incomplete: str) -> Iterable[Offer]:
    """Offer what `gpt compress` wrote."""
    return _files(incomplete, (".gptz",), "compressed file")


@_quietly
def datasets(incomplete: str) -> Iterable[Offer]:
    """Offer the presets, and files and folders of text."""
    from gptcli.data.archives import COMPRESSED
    from gptcli.data.presets import PRESETS
    from gptcli.data.readers import SUFFIXES

    offers = [(preset.name, preset.about) for preset in PRESETS.values()]
    return [*offers, *_files(incomplete, (*SUFFIXES, *COMPRESSED, ".tgz"), "")]


@_quietly
def data_folders(incomplete: str) -> Iterable[Offer]:
    """Offer the prepared data in data/, and folders elsewhere."""
    prepared = [path.parent.as_posix() for path in sorted(Path("data").glob("*/manifest.json"))]
    others = [folder for folder in _folders(incomplete) if Path(folder, "manifest.json").exists()]
    return [(folder, "prepared data") for folder in dict.fromkeys([*prepared, *others])]


def _paths(incomplete: str) -> Iterable[tuple[str, Path]]:
    """Return what an unfinished path may become; hidden files only where a dot was typed."""
    head, slash, name = incomplete.rpartition("/")
    folder = Path(head or "/") if slash else Path()
    for path in sorted(folder.iterdir()):
        if path.name.startswith(name) and path.name.startswith(".") <= name.startswith("."):
            yield head + slash + path.name, path


def _files(incomplete: str, suffixes: tuple[str, ...] | None, about: str) -> list[Offer]:
    """Return the files of these kinds, or all, and the folders on the way to more."""
    found: list[Offer] = []
    for shown, path in _paths(incomplete):
        if path.is_file() and (suffixes is None or path.suffix in suffixes):
            found.append((shown, about))
        elif path.is_dir():
            found.append((f"{shown}/", "folder"))
    if len(found) == 1 and found[0][1] == "folder":  # look into the only one there is
        found += _files(found[0][0], suffixes, about)
    return found


def _folders(incomplete: str) -> list[str]:
    return [shown for shown, path in _paths(incomplete) if path.is_dir()]


def mend_bash_words(env: MutableMapping[str, str], variable: str) -> None:
    """Join what bash splits, in the environment: it takes `=` and `:` for words.

    A value behind `KEY=` stays a word, as bash replaces that much; its key is left in `env`.
    """
    if env.get(variable) != "complete_bash":
        return
    raw, at = env.get("COMP_WORDS", ""), int(env.get("COMP_CWORD", "0"))
    words = raw.split("\n") if "\n" in raw else shlex.split(raw)
    words = [*words, *[""] * (at + 1 - len(words))][: at + 1]
    joined, is_open = list[str](), False
    for word in words:
        is_sign = word in ("=", ":")
        if joined and (is_open or is_sign):
            joined[-1] += word
        else:
            joined.append(word)
        is_open = is_sign
    *before, last = joined
    if last.startswith("--") and "=" in last:  # --set=optim.lr
        option, _, last = last.partition("=")
        before.append(option)
    if "=" in last and before[-1:] and before[-1] in _SET and words[-1] != last:
        env[_KEY], _, last = last.partition("=")
    env["COMP_WORDS"], env["COMP_CWORD"] = "\n".join([*before, last]), str(len(before))
