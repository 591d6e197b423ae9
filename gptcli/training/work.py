"""What a run does besides its steps: how often, and what it costs.

A cost is in tokens: as many as could be trained on in that time. So it holds on any machine of a
kind, and before anything is measured.
"""

from dataclasses import dataclass
from math import lcm

from gptcli.config.schema import Config
from gptcli.config.windows import epochs, eval_tokens
from gptcli.data.shards import Manifest

_LEAST_STEP = 64  # tokens' worth of a step of fewer, as measured
_FORWARD_SHARE = 1 / 3  # of a training step's arithmetic, which an evaluation does too
# As measured on two cores, at 6 million parameters; a GPU is faster at training only.
_SAVED = {"cpu": 2_000}  # tokens' worth of a checkpoint that training waits for
_SAVED_ELSEWHERE = 400_000
_SAMPLED = {"cpu": 30}  # tokens' worth of a token that is drawn
_SAMPLED_ELSEWHERE = 1_200


@dataclass(frozen=True)
class RunCounts:
    """What the data and the network came to.

    Attributes:
        n_params: Parameters of the network.
        train_tokens: Of the training split.
        val_tokens: Of the validation split; 0 without one.
        documents: Texts that the tokens of both splits come from.
        tokenizer_size: Ids of the tokenizer.
        asked_size: Ids that a bpe vocabulary was asked to have; None where that was left open.
        max_steps: Of the whole run.
        n_windows: Of an epoch.
        rows: Of a micro-batch in each process.
        processes: That train.
    """

    n_params: int
    train_tokens: int
    val_tokens: int
    documents: int
    tokenizer_size: int
    asked_size: int | None
    max_steps: int
    n_windows: int
    rows: int
    processes: int = 1

    @classmethod
    def of(cls, manifest: Manifest, **counted: int) -> "RunCounts":
        """Return the counts of a run on prepared data."""
        return cls(
            documents=manifest.documents,
            tokenizer_size=manifest.tokenizer.vocab_size,
            asked_size=manifest.recipe.max_vocab_size,
            **counted,
        )


@dataclass(frozen=True)
class WorkEstimate:
    """What is left to do, with the tokens' worth of each kind of it in `costs`.

    Attributes:
        eval_tokens: That one evaluation scores, of the training and of the validation split.
    """

    evaluations: int
    eval_tokens: tuple[int, int]
    saves: int
    samples: int
    costs: dict[str, float]


def cost_of_step(config: Config) -> int:
    """Return the tokens' worth of a step, which takes its time however few tokens it has."""
    return max(config.tokens_per_step, _LEAST_STEP)


def epochs_of(config: Config, counts: RunCounts, steps: int) -> float:
    """Return the passes over the training windows that some steps make."""
    return epochs(steps, config.tokens_per_step // config.seq_len, counts.n_windows)


def estimate_work(config: Config, counts: RunCounts, done: int = 0) -> WorkEstimate:
    """Return what is left of a run.

    Args:
        config: Settled.
        counts: Of its data.
        done: Steps that were done before.
    """
    train, last = config.train, counts.max_steps

    def times(every: int) -> int:
        return max(0, -(-last // every) - done // every)  # the last step is one of them

    evaluations = times(train.eval_every)
    saves = times(train.save_every) + evaluations - times(lcm(train.save_every, train.eval_every))
    if not done:
        saves += 1
    if not counts.val_tokens:  # the best epoch is kept, and each may be it
        saves += int(epochs_of(config, counts, last)) - int(epochs_of(config, counts, done))
    samples = times(train.sample_every or last)
    in_background = train.async_save is True or (
        train.async_save == "auto" and config.device == "cuda"
    )
    saved = 0 if in_background else _SAVED.get(config.device, _SAVED_ELSEWHERE)
    sampled = _SAMPLED.get(config.device, _SAMPLED_ELSEWHERE) * config.generate.max_new_tokens
    scored = eval_tokens(counts.train_tokens, counts.val_tokens, config.seq_len, train.eval_tokens)
    costs = {
        "steps": float((last - done) * cost_of_step(config)),
        "evaluating": evaluations * sum(scored) * _FORWARD_SHARE,
        "saving": float(saves * saved),
        "sampling": float(samples * sampled),
    }
    return WorkEstimate(evaluations, scored, saves, samples, costs)
