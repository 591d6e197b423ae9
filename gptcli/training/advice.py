"""Advice about a run: settings that few have on purpose, each with settings to try instead.

Judges a configuration and counts; opens nothing. Each rule names where it comes from. What is to
be tried is accepted by the configuration, in the situation that it is said in.
"""

import math
from collections.abc import Iterator
from functools import partial

from gptcli.config.schema import Config
from gptcli.formatting import decimal, plural
from gptcli.training.optim import LR_SCALE
from gptcli.training.requirements import Advice
from gptcli.training.work import RunCounts, epochs_of, estimate_work

_LR_FACTOR = 5.0  # from the rule, either way, from where on it is far off
_MANY_EPOCHS = 4
_TOKENS_PER_PARAMETER = 20  # from which on memorizing is not the danger (Hoffmann et al. 2022)
_LARGE_VOCABULARY = 4096  # below it, padding the head saves nothing
_LARGE_SHARE = 1 / 3  # of a run, that is not spent on its steps
_SMALL_SHARE = 0.1  # of its steps, that is suggested instead
_WORTH_SAYING = 50.0  # seconds that are not spent on steps
_USUAL_SECONDS = 1e-4  # of training on a token, on a laptop


def advise(
    config: Config, counts: RunCounts, seconds_per_token: float = _USUAL_SECONDS
) -> tuple[Advice, ...]:
    """Return what there is to say about a settled configuration, most telling first.

    Args:
        config: Settled.
        counts: Of its data and network.
        seconds_per_token: Of training, where that was measured.
    """
    rules = (_learning_rate, _warmup, _batch, _epochs, _context, _evaluation,
             partial(_shares, worth_saying=_WORTH_SAYING / seconds_per_token), _vocabulary,
             _documents)  # fmt: skip
    return tuple(found for rule in rules for found in rule(config, counts))


def usual_lr(n_params: int) -> float:
    """Return the peak learning rate of AdamW that is usual for a network trained from scratch.

    0.003239 - 0.0001395 ln N (Kaplan et al. 2020, appendix D.6), which is said to hold below 1e10
    parameters; beyond, GPT-3's 6e-5 at 175B (Brown et al. 2020, table 2.1) is the floor.
    """
    return max(6e-5, 0.003239 - 0.0001395 * math.log(max(1, n_params)))


def _learning_rate(config: Config, counts: RunCounts) -> Iterator[Advice]:
    lr = config.optim.lr
    adapters = config.model.lora is not None  # whose few parameters take larger steps
    usual = (
        usual_lr(counts.n_params) * LR_SCALE.get(config.optim.name, 1.0) * (4 if adapters else 1)
    )
    is_low = lr < usual / _LR_FACTOR and config.model.init_from == "scratch"
    if lr > usual * _LR_FACTOR or is_low:
        least = f" -s optim.min_lr={usual / 10:.1g}" if config.min_lr > usual else ""
        yield Advice(
            f"optim.lr {decimal(lr)} is {'high' if lr > usual else 'low'}",
            f"models of {counts.n_params:,} parameters usually train with lr around {usual:.1g}"
            " (Kaplan et al. 2020, D.6)",
            f"-s optim.lr={usual:.1g}{least}",
        )


def _warmup(config: Config, counts: RunCounts) -> Iterator[Advice]:
    warmup, steps = config.optim.warmup_steps, counts.max_steps
    if warmup >= steps and warmup:
        why = "the learning rate never reaches its peak"
    elif warmup > steps / 2:
        why = "more than half of the run is warm-up"
    else:
        return
    yield Advice(
        f"warm-up of {warmup:,} steps in a run of {steps:,}",
        why,
        f"-s optim.warmup_steps={steps // 50}",
    )


