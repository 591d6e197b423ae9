"""`gpt eval`: loss, perplexity and bits per byte of a checkpoint, or of several side by side."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli.commands import complete, options
from gptcli.errors import ConfigError
from gptcli.formatting import fixed
from gptcli.terminal import console

if TYPE_CHECKING:
    from gptcli.api.evaluate import Score
    from gptcli.checkpoint import TrainedModel
    from gptcli.evaluation.compare import Difference

# OpenAI's GPT-2 on OpenWebText's validation part, nats per token, as nanoGPT publishes them.
GPT2_ON_OPENWEBTEXT = {"124M": 3.12, "350M": 2.84, "774M": 2.67, "1558M": 2.54}

Checkpoints = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CHECKPOINT",
        help="Files, runs, gpt2, hf:org/name or folders; several are compared. Default: the newest"
        " run's best.",
        show_default=False,
        autocompletion=complete.checkpoints,
    ),
]
Data = Annotated[
    str | None, typer.Option(metavar="DIR", help="Prepared data; default: the run's own.")
]
TextFile = Annotated[str | None, typer.Option(metavar="FILE", help="Score a text file instead.")]
Stride = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Window stride; default: the context."),
]
MaxTokens = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Score a subset of about this many tokens.")
]
Yardsticks = Annotated[
    bool, typer.Option("--yardsticks", help="Compare with gzip and xz on the same text.")
]
Tasks = Annotated[
    str | None, typer.Option(metavar="NAME,...", help="lm-eval tasks or YAML files to run instead.")
]
Limit = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="With --tasks: examples per task.")
]


def evaluate(
    checkpoints: Checkpoints = None,
    checkpoint: options.CheckpointOption = None,
    config: options.ConfigOption = None,
    set_: options.SetOption = None,
    data: Data = None,
    text: TextFile = None,
    split: options.SplitOption = "val",
    stride: Stride = None,
    max_tokens: MaxTokens = None,
    yardsticks: Yardsticks = False,
    tasks: Tasks = None,
    limit: Limit = None,
    json_: options.JsonOption = False,
) -> None:
    """Measure loss, perplexity and bits per byte; compare checkpoints."""
    if limit is not None and tasks is None:
        raise ConfigError("--limit applies to --tasks; --max-tokens scores part of a text")
    if tasks is not None and (data or text or stride or max_tokens or yardsticks or split != "val"):
        raise ConfigError("--tasks bring their own text: use --limit and no other option with it")
    if checkpoints and checkpoint is not None:
        raise ConfigError("the checkpoint is given twice: as an argument and with --checkpoint")
    if yardsticks and (text is not None or split != "val"):
        raise ConfigError("--yardsticks compresses the validation text: omit --text and --split")
    loaded = options.load(config, set_)
    if loaded.dtype == "auto":  # a measurement is exact unless a precision is named
        loaded = loaded.model_copy(update={"dtype": "float32"})
    from gptcli.api.evaluate import compare, open_checkpoint

    names: list[str | None] = [*checkpoints] if checkpoints else [checkpoint]
    if tasks is not None:
        models = [open_checkpoint(name, loaded) for name in names]
        _run_tasks(models, tasks.split(","), limit, json_)
        return
    with console.bar("evaluating") as bar:
        scores = compare(
            names, loaded, text=text, data=data, split=split, stride=stride,
            max_tokens=max_tokens, on_progress=bar.update,
        )  # fmt: skip
    beside = {} if text is not None else _beside(scores[0], yardsticks)
    if len(scores) > 1:
        _compare(scores, beside, json_)
        return
    facts = _facts(scores[0]) | beside
    console.result_json(facts) if json_ else console.result(describe(facts))


def _beside(score: "Score", yardsticks: bool) -> dict[str, Any]:
    """Return figures of others on prepared data: published losses, and compressors."""
    from gptcli.data.shards import SPLITS, TokenReader, read_manifest
    from gptcli.evaluation.compare import measure

    folder, tokenizer = score.place, score.trained.tokenizer
    manifest = read_manifest(folder)
    found: dict[str, Any] = {}
    if "openwebtext" in manifest.recipe.source.lower() and tokenizer.name == "gpt2":
        found["references"] = GPT2_ON_OPENWEBTEXT
    if yardsticks:
        texts: list[bytes] = []
        with console.bar("compressing with gzip and xz"):
            for split in SPLITS:
                with TokenReader(folder, manifest, split) as tokens:
                    texts.append(tokenizer.decode_bytes(tokens.read(0, len(tokens)).tolist()))
            found["yardsticks"] = measure(*texts)
    return found


def _facts(score: "Score") -> dict[str, Any]:
    found = score.evaluation
    return {
        "checkpoint": str(score.trained.path),
        "step": score.trained.step,
        "split": score.split,
        "tokens": found.tokens,
        "bytes": found.bytes,
        "context": found.context,
        "stride": found.stride,
        "loss": found.loss,
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte,
        "seconds": round(score.seconds, 3),
        "standard_error": found.standard_error,
        "words": found.words,
        "word_perplexity": found.word_perplexity,
        "data": str(score.place),
    }


def describe(facts: dict[str, Any]) -> str:
    """Return the lines about one model, from its JSON result."""
    step = f" (step {facts['step']:,})" if facts["step"] else ""
    lines = [
        f"{facts['checkpoint']}{step} on {_place(facts)}:"
        f" {facts['tokens']:,} tokens, {facts['bytes']:,} bytes,"
        f" context {facts['context']}, stride {facts['stride']}",
        f"loss {fixed(facts['loss'], 4)} nats per token (standard error"
        f" {fixed(facts['standard_error'], 4)})",
        f"perplexity {fixed(facts['perplexity'], 2)} per token,"
        f" {fixed(facts['word_perplexity'], 2)} per word",
        f"{fixed(facts['bits_per_byte'], 3)} bits per byte",
    ]
    return "\n".join(lines + _describe_beside(facts, facts["bits_per_byte"]))


def _place(facts: dict[str, Any]) -> str:
    return facts["data"] if facts["split"] == "text" else f"{facts['split']} of {facts['data']}"


def _describe_beside(facts: dict[str, Any], bits_per_byte: float) -> list[str]:
    lines = []
    if (known := facts.get("references")) is not None:
        losses = ", ".join(f"{size} {loss}" for size, loss in known.items())
        lines.append(f"OpenAI's GPT-2 on OpenWebText, context 1024, nats per token: {losses}")
    if (found := facts.get("yardsticks")) is not None:
        lines.append(
            f"the validation text takes {found['gzip']:.3f} bits per byte with gzip -9,"
            f" {found['xz']:.3f} with xz -9e,"
            f" {found['xz_after_training_text']:.3f} with xz -9e after the training text"
        )
        names = {key: key.replace("_", " ").replace("after", "after the") for key in found}
        beaten = [name for key, name in names.items() if bits_per_byte < found[key]]
        others = [name for name in names.values() if name not in beaten]
        verdict = f"beats {' and '.join(beaten) or 'none of the three'}"
        verdict += f", but not {' or '.join(others)}" * bool(beaten and others)
        lines.append(f"lower is better: on text that it has never seen, the model {verdict}")
    return lines


def _compare(scores: "list[Score]", beside: dict[str, Any], json_: bool) -> None:
    """Print a table, and how the first model differs from each of the others."""
    from gptcli.evaluation.compare import paired_difference

    results = [_facts(score) for score in scores]
    first = results[0]["checkpoint"]
    others = [
        (facts["checkpoint"], paired_difference(scores[0].evaluation, score.evaluation))
        for facts, score in zip(results[1:], scores[1:], strict=True)
    ]
    if json_:
        differences = [
            {"first": first, "second": second, "bits_per_byte": found.bits_per_byte,
             "low": found.low, "high": found.high} for second, found in others
        ]  # fmt: skip
        console.result_json({"results": results, "differences": differences} | beside)
        return
    header = ("bits/byte", "nats/token", "perplexity", "tokens", "context", "step", "checkpoint")
    rows = [
        (fixed(facts["bits_per_byte"], 4), fixed(facts["loss"], 4), fixed(facts["perplexity"], 2),
         f"{facts['tokens']:,}", f"{facts['context']}", f"{facts['step']}", facts["checkpoint"])
        for facts in results
    ]  # fmt: skip
    console.table(header, rows)
    lines = [f"scored on {_place(results[0])}"]
    lines += [_describe_difference(first, second, found) for second, found in others]
    for line in lines + _describe_beside(beside, results[0]["bits_per_byte"]):
        console.result(line)


def _describe_difference(first: str, second: str, found: "Difference") -> str:
    interval = f"95% interval {found.low:+.4f} to {found.high:+.4f}"
    if found.low != found.low:
        interval, verdict = "no interval", "the text is too short to tell"
    elif found.is_certain:
        verdict = f"{first if found.bits_per_byte < 0 else second} is better"
    else:
        verdict = "this text cannot tell which is better"
    return (
        f"{first} minus {second}: {found.bits_per_byte:+.4f} bits per byte ({interval}): {verdict}"
    )


def _run_tasks(
    models: "list[TrainedModel]", names: list[str], limit: int | None, json_: bool
) -> None:
    from gptcli.interop.lm_eval import run_tasks

    results: list[dict[str, Any]] = []
    for model in models:
        tasks = run_tasks(model, names, limit=limit, device=str(model.model.wte.weight.device))
        results.append({"checkpoint": str(model.path), "step": model.step, "tasks": tasks})
    if json_:
        console.result_json(results[0] if len(results) == 1 else {"results": results})
        return
    rows = []
    for facts in results:
        for task, metrics in facts["tasks"].items():
            for metric, value in metrics.items():
                if not metric.endswith("_stderr"):
                    error = metrics.get(f"{metric}_stderr")
                    error = "" if error is None else f"{error:.4f}"
                    rows.append((task, metric, f"{value:.4f}", error, facts["checkpoint"]))
    console.table(("task", "metric", "value", "standard error", "checkpoint"), rows)
