"""Text: what a tiny model can learn from, rows of it, and what has broken tokenizers before."""

import json
from collections.abc import Iterable

HOSTILE = (
    "",
    " ",
    "a",
    "\0",
    "\0a\0\0b",
    "line\r\nline\rline\n\n\n  \t indented\n",
    "<|endoftext|>",
    "before<|endoftext|>after<|endoftext|>",
    "<|fim_prefix|><|endofprompt|>",
    "e\u0301\u0301\u0301 n\u0303o \u0915\u094d\u0937\u093f",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0001f44d\U0001f3ff",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u3053\u3093\u306b\u3061\u306f",
    "\u0645\u0631\u062d\u0628\u0627 \u202egnorw\u202c \u05e9\u05dc\u05d5\u05dd",
    "\ufeffbyte-order mark \ufffd replacement \ufffe\uffff\U0010ffff",
    "\x1c\x1d\x1e\x1f\x85\u00a0\u1680\u180e\u2000\u2028\u2029\u202f\u205f\u3000",
    "it's we'll I'VE they'd 'tis ''s \u2019s",
    " " * 10_000,
    "\n" * 5_000 + "\t" * 5_000,
    "a" * 5_000 + "1" * 5_000 + "!" * 5_000,
    "x = {\n    'a': [1, 2.50, 0x1F],\n\n\n    # comment   \n}\n",
    "\u00bd \u00b2 \u2167 1\u2070 \u0661\u0662",
)  # fmt: skip


def as_jsonl(rows: Iterable[str]) -> str:
    """Return rows as lines of JSON."""
    return "".join(json.dumps({"text": row}) + "\n" for row in rows)


def sentences(count: int, seed: int = 0) -> str:
    """Return plain text that a tiny model can learn something from."""
    words = "the cat sat on a mat and the dog ran to a big red barn by the sea".split()
    lines = []
    state = seed * 7919 + 1
    for _ in range(count):
        picked = []
        for _ in range(8):
            state = (state * 1103515245 + 12345) % 2**31
            picked.append(words[state // 65536 % len(words)])
        lines.append(" ".join(picked).capitalize() + ".\n")
    return "".join(lines)
