"""What a preparation will take: tokens, disk and time, from a short measurement.

An estimate, not a promise: it says before hours of work whether the disk can hold the result.
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from gptcli import atomic
from gptcli.data.prepare import PreparePlan
from gptcli.data.readers import parquet_text_bytes
from gptcli.data.units import documents
from gptcli.errors import StorageError
from gptcli.formatting import size
from gptcli.tokenizers import Tokenizer, UnknownCharacters, make_tokenizer
from gptcli.tokenizers.gigatoken import fast_bpe

_SAMPLE_CHARS = 1 << 18
_FOOTERS = 20  # of Parquet files, which say how much text is in them
_TEXT_PER_PARQUET_BYTE = 1.65  # OpenWebText: 39.8 GB of text in 24.2 GB


@dataclass(frozen=True)
class Estimate:
    """What to expect of a preparation."""

    text_bytes: int
    tokens: int
    shard_bytes: int
    download_bytes: int
    disk_bytes: int
    """Most that is on the disk at once because of it."""
    free_bytes: int
    seconds: float | None
    """Of tokenizing, by one process; None where no text is at hand to measure."""


def estimate(plan: PreparePlan) -> Estimate:
    """Measure how fast the source's first text is tokenized, and scale it to the whole."""
    remote = [path for unit in plan.source.units for path in unit.paths
              if not isinstance(path, Path) and not path.is_cached()]  # fmt: skip
    text_bytes = plan.source.n_bytes * _text_per_byte(plan)
    tokenizer = make_tokenizer(plan.tokenizer, list)  # what is learned from the text is empty here
    bytes_per_token, rate = _measure(plan, tokenizer)
    tokens = round(text_bytes / bytes_per_token)
    expected = plan.source.expected
    if expected is not None and expected.gpt2_tokens and plan.tokenizer.name == "gpt2":
        tokens = expected.gpt2_tokens
    item = 2 if max(tokenizer.vocab_size, plan.tokenizer.vocab_size or 0) <= 1 << 16 else 4
    sizes = [path.n_bytes for path in remote]
    # Two files at a time, when they are not kept: one tokenized, the next one on its way.
    kept = sum(sizes) if plan.data.keep_downloads else sum(sorted(sizes)[-2:])
    return Estimate(
        text_bytes=round(text_bytes),
        tokens=tokens,
        shard_bytes=tokens * item,
        download_bytes=sum(sizes),
        disk_bytes=tokens * item + kept,
        free_bytes=shutil.disk_usage(atomic.existing_folder(plan.folder)).free,
        seconds=text_bytes / rate if rate else None,
    )


def require_room(plan: PreparePlan, found: Estimate) -> None:
    """Refuse what the disk cannot hold.

    Raises:
        StorageError: With what is needed and what is free.
    """
    if found.disk_bytes > found.free_bytes:
        remedy = "free some space, or choose a folder on another disk with --out"
        if found.download_bytes and plan.data.keep_downloads:
            remedy += "; -s data.keep_downloads=false needs less"
        raise StorageError(
            f"{plan.folder}: {plan.source.name} needs about {size(found.disk_bytes)},"
            f" {size(found.free_bytes)} free",
            remedy,
        )


def _measure(plan: PreparePlan, tokenizer: Tokenizer) -> tuple[float, float | None]:
    """Return (bytes of text per token, bytes per second) of the first text at hand."""
    unit = next(iter(plan.source.units), None)
    learned = plan.tokenizer.name in ("char", "bpe") and plan.tokenizer.path is None
    if learned or unit is None or not all(isinstance(path, Path) for path in unit.paths):
        return tokenizer.bytes_per_token, None
    texts: list[str] = []
    total = 0
    for _, text in documents(unit, plan.data, tokenizer.safe_cut):
        texts.append(text[: _SAMPLE_CHARS - total])
        total += len(texts[-1])
        if total >= _SAMPLE_CHARS:
            break
    encode = (
        fast.encode
        if (fast := fast_bpe(tokenizer))
        else lambda texts: [tokenizer.encode(text) for text in texts]
    )
    try:
        encode(texts[:1])  # builds what is built once
        began = time.perf_counter()
        n_tokens = sum(len(ids) + 1 for ids in encode(texts))
    except UnknownCharacters:
        return tokenizer.bytes_per_token, None  # said where the text is read in earnest
    seconds = time.perf_counter() - began
    n_bytes = sum(len(text.encode()) for text in texts)
    if not n_bytes:
        return tokenizer.bytes_per_token, None
    return n_bytes / n_tokens, n_bytes / max(seconds, 1e-9)


def _text_per_byte(plan: PreparePlan) -> float:
    """Return how much text there is for each byte of the source's files."""
    paths = [path for unit in plan.source.units for path in unit.paths]
    names = (path.name if isinstance(path, Path) else getattr(path, "path", "") for path in paths)
    if not all(name.endswith(".parquet") for name in names):
        return 1.0
    local = [path for path in paths if isinstance(path, Path)][:_FOOTERS]
    texts = [parquet_text_bytes(path, plan.data.text_field) for path in local]
    known = [(text, path.stat().st_size) for text, path in zip(texts, local, strict=True) if text]
    if not known:
        return _TEXT_PER_PARQUET_BYTE
    return sum(text for text, _ in known) / sum(size for _, size in known)
