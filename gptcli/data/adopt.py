"""Token files that other programs have written, taken as they are: a manifest is put beside them.

Reads llm.c's and modded-nanogpt's shards (with their header) and nanoGPT's train.bin and val.bin
(without one). Nothing is copied or changed.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gptcli import atomic, locking
from gptcli.config.schema import Config, DataConfig
from gptcli.data import hub, shards
from gptcli.data.presets import PRESETS, Preset
from gptcli.data.shards import Counts, Manifest, Recipe, Shard, TokenizerRecord, UnitRecord
from gptcli.data.sources import data_dir
from gptcli.errors import ConfigError, DataError
from gptcli.tokenizers import Tokenizer, dump_tokenizer, make_tokenizer

_CHUNK_TOKENS = 1 << 22
_HEADERLESS = ("train.bin", "val.bin")


def is_token_folder(source: str) -> bool:
    """Tell whether a source is a folder of token files."""
    path = Path(source)
    try:
        names = [file.name for file in path.iterdir()] if path.is_dir() else []
    except OSError:
        return False
    return any(name.endswith(".bin") for name in names)


def token_files(config: DataConfig) -> tuple[Path, Preset | None, str | None] | None:
    """Return the folder of token files that need no tokenizing, and where they come from.

    Returns:
        The folder, the preset that has them ready-made and which part of it; None if the source
        is text.

    Raises:
        ConfigError: The files would have to be moved.
    """
    source = config.source
    if not source or not isinstance(source, str):
        return None
    name, _, part = source.partition(":")
    if name in PRESETS and PRESETS[name].kind == "shards":
        return data_dir(config), PRESETS[name], part or config.config
    if name in PRESETS or not is_token_folder(source):
        return None
    if config.dir not in (None, source):
        raise ConfigError(
            f"{source} already holds token files; they are used in place", "leave out --out"
        )
    return Path(source), None, None


def adopt(
    folder: Path, config: Config, on_progress: Callable[[int], None] = lambda n_bytes: None
) -> Manifest:
    """Write a manifest for the token files in `folder`; one that is there is left as it is.

    Args:
        folder: Holds the files; becomes a data folder.
        config: `tokenizer` says what the ids mean.
        on_progress: Called with the bytes of tokens read.

    Raises:
        ConfigError: The tokenizer would have to be learned from text that is not there.
        DataError: A file is of another kind, or holds ids outside the vocabulary.
    """
    if (folder / shards.MANIFEST).exists():
        manifest = shards.read_manifest(folder)
        for split in shards.SPLITS:
            shards.TokenReader(folder, manifest, split).close()
        return manifest
    if config.tokenizer.name in ("char", "bpe") and config.tokenizer.path is None:
        raise ConfigError(
            f"tokenizer.name: token files do not say what the ids of a '{config.tokenizer.name}'"
            " vocabulary mean",
            "name its file with -s tokenizer.path=...",
        )
    tokenizer = make_tokenizer(config.tokenizer, list)
    files = sorted(folder.glob("*.bin"))
    lengths = tokenizer.token_lengths()
    units = [_unit(file, tokenizer, lengths, on_progress) for file in files]
    dtypes = {dtype for _, dtype in units}
    if len(dtypes) != 1:
        raise DataError(f"{folder}: its files hold tokens of {' and '.join(sorted(dtypes))}")
    records = [record for record, _ in units]
    manifest = Manifest.of(
        Recipe(
            source=str(folder),
            revision=None,
            text_field=config.data.text_field,
            encoding_errors=config.data.encoding_errors,
            val_fraction=0.0,
            seed=config.seed,
            shard_tokens=max(shard.tokens for record in records for shard in record.shards),
            max_vocab_size=config.tokenizer.vocab_size,
            tokenizer=TokenizerRecord(
                name=tokenizer.name, vocab_size=tokenizer.vocab_size, sha256=tokenizer.fingerprint
            ),
        ),
        dtypes.pop(),
        records,
    )
    if not manifest.tokens.train:
        raise DataError(f"{folder}: no training tokens (a file name with 'train' in it)")
    with locking.hold(folder, "is preparing this folder", "wait for it"):
        atomic.write_bytes(folder / shards.TOKENIZER, dump_tokenizer(tokenizer))
        shards.write_manifest(folder, manifest)
    return manifest


def _unit(
    path: Path,
    tokenizer: Tokenizer,
    lengths: np.ndarray[tuple[int], np.dtype[np.int64]],
    on_progress: Callable[[int], None],
) -> tuple[UnitRecord, shards.Dtype]:
    """Count and check one file."""
    split: shards.Split = "val" if "val" in path.name else "train"
    if split == "train" and "train" not in path.name:
        raise DataError(f"{path}: neither 'train' nor 'val' in its name says what it is for")
    found, dtype = _describe(path, split)
    n_bytes = n_documents = 0
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(shards.HEADER_BYTES if found.format == "llm.c" else 0))
        while raw := file.read(_CHUNK_TOKENS * np.dtype(dtype).itemsize):
            digest.update(raw)
            ids = np.frombuffer(raw, dtype=np.dtype(dtype).newbyteorder("<"))
            highest = int(ids.max())
            if highest >= tokenizer.vocab_size:
                raise DataError(
                    f"{path}: holds id {highest:,}, but {tokenizer.name} has"
                    f" {tokenizer.vocab_size:,} ids",
                    "name the tokenizer that wrote it with -s tokenizer.name=... or .path=...",
                )
            n_bytes += int(lengths[ids].sum())
            n_documents += int((ids == tokenizer.eot).sum())
            on_progress(len(raw))
    sha256 = digest.hexdigest()
    counted = {split: found.tokens}
    record = UnitRecord(
        name=path.name,
        sha256=sha256,
        documents=n_documents,
        tokens=Counts(**counted),
        bytes=Counts(**{split: n_bytes}),
        shards=[found.model_copy(update={"sha256": sha256})],
    )
    return record, dtype


def _describe(path: Path, split: shards.Split) -> tuple[Shard, shards.Dtype]:
    """Read the header of a file, or tell one of nanoGPT's by its name."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = np.frombuffer(file.read(12).ljust(12, b"\0"), dtype="<i4")
    for dtype, magic in shards.MAGIC.items():
        if tuple(header[:2].tolist()) == magic:
            shard = Shard(file=path.name, split=split, tokens=int(header[2]), sha256="")
            shards.check_shard(path, shard, dtype)
            return shard, dtype
    if path.name not in _HEADERLESS or size % 2 or not size:
        raise DataError(
            f"{path}: neither a shard of llm.c's format nor nanoGPT's train.bin or val.bin"
        )
    shard = Shard(file=path.name, split=split, tokens=size // 2, sha256="", format="raw-uint16")
    return shard, "uint16"


def fetch_ready_made(
    preset: Preset, part: str | None, folder: Path, on_bytes: hub.OnBytes = lambda n_bytes: None
) -> None:
    """Download ready-made shards into `folder`: the first `part` training files, or all.

    Args:
        preset: Names the files.
        part: A number of training files.
        folder: Gets links to what is in the Hub's cache.
        on_bytes: Called as bytes arrive.

    Raises:
        ConfigError: `part` is no number of files.
        DataError: A file cannot be had.
    """
    assert preset.revision is not None and preset.n_shards is not None
    wanted = preset.n_shards
    if part is not None:
        if not part.isdigit() or not 1 <= int(part) <= preset.n_shards:
            raise ConfigError(
                f"{preset.name}:{part}: expected a number of files, 1 to {preset.n_shards}"
            )
        wanted = int(part)
    names = ["fineweb_val_000000.bin"]
    names += [f"fineweb_train_{number:06d}.bin" for number in range(1, wanted + 1)]
    atomic.make_folder(folder)
    for name in names:
        if not (folder / name).exists():
            file = hub.HubFile(preset.where, name, preset.revision)
            atomic.link(file.fetch(on_bytes).resolve(), folder / name)
