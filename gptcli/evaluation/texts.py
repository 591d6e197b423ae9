"""The text to score: a file, or a split of prepared data, in tokens of the model's tokenizer."""

from pathlib import Path

import numpy as np

from gptcli.checkpoint import TrainedModel
from gptcli.config.schema import Split
from gptcli.data.packing import PackedRows, open_rows
from gptcli.data.readers import read_text
from gptcli.data.shards import TokenReader, read_manifest
from gptcli.errors import DataError
from gptcli.evaluation.compare import spans_of_bytes
from gptcli.evaluation.score import SpanOf, TokenArray, TokenSequence
from gptcli.formatting import plural
from gptcli.tokenizers import UnknownCharacters


def text_tokens(
    path: Path, trained: TrainedModel, errors: str
) -> tuple[TokenSequence, SpanOf, str | None]:
    """Tokenize a text file, with nothing before it.

    Returns:
        The tokens, the span that each is in, and a warning if they decode to another text.

    Raises:
        DataError: It cannot be read, or has characters the tokenizer does not know, or no text.
    """
    tokenizer = trained.tokenizer
    pieces, is_changed = [], False
    try:
        for text in read_text(path, errors, tokenizer.safe_cut):
            pieces.append(tokenizer.encode(text))
            if tokenizer.is_foreign and not is_changed:
                is_changed = tokenizer.decode(pieces[-1].tolist()) != text
    except UnknownCharacters as error:
        hint = "its tokenizer knows the characters of its training text only"
        raise DataError(f"{path}: {error.message}", hint) from error
    tokens = np.concatenate(pieces)
    if len(tokens) < 2:
        raise DataError(f"{path}: {plural(len(tokens), 'token')}; scoring takes at least 2")
    span_of = spans_of_bytes(tokenizer.token_lengths()[tokens]).__getitem__
    warning = (
        f"the tokenizer of {trained.path} changes this text; its figures, bits per byte"
        " too, are those of the changed text"
    )
    return TokenArray(tokens), span_of, warning if is_changed else None


def split_tokens(
    folder: Path, split: Split, trained: TrainedModel, context: int
) -> TokenReader | PackedRows:
    """Open a split of prepared data that the checkpoint's tokenizer wrote.

    Conversations are in rows of `context` tokens.

    Raises:
        DataError: Another tokenizer wrote it, or it is empty.
    """
    manifest = read_manifest(folder)
    if manifest.tokenizer.sha256 != trained.tokenizer.fingerprint:
        raise DataError(
            f"{folder} was written by another tokenizer ({manifest.tokenizer.name},"
            f" {manifest.tokenizer.vocab_size:,} ids) than the checkpoint's"
            f" ({trained.tokenizer.name}, {trained.tokenizer.vocab_size:,} ids)",
            "name the data it was trained on with --data, or score a file with --text",
        )
    if not manifest.is_chat:
        tokens = TokenReader(folder, manifest, split)
    elif (rows := open_rows(folder, manifest, split, context, seed=0)) is not None:
        return rows
    if manifest.is_chat or len(tokens) < 2:
        raise DataError(f"{folder}: no {split} tokens", "try --split train, or --text FILE")
    return tokens
