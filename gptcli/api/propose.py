"""A run for a text, this machine and so many minutes: what `gpt config init SOURCE --minutes` does.

One rule, which docs/train.md states: the quickstart's run is scaled to the time and the machine's
speed, with a smaller model and more regularization where the text is short.
"""

import itertools
import math
import statistics
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gptcli.config import Config, load_config
from gptcli.config.reference import keys
from gptcli.data.presets import is_local
from gptcli.data.sources import LARGE_SOURCE, find_source
from gptcli.data.units import documents
from gptcli.errors import ConfigError, DataError
from gptcli.formatting import plural, size

_MINUTES, _TOKENS_PER_SECOND = 2.0, 10_000.0  # of the quickstart's run, which is scaled
_SHARE_OF_ZLIB = 0.87  # bits per byte after a million tokens, as a share of zlib's
_WEIGHTS_PER_BYTE = 10  # of text: more are of no use
_SAMPLE_CHARS, _PIECES = 1 << 20, 8
_SECONDS = 2.0  # of measuring


@dataclass(frozen=True)
class Text:
    """What is known of a text: its bytes, and those of a sample."""

    n_bytes: int
    bytes_per_character: float
    n_characters: int  # different ones
    zlib_bits: float  # bits per byte that zlib needs


@dataclass(frozen=True)
class Proposal:
    """Settings by key, each with its reason, and what to expect."""

    settings: dict[str, tuple[Any, str]]
    summary: list[str]  # lines about the text, the machine and the result
    bits_per_byte: float


def propose(source: str, minutes: float) -> Proposal:
    """Look at a text, measure this machine for seconds, and return settings.

    Raises:
        GptError: There is no such text on this machine, or it cannot be read.
    """
    flags = {"data.source": source, "train.max_minutes": minutes}
    text = look_at(load_config(None, flags=flags))
    return settings_for(text, source, minutes, tokens_per_second)


