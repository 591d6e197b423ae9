"""Token shards on disk: llm.c's file format, and the manifest that completes a data folder.

A shard is a header of 256 int32 (magic, version, token count, zeros) and the tokens: uint16 under
magic 20240520 version 1, uint32 under magic 20240801 version 7. llm.c and modded-nanogpt read
them. The manifest is written last; a folder without one is not finished.
"""

import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, Self

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_serializer

from gptcli import atomic
from gptcli.config.schema import DataConfig, Split
from gptcli.errors import DataError
from gptcli.formatting import plural
from gptcli.tokenizers import Dtype, Tokenizer, Tokens, dtype_for, load_tokenizer

SPLITS: tuple[Split, ...] = ("train", "val")

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
MASK, STARTS = ".mask", ".starts"  # the suffixes of what is beside a shard of conversations
HEADER_BYTES = 1024
_MAX_OPEN_FILES = 64
_CACHE_GB = DataConfig().cache_gb
MAGIC: dict[Dtype, tuple[int, int]] = {"uint16": (20240520, 1), "uint32": (20240801, 7)}


def _file_in_folder(name: str) -> str:
    """Refuse a name that is not that of a file in the folder itself."""
    is_plain = Path(name).name == name and name not in ("", "..") and "\0" not in name
    if not is_plain or len(os.fsencode(name)) > 255:
        raise ValueError(f"{name[:80]!r} is not the name of a file in this folder")
    return name


