"""`gpt data`: what is in a data folder, what it shares with another text, hashes checked."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gptcli.commands import options
from gptcli.errors import DataError
from gptcli.formatting import moment, plural, shares, size
from gptcli.terminal import console

if TYPE_CHECKING:
    from gptcli.data.contents import Contents
    from gptcli.data.overlap import Overlap
    from gptcli.data.shards import Manifest

_MOST_EXAMPLES = 5

app = typer.Typer(help="Inspect prepared data.", no_args_is_help=False)

Folder = Annotated[str, typer.Argument(metavar="DIR", help="A prepared data folder.")]


@app.command()
def info(
    folder: Folder,
    full: Annotated[
        bool, options.flag("--full", "Also read the tokens: lengths, characters, copies.")
    ] = False,
    json_: options.JsonOption = False,
) -> None:
    """Describe a data folder."""
    from gptcli.api.prepare import Prepared

    place, manifest = _opened(folder)
    facts: dict[str, Any] = {
        **manifest.recipe.model_dump(exclude={"tokenizer", "max_vocab_size"}),
        **Prepared(place, manifest).facts(),
        "dtype": manifest.dtype,
        "fingerprint": manifest.fingerprint,
        "val_share": round(manifest.val_share, 6),
    }
    facts = {"dir": folder} | facts | {"dir": folder}
    if manifest.has_own_val:
        facts["val_fraction"] = None
    contents = _contents(place, manifest) if full else None
    if json_:
        console.result_json(facts | ({"contents": asdict(contents)} if contents else {}))
        return
    if manifest.has_own_val:
        facts["val_fraction"] = "not used: the source has its own validation text"
    facts["val_share"] = f"{manifest.val_share:.2%} of the tokens"
    facts |= _described(contents) if contents else {}
    width = max(16, *map(len, facts))
    for key, value in facts.items():
        if key == "skipped":
            what = "row" if manifest.is_chat else "document"
            value = options.skipped_rows(value, what) or "none"
        elif key == "filters":
            value = json.dumps(value) if value else "none"
        elif isinstance(value, dict):
            value = ", ".join(f"{inner:,} {name}" for name, inner in value.items())
        text = f"{value:,}" if isinstance(value, int) and key != "seed" else str(value)
        console.result(f"{key:<{width}} {text}")


def _opened(folder: str) -> tuple[Path, "Manifest"]:
    """Return the place of a data folder on this machine, and its manifest."""
    from gptcli.data.presets import folder_at
    from gptcli.data.shards import read_manifest

    return folder_at(folder), read_manifest(folder_at(folder))


def _contents(folder: Path, manifest: "Manifest", most: int | None = None) -> "Contents":
    from gptcli.data.contents import MOST_TOKENS, measure

    with console.bar(f"reading {folder}", manifest.tokens.total) as bar:
        return measure(folder, manifest, most or MOST_TOKENS, bar.advance)


def _described(found: "Contents") -> dict[str, str]:
    """Return the counts in words, by what was counted."""
    frequent = {repr(text): float(n) for _, text, n in found.frequent[:_MOST_EXAMPLES]}
    return {
        "tokens read": f"{found.tokens_read:,}",
        "tokens per byte": f"{found.tokens_per_byte:.4f}",
        "lengths": f"{found.median_length:,.0f} tokens in the middle, {found.mean_length:,.1f} on"
        f" average, {found.longest:,} at most; {found.empty_documents:,} empty",
        "copies": f"{found.copies:,} of {found.documents:,} documents equal an earlier one;"
        f" {found.copies_in_val:,} for validation are in the training split",
        "characters": ", ".join(
            f"{share} {name}" for name, share in shares(found.characters).items()
        ),
        "frequent": ", ".join(
            f"{text} {n / max(1, found.tokens_read):.1%}" for text, n in frequent.items()
        ),
        "unused ids": f"{found.unused_ids:,}",
    }


@app.command()
def report(
    folder: Folder,
    out: Annotated[Path | None, options.output("DIR/report.html")] = None,
    max_tokens: Annotated[
        int | None, options.number("Most tokens to read of a split; default: 100 million.")
    ] = None,
    json_: options.JsonOption = False,
) -> None:
    """Write a self-contained HTML report of a data folder."""
    from gptcli.plotting import page, require_ending
    from gptcli.plotting.data_report import render

    place, manifest = _opened(folder)
    file = out or place / "report.html"
    require_ending(file, *page.FORMATS)
    contents = _contents(place, manifest, max_tokens)
    n_bytes = page.write(file, render(place, manifest, contents, moment()))
    facts = {"file": str(file), "bytes": n_bytes, "contents": asdict(contents)}
    console.result_json(facts) if json_ else console.result(f"{file}: {size(n_bytes)}")


@app.command()
def peek(
    folder: Folder,
    split: options.SplitOption = "train",
    count: Annotated[int, options.number("Number of windows or conversations.")] = 3,
    seq_len: Annotated[
        int | None, options.number("Tokens per window (64), or the most of a conversation (1024).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed for choosing windows.")] = 1337,
    json_: options.JsonOption = False,
) -> None:
    """Show decoded training windows, or conversations with what is trained on marked."""
    from gptcli.data.inspection import END_OF_TEXT_MARK, conversations_as_text, windows_as_text

    path, manifest = _opened(folder)
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
        shown = [asdict(each) for each in windows]
        console.result_json({"dir": folder, "split": split, "windows": shown})
        return
    for each in windows:
        place = f"{split} tokens {each.start:,} to {each.start + seq_len:,}"
        text = each.text.replace(END_OF_TEXT_MARK, f"\n{END_OF_TEXT_MARK}\n")
        console.result(f"--- {place}, from {', '.join(each.units)}\n{text}")


@app.command()
def verify(folder: Folder, json_: options.JsonOption = False) -> None:
    """Verify the size, header, hash and ids of every shard."""
    from gptcli.data.inspection import damaged_shards
    from gptcli.data.shards import SPLITS, read_tokenizer

    path, manifest = _opened(folder)
    read_tokenizer(path, manifest)
    n_shards = sum(len(manifest.shards(split)) for split in SPLITS)
    with console.bar(f"verifying {folder}", manifest.tokens.total) as bar:
        problems = damaged_shards(path, manifest, bar.advance)
    if problems:
        more = f" ({len(problems) - 1} more)" if len(problems) > 1 else ""
        hint = "prepare the folder again with `gpt prepare --force`"
        raise DataError(f"{problems[0]}{more}", hint)
    if json_:
        console.result_json({"dir": folder, "shards": n_shards, "damaged": 0})
    else:
        console.result(f"{folder}: {plural(n_shards, 'shard')} match the manifest")


@app.command()
def overlap(
    a: Annotated[str, typer.Argument(metavar="A", help="Prepared data, or a file of text.")],
    b: Annotated[
        str,
        typer.Argument(
            metavar="B", help="Prepared data, a file of text, or questions as for gpt eval."
        ),
    ],
    split: Annotated[
        Literal["train", "val"], typer.Option(help="Split of B; of A, train is read.")
    ] = "val",
    set_: options.SetOption = None,
    json_: options.JsonOption = False,
) -> None:
    """Measure how much of B occurs in A: lines, spans, questions of a test."""
    from gptcli.data import overlap as overlapping
    from gptcli.data.archives import suffix_of
    from gptcli.data.messages import format_of
    from gptcli.data.presets import folder_at, is_address
    from gptcli.data.readers import fields_of

    data, asked, place = options.load(None, set_).data, list[str](), folder_at(b)
    for name, path in ((a, folder_at(a)), (b, place)):
        if is_address(name):
            _opened(name)  # which is downloaded here
        fields = {*fields_of(path)} if suffix_of(path) == ".jsonl" else set[str]()
        if path is place and "answer" in fields and fields & {"prompt", "messages"}:
            continue
        if format_of([*fields]) is not None and data.text_field not in fields:
            hint = f"prepare them, and name their folder: `gpt prepare {path}`"
            raise DataError(f"{path}: conversations are compared as prepared data", hint)
    if "answer" in fields and fields & {"prompt", "messages"}:
        from gptcli.api.questions import read_questions

        for question in read_questions(place):
            asked.append("\n".join(m.content for m in question.messages if m.role == "user"))
    with console.bar(f"comparing {b} with {a}"):
        found = overlapping.overlap(
            folder_at(a), place, split=split, field=data.text_field,
            errors=data.encoding_errors, questions=asked,
        )  # fmt: skip
    name = f"{split} of {b}" if place.is_dir() else b
    if not found.units:
        raise DataError(f"{name}: no text to compare")
    if json_:
        console.result_json({"a": a, "b": b, "split": split} | asdict(found))
        return
    _show_overlap(found, f"{name}: {'the first ' * found.is_part}", a, asked)


def _show_overlap(found: "Overlap", name: str, a: str, asked: list[str]) -> None:
    console.result(f"{name}{plural(found.units, found.unit)}, of which {a} has")
    shares = [(found.lines, "lines")]
    shares += [(share, f"spans of {n} {found.unit}s") for n, share in found.spans.items()]
    if found.questions is not None:
        what = (
            f"questions (at least {min(found.spans)} {found.unit}s in a row; a shorter one whole)"
        )
        shares.append((found.questions, what))
    for share, what in shares:
        console.result(f"{share.share:8.2%} of {share.total:,} {what}")
    for number in found.questions_found[:_MOST_EXAMPLES]:
        console.result(f"--- question {number + 1:,}\n{asked[number]}")
    if found.longest.units:
        text = plural(found.longest.units, found.unit)
        console.result(f"--- the longest common span: {text}\n{found.longest.text.strip()}")
    for each in found.stretches[: 0 if asked else None]:
        text = f"{plural(each.units, found.unit)} from {found.unit} {each.start:,} on"
        console.result(f"--- {text}\n{each.text.strip()}")
