"""What the shell offers when Tab is pressed: keys, examples, runs, data sets.

Nothing here loads torch or prints: a completion that fails offers nothing. Where nothing is
offered, the shells that typer supports offer files.
"""

from collections.abc import Callable, Iterable
from functools import wraps

from gptcli.errors import GptError

Offer = tuple[str, str]  # a word, and what it is; some shells show both


def _quietly(offers: Callable[[str], Iterable[Offer]]) -> Callable[[str], list[Offer]]:
    """Let a completion offer what begins with the word typed so far, and nothing when it fails."""

    @wraps(offers)
    def complete(incomplete: str) -> list[Offer]:
        try:
            return [offer for offer in offers(incomplete) if offer[0].startswith(incomplete)]
        except (GptError, OSError, ValueError):
            return []

    return complete


@_quietly
def settings(incomplete: str) -> Iterable[Offer]:
    """Offer keys for KEY=VALUE, and for one alone its default."""
    from gptcli.config.reference import keys
    from gptcli.config.render import to_yaml

    found = [info for info in keys().values() if info.key.startswith(incomplete)]
    offers = [(f"{info.key}=", info.meaning) for info in found]
    if len(found) == 1:  # with a second offer, the shell does not end the word behind the `=`
        offers.append((f"{found[0].key}={to_yaml(found[0].default)}", "default"))
    return offers


@_quietly
def examples(incomplete: str) -> Iterable[Offer]:
    """Offer the shipped examples, each with what it is."""
    from gptcli.config.loader import example_files
    from gptcli.config.render import about_example

    return [(path.stem, about_example(path)) for path in example_files()]


@_quietly
def runs(incomplete: str) -> Iterable[Offer]:
    """Offer the runs in runs/, the newest first."""
    from gptcli.runs.find import list_runs

    return [(folder.name, "run") for folder in list_runs()]


@_quietly
def datasets(incomplete: str) -> Iterable[Offer]:
    """Offer the presets."""
    from gptcli.data.presets import PRESETS

    return [(preset.name, preset.about) for preset in PRESETS.values()]
