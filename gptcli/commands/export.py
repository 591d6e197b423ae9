"""`gpt export`: a trained model in the formats of other programs."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from gptcli.commands import options
from gptcli.errors import ConfigError
from gptcli.formatting import size
from gptcli.interop import FileDtype, Format
from gptcli.terminal import console


def export(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output folder (hf) or file.")],
    to: Annotated[Format, typer.Option(help="Target: Hugging Face, llama.cpp or nanoGPT.")],
    checkpoint: options.CheckpointOption = None,
    dtype: Annotated[
        FileDtype | None, typer.Option(help="Weight dtype of the GGUF file; default: float32.")
    ] = None,
    gguf: Annotated[
        bool, options.flag("--gguf", "With --to hf: a GGUF file in the folder too.")
    ] = False,
    push: Annotated[
        str | None,
        typer.Option(metavar="ORG/NAME", help="With --to hf: upload the folder to the Hub."),
    ] = None,
    force: options.ForceRename = False,
    json_: options.JsonOption = False,
) -> None:
    """Export a checkpoint to other programs' formats."""
    if dtype is not None and to is not Format.GGUF and not gguf:
        raise ConfigError(f"--dtype: only --to gguf has a choice, {to.value} keeps float32")
    for name, given in (("--gguf", gguf), ("--push", push)):
        if given and to is not Format.HF:
            raise ConfigError(f"{name}: only for --to hf, which writes a folder")
    if push is not None:
        from gptcli.interop import push as hub

        hub.require_repository(push)
    import torch

    from gptcli.interop.export import TARGETS
    from gptcli.interop.export import export as write
    from gptcli.interop.pretrained import open_model

    trained = open_model(checkpoint, options.load(None, None), torch.device("cpu"), whole=True)
    beside, of_file = out / f"{out.name}.gguf", dtype or FileDtype.FLOAT32
    if gguf:
        TARGETS[Format.GGUF].check(trained, beside)  # before anything is written
    with console.bar(f"writing {out}"):
        done = write(trained, to, out, dtype=FileDtype.FLOAT32 if gguf else of_file, force=force)
        also = write(trained, Format.GGUF, beside, dtype=of_file) if gguf else None
    address = None
    if push is not None:
        with console.bar(f"pushing {out}"):
            address = hub.push(out, push)
    notes = [*done.notes, *(also.notes if also else ())]
    if json_:
        more = {"notes": notes, "gguf": also.path if also else None, "address": address}
        console.result_json(asdict(done) | more)
        return
    for note in notes:
        console.message(f"note: {note}")
    console.result(
        f"{done.path}: {done.family}, {done.parameters:,} parameters, {size(done.bytes)}\n"
        f"read back: largest logit difference {done.logit_difference:.2g}"
        + (f"\n{also.path}: {of_file.value}, {size(also.bytes)}" if also else "")
        + (f"\npushed: {address}" if address else "")
    )
