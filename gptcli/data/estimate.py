"""What a preparation will take: tokens, disk and time, from a short measurement.

An estimate, not a promise: it says before hours of work whether the disk can hold the result.
"""

import itertools
import shutil
import time
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path

import numpy as np

from gptcli import atomic
from gptcli.data.archives import COMPRESSED
from gptcli.data.columns import parquet_text_bytes
from gptcli.data.dedup import REPEATED, keys_of
from gptcli.data.encode import TextBatch
from gptcli.data.filters import Rules
from gptcli.data.remote import RemoteFile
from gptcli.data.sources import PreparePlan
from gptcli.data.units import documents, excerpt
from gptcli.errors import StorageError
from gptcli.formatting import size
from gptcli.tokenizers import Tokenizer, UnknownCharacters, dtype_for, is_learned, make_tokenizer
from gptcli.tokenizers.gigatoken import fast_bpe

_SAMPLE_CHARS = 1 << 18
_JUDGED_CHARS = 1 << 22
_EXAMPLES = 3  # of what each filter leaves out
_FOOTERS = 20  # of Parquet files, which say how much text is in them
_TEXT_PER_PARQUET_BYTE = 1.65  # OpenWebText: 39.8 GB of text in 24.2 GB
_TEXT_PER_COMPRESSED_BYTE = 3.0  # of prose by gzip and zstd
_TEXT_PER_SOURCE_BYTE = 0.08  # questions and answers from Python's library


@dataclass(frozen=True)
class Estimate:
    """What to expect of a preparation."""

    tokenizer: str
    text_bytes: int
    tokens: int
    shard_bytes: int
    download_bytes: int
    disk_bytes: int  # the most that is on the disk at once because of it
    free_bytes: int
    seconds: float | None  # of tokenizing, by one process; None without text at hand to measure


def estimate(plan: PreparePlan) -> Estimate:
    """Measure how fast the source's first text is tokenized, and scale it to the whole."""
    paths = [path for unit in plan.source.units for path in unit.paths]
    per_byte = _TEXT_PER_SOURCE_BYTE
    if plan.data.format != "docstrings":
        per_byte = _text_per_byte(paths, plan.data.text_field)
    text_bytes = plan.source.n_bytes * per_byte
    tokenizer = make_tokenizer(plan.tokenizer, list)  # what is learned from the text is empty here
    bytes_per_token, rate = _measure(plan, tokenizer)
    tokens = round(text_bytes / bytes_per_token)
    expected = plan.source.expected
    if expected is not None and expected.gpt2_tokens and plan.tokenizer.name == "gpt2":
        tokens = expected.gpt2_tokens
    vocab_size = max(tokenizer.vocab_size, plan.tokenizer.vocab_size or 0)
    shard_bytes = tokens * np.dtype(dtype_for(vocab_size)).itemsize
    # With data.dedup, the tokens of a unit at a time are there twice.
    stored_bytes = shard_bytes // max(1, len(plan.source.units)) if plan.data.dedup else 0
    sizes = [p.n_bytes for p in paths if not isinstance(p, Path) and not p.is_cached()]
    # Two files at a time, when they are not kept: one is tokenized while the next is downloaded.
    kept = sizes if plan.data.keep_downloads else sorted(sizes)[-2:]
    return Estimate(
        tokenizer=tokenizer.name,
        text_bytes=round(text_bytes),
        tokens=tokens,
        shard_bytes=shard_bytes,
        download_bytes=sum(sizes),
        disk_bytes=shard_bytes + stored_bytes + sum(kept),
        free_bytes=shutil.disk_usage(atomic.existing_folder(plan.folder)).free,
        seconds=text_bytes / rate if rate else None,
    )


def require_room(plan: PreparePlan, found: Estimate) -> None:
    """Refuse, with a StorageError, what the disk cannot hold."""
    if found.disk_bytes > found.free_bytes:
        hint = "free some space, or choose a folder on another disk with --out"
        if found.download_bytes and plan.data.keep_downloads:
            hint += "; -s data.keep_downloads=false needs less"
        needed, free = size(found.disk_bytes), size(found.free_bytes)
        raise StorageError(
            f"{plan.folder}: {plan.source.name} needs about {needed}, {free} free", hint
        )


