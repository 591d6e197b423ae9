"""The files of token shards: their sizes checked, and read in parts."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gptcli.errors import DataError
from gptcli.tokenizers import Dtype, Tokens

REPAIR = "prepare the folder again with `gpt prepare --force`"
_CHUNK_BYTES = 8 << 20


def check_size(path: Path, expected: int, because: str, n_head: int = 0) -> bytes:
    """Compare the size of a file with the manifest, and return its first `n_head` bytes."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would block its reader
            raise DataError(f"{path}: not a regular file; the manifest lists it", REPAIR)
        with path.open("rb") as file:
            raw = file.read(n_head)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing; the manifest lists it", REPAIR) from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    if size != expected:
        raise DataError(f"{path}: {size:,} bytes, but {because} {expected:,}", REPAIR)
    return raw


def chunks(path: Path, header_bytes: int, dtype: Dtype) -> Iterator[tuple[bytes, Tokens]]:
    """Yield all bytes of a shard in parts, each with the ids in it; a header has none."""
    stored = np.dtype(dtype).newbyteorder("<")
    with path.open("rb") as file:
        yield file.read(header_bytes), np.empty(0, stored)
        while raw := file.read(_CHUNK_BYTES):
            yield raw, np.frombuffer(raw, stored)
