"""Tokenizers from a configuration and from files, whole or damaged."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptcli.config import TokenizerConfig
from gptcli.errors import ConfigError, DataError
from gptcli.tokenizers import (
    Tokenizer,
    dump_tokenizer,
    load_tokenizer,
    make_tokenizer,
    tokenizer_from,
)


def texts() -> Iterable[str]:
    """Return a little text in pieces."""
    return ["def f(x):\n", "    return x\n" * 20]


def test_each_name_makes_its_tokenizer() -> None:
    assert make_tokenizer(TokenizerConfig(), texts).name == "gpt2"
    assert make_tokenizer(TokenizerConfig(name="bytes"), texts).vocab_size == 257
    char = make_tokenizer(TokenizerConfig(name="char"), texts)
    assert char.definition()["alphabet"] == "".join(sorted(set("".join(texts()))))
    assert make_tokenizer(TokenizerConfig(name="bpe", vocab_size=260), texts).vocab_size == 260


def test_text_is_read_only_where_something_is_learned() -> None:
    def no_text() -> Iterable[str]:
        raise AssertionError("read")

    for name in ("gpt2", "bytes"):
        make_tokenizer(TokenizerConfig(name=name), no_text)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TokenizerConfig(name="bpe", vocab_size=256), "256 is too small; bpe needs at least 257"),
        (TokenizerConfig(name="charr"), "unknown tokenizer 'charr'"),
    ],
)
def test_what_cannot_be_made(config: TokenizerConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_tokenizer(config, texts)


def test_a_file_holds_all_of_a_tokenizer(
    tokenizer_for: Callable[[str], Tokenizer], hostile_texts: tuple[str, ...], tmp_path: Path
) -> None:
    text = "".join(hostile_texts)
    tokenizer = tokenizer_for(text)
    file = tmp_path / "tokenizer.json"
    file.write_bytes(dump_tokenizer(tokenizer))
    for place in (file, tmp_path):
        again = load_tokenizer(place)
        assert again.fingerprint == tokenizer.fingerprint
        assert again.encode(text).tolist() == tokenizer.encode(text).tolist()


def test_a_stored_vocabulary_is_used_again(bpe: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(dump_tokenizer(bpe))
    path = str(tmp_path)
    assert make_tokenizer(TokenizerConfig(path=path), texts).fingerprint == bpe.fingerprint
    named = TokenizerConfig(name="bpe", path=path)
    assert make_tokenizer(named, texts).fingerprint == bpe.fingerprint
    with pytest.raises(ConfigError, match="holds a 'bpe' tokenizer, not 'char'"):
        make_tokenizer(TokenizerConfig(name="char", path=path), texts)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json: No such file"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match=r"none\.json: No such file"):
        load_tokenizer(tmp_path / "none.json")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"5",
        b"null",
        b'"format"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"format": "gptcli-tokenizer"}',
        b'{"version": "1.0", "model": {"type": "BPE"}}',
        b'{"format": "gptcli-tokenizer", "version": 2, "name": "bytes"}',
        b'{"format": "gptcli-tokenizer", "version": 1}',
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content)
    with pytest.raises(DataError, match="not a tokenizer"):
        load_tokenizer(file)


@pytest.mark.parametrize(
    "change",
    [
        {"name": 5},
        {"ranks": 5},
        {"ranks": None},
        {"ranks": ""},
        {"ranks": "IQ== 0"},
        {"ranks": "IQ== 0 1"},
        {"ranks": "! 0"},
        {"pattern": "("},
        {"pattern": 5},
        {"specials": {}},
        {"specials": {"<|endoftext|>": "x"}},
        {"specials": {"<|endoftext|>": 0}},
        {"specials": {"<|endoftext|>": -1}},
        {"specials": {"<|endoftext|>": 2**40}},
        {"specials": 5},
    ],
)
def test_a_damaged_vocabulary_is_refused(bpe: Tokenizer, change: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="not a tokenizer definition"):
        tokenizer_from(bpe.definition() | change)


def test_a_vocabulary_without_a_byte_is_refused(bpe: Tokenizer) -> None:
    """tiktoken would end the process at the first text that has it."""
    definition = bpe.definition()
    definition["ranks"] = "\n".join(definition["ranks"].splitlines()[1:])
    with pytest.raises(DataError, match="a byte has no rank"):
        tokenizer_from(definition)


@pytest.mark.parametrize(
    "definition",
    [
        {},
        {"name": "char"},
        {"name": "char", "alphabet": 5},
        {"name": "char", "alphabet": "aa"},
        {"name": "char", "alphabet": "\ud800"},
        {"name": "bpe"},
        {"name": "other"},
        {"name": None},
    ],
)
def test_a_damaged_definition_is_refused(definition: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="not a tokenizer definition"):
        tokenizer_from(definition)


def test_a_file_with_changed_bytes_is_refused_or_loads(bpe: Tokenizer, tmp_path: Path) -> None:
    """Whatever happens to a file, reading it ends with an error of ours or with a tokenizer."""
    whole = dump_tokenizer(bpe)
    file = tmp_path / "tokenizer.json"
    text = "def f(x):\n  return '\U0001f600'"

    @settings(max_examples=80, deadline=None)
    @given(
        at=st.integers(0, len(whole) - 1),
        byte=st.integers(0, 255),
        length=st.integers(0, 3),
        end=st.one_of(st.just(len(whole)), st.integers(0, len(whole))),
    )
    @example(at=0, byte=0x7B, length=1, end=len(whole))
    def check(at: int, byte: int, length: int, end: int) -> None:
        file.write_bytes((whole[:at] + bytes([byte]) * length + whole[at + length :])[:end])
        try:
            tokenizer = load_tokenizer(file)
        except DataError:
            return
        # What cannot be seen in the file itself, the manifest's fingerprint shows.
        same = tokenizer.encode(text).tolist() == bpe.encode(text).tolist()
        assert same or tokenizer.fingerprint != bpe.fingerprint

    check()
