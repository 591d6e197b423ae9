"""Sampling: ids in, ids out, and text around it. Each draw is a function of its key.

Sample k of a seed is the same text whether it is drawn alone or among others. Knows nothing of
checkpoints or terminals.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gptcli.config.schema import GenerateConfig
from gptcli.device import Compute
from gptcli.errors import ConfigError
from gptcli.keyed import keyed_float
from gptcli.model import GPT
from gptcli.model.cache import KVCache
from gptcli.tokenizers import TextDecoder, Tokenizer, UnknownCharacters


def candidates(logits: Tensor, config: GenerateConfig) -> tuple[Tensor, Tensor]:
    """Return the ids that may be drawn and their probabilities, likeliest first, (K,) each.

    Temperature, then top-k, then top-p (Holtzman et al. 2020) and min-p (Nguyen et al. 2024).

    Args:
        logits: (V,), float32.
        config: How to sample; temperature above 0.
    """
    k = min(config.top_k or logits.numel(), logits.numel())
    values, ids = torch.topk(logits / config.temperature, k)
    probs = torch.softmax(values, dim=0)
    keep = torch.ones_like(probs, dtype=torch.bool)
    if config.top_p is not None:
        keep &= probs.cumsum(0) - probs < config.top_p
    if config.min_p is not None:
        keep &= probs >= config.min_p * probs[0]
    return ids[keep], probs[keep] / probs[keep].sum()


def draw(logits: Tensor, config: GenerateConfig, uniform: float) -> int:
    """Return one id drawn from logits (V,) by inverting the distribution at `uniform` in [0, 1)."""
    if config.temperature == 0:
        return int(logits.argmax())
    ids, probs = candidates(logits, config)
    ends = probs.double().cumsum(0)
    index = int(torch.searchsorted(ends, uniform * float(ends[-1]), right=True))
    return int(ids[min(index, len(ids) - 1)])


@torch.no_grad()
def stream(
    model: GPT,
    prompt: Sequence[int],
    config: GenerateConfig,
    compute: Compute,
    *,
    eot: int,
    n_tokens: int,
    seed: int,
    sample: int = 0,
) -> Iterator[int]:
    """Yield drawn ids as they are drawn, until end-of-text (not yielded) or max_new_tokens.

    When the context is full, its later half is read again and drawing goes on.

    Args:
        model: In evaluation mode.
        prompt: One to block_size ids.
        config: How to sample.
        compute: Where the network lives, and its precision.
        eot: The id that ends a text.
        n_tokens: Ids the tokenizer has; the network may have more rows, which are never drawn.
        seed: With `sample` and the position, the key of each draw.
        sample: Which of several texts this is.
    """
    block_size = model.config.block_size
    assert 0 < len(prompt) <= block_size
    tokens = list(prompt)
    cache = model.empty_cache(1, min(block_size, len(tokens) + config.max_new_tokens))
    new = tokens
    for position in range(config.max_new_tokens):
        if cache.length + len(new) > block_size:
            new = tokens[-max(1, block_size // 2) :]
            cache.length = 0
        logits = _next_logits(model, new, cache, compute)[:n_tokens]
        token = draw(logits, config, keyed_float("draw", seed, sample, position))
        if token == eot:
            return
        yield token
        tokens.append(token)
        new = [token]


def _next_logits(model: GPT, new: list[int], cache: KVCache, compute: Compute) -> Tensor:
    """Feed new tokens and return the logits (V,) of the one after them, float32 on the CPU."""
    with compute.autocast():
        logits = model(torch.tensor([new], device=compute.device), cache=cache).logits
    result: Tensor = logits[0, -1].float().cpu()
    return result


def encode_prompt(tokenizer: Tokenizer, prompt: str | None, block_size: int) -> list[int]:
    """Return the ids to start from: the prompt's, or end-of-text without one.

    Raises:
        ConfigError: The prompt is longer than the context, or the vocabulary lacks part of it.
    """
    try:
        ids = tokenizer.encode(prompt).tolist() if prompt else [tokenizer.eot]
    except UnknownCharacters as error:
        raise ConfigError(f"the prompt: {error.message}", error.hint) from error
    except UnicodeEncodeError as error:  # bytes of the command line that are not UTF-8
        raise ConfigError(f"the prompt is not valid text at character {error.start}") from error
    if len(ids) > block_size:
        raise ConfigError(
            f"the prompt has {len(ids)} tokens, the network's context holds {block_size}",
            "shorten the prompt to its end, which matters most",
        )
    return ids


class TextStream:
    """The text of a stream of ids, cut before the first stop string.

    Iterating yields text as soon as it is certain: bytes of an unfinished character and what may
    become a stop string are held back.

    Attributes:
        text: The text so far.
        n_tokens: Ids drawn so far.
        finish_reason: "length", or "stop" after end-of-text or a stop string.
    """

    def __init__(self, ids: Iterator[int], tokenizer: Tokenizer, config: GenerateConfig) -> None:
        self.text = ""
        self.n_tokens = 0
        self.finish_reason = "length"
        self._ids, self._decoder, self._config = ids, TextDecoder(tokenizer), config

    def __iter__(self) -> Iterator[str]:
        held = ""
        for token in self._ids:
            self.n_tokens += 1
            held += self._decoder.push(token)
            at = _first_stop(held, self._config.stop)
            if at is not None:
                self.finish_reason = "stop"
                yield from self._emit(held[:at])
                return
            sure = len(held) - _possible_stop(held, self._config.stop)
            yield from self._emit(held[:sure])
            held = held[sure:]
        if self.n_tokens < self._config.max_new_tokens:
            self.finish_reason = "stop"
        yield from self._emit(held + self._decoder.finish())

    def _emit(self, text: str) -> Iterator[str]:
        if text:
            self.text += text
            yield text


def _first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Return where the earliest stop string begins."""
    places = [at for stop in stops if (at := text.find(stop)) >= 0]
    return min(places, default=None)


def _possible_stop(text: str, stops: Sequence[str]) -> int:
    """Return the length of the longest end of `text` that a stop string begins with."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
