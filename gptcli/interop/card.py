"""The model card of an exported folder: what the network is, what it read, how well it predicts."""

import json
import math
from pathlib import Path
from typing import Any

from gptcli import __version__
from gptcli.checkpoint import TrainedModel
from gptcli.runs import METRICS


def model_card(trained: TrainedModel, family: str, n_parameters: int, name: str) -> str:
    """Return the content of `README.md`."""
    facts = trained.checkpoint
    made = f"trained with gptcli {__version__}" if facts.data else "with the weights it has there"
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"tags: [{family}, gptcli]",
        "---",
        "",
        f"# {name}",
        "",
        f"A {family} network of {n_parameters:,} parameters, {made}.",
        "",
        "| | |",
        "|---|---|",
        f"| started from | {_origin(facts.state)} |",
        f"| tokenizer | {trained.tokenizer.name}, {trained.tokenizer.vocab_size:,} tokens |",
        *(_training(trained) if facts.data else []),
        "",
        "Losses are in nats per token. Every document begins with `<|endoftext|>`, which is also"
        " what to start from without a prompt.",
        "",
    ]
    return "\n".join(lines)


def _training(trained: TrainedModel) -> list[str]:
    """Return rows about the data, the optimizer and the losses of a run."""
    data, steps = trained.checkpoint.data, trained.step
    train, optim = (trained.checkpoint.config[section] for section in ("train", "optim"))
    tokens = steps * int(train["tokens_per_step"])
    return [
        f"| data | {_source(data)} |",
        f"| training tokens there | {data['tokens']['train']:,} |",
        f"| steps | {steps:,} of {int(train['tokens_per_step']):,} tokens, {tokens:,} in all |",
        f"| optimizer | {optim['name']}, peak learning rate {optim['lr']:g},"
        f" {optim['schedule']} schedule |",
        *_losses(trained),
    ]


def _source(data: dict[str, Any]) -> str:
    source = data.get("source")
    shown = source if isinstance(source, str) else json.dumps(source)
    return f"{shown} at {data['revision']}" if data.get("revision") else shown


def _origin(state: dict[str, Any]) -> str:
    origin = state.get("origin") or {}
    if not origin:
        return "random weights"
    revision = f" at {origin['revision']}" if origin.get("revision") else ""
    return f"{origin['init_from']}{revision}"


def _losses(trained: TrainedModel) -> list[str]:
    """Return rows with the losses of this step, from the run's own log if it is still there.

    The best so far is another row only where it is another loss.
    """
    state, step = trained.checkpoint.state, trained.step
    rows = {}
    for line in _metrics(trained.path):
        if line.get("step") == step and "val_loss" in line:
            rows = {"validation loss": line["val_loss"], "training loss": line.get("train_loss")}
    best = state.get("best_loss")
    if best is not None and best < rows.get("validation loss", math.inf):
        rows[f"best loss so far (step {state['best_step']:,})"] = best
    return [
        f"| {key} | {value:.4f} (perplexity {math.exp(min(value, 700)):,.2f}) |"
        for key, value in rows.items()
        if isinstance(value, float)
    ]


def _metrics(checkpoint: Path) -> list[dict[str, Any]]:
    for folder in checkpoint.resolve().parents[:2]:
        try:
            text = (folder / METRICS).read_text(encoding="utf-8")
            return [line for line in map(json.loads, text.splitlines()) if isinstance(line, dict)]
        except (OSError, ValueError):
            continue
    return []
