"""What a run does besides its steps, and advice about settings that few have on purpose.

Judges a settled run; opens nothing. Each rule names its source. What it suggests is accepted by the
configuration in the situation that it is for.

Costs are in tokens: as many as could be trained on in that time. So they hold on any machine of a
kind, and before anything is measured.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from gptcli.config.schema import Config
from gptcli.formatting import decimal, plural
from gptcli.training.optim import LR_SCALE
from gptcli.training.spec import RunSpec

_LEAST_STEP = 64  # tokens' worth of a step of fewer, as measured
_FORWARD_SHARE = 1 / 3  # of a training step's arithmetic, which an evaluation does too
# As measured on two cores, at 6 million parameters; a GPU is faster at training only.
_SAVE_COST, _GPU_SAVE_COST = 2_000, 400_000  # tokens' worth of a checkpoint that training waits for
_SAMPLE_COST, _GPU_SAMPLE_COST = 30, 1_200  # tokens' worth of a token that is sampled
_LR_FACTOR = 5.0  # from the rule, either way, from where on it is far off
_MANY_EPOCHS = 4
_TOKENS_PER_PARAMETER = 20  # from which on memorizing is not the danger (Hoffmann et al. 2022)
_LARGE_VOCABULARY = 4096  # below it, padding the head saves nothing
_LARGE_SHARE = 1 / 3  # of a run, that is not spent on its steps
_SMALL_SHARE = 0.1  # of its steps, that is suggested instead
_WORTH_SAYING = 50.0  # seconds that are not spent on steps
_USUAL_SECONDS = 1e-4  # of training on a token, on a laptop


@dataclass(frozen=True)
class Advice:
    """A setting that few runs have on purpose."""

    what: str  # the setting, with its value
    why: str  # what to expect of it, and what helps that is no setting
    # what to try instead, as words of a command line, perhaps with "or"; empty if nothing
    set: str = ""

    def __str__(self) -> str:
        """Return it as one line."""
        return f"{self.what}: {self.why}" + (f"; try: {self.set}" if self.set else "")


@dataclass(frozen=True)
class Drawn:
    """What a run draws from one source of a mixture."""

    name: str
    tokens: int  # tokens drawn
    share: float  # its part of all tokens drawn
    epochs: float  # passes over its training windows
    train_tokens: int  # tokens of its training split
    val_tokens: int  # tokens of its validation split

    @property
    def text(self) -> str:
        """The same, for people."""
        return (
            f"{self.name}: {self.share:.1%}, {self.tokens:,} tokens,"
            f" {plural(self.epochs, 'epoch')} of {self.train_tokens:,} + {self.val_tokens:,}"
        )


def drawn(spec: RunSpec) -> list[Drawn]:
    """Return what a run draws from each source of its mixture; nothing without one."""
    if spec.config.data.mix is None:
        return []
    from gptcli.data.mixture import Shares  # which only mixtures need

    n = spec.max_steps * (spec.tokens_per_step // spec.config.seq_len)
    counts = Shares(spec.config.data.mix, n, spec.config.seed).counts(n)
    return [
        Drawn(part.name, count * spec.config.seq_len, count / n, count / n_windows,
              part.manifest.tokens.train, part.manifest.tokens.val)
        for part, count, n_windows in zip(spec.parts, counts, spec.part_windows, strict=True)
    ]  # fmt: skip


class Work(NamedTuple):
    """How often a run does something, and what all of it costs, in tokens' worth."""

    times: int
    cost: float


def step_cost(config: Config) -> int:
    """Return the tokens' worth of a step, which takes its time however few tokens it has."""
    return max(config.tokens_per_step, _LEAST_STEP)