FileName = Annotated[str, AfterValidator(_file_in_folder)]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_serializer(mode="wrap")
    def _without_unset(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Leave out what only some data has: records of other data keep their bytes."""
        return {k: v for k, v in handler(self).items() if v is not None or k not in _OF_SOME}


_OF_SOME = {"conversations", "trained", "mask_sha256", "starts_sha256", "skipped",
            "conversation_format", "bad_rows", "dedup", "filters"}  # fmt: skip


class Counts(_Record):
    """A number for each split."""

    train: Count = 0
    val: Count = 0

    def __add__(self, other: Self) -> "Counts":
        return Counts(train=self.train + other.train, val=self.val + other.val)

    @property
    def total(self) -> int:
        """The number for both splits together."""
        return self.train + self.val


class Shard(_Record):
    """One file of tokens."""

    file: FileName
    split: Split
    tokens: Count
    sha256: str
    format: Literal["llm.c", "raw-uint16"] = "llm.c"
    conversations: Count | None = None  # this and the rest: of conversations only
    trained: Count | None = None  # of the tokens, those that are trained on
    mask_sha256: str | None = None
    starts_sha256: str | None = None

    def beside(self, suffix: str) -> str:
        """Return the name of a file beside this one."""
        return self.file.removesuffix(".bin") + suffix

    @property
    def sizes(self) -> dict[str, int]:
        """The files of the shard beside its tokens, with their bytes."""
        if self.conversations is None:
            return {}
        return {
            self.beside(MASK): -(-self.tokens // 8),
            self.beside(STARTS): 8 * self.conversations,
        }

    def n_bytes(self, dtype: Dtype) -> int:
        """Return the size of the file."""
        return self.header_bytes + self.tokens * np.dtype(dtype).itemsize

    @property
    def header_bytes(self) -> int:
        """The size of the file's header, 0 where there is none."""
        return HEADER_BYTES if self.format == "llm.c" else 0


class Skipped(_Record):
    """Rows or documents that were left out, for one reason."""

    rows: Count
    first: str  # its file and line


class UnitRecord(_Record):
    """What a unit of the source became."""

    name: str
    sha256: str  # over the unit's source files, to notice when they change
    documents: Count
    tokens: Counts
    bytes: Counts  # of text, without end-of-text tokens
    shards: list[Shard]
    skipped: dict[str, Skipped] | None = None  # by reason


class TokenizerRecord(_Record):
    """Which tokenizer wrote the shards; its definition is in tokenizer.json."""

    name: str
    vocab_size: Annotated[int, Field(ge=1, le=1 << 32)]
    sha256: str

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Self:
        """Return the record of a tokenizer."""
        sha256 = tokenizer.fingerprint
        return cls(name=tokenizer.name, vocab_size=tokenizer.vocab_size, sha256=sha256)


class Recipe(_Record):
    """What the shards' bytes depend on, besides the content of the source."""

    source: str
    revision: str | None
    text_field: str
    encoding_errors: str
    val_fraction: Annotated[float, Field(ge=0, lt=1)]
    seed: int
    shard_tokens: int
    max_vocab_size: int | None
    tokenizer: TokenizerRecord
    conversation_format: str | None = None  # None: text
    bad_rows: str | None = None  # of conversations only
    dedup: str | None = None
    filters: dict[str, int | float | str | list[str]] | None = None

    def differing(self, other: Self) -> list[str]:
        """Return the fields in which two recipes differ."""
        return [key for key in type(self).model_fields if getattr(self, key) != getattr(other, key)]


class Manifest(_Record):
    """What a data folder holds."""

    format: Literal["gptcli-data"] = "gptcli-data"
    version: Literal[1] = 1
    recipe: Recipe
    dtype: Dtype
    documents: Count
    tokens: Counts
    bytes: Counts
    units: list[UnitRecord]

    @classmethod
    def of(cls, recipe: Recipe, units: list[UnitRecord], dtype: Dtype | None = None) -> Self:
        """Add up what the units became."""
        return cls(
            recipe=recipe,
            dtype=dtype or dtype_for(recipe.tokenizer.vocab_size),
            documents=sum(unit.documents for unit in units),
            tokens=sum((unit.tokens for unit in units), Counts()),
            bytes=sum((unit.bytes for unit in units), Counts()),
            units=units,
        )

    @property
    def tokenizer(self) -> TokenizerRecord:
        """The tokenizer that wrote the shards."""
        return self.recipe.tokenizer

    @property
    def is_chat(self) -> bool:
        """Whether the folder holds conversations, not text."""
        return self.recipe.conversation_format is not None

    def trained(self, split: Split) -> int:
        """Return how many tokens of a split are trained on: of text, all."""
        if not self.is_chat:
            return int(getattr(self.tokens, split))
        return sum(shard.trained or 0 for shard in self.shards(split))

    @property
    def val_share(self) -> float:
        """The part of the tokens that is held out for validation."""
        return self.tokens.val / max(1, self.tokens.total)

    @property
    def has_own_val(self) -> bool:
        """Whether the source has its own validation text: each unit is one split as a whole."""
        splits = [{shard.split for shard in unit.shards} for unit in self.units if unit.shards]
        return {"train"} in splits and {"val"} in splits and {"train", "val"} not in splits

    def shards(self, split: Split) -> list[Shard]:
        """Return a split's shards in the order of their names, which is that of the tokens."""
        shards = (shard for unit in self.units for shard in unit.shards if shard.split == split)
        return sorted(shards, key=lambda shard: shard.file)

    @property
    def fingerprint(self) -> str:
        """A sha256 over the tokenizer and the content of every shard."""
        digest = hashlib.sha256(self.tokenizer.sha256.encode())
        for split in SPLITS:
            for shard in self.shards(split):
                digest.update(f"{split} {shard.tokens} {shard.sha256}\n".encode())
                if self.is_chat:
                    digest.update(f"{shard.mask_sha256} {shard.starts_sha256}\n".encode())
        return digest.hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a data folder; a DataError if there is none or it is damaged."""
    from gptcli.data import remote  # which most folders have no need of

    path = folder / MANIFEST
    remote.refresh(folder, (MANIFEST, TOKENIZER))
    try:
        content = json.loads(atomic.read_bytes(path))
        checksum = content.pop("checksum", None) if isinstance(content, dict) else None
        manifest = Manifest.model_validate_json(json.dumps(content))
        if checksum not in (None, _checksum(manifest)):  # None in folders of early versions
            raise ValueError("it does not have its checksum")
        for split in SPLITS:
            if getattr(manifest.tokens, split) != sum(s.tokens for s in manifest.shards(split)):
                raise ValueError(f"the shards do not add up to its {split} tokens")
        return manifest
    except FileNotFoundError as error:
        finished = "is not prepared" if folder.is_dir() else "does not exist"
        raise DataError(
            f"{folder}: this data folder {finished} (no {MANIFEST})",
            "run `gpt prepare` with the same configuration first",
        ) from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            detail = error.errors()[0]
            where = ".".join(map(str, detail["loc"]))
            reason = f"{where or 'file'}: {detail['msg'].removeprefix('Value error, ')}"
        raise DataError(
            f"{path}: damaged manifest ({reason})",
            "move the folder away and run `gpt prepare` again, or choose another with --out",
        ) from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a data folder, with a checksum over it."""
    content = {**manifest.model_dump(), "checksum": _checksum(manifest)}
    atomic.write_bytes(folder / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())


def _checksum(manifest: Manifest) -> str:
    return hashlib.sha256(manifest.model_dump_json().encode()).hexdigest()


def read_tokenizer(folder: Path, manifest: Manifest) -> Tokenizer:
    """Return the tokenizer of a data folder; a DataError if it is not the manifest's."""
    tokenizer = load_tokenizer(folder / TOKENIZER)
    record = manifest.tokenizer
    if (tokenizer.fingerprint, tokenizer.vocab_size) != (record.sha256, record.vocab_size):
        raise DataError(f"{folder / TOKENIZER}: not the tokenizer that wrote these shards")
    return tokenizer


class TokenReader(AbstractContextManager["TokenReader"]):
    """Reads the tokens of a split as one sequence, across its shards.

    Files are read, not mapped: a shard that someone cuts short is an error here, where a mapped
    one would kill the process. Threads may share one reader.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, split: Split, cache_gb: float = _CACHE_GB
    ) -> None:
        """Open a split; sizes and headers are checked (a DataError if wrong), hashes are not."""
        from gptcli.data import remote

        self._kind = manifest.dtype
        self._dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._shards = manifest.shards(split)
        self._paths = [folder / shard.file for shard in self._shards]
        self._ends = np.cumsum([shard.tokens for shard in self._shards], dtype=np.int64)
        self._opened: OrderedDict[int, BinaryIO] = OrderedDict()
        self._lock = threading.Lock()
        self._cache_gb = cache_gb if remote.address_of(folder) else None
        if self._cache_gb is not None:
            held = sum(shard.n_bytes(manifest.dtype) for shard in self._shards)
            remote.require_room(f"the {split} split", held, self._cache_gb)
            return
        for shard, path in zip(self._shards, self._paths, strict=True):
            check_shard(path, shard, manifest.dtype)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, start: int, count: int) -> Tokens:
        """Return tokens start to start + count, (count,); the range must lie in the split."""
        assert 0 <= start <= start + count <= len(self)
        parts: list[Tokens] = []
        index = int(np.searchsorted(self._ends, start, side="right"))
        while count:
            shard_start = int(self._ends[index]) - self._shards[index].tokens
            length = min(count, int(self._ends[index]) - start)
            with self._lock:
                parts.append(self._read(index, start - shard_start, length))
            start, count, index = start + length, count - length, index + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty(0, self._dtype)])

    def _read(self, index: int, start: int, count: int) -> Tokens:
        file = self._file(index)
        size = self._dtype.itemsize
        file.seek(self._shards[index].header_bytes + start * size)
        raw = file.read(count * size)
        if len(raw) != count * size:
            raise DataError(f"{self._paths[index]}: became shorter while it was in use")
        return np.frombuffer(raw, dtype=self._dtype)

    def _file(self, index: int) -> BinaryIO:
        """Return the open file of a shard, keeping the most recently used ones open."""
        file = self._opened.pop(index, None)
        if file is None:
            if self._cache_gb is not None:
                self._download(index, self._cache_gb)
            if len(self._opened) == _MAX_OPEN_FILES:
                self._opened.popitem(last=False)[1].close()
            try:
                file = self._paths[index].open("rb", buffering=0)
            except OSError as error:
                raise DataError(f"{self._paths[index]}: {error.strerror}") from error
        self._opened[index] = file
        return file

    def _download(self, index: int, cache_gb: float) -> None:
        from gptcli.data import remote

        path, shard = self._paths[index], self._shards[index]
        remote.fetch(path, shard.n_bytes(self._kind), shard.sha256, cache_gb)
        check_shard(path, shard, self._kind)
        for other in [each for each in self._opened if not self._paths[each].exists()]:
            self._opened.pop(other).close()  # which made room

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the open files."""
        for file in self._opened.values():
            file.close()
        self._opened.clear()


def check_shards(folder: Path, manifest: Manifest) -> None:
    """Compare the sizes and headers of all shards with the manifest, or raise a DataError."""
    for split in SPLITS:
        for shard in manifest.shards(split):
            check_shard(folder / shard.file, shard, manifest.dtype)


def check_shard(path: Path, shard: Shard, dtype: Dtype) -> None:
    """Compare a shard's size and header with the manifest, and the sizes of what is beside it."""
    from gptcli.data.shard_files import REPAIR, check_size

    expected = shard.n_bytes(dtype)
    raw = check_size(path, expected, f"{plural(shard.tokens, 'token')} take", shard.header_bytes)
    if raw:
        header = tuple(int(word) for word in np.frombuffer(raw, dtype="<i4", count=3))
        if header != (*MAGIC[dtype], shard.tokens):
            raise DataError(f"{path}: not a {dtype} token shard (header {header})", REPAIR)
    for name, n_bytes in shard.sizes.items():
        check_size(path.with_name(name), n_bytes, "the manifest says")