def _batch(config: Config, counts: RunCounts) -> Iterator[Advice]:
    def words(rows: int, tokens: int) -> str:
        rows *= counts.processes
        unit = rows * config.seq_len
        tokens = -(-tokens // unit) * unit
        return f"-s train.micro_batch_size={rows} -s train.tokens_per_step={tokens}"

    if config.device == "cuda" and counts.rows == 1 and config.seq_len < 4096:
        yield Advice(
            "micro-batch of one row",
            "a GPU is idle most of the time with so little at once",
            words(8, config.tokens_per_step),
        )
    step = config.tokens_per_step
    if step > config.seq_len * counts.n_windows / 2 and counts.max_steps > 1:
        smaller = words(1, 1)
        yield Advice(
            f"a step takes {step:,} of {counts.train_tokens:,} tokens",
            "each step sees most of the data; use more text, or smaller steps",
            smaller if step > config.seq_len * counts.processes else "",
        )


def _epochs(config: Config, counts: RunCounts) -> Iterator[Advice]:
    """Muennighoff et al. 2023: up to four passes are worth about as much as new text.

    Who names the epochs, holds nothing out, or takes dropout against it, means to repeat the text.
    """
    epochs = epochs_of(config, counts, counts.max_steps)
    deliberate = config.train.max_epochs or not counts.val_tokens or config.model.dropout
    is_ample = counts.train_tokens > _TOKENS_PER_PARAMETER * counts.n_params
    if epochs <= _MANY_EPOCHS or deliberate or is_ample:
        return
    steps = max(1, int(counts.max_steps * _MANY_EPOCHS / epochs))
    dropout = "-s model.dropout=0.1 or " if config.model.init_from == "scratch" else ""
    yield Advice(
        f"{plural(epochs, 'epoch')} over {counts.train_tokens:,} tokens without dropout",
        "after about 4, the model memorizes the text and learns little from it (Muennighoff et al."
        " 2023); more text is better",
        f"{dropout}-s train.max_steps={steps}",
    )


def _context(config: Config, counts: RunCounts) -> Iterator[Advice]:
    if config.trained_context == config.model.block_size:
        return
    rotary = " or -s model.position=rope" if config.model.head_size % 2 == 0 else ""
    yield Advice(
        f"data.seq_len {config.seq_len:,} is shorter than model.block_size"
        f" {config.model.block_size:,}",
        f"learned positions beyond {config.seq_len:,} are never trained, so that eval and generate"
        " leave them out",
        f"-s model.block_size={config.seq_len}{rotary}",
    )


def _evaluation(config: Config, counts: RunCounts) -> Iterator[Advice]:
    train = config.train
    wanted = train.eval_tokens
    if wanted and 0 < counts.val_tokens < wanted:
        yield Advice(
            f"validation of {counts.val_tokens:,} tokens for evaluations of {wanted:,}",
            "the split is smaller than eval_tokens, so its loss is noisy; a larger"
            " data.val_fraction helps",
            f"-s train.eval_tokens={counts.val_tokens}",
        )
    elif 0 < counts.val_tokens < 20 * config.seq_len:
        yield Advice(
            f"validation of {counts.val_tokens:,} tokens is"
            f" {counts.val_tokens / config.seq_len:.1f} windows",
            "the validation loss is uncertain; use more text or a larger data.val_fraction",
        )
    is_set = config.is_set("train.eval_every") and counts.val_tokens
    if train.eval_every > counts.max_steps and is_set:
        yield Advice(
            f"train.eval_every {train.eval_every:,} in a run of {counts.max_steps:,} steps",
            "there is one evaluation, at the end",
            f"-s train.eval_every={max(1, counts.max_steps // 10)}",
        )


def _shares(config: Config, counts: RunCounts, worth_saying: float) -> Iterator[Advice]:
    """What takes more than a third of a run that is not training."""
    work, train, steps = estimate_work(config, counts), config.train, counts.max_steps

    def every(times: int, cost: float) -> int:
        """Return the steps after which to do what is done so often, for a tenth of the cost."""
        fitting = times * _SMALL_SHARE * work.costs["steps"] / max(1.0, cost)
        return min(steps, math.ceil(steps / max(1.0, fitting)))

    saving = every(work.saves, work.costs["saving"])
    words = {
        "evaluating": f"-s train.eval_every={every(work.evaluations, work.costs['evaluating'])}",
        "saving": f"-s train.save_every={saving} -s train.eval_every={saving}",
        "sampling": f"-s train.sample_every={every(work.samples, work.costs['sampling'])}",
    }
    if work.evaluations == 1:
        tokens = max(config.seq_len, int(0.3 * work.costs["steps"] / 2))
        words["evaluating"] = f"-s train.eval_tokens={tokens}"
    if train.sample_every is None or work.samples == 1:
        words["sampling"] = (
            f"-s generate.max_new_tokens={config.generate.max_new_tokens // 10 or 1}"
        )
    times = {"evaluating": work.evaluations, "saving": work.saves, "sampling": work.samples}
    total = sum(work.costs.values())
    for name, cost in work.costs.items():
        if name != "steps" and cost > max(_LARGE_SHARE * total, worth_saying):
            yield Advice(
                f"{name} {_often(times[name])} takes about {cost / total:.0%} of the run",
                "less often leaves more of it to training",
                words[name],
            )


def _often(times: int) -> str:
    return "once" if times == 1 else f"{times:,} times"


def _vocabulary(config: Config, counts: RunCounts) -> Iterator[Advice]:
    size, own = config.model.vocab_size or counts.tokenizer_size, counts.tokenizer_size
    padded = -(-own // 64) * 64
    if counts.asked_size is not None and own < counts.asked_size:
        yield Advice(
            f"the bpe vocabulary has {own:,} tokens, not the {counts.asked_size:,} asked for",
            "the text has no more pairs to merge"
            + (f"; {size - own:,} rows of the model are never used" if size > padded else ""),
            f"-s model.vocab_size={padded}" if size > padded else "",
        )
    if size % 64 and size >= _LARGE_VOCABULARY and config.device == "cuda" and (
        config.model.init_from == "scratch"
    ):  # fmt: skip
        yield Advice(
            f"vocabulary of {size:,} is not a multiple of 64",
            "GPUs multiply a padded head faster; the rows added are never used (as in nanoGPT)",
            f"-s model.vocab_size={-(-size // 64) * 64}",
        )


def _documents(config: Config, counts: RunCounts) -> Iterator[Advice]:
    """Many short texts in a long window: attention crosses from one to the next."""
    total = counts.train_tokens + counts.val_tokens
    mean = total / max(1, counts.documents)
    if counts.documents < 100 or config.seq_len <= 8 * mean:
        return
    length = min(config.seq_len, max(16, 2 ** math.ceil(math.log2(4 * mean))))
    unit = config.rows * length
    step = max(unit, config.tokens_per_step // unit * unit)
    same = " ".join(f"-s {key}={length}" for key in ("data.seq_len", "data.stride")
                    if config.get(key))  # fmt: skip
    yield Advice(
        f"windows of {config.seq_len:,} tokens over documents of {mean:,.0f} on average",
        "most of what is attended to belongs to other documents",
        f"-s model.block_size={length} {same} -s train.tokens_per_step={step}".replace("  ", " "),
    )
