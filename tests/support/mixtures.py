"""Two small sources to mix, and the settings of a tiny run on both."""

import contextlib
from pathlib import Path

from gptcli import cli
from gptcli.config import Config, load_config

from .runs import TINY
from .texts import sentences

MIX = "data.mix=[{source: a.txt, weight: 0.7}, {source: b.txt, weight: 0.3}]"
FALLING = "data.mix=[{source: a.txt, weight: [[0, 0.9], [1, 0.1]]}, {source: b.txt, weight: 0.5}]"


def write_sources() -> None:
    """Write a.txt and b.txt into this folder, the second of about half the size."""
    Path("a.txt").write_text(sentences(120), encoding="utf-8", newline="\n")
    code = "".join(f"def f{n}(x):\n    return x * {n % 7} + {n}\n" for n in range(60))
    Path("b.txt").write_text(code, encoding="utf-8", newline="\n")


def prepared_sources(folder: Path) -> Path:
    """Write them into a folder, and prepare both as bytes."""
    with contextlib.chdir(folder):
        write_sources()
        for name in ("a", "b"):
            assert cli.run(["prepare", f"{name}.txt", "-s", "tokenizer.name=bytes"]) == 0
    return folder


def mixed(*overrides: str, mix: str = MIX, name: str = "mixed") -> Config:
    """Return the settings of a tiny run on a mixture."""
    return load_config(None, [*TINY, mix, "tokenizer.name=bytes", f"name={name}", *overrides])
