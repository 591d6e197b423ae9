"""`gpt data`: what is in a data folder, windows or conversations decoded, hashes checked."""

from pathlib import Path
from typing import Annotated, Any

import typer

from gptcli.commands import complete, options
from gptcli.errors import DataError
from gptcli.formatting import plural
from gptcli.terminal import console

app = typer.Typer(help="Inspect prepared data.", no_args_is_help=False)

Folder = Annotated[
    str,
    typer.Argument(
        metavar="DIR", help="A prepared data folder.", autocompletion=complete.data_folders
    ),
]


@app.command()
def info(folder: Folder, json_: options.JsonOption = False) -> None:
    """Describe a data folder."""
    from gptcli.api.prepare import Prepared
    from gptcli.data.shards import read_manifest

    manifest = read_manifest(Path(folder))
    facts: dict[str, Any] = {
        "dir": folder,
        **manifest.recipe.model_dump(exclude={"tokenizer", "max_vocab_size"}),
        **Prepared(Path(folder), manifest).facts(),
        "dtype": manifest.dtype,
        "fingerprint": manifest.fingerprint,
        "val_share": round(manifest.val_share, 6),
    }
    if manifest.has_own_val:
        facts["val_fraction"] = None
    if json_:
        console.result_json(facts)
        return
    if manifest.has_own_val:
        facts["val_fraction"] = "not used: the source has its own validation text"
    facts["val_share"] = f"{manifest.val_share:.2%} of the tokens"
    for key, value in facts.items():
        if key == "skipped":
            value = options.skipped_rows(value) or "none"
        elif isinstance(value, dict):
            value = ", ".join(f"{inner:,} {name}" for name, inner in value.items())
        text = f"{value:,}" if isinstance(value, int) and key != "seed" else str(value)
        console.result(f"{key:<16} {text}")


@app.command()
def peek(
    folder: Folder,
    split: options.SplitOption = "train",
    count: Annotated[
        int, typer.Option(metavar="N", min=1, help="Number of windows or conversations.")
    ] = 3,
    seq_len: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Tokens per window (64), or the most of a conversation (1024)."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed for choosing windows.")] = 1337,
    json_: options.JsonOption = False,
) -> None:
    """Show decoded training windows, or conversations with what is trained on marked."""
    from gptcli.data.inspection import conversations_as_text, windows_as_text
    from gptcli.data.shards import read_manifest

    path, manifest = Path(folder), read_manifest(Path(folder))
    if manifest.is_chat:
        talks = conversations_as_text(
            path, manifest, split, count=count, max_tokens=seq_len or 1024, seed=seed
        )
        if json_:
            shown = [
                {"number": n, "parts": [{"text": text, "trained": on} for text, on in parts]}
                for n, parts in talks
            ]
            console.result_json({"dir": folder, "split": split, "conversations": shown})
            return
        for number, parts in talks:
            console.result(f"--- {split} conversation {number:,}")
            console.marked(parts)
        return
    seq_len = seq_len or 64
    windows = windows_as_text(path, manifest, split, count=count, seq_len=seq_len, seed=seed)
    if json_:
        facts = [{"start": start, "text": text} for start, text in windows]
        console.result_json({"dir": folder, "split": split, "windows": facts})
        return
    for start, text in windows:
        console.result(f"--- {split} tokens {start:,} to {start + seq_len:,}\n{text}")


@app.command()
def verify(folder: Folder, json_: options.JsonOption = False) -> None:
    """Verify the size, header, hash and ids of every shard."""
    from gptcli.data.inspection import damaged_shards
    from gptcli.data.shards import SPLITS, read_manifest, read_tokenizer

    path = Path(folder)
    manifest = read_manifest(path)
    read_tokenizer(path, manifest)
    n_shards = sum(len(manifest.shards(split)) for split in SPLITS)
    with console.bar(f"verifying {folder}", manifest.tokens.train + manifest.tokens.val) as bar:
        problems = damaged_shards(path, manifest, bar.advance)
    if problems:
        more = f" ({len(problems) - 1} more)" if len(problems) > 1 else ""
        hint = "prepare the folder again with `gpt prepare --force`"
        raise DataError(f"{problems[0]}{more}", hint)
    if json_:
        console.result_json({"dir": folder, "shards": n_shards, "damaged": 0})
    else:
        console.result(f"{folder}: {plural(n_shards, 'shard')} match the manifest")
