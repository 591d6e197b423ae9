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
    force: Annotated[
        bool, typer.Option("--force", help="Rename an existing OUT to OUT~1.")
    ] = False,
    json_: options.JsonOption = False,
) -> None:
    """Export a checkpoint to other programs' formats."""
    if dtype is not None and to is not Format.GGUF:
        raise ConfigError(f"--dtype: only --to gguf has a choice, {to.value} keeps float32")
    import torch

    from gptcli.interop.export import export as write
    from gptcli.interop.pretrained import open_model

    trained = open_model(checkpoint, options.load(None, None), torch.device("cpu"), whole=True)
    with console.bar(f"writing {out}"):
        done = write(trained, to, out, dtype=dtype or FileDtype.FLOAT32, force=force)
    if json_:
        console.result_json(asdict(done))
        return
    for note in done.notes:
        console.message(f"note: {note}")
    console.result(
        f"{done.path}: {done.family}, {done.parameters:,} parameters, {size(done.bytes)}\n"
        f"read back: largest logit difference {done.logit_difference:.2g}"
    )