def look_at(config: Config) -> Text:
    """Return what is known of the text of `data.source`."""
    if not is_local(config.data):
        hint = "copy an example: gpt config init --from modern-124m"
        raise ConfigError(f"{config.data.source}: this text is not on this machine", hint)
    found = find_source(config.data, config.seed)
    if found.format is not None:
        hint = "name a text, or train on it with a configuration of yours: gpt train -c FILE"
        raise ConfigError(f"{config.data.source}: holds conversations, not text", hint)
    texts = [text[:_SAMPLE_CHARS] for unit in found.units[:_PIECES]
             for _, text, _ in itertools.islice(documents(unit, config.data), _PIECES)]  # fmt: skip
    text = "".join(part[: _SAMPLE_CHARS // max(1, len(texts))] for part in texts)
    sample = text.encode()
    if not sample:
        raise DataError(f"{config.data.source}: there is no text")
    bits = 8 * len(zlib.compress(sample, 9)) / len(sample)
    return Text(found.n_bytes, len(sample) / len(text), len(set(text)), bits)


def tokens_per_second(config: Config) -> float:
    """Return the tokens on which this machine trains in a second, without the updates."""
    import torch

    from gptcli.device import init_runtime, synchronize
    from gptcli.model import GPT

    runtime = init_runtime(config)
    model = GPT(config.model).to(runtime.device)
    model.init_weights(0)
    ids = torch.zeros(config.rows, config.seq_len, dtype=torch.int64, device=runtime.device)
    took: list[float] = []
    while len(took) < 3 or sum(took) < _SECONDS:
        began = time.perf_counter()
        with runtime.autocast():
            loss = model(ids, ids).loss
        torch.autograd.backward(loss)
        synchronize(runtime.device)
        took.append(time.perf_counter() - began)
    return ids.numel() / statistics.median(took[1:])


def settings_for(
    text: Text, source: str, minutes: float, speed: Callable[[Config], float]
) -> Proposal:
    """Return the settings for a text and a time; `speed` says what a machine does in a second."""
    base = load_config("quickstart", ["model.vocab_size=4096"])
    wide, usual_speed = base.model.n_embd // base.model.n_layer, speed(base)
    scale = minutes / _MINUTES * usual_speed / _TOKENS_PER_SECOND
    by_time = base.model.n_layer * scale ** (1 / 6)
    by_text = (_WEIGHTS_PER_BYTE * text.n_bytes / (12 * wide**2)) ** (1 / 3)
    n_layer = max(2, min(16, round(min(by_time, by_text))))
    width, limit = wide * n_layer, "text" if by_text < by_time else "time"
    wanted = max(1.2 * math.sqrt(text.n_bytes), 2 * text.n_characters)
    vocab_size = _power_of_two(wanted, 512, 32768)
    bytes_per_token = 0.28 * math.log2(vocab_size) * max(1.0, text.bytes_per_character / 1.5)
    held_out = text.n_bytes / bytes_per_token * (0.0005 if text.n_bytes >= LARGE_SOURCE else 0.1)
    longest = base.model.block_size * (1 if n_layer < 6 else 2 if n_layer < 10 else 4)
    context = _power_of_two(held_out / 4, 16, longest)
    rows = max(1, _power_of_two(base.tokens_per_step * scale**0.25, 512, 1 << 17) // context)
    shape = {"n_layer": n_layer, "n_head": n_layer, "n_embd": width, "block_size": context}
    sets = [f"model.{key}={value}" for key, value in (shape | {"vocab_size": vocab_size}).items()]
    sized = load_config("quickstart", [*sets, f"train.micro_batch_size={rows}"])
    n_tokens = 60 * minutes * speed(sized)
    n_steps, epochs = round(n_tokens / rows / context), n_tokens * bytes_per_token / text.n_bytes
    dropout = 0.0 if epochs < 3 else 0.1 if epochs < 16 else 0.2  # on a CPU it halves the steps
    ema = round(1 - 10 / min(10_000, max(100, n_steps)), 4) if dropout else None
    slower = math.sqrt(base.model.n_layer / n_layer)
    settings: dict[str, tuple[Any, str]] = {
        "data.source": (source, f"{size(text.n_bytes)} of text"),
        "tokenizer.name": ("bpe", "Pieces learned from this text."),
        "tokenizer.vocab_size": (vocab_size, "Grows with the root of the text, and is at least"
                                 f" twice its {text.n_characters:,} characters."),
        "model.n_layer": (n_layer, f"Depth and width are one dial, which the {limit} limits here."),
        "model.n_head": (n_layer, ""),
        "model.n_embd": (width, ""),
        "model.block_size": (context, "Longer for larger models; validation needs four windows."),
        "model.dropout": (dropout, f"The text is read {plural(epochs, 'time')}, about."),
        "train.max_minutes": (minutes, f"About {n_steps:,} steps on this machine."),
        "train.micro_batch_size": (rows, f"{rows * context:,} tokens a step, more in longer runs."),
        "train.eval_every": (max(10, n_steps // 8), ""),
        "train.eval_tokens": (65536 if held_out > 65536 else None, ""),
        "train.ema": (ema, "An average of weights, over a tenth of the run, for text read often."),
    }  # fmt: skip
    for key in filter(base.is_set, keys()):  # the rest of its recipe
        value = base.get(key)
        if key.startswith(("model.", "optim.")) and key not in (*settings, "model.vocab_size"):
            is_rate = key.endswith("lr") and value
            reason = "Falls with the root of the depth." if is_rate else ""
            settings[key] = (float(f"{value * slower:.2g}") if is_rate else value, reason)
    expected = text.zlib_bits * _SHARE_OF_ZLIB * (max(n_tokens, 1) / 1e6) ** -0.12
    summary = [
        f"A run of {plural(minutes, 'minute')} on {source}: {size(text.n_bytes)},"
        f" {text.bytes_per_character:.2f} bytes per character.",
        f"This machine: {usual_speed:,.0f} tokens/s with the quickstart's model.",
        f"Expected: about {expected:.1f} bits per byte of validation text, within a third;"
        f" zlib needs {text.zlib_bits:.1f}.",
    ]
    return Proposal(settings, summary, expected)


def _power_of_two(value: float, least: int, most: int) -> int:
    return int(max(least, min(most, 2 ** round(math.log2(max(value, 1))))))
