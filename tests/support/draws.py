"""What a model draws: the ids of texts, without their characters."""

from collections.abc import Collection, Iterator, Sequence

from gptcli.config import GenerateConfig
from gptcli.generation import Row, Rows
from gptcli.generation.decode import Drawn
from gptcli.model import GPT


def draws(
    model: GPT,
    prompt: Sequence[int],
    config: GenerateConfig,
    *,
    ends: Collection[int] = (),
    seed: int = 1,
    numbers: Sequence[int] = (0,),
    n_top: int | None = None,
    replay: bool = False,
) -> Iterator[Drawn]:
    """Yield the draws that have a token, until all samples are complete."""
    rows = Rows(model, replay=replay)
    drawn = rows.join([Row(list(prompt), config, ends, seed, n, n_top) for n in numbers])
    while drawn:
        for one in drawn:
            if one.token is not None:
                yield one
            if one.token is None or one.row.n_drawn == config.max_new_tokens:
                rows.leave(one.row)
        drawn = rows.step() if rows.rows else []


def ids_drawn(
    model: GPT, prompt: Sequence[int], config: GenerateConfig, number: int = 0, **key: object
) -> list[int]:
    """Return the ids of one sample."""
    found = draws(model, prompt, config, numbers=[number], **key)  # type: ignore[arg-type]
    return [one.token for one in found if one.token is not None]
