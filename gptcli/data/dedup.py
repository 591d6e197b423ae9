"""Documents that repeat an earlier one: keys of each on disk, and which keys were there before.

Two documents are the same if a key of theirs is. Which one stays depends on the order of the source
alone, so units are written as they are, in any order and by any process, beside their keys; once
all keys are there, `repeated` tells what to leave out, and `stored` reads the units again.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from gptcli.data.encode import Encoded, TextBatch
from gptcli.data.units import Unit
from gptcli.errors import ConfigError
from gptcli.tokenizers import Dtype

OnKey = Callable[[int, bytes], None]  # is called with a document's index in its unit, and 16 bytes

REPEATED = {"exact": "repeats an earlier document", "near": "is much like an earlier document"}
_RUN_KEYS = 1 << 20  # are sorted at a time, when they are written and when they are compared
_KEY = np.dtype([("high", "<u8"), ("low", "<u8"), ("document", "<u4")])  # on disk
_AS_SPACES = bytes.maketrans(b"\t\n\r\x0b\x0c", b"     ")
# A pair of documents that share the part s of their shingles has a band in common with the
# probability 1 - (1 - s**8)**16: 0.06 at 0.5, 0.61 at 0.7, 0.95 at 0.8, 1.00 at 0.9.
_BANDS, _ROWS = 16, 8
_SHINGLE_CHARS = 16  # a power of two
_BASE = 0x9E3779B97F4A7C15
_MINHASH_SEED = 1


class ExactKeys:
    """One key of each document: a hash of its text, and of who says it.

    Line ends and tabs count as spaces, and white space at the ends of the text does not count.
    """

    def __init__(self, on_key: OnKey) -> None:
        self._on_key, self._document, self._hash = on_key, -1, hashlib.sha256()
        self._spaces = b""  # at the end of what was added last

    def add(self, batch: TextBatch) -> None:
        """Add a batch; a document may continue in the next one."""
        roles = batch.roles or itertools.repeat(-1)
        for document, text, role in zip(batch.documents, batch.texts, roles, strict=False):
            if "\r" in text:
                text = text.replace("\r\n", "\n")
            content = text.encode().translate(_AS_SPACES)
            if role >= 0:
                content = bytes([role]) + content
            if document != self._document:
                self.finish()
                self._document, self._hash, self._spaces = document, hashlib.sha256(), b""
                content = content.lstrip()
            if visible := content.rstrip():
                self._hash.update(self._spaces + visible)
                self._spaces = content[len(visible) :]
            else:  # still at the end, as far as is known
                self._spaces += content

    def finish(self) -> None:
        """Report the last document's key."""
        if self._document >= 0:
            self._on_key(self._document, self._hash.digest()[:16])
        self._document = -1


class NearKeys:
    """Keys that similar documents are likely to share: bands of a MinHash of their shingles."""

    def __init__(self, on_key: OnKey) -> None:
        from rensa import RMinHash

        self._digests = RMinHash.digest_matrix_from_flat_token_hashes
        self._on_key, self._document = on_key, -1
        self._digest = np.empty(0, np.uint32)

    def add(self, batch: TextBatch) -> None:
        """Add a batch; a document may continue in the next one."""
        if not batch.texts:
            return
        shingles = [_shingles(text) for text in batch.texts]
        offsets = np.cumsum([0, *map(len, shingles)]).tolist()
        n_digests = _BANDS * _ROWS
        matrix = self._digests(np.concatenate(shingles), offsets, n_digests, _MINHASH_SEED)
        firsts = np.flatnonzero(np.diff(batch.documents, prepend=-1))
        rows = np.minimum.reduceat(np.array(matrix.to_rows(), np.uint32), firsts, axis=0)
        for first, row in zip(firsts, rows, strict=True):
            if (document := batch.documents[first]) == self._document:
                row = np.minimum(row, self._digest)
            else:
                self.finish()
            self._document, self._digest = document, row

    def finish(self) -> None:
        """Report the last document's keys."""
        if self._document >= 0:
            for band in range(_BANDS):
                rows = self._digest[band * _ROWS : (band + 1) * _ROWS].astype("<u4").tobytes()
                key = hashlib.sha256(bytes([band]) + rows).digest()[:16]
                self._on_key(self._document, key)
        self._document = -1


def _shingles(text: str) -> npt.NDArray[np.uint64]:
    """Return a hash of each run of characters of one length, white space and case aside."""
    points = np.frombuffer("".join(text.lower().split()).encode("utf-32-le"), "<u4")
    hashes = points.astype(np.uint64)
    if len(hashes) < _SHINGLE_CHARS:
        hashes = np.pad(hashes, (0, _SHINGLE_CHARS - len(hashes)))
    width, base = 1, _BASE
    while width < _SHINGLE_CHARS:  # of two runs that touch, one twice as long
        hashes = hashes[:-width] * np.uint64(base) + hashes[width:]
        width, base = 2 * width, base * base % (1 << 64)
    return np.asarray((hashes ^ (hashes >> np.uint64(32))) * np.uint64(_BASE))


