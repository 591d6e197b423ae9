"""Token files that other programs have written, used in place: a manifest is put beside them.

Reads llm.c's and modded-nanogpt's shards (with their header) and nanoGPT's train.bin and val.bin
(without one). Nothing is copied or changed.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gptcli import atomic, locking
from gptcli.config.schema import Config, DataConfig, Split
from gptcli.data import hub, shards
from gptcli.data.presets import PRESETS, Preset, data_dir
from gptcli.data.shard_files import chunks
from gptcli.data.shards import Counts, Manifest, Recipe, Shard, TokenizerRecord, UnitRecord
from gptcli.errors import ConfigError, DataError
from gptcli.tokenizers import Dtype, Tokenizer, dump_tokenizer, is_learned, make_tokenizer

_HEADERLESS = ("train.bin", "val.bin")


def token_files(config: DataConfig) -> tuple[Path, Preset | None, str | None] | None:
    """Return the folder of token files, the preset that has them, and which part of it.

    None if the source is text; token files that would have to be moved are refused.
    """
    source = config.source
    if not source or not isinstance(source, str):
        return None
    name, _, part = source.partition(":")
    if name in PRESETS and PRESETS[name].kind == "shards":
        return data_dir(config), PRESETS[name], part or config.config
    if name in PRESETS or not _is_token_folder(Path(source)):
        return None
    if config.dir not in (None, source):
        raise ConfigError(
            f"{source} already holds token files; they are used in place", "leave out --out"
        )
    return Path(source), None, None


def _is_token_folder(path: Path) -> bool:
    try:
        return path.is_dir() and any(file.name.endswith(".bin") for file in path.iterdir())
    except OSError:
        return False


def adopt(
    folder: Path, config: Config, on_progress: Callable[[int], None] = lambda n_bytes: None
) -> Manifest:
    """Write a manifest for the token files in `folder`; an existing one is kept.

    Raises:
        ConfigError: The tokenizer would have to be learned from text that is not there.
        DataError: A file is of another kind, or holds ids outside the vocabulary.
    """
    if (folder / shards.MANIFEST).exists():
        manifest = shards.read_manifest(folder)
        shards.check_shards(folder, manifest)
        return manifest
    if is_learned(config.tokenizer):
        raise ConfigError(
            f"tokenizer.name: token files do not say what the ids of a '{config.tokenizer.name}'"
            " vocabulary mean",
            "name its file with -s tokenizer.path=...",
        )
    tokenizer = make_tokenizer(config.tokenizer, list)
    lengths = tokenizer.token_lengths()
    units = [_unit(file, tokenizer, lengths, on_progress) for file in sorted(folder.glob("*.bin"))]
    dtypes = {dtype for _, dtype in units}
    if len(dtypes) != 1:
        raise DataError(f"{folder}: its files hold tokens of {' and '.join(sorted(dtypes))}")
    records = [record for record, _ in units]
    recipe = Recipe(
        source=str(folder),
        revision=None,
        text_field=config.data.text_field,
        encoding_errors=config.data.encoding_errors,
        val_fraction=0.0,
        seed=config.seed,
        shard_tokens=max(record.tokens.total for record in records),
        max_vocab_size=config.tokenizer.vocab_size,
        tokenizer=TokenizerRecord.of(tokenizer),
    )
    manifest = Manifest.of(recipe, records, dtypes.pop())
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
) -> tuple[UnitRecord, Dtype]:
    """Count and check one file."""
    shard, dtype = _describe(path)
    n_bytes = n_documents = 0
    digest = hashlib.sha256()
    for raw, ids in chunks(path, shard.header_bytes, dtype):
        digest.update(raw)
        highest = int(ids.max(initial=0))
        if highest >= tokenizer.vocab_size:
            raise DataError(
                f"{path}: holds id {highest:,}, but {tokenizer.name} has"
                f" {tokenizer.vocab_size:,} ids",
                "name the tokenizer that wrote it with -s tokenizer.name=... or .path=...",
            )
        n_bytes += int(lengths[ids].sum())
        n_documents += int((ids == tokenizer.eot).sum())
        on_progress(len(raw))
    shard = shard.model_copy(update={"sha256": digest.hexdigest()})
    record = UnitRecord(
        name=path.name,
        sha256=shard.sha256,
        documents=n_documents,
        tokens=Counts(**{shard.split: shard.tokens}),
        bytes=Counts(**{shard.split: n_bytes}),
        shards=[shard],
    )
    return record, dtype


def _describe(path: Path) -> tuple[Shard, Dtype]:
    """Tell what a file holds by its header, or one of nanoGPT's by its name."""
    split: Split = "val" if "val" in path.name else "train"
    if split not in path.name:
        raise DataError(f"{path}: neither 'train' nor 'val' in its name says what it is for")
    size = path.stat().st_size
    with path.open("rb") as file:
        header = np.frombuffer(file.read(12).ljust(12, b"\0"), dtype="<i4").tolist()
    for dtype, magic in shards.MAGIC.items():
        if tuple(header[:2]) == magic:
            shard = Shard(file=path.name, split=split, tokens=header[2], sha256="")
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
    """Download and link ready-made shards: the first `part` training files, or all."""
    assert preset.revision is not None and preset.n_shards is not None
    n_shards = preset.n_shards
    if part is not None:
        if not part.isdigit() or not 1 <= int(part) <= n_shards:
            raise ConfigError(f"{preset.name}:{part}: expected a number of files, 1 to {n_shards}")
        n_shards = int(part)
    names = [f"fineweb_train_{number:06d}.bin" for number in range(1, n_shards + 1)]
    atomic.make_folder(folder)
    for name in ("fineweb_val_000000.bin", *names):
        if not (folder / name).exists():
            file = hub.HubFile(preset.where, name, preset.revision)
            atomic.link(file.fetch(on_bytes).resolve(), folder / name)
