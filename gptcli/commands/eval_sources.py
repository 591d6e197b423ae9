"""`gpt eval` of a model that was trained on a mixture: each source, and their mean."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gptcli.errors import ConfigError
from gptcli.formatting import fixed
from gptcli.terminal import console

if TYPE_CHECKING:
    from gptcli.checkpoint import TrainedModel
    from gptcli.config import Config


def show_sources(
    models: "list[TrainedModel]", config: "Config", how: dict[str, Any], json_: bool
) -> None:
    """Print the figures of a model on each source, and of their mean.

    The mean is by the weights at the end of the run, as the run's own val_loss is.

    Raises:
        ConfigError: There are several models.
    """
    from gptcli.api.evaluate import compare
    from gptcli.commands.eval import facts_of

    [model, *others] = models
    if others:
        names = ", ".join(model.sources)
        raise ConfigError(
            f"{model.path} was trained on several sources: {names}",
            "compare models on one of them with --source NAME, or on --data DIR",
        )
    found = {}
    for name in model.sources:
        with console.bar(f"evaluating {name}") as bar:
            scores = compare([model], config, source=name, **how, on_progress=bar.update)
        found[name] = facts_of(scores[0])
    facts = _mean(found, model.sources) | {"sources": found}
    console.result_json(facts) if json_ else console.result(_describe(facts))


def _mean(found: dict[str, dict[str, Any]], weights: dict[str, float]) -> dict[str, Any]:
    """Return the figures of tokens drawn from sources by their weights."""
    total = sum(weights[name] for name in found)
    shares = {name: weights[name] / total if total else 1 / len(found) for name in found}

    def mean(value_of: Callable[[dict[str, Any]], float]) -> float:
        return sum(share * value_of(found[name]) for name, share in shares.items())

    nats, n_bytes = mean(lambda one: one["loss"]), mean(lambda one: one["bytes"] / one["tokens"])
    first = next(iter(found.values()))
    return {
        **{key: first[key] for key in ("checkpoint", "step", "split", "context", "stride")},
        **{key: sum(one[key] for one in found.values()) for key in ("tokens", "bytes", "seconds")},
        "loss": nats,
        "perplexity": math.exp(min(nats, 700.0)),
        "bits_per_byte": nats / math.log(2) / n_bytes,
        "weights": shares,
    }


def _describe(facts: dict[str, Any]) -> str:
    from gptcli.commands.eval import describe

    by = ", ".join(f"{name} {share:.1%}" for name, share in facts["weights"].items())
    lines = [f"{name}: {describe(one)}" for name, one in facts["sources"].items()]
    return "\n".join([
        *lines,
        f"mean by the weights at the end of the run ({by}): loss {fixed(facts['loss'], 4)},"
        f" {fixed(facts['bits_per_byte'], 3)} bits per byte",
    ])  # fmt: skip
