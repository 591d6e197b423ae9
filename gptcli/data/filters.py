"""Rules that leave documents out by what is in them, one document at a time.

Knows nothing of files or units. A document is judged by its first piece, which is all of it up to
4 MB, so that memory stays bounded; only its length counts to the end.
"""

import functools
import string
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from gptcli.config.schema import FilterConfig
from gptcli.errors import ConfigError, DataError

_SECONDS = 10  # of one search of the regular expression
_LANGUAGE_CHARS = 2000
_LEAST_CONFIDENCE = 0.05  # digits and signs alone are in no language
_NOT_LETTERS = bytes(set(range(128)) - set(string.ascii_letters.encode()))


class Rules:
    """The filters of a configuration; a call tells which one leaves a document out.

    Raises:
        ConfigError: The regular expression is none, a language is unknown, or a package is missing.
    """

    def __init__(self, config: FilterConfig) -> None:
        self._config = config
        self._search = _search_of(config.exclude) if config.exclude is not None else None
        self._language = _language_of(config.languages) if config.languages is not None else None

    def __call__(self, pieces: Iterator[str], place: str) -> str | None:
        """Return why a document is left out, None if it is kept.

        Raises:
            DataError: The regular expression takes too long on it.
        """
        config, head = self._config, next(pieces, "")
        n_chars = len(head)
        if config.min_chars is not None or config.max_chars is not None:
            enough = max(config.min_chars or 0, (config.max_chars or 0) + 1)
            while n_chars < enough and (piece := next(pieces, None)) is not None:
                n_chars += len(piece)
        if config.min_chars is not None and n_chars < config.min_chars:
            return "shorter than min_chars"
        if config.max_chars is not None and n_chars > config.max_chars:
            return "longer than max_chars"
        if config.min_letters is not None and _share_of_letters(head) < config.min_letters:
            return "fewer letters than min_letters"
        most = config.max_repeated_lines
        if most is not None and _share_of_repeated_lines(head) > most:
            return "more repeated lines than max_repeated_lines"
        if self._search is not None and self._search(head, place):
            return "matches exclude"
        if self._language is not None and self._language(head) not in (config.languages or ()):
            return "not in languages"
        return None


def _share_of_letters(text: str) -> float:
    """Return the share of letters among the characters that are not white space."""
    visible = "".join(text.split())
    if visible.isascii():
        letters = len(visible.encode().translate(None, _NOT_LETTERS))
    else:
        letters = sum(map(str.isalpha, visible))
    return letters / max(1, len(visible))


def _share_of_repeated_lines(text: str) -> float:
    """Return the share of the lines with text that repeat an earlier one."""
    lines = Counter(line for line in map(str.strip, text.split("\n")) if line)
    return 1 - len(lines) / lines.total() if lines else 0.0


def _search_of(expression: str) -> Callable[[str, str], bool]:
    """Return a function that tells whether a regular expression is found in a text."""
    import regex  # unlike `re`, it can stop a search that would take for ever

    try:
        compiled = regex.compile(expression)
    except regex.error as error:
        raise ConfigError(f"data.filters.exclude: not a regular expression ({error})") from error

    def search(text: str, place: str) -> bool:
        try:
            return compiled.search(text, timeout=_SECONDS) is not None
        except TimeoutError:
            raise DataError(
                f"{place}: data.filters.exclude took more than {_SECONDS} seconds",
                "simplify the expression, such as a repetition within a repetition",
            ) from None

    return search


def _language_of(codes: list[str]) -> Callable[[str], str]:
    """Return a function that tells the language of a text."""
    identifier = _identifier()
    if unknown := sorted(set(codes) - set(identifier.labels)):
        raise ConfigError(
            f"data.filters.languages: unknown code '{unknown[0]}'",
            "use ISO 639 codes, such as en, de or zh",
        )
    return lambda text: str(identifier.classify(text[:_LANGUAGE_CHARS])[0])


@functools.cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        hint = "install it: pip install 'gptcli[language]'"
        raise ConfigError("data.filters.languages needs the package py3langid", hint) from error
    return LanguageIdentifier.from_model_file(
        MODEL_FILE, norm_probs=True, min_confidence=_LEAST_CONFIDENCE
    )
