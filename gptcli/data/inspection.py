"""Looking into a data folder: what it holds, windows as the network will see them, its hashes."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from gptcli.data.shards import SPLITS, Manifest, Split, TokenReader, check_shard, read_tokenizer
from gptcli.errors import DataError
from gptcli.seeding import derive_seed
from gptcli.tokenizers import Tokenizer

END_OF_TEXT_MARK = "<|endoftext|>"
_CHUNK_TOKENS = 1 << 20


def damaged_shards(
    folder: Path, manifest: Manifest, on_progress: Callable[[int], None] = lambda n_tokens: None
) -> list[str]:
    """Check every shard's size, header, hash and ids; return what is wrong, one line each."""
    problems: list[str] = []
    for split in SPLITS:
        for shard in manifest.shards(split):
            path = folder / shard.file
            try:
                check_shard(path, shard, manifest.dtype)
                with path.open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except DataError as error:
                problems.append(error.message)
            except OSError as error:
                problems.append(f"{path}: {error.strerror}")
            else:
                if found != shard.sha256:
                    problems.append(f"{path}: content does not have the hash of the manifest")
            on_progress(shard.tokens)
    if not problems:
        problems += _foreign_ids(folder, manifest)
    return problems


def _foreign_ids(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Yield a line for each split that holds ids outside the vocabulary."""
    for split in SPLITS:
        with TokenReader(folder, manifest, split) as tokens:
            highest = max((int(chunk.max()) for chunk in _chunks(tokens)), default=0)
        if highest >= manifest.tokenizer.vocab_size:
            yield _foreign_id(folder, split, highest, manifest)


def _chunks(tokens: TokenReader) -> Iterator[np.ndarray]:
    for start in range(0, len(tokens), _CHUNK_TOKENS):
        yield tokens.read(start, min(_CHUNK_TOKENS, len(tokens) - start))


def windows_as_text(
    folder: Path, manifest: Manifest, split: Split, *, count: int, seq_len: int, seed: int
) -> list[tuple[int, str]]:
    """Return (first token's place, decoded text) of windows drawn by `seed`.

    Raises:
        DataError: The split is shorter than a window, or holds ids outside the vocabulary.
    """
    tokenizer = read_tokenizer(folder, manifest)
    with TokenReader(folder, manifest, split) as tokens:
        room = len(tokens) - seq_len + 1
        if room < 1:
            raise DataError(f"{folder}: the {split} split has only {len(tokens)} tokens")
        starts = [derive_seed("peek", seed, index) % room for index in range(count)]
        windows = [(start, tokens.read(start, seq_len)) for start in starts]
    highest = max((int(ids.max(initial=0)) for _, ids in windows), default=0)
    if highest >= tokenizer.vocab_size:
        raise DataError(_foreign_id(folder, split, highest, manifest))
    return [(start, _decode(tokenizer, ids)) for start, ids in windows]


def _foreign_id(folder: Path, split: Split, token: int, manifest: Manifest) -> str:
    size = manifest.tokenizer.vocab_size
    return f"{folder}: the {split} split holds id {token}, the vocabulary has {size}"


def _decode(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """Decode ids with end-of-text made visible."""
    mark = END_OF_TEXT_MARK.encode()
    parts = (mark if i == tokenizer.eot else tokenizer.token_bytes(i) for i in ids.tolist())
    return b"".join(parts).decode("utf-8", "replace")
