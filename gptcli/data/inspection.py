"""Looking into a data folder: its hashes, and text or conversations as the model sees them."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptcli.config.schema import Split
from gptcli.data import remote
from gptcli.data.conversations import ConversationReader, fetch_sides, read_sides, require_mask
from gptcli.data.shard_files import chunks
from gptcli.data.shards import SPLITS, Manifest, TokenReader, check_shard, read_tokenizer
from gptcli.errors import DataError
from gptcli.seeding import derive_seed
from gptcli.tokenizers import END_OF_TURN, START_OF_TURN, Tokenizer

END_OF_TEXT_MARK = "<|endoftext|>"


@dataclass(frozen=True)
class Window:
    """Tokens from `start` on: their text, where documents begin, and the source's units."""

    start: int
    text: str
    borders: list[int]  # tokens after `start`
    units: list[str]


def damaged_shards(
    folder: Path, manifest: Manifest, on_progress: Callable[[int], None] = lambda n_tokens: None
) -> list[str]:
    """Check every shard's size, header, hash and ids; return what is wrong, one line each."""
    problems: list[str] = []
    highest = dict.fromkeys(SPLITS, 0)
    for shard in (shard for split in SPLITS for shard in manifest.shards(split)):
        path, digest = folder / shard.file, hashlib.sha256()
        try:
            remote.fetch(path, shard.n_bytes(manifest.dtype), shard.sha256)
            if manifest.is_chat:
                fetch_sides(folder, shard)
            check_shard(path, shard, manifest.dtype)
            for raw, ids in chunks(path, shard.header_bytes, manifest.dtype):
                digest.update(raw)
                highest[shard.split] = max(highest[shard.split], int(ids.max(initial=0)))
            if manifest.is_chat:
                read_sides(folder, shard, hashes=True)
        except DataError as error:
            problems.append(error.message)
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
        else:
            if digest.hexdigest() != shard.sha256:
                problems.append(f"{path}: content does not have the hash of the manifest")
        on_progress(shard.tokens)
    n_ids, known = manifest.tokenizer.vocab_size, highest.items()
    unknown = [_unknown_id(folder, split, token, n_ids) for split, token in known if token >= n_ids]
    problems = problems or unknown
    if manifest.is_chat and not problems:
        require_mask(folder, manifest)
    return problems


def conversations_as_text(
    folder: Path, manifest: Manifest, split: Split, *, count: int, max_tokens: int, seed: int
) -> list[tuple[int, list[tuple[str, bool]]]]:
    """Return (number, parts) of conversations drawn by `seed`: text, and if it is trained on."""
    tokenizer = read_tokenizer(folder, manifest)
    found = []
    with ConversationReader(folder, manifest, split) as reader:
        if not len(reader):
            raise DataError(f"{folder}: the {split} split has no conversation")
        for draw in range(count):
            index = derive_seed("peek", seed, draw) % len(reader)
            ids, trained = (each[:max_tokens] for each in reader.read(index))
            cuts = np.flatnonzero(np.diff(trained)) + 1
            pairs = zip(np.split(ids, cuts), np.split(trained, cuts), strict=True)
            parts = [
                (_decode(folder, split, tokenizer, part), bool(mask[0])) for part, mask in pairs
            ]
            if (left := int(reader.lengths[index]) - len(ids)) > 0:
                parts.append((f"... ({left:,} more tokens)\n", False))
            found.append((index, parts))
    return found


def windows_as_text(
    folder: Path, manifest: Manifest, split: Split, *, count: int, seq_len: int, seed: int
) -> list[Window]:
    """Return windows drawn by `seed`."""
    tokenizer = read_tokenizer(folder, manifest)
    with TokenReader(folder, manifest, split) as tokens:
        n_starts = len(tokens) - seq_len + 1
        if n_starts < 1:
            raise DataError(f"{folder}: the {split} split has only {len(tokens)} tokens")
        starts = [derive_seed("peek", seed, index) % n_starts for index in range(count)]
        windows = [(start, tokens.read(start, seq_len)) for start in starts]
    unit_of = {shard.file: unit.name for unit in manifest.units for shard in unit.shards}
    shards = manifest.shards(split)
    ends = np.cumsum([shard.tokens for shard in shards])
    found = []
    for start, ids in windows:
        first, last = np.searchsorted(ends, (start, start + seq_len - 1), side="right")
        units = dict.fromkeys(unit_of[shard.file] for shard in shards[first : last + 1])
        borders = np.flatnonzero(ids == tokenizer.eot).tolist()
        found.append(Window(start, _decode(folder, split, tokenizer, ids), borders, list(units)))
    return found


def _decode(folder: Path, split: Split, tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """Decode ids with end-of-text and the tokens of turns made visible."""
    if (highest := int(ids.max(initial=0))) >= tokenizer.vocab_size:
        raise DataError(_unknown_id(folder, split, highest, tokenizer.vocab_size))
    marks = {tokenizer.eot: END_OF_TEXT_MARK.encode()}
    if tokenizer.chat is not None:
        marks |= zip(tokenizer.chat, (START_OF_TURN.encode(), END_OF_TURN.encode()), strict=True)
    parts = (marks.get(i) or tokenizer.token_bytes(i) for i in ids.tolist())
    return b"".join(parts).decode("utf-8", "replace")


def _unknown_id(folder: Path, split: Split, token: int, n_ids: int) -> str:
    return f"{folder}: the {split} split holds id {token}, the vocabulary has {n_ids}"
