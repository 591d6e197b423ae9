"""What a sweep tries: keys of the configuration with choices or a range, and points among them.

A point depends on the seed and its number alone: not on when, where or by whom it is tried.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from gptcli.config.loader import load_config
from gptcli.config.reference import keys
from gptcli.config.schema import Config
from gptcli.config.yaml import flow, read_value
from gptcli.errors import CombinationError, ConfigError
from gptcli.seeding import derive_seed, derive_uniform

Value = float | int | str | bool | None
_EXAMPLE = "for example: optim.lr=1e-3..1e-2:log model.n_layer=2,4,6"
_FIXED = ("name", "run_dir", "seed", "model.block_size", "train.eval_tokens", "train.stop_after")
_FIXED_SECTIONS = ("data.", "tokenizer.", "generate.")
_DEFAULT_POINTS, _MOST_POINTS = 20, 10_000


@dataclass(frozen=True)
class Swept:
    """A key and the values to try: choices, or a range with both its ends."""

    key: str
    choices: tuple[Value, ...] = ()
    low: float = 0.0
    high: float = 0.0
    is_log: bool = False
    is_whole: bool = False

    @property
    def text(self) -> str:
        """The values in the words of the command line."""
        if self.choices:
            return ",".join(map(flow, self.choices))
        return f"{flow(self.low)}..{flow(self.high)}{':log' * self.is_log}"

    def at(self, position: float) -> Value:
        """Return the value at a position in [0, 1)."""
        if self.choices:
            return self.choices[int(position * len(self.choices))]
        margin = 0.5 * self.is_whole  # so that each whole number is as likely
        low, high = self.low - margin, self.high + margin
        value = low * (high / low) ** position if self.is_log else low + (high - low) * position
        value = value if self.is_whole else float(f"{value:.4g}")
        value = min(max(value, self.low), self.high)
        return round(value) if self.is_whole else value


def read_space(words: Iterable[str], base: Config) -> tuple[Swept, ...]:
    """Return what `KEY=A,B,C` and `KEY=LO..HI[:log]` stand for; `base` has all other values.

    Raises:
        ConfigError: A key does not exist or cannot be swept, or does not take one of its values.
    """
    space: dict[str, Swept] = {}
    given = base.model_dump(mode="json", exclude_unset=True)
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or key in space:
            problem = "is swept twice" if equals else "expected KEY=A,B or KEY=LO..HI"
            raise ConfigError(f"{word}: {problem}", _EXAMPLE)
        if key in _FIXED or key.startswith(_FIXED_SECTIONS):
            raise ConfigError(f"{word}: all trials keep their data, evaluation windows and seeds")
        one = space[key] = _read(key, text)
        for value in one.choices or (one.low, one.high):
            try:
                load_config(None, [f"{key}={flow(value)}"], base=given)
            except CombinationError:  # it may fit what another key is swept to
                pass
            except ConfigError as error:
                raise ConfigError(error.message.removeprefix("--set "), error.hint) from None
    return tuple(space.values())


def _read(key: str, text: str) -> Swept:
    low, dots, high = text.removesuffix(":log").partition("..")
    if not dots:
        choices = read_value(f"[{text}]")
        if len(set(map(flow, choices))) < len(choices):
            raise ConfigError(f"{key}={text}: one of these values is given twice", _EXAMPLE)
        if len(choices) > 1 and all(isinstance(one, Value) for one in choices):
            return Swept(key, tuple(choices))
        raise ConfigError(f"{key}={text}: expected two or more values, or LO..HI", _EXAMPLE)
    first, last, is_log = read_value(low), read_value(high), text.endswith(":log")
    are_numbers = {type(first), type(last)} <= {int, float}
    if not are_numbers or first >= last or (is_log and first <= 0):
        least = "above 0, " * is_log
        raise ConfigError(f"{key}={text}: expected two numbers, {least}the smaller first", _EXAMPLE)
    takes = keys()[key].takes if key in keys() else ""
    is_whole = "a whole number" in takes and "a number" not in takes
    return Swept(key, (), first, last, is_log, is_whole)


def n_points(space: Sequence[Swept], wanted: int | None) -> int:
    """Return how many points to try; choices alone have so many combinations."""
    size = math.prod(len(one.choices) for one in space)
    if size > _MOST_POINTS:
        raise ConfigError(f"a sweep of {size:,} combinations; {_MOST_POINTS:,} are possible")
    return min(wanted or size, size) if size else wanted or _DEFAULT_POINTS


def point(space: Sequence[Swept], seed: int, number: int) -> dict[str, Value]:
    """Return a point: of choices alone, one of the grid in random order, each once.

    With a range, points fill the space evenly however many there are: Halton's sequence, shifted.
    """
    names = [one.key for one in space]
    if all(one.choices for one in space):
        grid = list(product(*(one.choices for one in space)))
        order = sorted(range(len(grid)), key=lambda index: derive_seed("grid", seed, index))
        return dict(zip(names, grid[order[number]], strict=True))
    primes = (n for n in range(2, 1000) if all(n % divisor for divisor in range(2, n)))
    shifts = (derive_uniform("sweep", seed, name) for name in names)
    positions = (
        (shift + _inverse(number, base)) % 1.0 for shift, base in zip(shifts, primes, strict=False)
    )
    return {one.key: one.at(at) for one, at in zip(space, positions, strict=True)}


def _inverse(number: int, base: int) -> float:
    """Return the digits of a number behind the point, in reverse order."""
    value, scale = 0.0, 1.0
    while number:
        number, digit = divmod(number, base)
        scale /= base
        value += digit * scale
    return value
