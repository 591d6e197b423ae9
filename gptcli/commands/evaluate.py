"""`gpt eval`: loss, perplexity and bits per byte of a checkpoint."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli import console
from gptcli.commands import options
from gptcli.errors import ConfigError, DataError

if TYPE_CHECKING:
    from gptcli.checkpoint import TrainedModel
    from gptcli.evaluation import Evaluation, TokenSequence


def evaluate(
    checkpoint: options.CheckpointOption = None,
    config: options.ConfigOption = None,
    set_: options.SetOption = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="DIR", help="Prepared data; default: the run's own."),
    ] = None,
    text: Annotated[
        str | None, typer.Option("--text", metavar="FILE", help="Score a text file instead.")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="train or val.")] = "val",
    stride: Annotated[
        int | None, typer.Option("--stride", help="Tokens a window adds; default: the context.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="Score about this many, evenly spaced.")
    ] = None,
    yardsticks: Annotated[
        bool, typer.Option("--yardsticks", help="Also compress the same text with gzip and xz.")
    ] = False,
    json_: options.JsonOption = False,
) -> None:
    """Measure loss, perplexity and bits per byte."""
    options.require_positive(stride=stride, max_tokens=max_tokens)
    _require_one_text(data, text, split, yardsticks)
    loaded = options.exactly(options.load(config, set_))
    from gptcli.checkpoint import find_checkpoint, load_model
    from gptcli.device import compute
    from gptcli.evaluation import evaluate as evaluate_model

    machine = compute(loaded)
    trained = load_model(find_checkpoint(checkpoint, loaded), machine.device)
    context = _context(loaded.data.seq_len, trained)
    if stride is not None and stride > context:
        raise ConfigError(f"--stride: {stride} would skip tokens; the context is {context}")
    if text is not None:
        tokens, split = _text_tokens(Path(text), trained), "text"
    else:
        tokens = _split_tokens(Path(data) if data else trained.data_dir, split, trained)
    began = time.perf_counter()
    with tokens, console.bar("evaluating") as bar:
        found = evaluate_model(
            trained.model,
            tokens,
            machine,
            context=context,
            stride=stride,
            max_tokens=max_tokens,
            token_lengths=trained.tokenizer.token_lengths(),
            on_progress=bar.update,
        )
    assert found is not None
    facts = _facts(trained, split, found, time.perf_counter() - began)
    if yardsticks:
        folder = Path(data) if data else trained.data_dir
        facts |= _yardsticks(folder, trained)
    console.result_json(facts) if json_ else console.result(_describe(facts))


def _require_one_text(data: str | None, text: str | None, split: str, yardsticks: bool) -> None:
    """Refuse options that do not name one text to score."""
    if data is not None and text is not None:
        raise ConfigError("--data and --text exclude each other: there is one text to score")
    if split not in ("train", "val"):
        raise ConfigError(f"--split: expected train or val, got '{split}'")
    if text is not None and yardsticks:
        raise ConfigError("--yardsticks needs prepared data: it compresses both splits")


def _context(wanted: int | None, trained: "TrainedModel") -> int:
    block_size = trained.model.config.block_size
    if wanted is not None and wanted > block_size:
        raise ConfigError(f"data.seq_len: {wanted} is longer than the context of {block_size}")
    return wanted or block_size


def _text_tokens(path: Path, trained: "TrainedModel") -> "TokenSequence":
    """Tokenize a text file; nothing is put before it."""
    import numpy as np

    from gptcli.data.readers import read_text
    from gptcli.evaluation import TokenArray

    if not path.is_file():
        raise DataError(f"{path}: no such file")
    tokenizer = trained.tokenizer
    pieces = [tokenizer.encode(piece) for piece in read_text(path, "strict", tokenizer.safe_cut)]
    tokens = np.concatenate(pieces)
    if len(tokens) < 2:
        raise DataError(f"{path}: {len(tokens)} tokens; scoring takes at least 2")
    return TokenArray(tokens)


def _split_tokens(folder: Path, split: str, trained: "TrainedModel") -> "TokenSequence":
    """Open a split of prepared data that the checkpoint's tokenizer wrote."""
    from gptcli.data.shards import TokenReader, read_manifest

    manifest = read_manifest(folder)
    if manifest.tokenizer.sha256 != trained.tokenizer.fingerprint:
        raise DataError(
            f"{folder} was written by another tokenizer ({manifest.tokenizer.name},"
            f" {manifest.tokenizer.vocab_size} ids) than the checkpoint's"
            f" ({trained.tokenizer.name}, {trained.tokenizer.vocab_size} ids)",
            "name the data it was trained on with --data, or score a file with --text",
        )
    tokens = TokenReader(folder, manifest, split)  # type: ignore[arg-type]
    if len(tokens) < 2:
        raise DataError(f"{folder}: no {split} tokens", "try --split train, or --text FILE")
    return tokens


def _facts(
    trained: "TrainedModel", split: str, found: "Evaluation", seconds: float
) -> dict[str, Any]:
    return {
        "checkpoint": str(trained.path),
        "step": trained.step,
        "split": split,
        "tokens": found.tokens,
        "bytes": found.bytes,
        "context": found.context,
        "stride": found.stride,
        "loss": found.loss,
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte,
        "seconds": round(seconds, 3),
    }


def _yardsticks(folder: Path, trained: "TrainedModel") -> dict[str, Any]:
    from gptcli.data.shards import SPLITS, TokenReader, read_manifest
    from gptcli.yardsticks import measure

    manifest = read_manifest(folder)
    texts: list[bytes] = []
    with console.bar("compressing with gzip and xz"):
        for split in SPLITS:
            with TokenReader(folder, manifest, split) as tokens:
                ids = tokens.read(0, len(tokens)).tolist()
            texts.append(trained.tokenizer.decode_bytes(ids))
        return {"yardsticks": measure(*texts)}


def _describe(facts: dict[str, Any]) -> str:
    lines = [
        f"{facts['checkpoint']} (step {facts['step']}) on {facts['split']}:"
        f" {facts['tokens']:,} tokens, {facts['bytes']:,} bytes,"
        f" context {facts['context']}, stride {facts['stride']}",
        f"loss {facts['loss']:.4f} nats per token   perplexity {facts['perplexity']:.2f} per token"
        f"   {facts['bits_per_byte']:.3f} bits per byte",
    ]
    if (found := facts.get("yardsticks")) is not None:
        lines.append(
            f"the same text takes {found['gzip']:.3f} bits per byte with gzip -9,"
            f" {found['xz']:.3f} with xz -9e,"
            f" {found['xz_after_training_text']:.3f} with xz -9e that has read the training text"
        )
        better = [name for name in ("gzip", "xz") if facts["bits_per_byte"] < found[name]]
        verdict = "better than " + " and ".join(better) if better else "not yet as well as gzip"
        lines.append(f"fewer is better: the model predicts text it has never seen {verdict}")
    return "\n".join(lines)
