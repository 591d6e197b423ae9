"""What is unusual about a run: settings that few have on purpose, each with what is usual.

Judges a configuration and counts; opens nothing. Each rule names where it comes from.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from gptcli.config.schema import Config
from gptcli.training.outlook import Unusual

_LR_FACTOR = 5.0  # from the rule, either way, from where on it is far off
_MANY_EPOCHS = 4
_LARGE_VOCABULARY = 4096  # below it, rows that are added cost a CPU more than they save


@dataclass(frozen=True)
class Counts:
    """What the data and the network came to.

    Attributes:
        n_params: Parameters of the network.
        train_tokens: Of the training split.
        val_tokens: Of the validation split; 0 without one.
        documents: Texts that the tokens of both splits come from.
        tokenizer_size: Ids of the tokenizer.
        max_steps: Of the whole run.
        epochs: Passes over the training windows that those steps make.
        rows: Of a micro-batch.
    """

    n_params: int
    train_tokens: int
    val_tokens: int
    documents: int
    tokenizer_size: int
    max_steps: int
    epochs: float
    rows: int


def unusual(config: Config, counts: Counts) -> tuple[Unusual, ...]:
    """Return what is unusual about a settled configuration, most telling first."""
    rules = (_learning_rate, _warmup, _batch, _epochs, _evaluation, _vocabulary, _documents)
    return tuple(found for rule in rules for found in rule(config, counts))


def usual_lr(n_params: int) -> float:
    """Return the peak learning rate of AdamW that is usual for a network trained from scratch.

    0.003239 - 0.0001395 ln N (Kaplan et al. 2020, appendix D.6), which is said to hold below 1e10
    parameters; beyond, GPT-3's 6e-5 at 175B (Brown et al. 2020, table 2.1) is the floor.
    """
    return max(6e-5, 0.003239 - 0.0001395 * math.log(max(1, n_params)))


def _learning_rate(config: Config, counts: Counts) -> Iterator[Unusual]:
    lr, usual = config.optim.lr, usual_lr(counts.n_params)
    adapters = config.model.lora is not None  # whose few parameters take larger steps
    factor = _LR_FACTOR * (4 if adapters or config.optim.name == "muon" else 1)
    is_low = lr < usual / _LR_FACTOR and config.model.init_from == "scratch"
    if lr > usual * factor or is_low:
        yield Unusual(
            f"optim.lr {lr:.2g} is {'high' if lr > usual else 'low'}",
            f"networks of {counts.n_params:,} parameters usually learn at about {usual:.1g}"
            " (Kaplan et al. 2020, D.6)",
            f"-s optim.lr={usual:.1g}",
        )


def _warmup(config: Config, counts: Counts) -> Iterator[Unusual]:
    warmup, steps = config.optim.warmup_steps, counts.max_steps
    if warmup >= steps and warmup:
        why = "the learning rate never reaches its peak"
    elif warmup > steps / 2:
        why = "most of the run goes into it"
    else:
        return
    yield Unusual(
        f"warm-up of {warmup:,} steps in a run of {steps:,}",
        why,
        f"-s optim.warmup_steps={max(1, steps // 50)}",
    )


def _batch(config: Config, counts: Counts) -> Iterator[Unusual]:
    if config.device == "cuda" and counts.rows == 1 and config.seq_len < 4096:
        yield Unusual(
            "micro-batch of one row",
            "a GPU is idle most of the time with so little at once",
            "-s train.micro_batch_size=auto"
            f" -s train.tokens_per_step={max(config.tokens_per_step, 8 * config.seq_len)}",
        )
    n_windows = max(1.0, counts.max_steps / max(counts.epochs, 1e-9))
    if n_windows < 2 and counts.epochs > 1:
        yield Unusual(
            f"a step takes {config.tokens_per_step:,} of {counts.train_tokens:,} tokens",
            "each one sees most of the data, some of it more than once",
            f"-s train.tokens_per_step={config.seq_len}",
        )


def _epochs(config: Config, counts: Counts) -> Iterator[Unusual]:
    """Muennighoff et al. 2023: up to four passes are worth about as much as new text."""
    if counts.epochs <= _MANY_EPOCHS:
        return
    remedy = []
    if config.model.dropout == 0 and config.model.init_from == "scratch":
        remedy.append("-s model.dropout=0.1")
    steps = max(1, round(counts.max_steps * _MANY_EPOCHS / counts.epochs))
    remedy.append(f"-s train.max_steps={steps}, or more text")
    no_dropout = " without dropout" if config.model.dropout == 0 else ""
    yield Unusual(
        f"{counts.epochs:.3g} epochs over {counts.train_tokens:,} tokens{no_dropout}",
        "after about 4, text seen again teaches little and is learned by heart"
        " (Muennighoff et al. 2023)",
        " or ".join(remedy),
    )


def _evaluation(config: Config, counts: Counts) -> Iterator[Unusual]:
    train = config.train
    wanted = train.eval_tokens
    if wanted and 0 < counts.val_tokens < wanted:
        yield Unusual(
            f"validation of {counts.val_tokens:,} tokens for evaluations of {wanted:,}",
            "each one scores the whole split, and is as uncertain as that is small",
            f"-s train.eval_tokens={counts.val_tokens}, or a larger data.val_fraction",
        )
    elif 0 < counts.val_tokens < 20 * config.seq_len:
        yield Unusual(
            f"validation of {counts.val_tokens:,} tokens is"
            f" {counts.val_tokens / config.seq_len:.1f} windows",
            "the validation loss is uncertain",
            "a larger data.val_fraction",
        )
    if train.eval_every > counts.max_steps and config.is_set("train.eval_every"):
        yield Unusual(
            f"train.eval_every {train.eval_every:,} in a run of {counts.max_steps:,} steps",
            "there is one evaluation, at the end",
            f"-s train.eval_every={max(1, counts.max_steps // 10)}",
        )


def _vocabulary(config: Config, counts: Counts) -> Iterator[Unusual]:
    size = config.model.vocab_size or counts.tokenizer_size
    matters = config.device == "cuda" or size >= _LARGE_VOCABULARY
    if size % 64 and matters:
        yield Unusual(
            f"vocabulary of {size:,} is not a multiple of 64",
            "GPUs multiply a padded head faster; the rows added are never used (as in nanoGPT)",
            f"-s model.vocab_size={-(-size // 64) * 64}",
        )


def _documents(config: Config, counts: Counts) -> Iterator[Unusual]:
    """Many short texts in a long window: attention crosses from one to the next."""
    total = counts.train_tokens + counts.val_tokens
    mean = total / max(1, counts.documents)
    if counts.documents >= 100 and config.seq_len > 8 * mean:
        yield Unusual(
            f"windows of {config.seq_len:,} tokens over documents of {mean:,.0f} on average",
            "most of what is attended to belongs to other documents",
            f"-s data.seq_len={max(16, 2 ** math.ceil(math.log2(4 * mean)))}",
        )