def keys_of(kind: Literal["exact", "near"], on_key: OnKey) -> ExactKeys | NearKeys:
    """Return what calls `on_key` with the keys of documents; a ConfigError without its package."""
    if kind == "exact":
        return ExactKeys(on_key)
    try:
        return NearKeys(on_key)
    except ImportError as error:
        hint = "install it: pip install 'gptcli[dedup]'"
        raise ConfigError("data.dedup: near needs the package rensa", hint) from error


class KeyFile:
    """Writes the keys of a unit, sorted in runs."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._keys = file, bytearray()

    def append(self, document: int, key: bytes) -> None:
        """Add a key."""
        self._keys += key + document.to_bytes(4, "little")
        if len(self._keys) == _KEY.itemsize * _RUN_KEYS:
            self.flush()

    def flush(self) -> None:
        """Write the keys that are not written yet."""
        keys = np.frombuffer(self._keys, _KEY)
        self._file.write(keys[np.argsort(keys["high"])].tobytes())
        self._keys = bytearray()


def repeated(files: Sequence[Path], n_documents: Sequence[int]) -> list[npt.NDArray[np.bool_]]:
    """Tell which documents have a key that an earlier one has.

    Memory holds one run of keys, and a byte for each document.

    Args:
        files: The keys of each unit, in the order in which documents are earlier or later.
        n_documents: One more than the last index of each unit's documents.

    Returns:
        For each unit and document (n,), whether it repeats another.
    """
    starts = np.cumsum([0, *n_documents])
    found = np.zeros(starts[-1], np.bool_)
    n_parts = 1 + sum(path.stat().st_size for path in files) // (_KEY.itemsize * _RUN_KEYS)
    bounds = np.array([part * (1 << 64) // n_parts for part in range(1, n_parts)], np.uint64)
    runs = [(path, int(start), cuts) for path, start in zip(files, starts, strict=False)
            for cuts in _runs(path, bounds)]  # fmt: skip
    for part in range(n_parts):
        keys, documents = [np.empty(0, _KEY)], [np.empty(0, np.int64)]
        for path, start, cuts in runs:
            if n := cuts[part + 1] - cuts[part]:
                keys.append(np.fromfile(path, _KEY, n, offset=_KEY.itemsize * cuts[part]))
                documents.append(keys[-1]["document"] + np.int64(start))
        high, low = (np.concatenate([each[half] for each in keys]) for half in ("high", "low"))
        of = np.concatenate(documents)
        order = np.lexsort((of, low, high))  # of equal keys, the first document is the first
        same = (np.diff(high[order]) == 0) & (np.diff(low[order]) == 0)
        found[of[order[1:][same]]] = True
    return np.split(found, starts[1:-1])


def _runs(path: Path, bounds: npt.NDArray[np.uint64]) -> Iterator[list[int]]:
    """Yield where the parts of the keys begin in each run of a file, and the run's end."""
    n_keys = path.stat().st_size // _KEY.itemsize
    for start in range(0, n_keys, _RUN_KEYS):
        high = np.fromfile(path, _KEY, _RUN_KEYS, offset=_KEY.itemsize * start)["high"]
        yield [start, *(start + np.searchsorted(high, bounds)).tolist(), start + len(high)]


def store(file: BinaryIO, batch: TextBatch, encoded: Encoded) -> None:
    """Write what a batch became, to be read by `stored`."""
    numbers = [batch.documents, encoded.counts, encoded.n_bytes, batch.roles]
    for array in ([len(batch.documents), len(encoded.ids)], numbers):
        file.write(np.array(array, "<i8").tobytes())
    file.write(encoded.ids.data.cast("B"))


def stored(
    file: BinaryIO,
    unit: Unit,
    dtype: Dtype,
    is_repeated: npt.NDArray[np.bool_] | None = None,
    reason: str = "",
) -> Iterator[tuple[TextBatch, Encoded]]:
    """Yield the batches of a unit without the documents that repeat another, which are noted."""
    last = -1
    while head := file.read(16):
        n_texts, n_ids = np.frombuffer(head, "<i8")
        numbers = np.frombuffer(file.read(32 * n_texts), "<i8").reshape(4, -1)
        ids = np.frombuffer(file.read(n_ids * np.dtype(dtype).itemsize), dtype)
        left_out: list[int] = []
        if is_repeated is not None and (drop := is_repeated[numbers[0]]).any():
            left_out = [each for each in np.unique(numbers[0, drop]).tolist() if each != last]
            ids = ids[~np.repeat(drop, numbers[1])]
            last, numbers = numbers[0, -1], numbers[:, ~drop]
        documents, counts, n_bytes, roles = numbers.tolist()
        skipped = [(reason, f"{unit.name}: document {each + 1}") for each in left_out]
        batch = TextBatch(unit, [""] * len(documents), documents, roles=roles, skipped=skipped)
        yield batch, Encoded(ids, counts, n_bytes)
