"""Conversations in a data folder: where each begins, and which of its tokens are trained on.

Beside a shard `x.bin` are `x.mask`, one bit for each token (the lowest of a byte first), 1 where
it is trained on, and `x.starts`, little-endian uint64, the shard's positions at which a
conversation begins. No conversation is in two shards.
"""

import hashlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gptcli import atomic
from gptcli.config.schema import Split
from gptcli.data.shard_files import REPAIR
from gptcli.data.shards import (
    MASK,
    SPLITS,
    STARTS,
    Manifest,
    Shard,
    Skipped,
    TokenReader,
    UnitRecord,
)
from gptcli.errors import DataError
from gptcli.tokenizers import Tokens
from gptcli.tokenizers.chat import Mask

Bits = npt.NDArray[np.uint8]
Lengths = npt.NDArray[np.int64]


def fetch_sides(folder: Path, shard: Shard) -> None:
    """Copy what is beside a shard from the folder's address, if it stands for one."""
    from gptcli.data import remote

    for suffix, sha256 in ((MASK, shard.mask_sha256), (STARTS, shard.starts_sha256)):
        path = folder / shard.beside(suffix)
        remote.fetch(path, shard.sizes.get(path.name, 0), str(sha256))


def read_sides(folder: Path, shard: Shard, *, hashes: bool = False) -> tuple[Bits, Lengths]:
    """Read the packed mask of a shard and where its conversations begin; check both.

    Raises:
        DataError: They are not what the manifest says; hashes are compared if `hashes` is set.
    """
    fetch_sides(folder, shard)
    raws = []
    for suffix, expected in ((MASK, shard.mask_sha256), (STARTS, shard.starts_sha256)):
        path = folder / shard.beside(suffix)
        try:
            raws.append(atomic.read_bytes(path))
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}", REPAIR) from error
        if hashes and hashlib.sha256(raws[-1]).hexdigest() != expected:
            raise DataError(f"{path}: content does not have the hash of the manifest", REPAIR)
    mask = np.frombuffer(raws[0], dtype=np.uint8)
    if len(mask) != -(-shard.tokens // 8) or int(np.bitwise_count(mask).sum()) != shard.trained:
        path = folder / shard.beside(MASK)
        raise DataError(f"{path}: does not mark the {shard.trained:,} trained tokens", REPAIR)
    starts = np.frombuffer(raws[1], dtype="<u8") if len(raws[1]) % 8 == 0 else np.empty(0, "<u8")
    ends = np.append(starts[1:], np.uint64(shard.tokens))
    if len(starts) != shard.conversations or starts[:1].any() or (ends <= starts).any():
        path = folder / shard.beside(STARTS)
        raise DataError(f"{path}: not where {shard.conversations} conversations begin", REPAIR)
    return mask, starts.astype(np.int64)


def skipped_rows(units: Iterable[UnitRecord]) -> dict[str, Skipped]:
    """Add up the rows that no conversation was made of, by reason."""
    found: dict[str, Skipped] = {}
    for reason, rows in (item for unit in units for item in (unit.skipped or {}).items()):
        first = found.get(reason, rows).first
        total = rows.rows + (found[reason].rows if reason in found else 0)
        found[reason] = Skipped(rows=total, first=first)
    return found


def require_mask(folder: Path, manifest: Manifest) -> None:
    """Refuse, with a DataError, a folder in which all tokens or none are trained on."""
    for split in SPLITS:
        tokens, trained = getattr(manifest.tokens, split), manifest.trained(split)
        if tokens and trained in (0, tokens):
            which = "all" if trained else "none"
            raise DataError(
                f"{folder}: {which} of the {tokens:,} {split} tokens are trained on; in"
                " conversations these are the assistant's only",
                "prepare the conversations again with `gpt prepare --force`",
            )


class ConversationReader(AbstractContextManager["ConversationReader"]):
    """Reads the conversations of a split by number, in the order of the shards.

    The masks are kept in memory, a sixteenth of the tokens' size. Threads may share one reader.
    `lengths` has the tokens of each conversation (n,), `trained` how many are trained on (n,).
    """

    def __init__(self, folder: Path, manifest: Manifest, split: Split) -> None:
        """Open a split.

        Raises:
            DataError: The folder holds text, its files are not what the manifest says (hashes
                are not compared), or all of its tokens or none are trained on.
        """
        if not manifest.is_chat:
            raise DataError(f"{folder}: holds text, not conversations")
        require_mask(folder, manifest)
        self._tokens = TokenReader(folder, manifest, split)
        self._shards: list[tuple[int, Bits]] = []  # the place of its first token, and its mask
        starts, trained = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        n_tokens = 0
        for shard in manifest.shards(split):
            packed, begins = read_sides(folder, shard)
            self._shards.append((n_tokens, packed))
            mask = np.unpackbits(packed, count=shard.tokens, bitorder="little")
            trained.append(np.add.reduceat(mask, begins, dtype=np.int64))
            starts.append(begins + n_tokens)
            n_tokens += shard.tokens
        self._starts = np.concatenate(starts)
        self._shard_of = np.repeat(np.arange(len(starts) - 1), [len(each) for each in starts[1:]])
        self.lengths: Lengths = np.diff(self._starts, append=n_tokens)
        self.trained: Lengths = np.concatenate(trained)

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, index: int) -> tuple[Tokens, Mask]:
        """Return the tokens of a conversation (n,), and which are trained on (n,)."""
        start, length = int(self._starts[index]), int(self.lengths[index])
        first_token, packed = self._shards[self._shard_of[index]]
        byte, bit = divmod(start - first_token, 8)
        bits = np.unpackbits(packed[byte : byte + (bit + length + 7) // 8], bitorder="little")
        return self._tokens.read(start, length), bits[bit : bit + length].view(np.bool_)

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the open files."""
        self._tokens.close()
