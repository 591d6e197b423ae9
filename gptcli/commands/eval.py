"""`gpt eval`: loss, perplexity and bits per byte of a checkpoint, or of several side by side."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli.commands import complete, options
from gptcli.commands.eval_sources import show_sources
from gptcli.errors import ConfigError
from gptcli.formatting import duration, fixed, listed
from gptcli.terminal import console

if TYPE_CHECKING:
    from gptcli.api.evaluate import Score
    from gptcli.checkpoint import TrainedModel
    from gptcli.config import Config
    from gptcli.evaluation.metrics import Difference

_LABELS = {
    "gzip": "gzip -9",
    "xz": "xz -9e",
    "xz_after_training_text": "xz -9e after the training text",
    "ngram": "a 5-gram model",
    "ppmd": "PPMd",
    "ppmd_after_training_text": "PPMd after the training text",
}
# OpenAI's GPT-2 on OpenWebText's validation part, nats per token, as nanoGPT publishes them.
GPT2_ON_OPENWEBTEXT = {"124M": 3.12, "350M": 2.84, "774M": 2.67, "1558M": 2.54}

Checkpoints = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CHECKPOINT",
        help="Files, runs, gpt2, hf:org/name or folders; several are compared. Default: the newest"
        " run's best.",
        show_default=False,
        autocompletion=complete.runs,
    ),
]
Data = Annotated[
    str | None, typer.Option(metavar="DIR", help="Prepared data; default: the run's own.")
]
Source = Annotated[
    str | None, typer.Option(metavar="NAME", help="One source of the run's data.mix.")
]
TextFile = Annotated[str | None, typer.Option(metavar="FILE", help="Score a text file instead.")]
Stride = Annotated[int | None, options.number("Window stride; default: the context.")]
MaxTokens = Annotated[int | None, options.number("Score a subset of about this many tokens.")]
Baselines = Annotated[
    bool, options.flag("--baselines", "Compare with gzip, xz, PPMd and n-grams on the same text.")
]
Adapt = Annotated[
    bool, options.flag("--adapt", "Also score a copy that learns from what it has scored.")
]
AdaptLr = Annotated[
    float | None,
    typer.Option(metavar="F", min=0, help="Learning rate of --adapt; default: 0.0003."),
]
Tasks = Annotated[
    str | None, typer.Option(metavar="NAME,...", help="lm-eval tasks or YAML files to run instead.")
]
Questions = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Questions with answers (JSON lines) to ask instead."),
]
Limit = Annotated[int | None, options.number("With --tasks: examples per task.")]


def evaluate(
    context: typer.Context,
    checkpoints: Checkpoints = None,
    checkpoint: options.CheckpointOption = None,
    config: options.ConfigOption = None,
    set_: options.SetOption = None,
    data: Data = None,
    source: Source = None,
    text: TextFile = None,
    split: options.SplitOption = "val",
    stride: Stride = None,
    max_tokens: MaxTokens = None,
    baselines: Baselines = False,
    adapt: Adapt = False,
    adapt_lr: AdaptLr = None,
    tasks: Tasks = None,
    limit: Limit = None,
    questions: Questions = None,
    json_: options.JsonOption = False,
) -> None:
    """Measure loss, perplexity and bits per byte; compare checkpoints."""
    names: list[Any] = [*checkpoints] if checkpoints else [checkpoint]
    _refuse(context.params, len(names))
    loaded = options.load(config, set_)
    if loaded.dtype == "auto":  # a measurement is exact unless a precision is named
        loaded = loaded.model_copy(update={"dtype": "float32"})
    from gptcli.api.evaluate import compare, open_checkpoint
    from gptcli.evaluation.adapt import LR

    rate = (LR if adapt_lr is None else adapt_lr) if adapt else None
    how: dict[str, Any] = {"split": split, "max_tokens": max_tokens}
    if not (text or data or source):
        names = [open_checkpoint(name, loaded) for name in names]
        if tasks is not None:
            return _run_tasks(names, tasks.split(","), limit, json_)
        if questions is not None:
            return _ask(names, questions, loaded, json_)
        if names[0].sources and not (baselines or adapt):
            return show_sources(names, loaded, how | {"stride": stride}, json_)
    how |= {"text": text, "data": data, "source": source}
    with console.bar("evaluating") as bar:
        how["on_progress"] = bar.update
        scores = compare(names, loaded, stride=stride, adapt_lr=rate, **how)
    beside = {} if text is not None else _references(scores[0])
    if baselines:
        beside["baselines"] = _baselines(scores[0])
    if len(scores) > 1:
        return _compare(scores, beside, json_)
    facts = facts_of(scores[0]) | beside
    if (adapted := scores[0].adapted) is not None:
        figures = {"loss": adapted.loss, "bits_per_byte": adapted.bits_per_byte}
        facts["adapted"] = {"lr": rate} | figures
    return console.result_json(facts) if json_ else console.result(describe(facts))


def _refuse(given: dict[str, Any], n_models: int) -> None:
    reads = ("data", "text", "source", "stride", "max_tokens", "baselines", "adapt")
    has_text = any(given[name] for name in reads) or given["split"] != "val"
    tasks, adapt = given["tasks"] is not None, given["adapt"]
    options.refuse({
        "the checkpoint is given twice: as an argument and with --checkpoint":
            given["checkpoints"] and given["checkpoint"] is not None,
        "--adapt: omit --max-tokens and name one checkpoint; it reads all of a text":
            adapt and (given["max_tokens"] is not None or n_models > 1),
        "--adapt-lr applies to --adapt: add --adapt": given["adapt_lr"] is not None and not adapt,
        "--baselines compresses the validation text: omit --text and --split":
            given["baselines"] and (given["text"] is not None or given["split"] != "val"),
        "--questions needs no other text: omit the options that name one":
            given["questions"] is not None and (has_text or tasks),
        "--limit applies to --tasks; --max-tokens scores part of a text":
            given["limit"] is not None and not tasks,
        "--tasks bring their own text: use --limit and no other option with it":
            tasks and has_text,
    })  # fmt: skip


def _references(score: "Score") -> dict[str, Any]:
    """Return published losses on the text of a data folder."""
    from gptcli.data.shards import read_manifest

    source = read_manifest(score.place).recipe.source.lower()
    is_known = "openwebtext" in source and score.trained.tokenizer.name == "gpt2"
    return {"references": GPT2_ON_OPENWEBTEXT} if is_known else {}


def _baselines(score: "Score") -> dict[str, Any]:
    """Measure what compressors and an n-gram model need for the validation text."""
    if score.conversations is not None:
        raise ConfigError(f"--baselines compresses text, and {score.place} holds conversations")
    from gptcli.data.shards import TokenReader, read_manifest
    from gptcli.evaluation.baselines import HAS_PPMD, SECONDS_PER_BYTE, measure

    manifest = read_manifest(score.place)
    n_bytes = sum(manifest.bytes.model_dump().values())
    if not HAS_PPMD:
        console.message("note: PPMd is left out; install it with: pip install 'gptcli[baselines]'")
    took = duration(max(1.0, n_bytes * SECONDS_PER_BYTE))
    with (
        console.bar(f"measuring baselines, about {took}") as bar,
        TokenReader(score.place, manifest, "train") as train,
        TokenReader(score.place, manifest, "val") as val,
    ):
        return asdict(measure(train, val, score.trained.tokenizer, bar.update))


def facts_of(score: "Score") -> dict[str, Any]:
    """Return the JSON result about one model on one text."""

    def figures(*names: str) -> dict[str, Any]:
        return {name: getattr(score.evaluation, name) for name in names}

    facts = _named(score.trained) | {"split": score.split}
    facts |= figures("tokens", "bytes", "context", "stride", "loss", "perplexity", "bits_per_byte")
    facts |= {"seconds": round(score.seconds, 3)}
    facts |= figures("standard_error", "words", "word_perplexity") | {"data": str(score.place)}
    return facts | ({"conversations": n} if (n := score.conversations) is not None else {})


def _named(model: "TrainedModel") -> dict[str, Any]:
    return {"checkpoint": str(model.path), "step": model.step}


def describe(facts: dict[str, Any]) -> str:
    """Return the lines about one model, from its JSON result."""
    step = f" (step {facts['step']:,})" if facts["step"] else ""
    what, windows = "tokens", f", stride {facts['stride']}"
    if (n_chats := facts.get("conversations")) is not None:
        what, windows = f"trained tokens of {n_chats:,} conversations", ""
    lines = [
        f"{facts['checkpoint']}{step} on {_place(facts)}:"
        f" {facts['tokens']:,} {what}, {facts['bytes']:,} bytes,"
        f" context {facts['context']}{windows}",
        f"loss {fixed(facts['loss'], 4)} nats per token (standard error"
        f" {fixed(facts['standard_error'], 4)})",
        f"perplexity {fixed(facts['perplexity'], 2)} per token,"
        f" {fixed(facts['word_perplexity'], 2)} per word",
        f"{fixed(facts['bits_per_byte'], 3)} bits per byte",
    ]
    models = {"the model": facts["bits_per_byte"]}
    context = facts["context"]
    if facts["stride"] == context > 1 and n_chats is None:
        lines.append(
            f"a token sees {context // 2} tokens before it on average; {context - context // 4}"
            f" with --stride {context // 2}, which takes twice as long"
        )
    if (adapted := facts.get("adapted")) is not None:
        models["the model with --adapt"] = adapted["bits_per_byte"]
        lines.append(
            f"{fixed(adapted['bits_per_byte'], 3)} bits per byte if it learns from each window once"
            f" that is scored (--adapt, rate {adapted['lr']:g})"
        )
    return "\n".join(lines + _describe_beside(facts, models))


def _place(facts: dict[str, Any]) -> str:
    return facts["data"] if facts["split"] == "text" else f"{facts['split']} of {facts['data']}"


def _describe_beside(facts: dict[str, Any], models: dict[str, float]) -> list[str]:
    """Return lines about the figures of others, and where the models, the first above all, are."""
    lines = []
    if (known := facts.get("references")) is not None:
        losses = ", ".join(f"{size} {loss}" for size, loss in known.items())
        lines.append(f"OpenAI's GPT-2 on OpenWebText, context 1024, nats per token: {losses}")
    if (found := facts.get("baselines")) is not None:
        others = {_LABELS[name]: bits for name, bits in found["bits_per_byte"].items()}
        ranked = sorted((others | models).items(), key=lambda item: item[1])
        lines += [
            f"the validation text: {found['bytes']:,} bytes, sha256 {found['sha256']};"
            f" {found['lines_in_training_text']:.1%} of its lines and"
            f" {found['spans_in_training_text'][50]:.1%} of its spans of 50 tokens are in the"
            f" training text ({found['training_bytes']:,} bytes)",
            "bits per byte, lower is better:",
            *(f"  {bits:.3f}  {name}" for name, bits in ranked),
        ]
        lines.append(_verdict(next(iter(models.values())), others))
    return lines


def _verdict(bits_per_byte: float, others: dict[str, float]) -> str:
    better = [f"{name} ({bits:.3f})" for name, bits in others.items() if bits_per_byte < bits]
    worse = [f"{name} ({bits:.3f})" for name, bits in others.items() if bits_per_byte >= bits]
    sides = {"better": better, "worse": worse}
    parts = [f"{how} than {listed(names, 'and')}" for how, names in sides.items() if names]
    start = f"{bits_per_byte:.3f} bits per byte on text that the model has never seen: "
    return start + "; ".join(parts)


def _compare(scores: "list[Score]", beside: dict[str, Any], json_: bool) -> None:
    """Print a table, and how the first model differs from each of the others."""
    from gptcli.evaluation.metrics import paired_difference

    results = [facts_of(score) for score in scores]
    first = results[0]["checkpoint"]
    others = [
        (facts["checkpoint"], paired_difference(scores[0].evaluation, score.evaluation))
        for facts, score in zip(results[1:], scores[1:], strict=True)
    ]
    if json_:
        differences = [{"first": first, "second": name} | asdict(found) for name, found in others]
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
    models = {facts["checkpoint"]: facts["bits_per_byte"] for facts in results}
    for line in lines + _describe_beside(beside, models):
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


def _ask(models: "list[TrainedModel]", path: str, config: "Config", json_: bool) -> None:
    """Print how many questions each model answers."""
    from gptcli.api.questions import ask, read_questions

    questions = read_questions(Path(path))
    results: list[dict[str, Any]] = []
    for model in models:
        with console.bar("asking") as bar:
            found = ask(model, questions, config, bar.update)
        results.append(_named(model) | {"questions": path} | asdict(found))
    if json_:
        console.result_json(results[0] if len(results) == 1 else {"results": results})
        return
    for facts in results:
        console.result(f"{facts['checkpoint']} (step {facts['step']:,}) on {path}:")
        if n := facts["choice_questions"]:
            console.result(
                f"{facts['choice_accuracy']:.1%} of {n:,} choices right by likelihood in sum,"
                f" {facts['choice_accuracy_per_token']:.1%} per token; guessing gives"
                f" {facts['chance']:.1%}"
            )
        if n := facts["free_questions"]:
            console.result(
                f"{facts['exact_match']:.1%} of {n:,} answers match exactly;"
                f" {facts['ended']:.1%} ended within {config.generate.max_new_tokens} tokens"
            )


def _run_tasks(
    models: "list[TrainedModel]", names: list[str], limit: int | None, json_: bool
) -> None:
    from gptcli.interop.lm_eval import run_tasks

    results: list[dict[str, Any]] = []
    for model in models:
        tasks = run_tasks(model, names, limit=limit, device=str(model.model.wte.weight.device))
        results.append(_named(model) | {"tasks": tasks})
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