def _measure(plan: PreparePlan, tokenizer: Tokenizer) -> tuple[float, float | None]:
    """Return (bytes of text per token, bytes per second) of the first text at hand."""
    unknown = tokenizer.bytes_per_token, None
    unit = next(iter(plan.source.units), None)
    if is_learned(plan.tokenizer) or unit is None:
        return unknown
    if not all(isinstance(path, Path) for path in unit.paths):
        return unknown
    texts: list[str] = []
    n_chars = 0
    for _, text, _ in documents(unit, plan.data, tokenizer.safe_cut):
        texts.append(text[: _SAMPLE_CHARS - n_chars])
        n_chars += len(texts[-1])
        if n_chars >= _SAMPLE_CHARS:
            break
    fast = fast_bpe(tokenizer)
    encode = fast.encode if fast else lambda texts: [tokenizer.encode(text) for text in texts]
    try:
        encode(texts[:1])  # builds what is built once
        began = time.perf_counter()
        n_tokens = sum(len(ids) + 1 for ids in encode(texts))
    except UnknownCharacters:
        return unknown  # reported when the text is tokenized
    seconds = time.perf_counter() - began
    n_bytes = sum(len(text.encode()) for text in texts)
    return (n_bytes / n_tokens, n_bytes / max(seconds, 1e-9)) if n_bytes else unknown


@dataclass
class LeftOut:
    """What is left out of the first documents of a source, by reason."""

    documents: int = 0  # that were looked at
    rows: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)


def left_out(plan: PreparePlan) -> LeftOut:
    """Apply the filters of a plan to its first documents at hand, and look for repeated ones."""
    found, n_chars = LeftOut(), 0
    rules = Rules(plan.data.filters) if plan.data.filters else None
    keys: set[bytes] = set()
    seen: set[bytes] = set()
    dedup = plan.data.dedup
    find_keys = keys_of(dedup, lambda _, key: keys.add(key)) if dedup else None
    unfiltered = plan.data.model_copy(update={"filters": None})
    for unit in plan.source.units:
        if not all(isinstance(path, Path) for path in unit.paths):
            continue
        for index, pieces in itertools.groupby(documents(unit, unfiltered), itemgetter(0)):
            numbers, texts, roles = zip(*itertools.islice(pieces, 16), strict=True)
            head, place = "\n".join(texts), f"{unit.name}: document {index + 1}"
            found.documents += 1
            reason = rules(iter([head]), place) if rules else None
            if reason is None and dedup and find_keys:
                keys.clear()
                find_keys.add(TextBatch(unit, [*texts], [*numbers], roles=[*roles]))
                find_keys.finish()
                reason = REPEATED[dedup] if keys & seen else None
                seen |= keys
            if reason is not None:
                found.rows[reason] = found.rows.get(reason, 0) + 1
                if found.rows[reason] <= _EXAMPLES:
                    found.examples.setdefault(reason, []).append(f"{place}: {excerpt(head)}")
            n_chars += len(head)
            if n_chars >= _JUDGED_CHARS:
                return found
    return found


def _text_per_byte(paths: list[Path | RemoteFile], text_field: str) -> float:
    """Return how much text there is for each byte of the source's files."""
    names = [str(getattr(path, "path", path)).lower() for path in paths]
    if all(name.endswith((*COMPRESSED, ".tgz")) for name in names):
        return _TEXT_PER_COMPRESSED_BYTE
    if not all(name.endswith(".parquet") for name in names):
        return 1.0
    local = [path for path in paths if isinstance(path, Path)][:_FOOTERS]
    texts = {path: parquet_text_bytes(path, text_field) for path in local}
    n_bytes = sum(path.stat().st_size for path, text in texts.items() if text)
    return sum(filter(None, texts.values())) / n_bytes if n_bytes else _TEXT_PER_PARQUET_BYTE