def estimate_work(spec: RunSpec, done: int = 0) -> dict[str, Work]:
    """Return what is left of a run after its first `done` steps, by kind."""
    config, train, last = spec.config, spec.config.train, spec.max_steps
    on_gpu = config.device != "cpu"

    def times(every: int) -> int:
        return max(0, -(-last // every) - done // every)  # the last step is one of them

    evaluations = times(train.eval_every)
    saves = times(train.save_every) + evaluations
    saves -= times(math.lcm(train.save_every, train.eval_every))  # one checkpoint serves both
    if not done:
        saves += 1
    if not spec.val_tokens:  # the best epoch is kept, and each may be it
        saves += int(spec.epochs_at(last)) - int(spec.epochs_at(done))
    samples = times(train.sample_every or last)
    save_cost = 0 if spec.saves_in_background else _GPU_SAVE_COST if on_gpu else _SAVE_COST
    sample_cost = (_GPU_SAMPLE_COST if on_gpu else _SAMPLE_COST) * config.generate.max_new_tokens
    return {
        "steps": Work(last - done, (last - done) * step_cost(config)),
        "evaluating": Work(evaluations, evaluations * sum(spec.eval_tokens) * _FORWARD_SHARE),
        "saving": Work(saves, saves * save_cost),
        "sampling": Work(samples, samples * sample_cost),
    }


def advise(spec: RunSpec, seconds_per_token: float = _USUAL_SECONDS) -> tuple[Advice, ...]:
    """Return advice about a settled run, most telling first; a token's time may be measured."""
    shares = partial(_shares, worth_saying=_WORTH_SAYING / seconds_per_token)
    rules = (_learning_rate, _warmup, _batch, _epochs, _context, _evaluation, shares, _vocabulary)
    return tuple(advice for rule in rules for advice in rule(spec))


def usual_lr(n_params: int) -> float:
    """Return the usual peak learning rate of AdamW for a model trained from scratch.

    0.003239 - 0.0001395 ln N (Kaplan et al. 2020, appendix D.6), which holds below 1e10 parameters;
    beyond, GPT-3's 6e-5 at 175B (Brown et al. 2020, table 2.1) is the floor.
    """
    return max(6e-5, 0.003239 - 0.0001395 * math.log(max(1, n_params)))


def _learning_rate(spec: RunSpec) -> Iterator[Advice]:
    config, lr, n_params = spec.config, spec.config.optim.lr, spec.size.parameters
    usual = usual_lr(n_params) * LR_SCALE.get(config.optim.name, 1.0)
    if config.model.lora is not None:  # few parameters take larger steps
        usual *= 4
    is_low = lr < usual / _LR_FACTOR and config.model.init_from == "scratch"
    if lr > usual * _LR_FACTOR or is_low:
        floor = f" -s optim.min_lr={usual / 10:.1g}" if config.min_lr > usual else ""
        yield Advice(
            f"optim.lr {decimal(lr)} is {'high' if lr > usual else 'low'}",
            f"models of {n_params:,} parameters usually train with lr around {usual:.1g}"
            " (Kaplan et al. 2020, D.6)",
            f"-s optim.lr={usual:.1g}{floor}",
        )


def _warmup(spec: RunSpec) -> Iterator[Advice]:
    warmup, steps = spec.config.optim.warmup_steps, spec.max_steps
    if warmup > steps / 2:
        yield Advice(
            f"warm-up of {warmup:,} steps in a run of {steps:,}",
            "the learning rate never reaches its peak"
            if warmup >= steps
            else "more than half of the run is warm-up",
            f"-s optim.warmup_steps={steps // 50}",
        )


def _batch(spec: RunSpec) -> Iterator[Advice]:
    config, step = spec.config, spec.tokens_per_step
    if step > config.seq_len * spec.n_windows / 2 and spec.max_steps > 1:
        least = spec.n_processes * config.seq_len
        yield Advice(
            f"a step takes {step:,} of {spec.train_tokens:,} tokens",
            "each step sees most of the data; use more text, or smaller steps",
            f"-s train.micro_batch_size={spec.n_processes} -s train.tokens_per_step={least}"
            if step > least
            else "",
        )


def _epochs(spec: RunSpec) -> Iterator[Advice]:
    """Muennighoff et al. 2023: up to four epochs are worth about as much as new text.

    A run that names its epochs, has no validation, or uses dropout means to repeat the text; so
    does a source of a mixture that names its epochs.
    """
    config = spec.config
    many: list[tuple[float, int, str, str, str]] = []
    if config.data.mix is not None:
        helps = f"a lower weight, or max_epochs: {_MANY_EPOCHS} beside it, helps"
        many = [(each.epochs, each.train_tokens, f" of {each.name}", helps, "")
                for source, each in zip(config.data.mix, drawn(spec), strict=True)
                if source.max_epochs is None]  # fmt: skip
    elif not (config.train.max_epochs or not spec.val_tokens or config.model.dropout):
        dropout = "-s model.dropout=0.1 or " * (config.model.init_from == "scratch")
        if spec.train_tokens <= _TOKENS_PER_PARAMETER * spec.size.parameters:
            many = [(spec.epochs, spec.train_tokens, " without dropout", "more text is better",
                     dropout)]  # fmt: skip
    for epochs, n_tokens, which, helps, other in many:
        if epochs > _MANY_EPOCHS:
            yield Advice(
                f"{plural(epochs, 'epoch')} over {n_tokens:,} tokens{which}",
                f"after about {_MANY_EPOCHS}, the model memorizes the text and learns little from"
                f" it (Muennighoff et al. 2023); {helps}",
                f"{other}-s train.max_steps={max(1, int(spec.max_steps * _MANY_EPOCHS / epochs))}",
            )


def _context(spec: RunSpec) -> Iterator[Advice]:
    config = spec.config
    if config.trained_context == config.model.block_size:
        return
    rotary = " or -s model.position=rope" if config.model.head_size % 2 == 0 else ""
    yield Advice(
        f"data.seq_len {config.seq_len:,} is shorter than model.block_size"
        f" {config.model.block_size:,}",
        f"learned positions beyond {config.seq_len:,} are never trained, so eval and generate"
        " leave them out",
        f"-s model.block_size={config.seq_len}{rotary}",
    )


def _evaluation(spec: RunSpec) -> Iterator[Advice]:
    config, train, n_val = spec.config, spec.config.train, spec.val_tokens
    if not n_val:
        return
    if train.eval_tokens and n_val < train.eval_tokens:
        yield Advice(
            f"validation of {n_val:,} tokens for evaluations of {train.eval_tokens:,}",
            "the split is smaller than eval_tokens, so its loss is noisy; a larger"
            " data.val_fraction helps",
            f"-s train.eval_tokens={n_val}",
        )
    elif n_val < 20 * config.seq_len:
        yield Advice(
            f"validation of {n_val:,} tokens is {n_val / config.seq_len:.1f} windows",
            "the validation loss is uncertain; use more text or a larger data.val_fraction",
        )


def _shares(spec: RunSpec, worth_saying: float) -> Iterator[Advice]:
    """Name what takes more than a third of a run and is not training."""
    config, work = spec.config, estimate_work(spec)
    steps, training = work.pop("steps")

    def every(kind: str) -> int:
        """Return the interval at which a kind of work costs a tenth of the steps."""
        fitting = work[kind].times * _SMALL_SHARE * training / max(1.0, work[kind].cost)
        return min(steps, math.ceil(steps / max(1.0, fitting)))

    settings = {
        "evaluating": f"-s train.eval_every={every('evaluating')}",
        "saving": f"-s train.save_every={every('saving')} -s train.eval_every={every('saving')}",
        "sampling": f"-s train.sample_every={every('sampling')}",
    }
    if work["evaluating"].times == 1:
        tokens = max(config.seq_len, int(0.3 * training / 2))
        settings["evaluating"] = f"-s train.eval_tokens={tokens}"
    if config.train.sample_every is None or work["sampling"].times == 1:
        tokens = config.generate.max_new_tokens // 10 or 1
        settings["sampling"] = f"-s generate.max_new_tokens={tokens}"
    total = training + sum(cost for _, cost in work.values())
    for kind, (n_times, cost) in work.items():
        if cost > max(_LARGE_SHARE * total, worth_saying):
            often = "once" if n_times == 1 else f"{n_times:,} times"
            yield Advice(
                f"{kind} {often} takes about {cost / total:.0%} of the run",
                "less often leaves more of it to training",
                settings[kind],
            )


def _vocabulary(spec: RunSpec) -> Iterator[Advice]:
    config, n_ids = spec.config, spec.manifest.tokenizer.vocab_size
    requested = spec.manifest.recipe.max_vocab_size
    size = config.model.vocab_size or n_ids
    padded = -(-n_ids // 64) * 64
    if requested is not None and n_ids < requested:
        yield Advice(
            f"the bpe vocabulary has {n_ids:,} tokens, not the {requested:,} requested",
            "the text has no more pairs to merge"
            + (f"; {size - n_ids:,} rows of the model are never used" if size > padded else ""),
            f"-s model.vocab_size={padded}" if size > padded else "",
        )
    on_gpu = config.device == "cuda" and config.model.init_from == "scratch"
    if on_gpu and size % 64 and size >= _LARGE_VOCABULARY:
        yield Advice(
            f"vocabulary of {size:,} is not a multiple of 64",
            "GPUs multiply a padded head faster; the rows added are never used (as in nanoGPT)",
            f"-s model.vocab_size={-(-size // 64) * 64}",
        )
