"""`gpt compress` and `gpt decompress`: a file as small as a checkpoint's bits per byte say."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from gptcli import atomic
from gptcli.commands import options
from gptcli.errors import CheckpointError, ConfigError, DataError
from gptcli.formatting import fixed, size
from gptcli.terminal import console

_SUFFIX = ".gptz"
File = Annotated[Path, typer.Argument(metavar="FILE")]
Stride = Annotated[
    int | None, options.number("Window stride, as in gpt eval; default: the context.")
]


def compress(
    file: File,
    out: Annotated[Path | None, options.output("FILE.gptz", "OUT")] = None,
    checkpoint: options.CheckpointOption = None,
    stride: Stride = None,
    force: options.ForceRename = False,
    json_: options.JsonOption = False,
) -> None:
    """Compress a file with a checkpoint's predictions."""
    content, began = _read(file), time.perf_counter()
    out = out or file.with_name(file.name + _SUFFIX)
    atomic.require_free(out, force)
    atomic.make_folder(out.parent)
    from gptcli.api.evaluate import load
    from gptcli.evaluation.compress import compress as pack

    trained = load(checkpoint, device="cpu")
    with console.bar(f"compressing {file}") as bar:
        packed = pack(content, trained, stride=stride, on_progress=bar.update)
    data = packed.to_bytes()
    _write(out, data)
    bits = 8 * len(data) / max(1, len(content))
    facts = {
        "checkpoint": str(trained.path), "file": str(out), "bytes": len(content),
        "compressed_bytes": len(data), "bits_per_byte": bits,
        "tokens": packed.n_tokens, "bytes_aside": len(packed.aside), "stride": packed.stride,
        "sha256": packed.content, "seconds": round(time.perf_counter() - began, 3),
    }  # fmt: skip
    line = f"{out}: {size(len(data))} of {size(len(content))}"
    if content:
        line += f", {fixed(bits, 3)} bits per byte"
    if packed.aside:
        line += f"; {size(len(packed.aside))} of it, deflated, is what the tokens cannot give back"
    console.result_json(facts) if json_ else console.result(line)


def decompress(
    file: File,
    out: Annotated[Path | None, options.output("FILE without .gptz", "OUT")] = None,
    checkpoint: options.CheckpointOption = None,
    force: options.ForceRename = False,
    json_: options.JsonOption = False,
) -> None:
    """Restore a file that gpt compress wrote, with the same checkpoint."""
    if out is None and (file.suffix != _SUFFIX or file.name == _SUFFIX):
        raise ConfigError(f"{file} does not end in {_SUFFIX}", "name the file to write with -o OUT")
    out = out or file.with_suffix("")
    data, began = _read(file), time.perf_counter()
    atomic.require_free(out, force)
    atomic.make_folder(out.parent)
    from gptcli.api.evaluate import load
    from gptcli.evaluation.compress import Packed, decompress, machine

    with _about(file):
        packed = Packed.from_bytes(data)
    trained = load(checkpoint, device="cpu")
    if packed.machine != (here := machine()):
        console.message(f"note: it was compressed with {packed.machine}; this is {here}")
    with console.bar(f"decompressing {file}") as bar, _about(file):
        content = decompress(packed, trained, bar.update)
    _write(out, content)
    facts = {
        "checkpoint": str(trained.path), "file": str(out), "bytes": len(content),
        "compressed_bytes": len(data), "sha256": packed.content,
        "seconds": round(time.perf_counter() - began, 3),
    }  # fmt: skip
    console.result_json(facts) if json_ else console.result(f"{out}: {size(len(content))}")


@contextmanager
def _about(file: Path) -> Iterator[None]:
    """Put the file's name before the message of an error."""
    try:
        yield
    except (CheckpointError, DataError) as error:
        raise type(error)(f"{file}: {error.message}", error.hint) from error


def _read(path: Path) -> bytes:
    if path.is_dir():
        raise DataError(f"{path}: is a folder, not a file")
    try:
        with atomic.storage_errors(path):
            return atomic.read_bytes(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error


def _write(out: Path, data: bytes) -> None:
    if out.exists():
        atomic.set_aside(out)
    atomic.write_bytes(out, data)
