"""What `gpt eval` says about the figures: in JSON, in lines, in tables."""

from typing import TYPE_CHECKING, Any

from gptcli.formatting import fixed
from gptcli.terminal import console

if TYPE_CHECKING:
    from gptcli.checkpoint import TrainedModel
    from gptcli.evaluation import Difference, Evaluation

Scored = list[tuple[dict[str, Any], "Evaluation"]]


def facts_of(
    trained: "TrainedModel", place: str, split: str, found: "Evaluation", seconds: float
) -> dict[str, Any]:
    """Return the JSON result of scoring one network."""
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
        "standard_error": found.standard_error,
        "words": found.words,
        "word_perplexity": found.word_perplexity,
        "data": place,
    }


def describe(facts: dict[str, Any]) -> str:
    """Return the lines about one network."""
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
    return "\n".join(lines + _held_against(facts, facts["bits_per_byte"]))


def _place(facts: dict[str, Any]) -> str:
    """Name the text that was scored."""
    return facts["data"] if facts["split"] == "text" else f"{facts['split']} of {facts['data']}"


def _held_against(facts: dict[str, Any], bits_per_byte: float) -> list[str]:
    """Return lines on what the figures can be held against."""
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
        verdict = _verdict(found, bits_per_byte)
        lines.append(f"lower is better: on text that it has never seen, the model {verdict}")
    return lines


def _verdict(yardsticks: dict[str, float], bits_per_byte: float) -> str:
    """Return what a model beats, and what it does not."""
    names = {"gzip": "gzip", "xz": "xz", "xz_after_training_text": "xz after the training text"}
    beaten = [name for key, name in names.items() if bits_per_byte < yardsticks[key]]
    others = [name for name in names.values() if name not in beaten]
    if not beaten:
        return "beats none of the three"
    return f"beats {' and '.join(beaten)}" + (f", but not {' or '.join(others)}" if others else "")


def compare(scored: Scored, extra: dict[str, Any], json_: bool) -> None:
    """Print a table, and how the first network differs from each of the others."""
    from gptcli.evaluation import paired_difference

    results = [facts for facts, _ in scored]
    others = [(facts, paired_difference(scored[0][1], score)) for facts, score in scored[1:]]
    first = results[0]["checkpoint"]
    if json_:
        differences = [
            {"first": first, "second": facts["checkpoint"], "bits_per_byte": found.bits_per_byte,
             "low": found.low, "high": found.high} for facts, found in others
        ]  # fmt: skip
        console.result_json({"results": results, "differences": differences} | extra)
        return
    header = ("bits/byte", "nats/token", "perplexity", "tokens", "context", "step", "checkpoint")
    rows = [
        (fixed(facts["bits_per_byte"], 4), fixed(facts["loss"], 4), fixed(facts["perplexity"], 2),
         f"{facts['tokens']:,}", f"{facts['context']}", f"{facts['step']}", facts["checkpoint"])
        for facts in results
    ]  # fmt: skip
    console.table(header, rows)
    console.result(f"scored on {_place(results[0])}")
    for facts, found in others:
        console.result(_describe_difference(first, facts["checkpoint"], found))
    for line in _held_against(extra, results[0]["bits_per_byte"]):
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


def show_tasks(results: list[dict[str, Any]]) -> None:
    """Print the metrics of lm-eval's tasks."""
    rows = [
        (task, metric, f"{value:.4f}", _plus_minus(metrics.get(f"{metric}_stderr")),
         facts["checkpoint"])
        for facts in results
        for task, metrics in facts["tasks"].items()
        for metric, value in metrics.items()
        if not metric.endswith("_stderr")
    ]  # fmt: skip
    console.table(("task", "metric", "value", "standard error", "checkpoint"), rows)


def _plus_minus(error: float | None) -> str:
    return "" if error is None else f"{error:.4f}"
