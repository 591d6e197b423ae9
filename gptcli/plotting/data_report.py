"""A data folder as one HTML page: documents, tokens, characters, duplicates, samples."""

from pathlib import Path

from gptcli.data.contents import Contents, Document
from gptcli.data.shards import Manifest
from gptcli.formatting import count, decimal, plural, size
from gptcli.plotting.page import bars, details, escape, fill, pairs, section, table


def render(folder: Path, manifest: Manifest, contents: Contents, now: str) -> str:
    """Return the page of a data folder."""
    recipe, total = manifest.recipe, manifest.tokens.total
    what = "conversation" if manifest.is_chat else "document"
    facts = f"<p>{escape(recipe.source)}</p>"
    if contents.tokens_read < total:
        part = f"Counted in {contents.tokens_read:,} of {total:,} tokens, the first of each split."
        facts += f'<p class="quiet">{part}</p>'
    tiles = [
        ("Tokens", count(total), f"{manifest.val_share:.2%} for validation"),
        (f"{what.capitalize()}s", count(manifest.documents), ""),
        ("Text", size(manifest.bytes.total), ""),
        ("Tokens per byte", decimal(contents.tokens_per_byte), ""),
        ("Median length", plural(contents.median_length, "token"), f"at most {contents.longest:,}"),
        ("Vocabulary", f"{manifest.tokenizer.vocab_size:,}",
         f"{contents.unused_ids:,} ids do not occur"),
        ("Copies", f"{contents.copies / max(1, contents.documents):.2%}", f"of the {what}s"),
    ]  # fmt: skip
    return fill(
        folder.resolve().name,
        facts=facts,
        tiles=tiles,
        body=[
            section(f"Lengths of {what}s", _lengths(contents, what)),
            section("Duplicates", _duplicates(contents, what)),
            section("Characters", _shares(contents.characters)),
            section("Most frequent tokens", _tokens(contents, manifest)),
            section("Samples", *(_sample(each, what, is_open=True) for each in contents.samples)),
            section("Folder", _folder(manifest)),
        ],
        now=now,
        folder=folder,
    )


def _lengths(contents: Contents, what: str) -> str:
    rows = [(f"{low:,} to {2 * low - 1:,} tokens" if low > 1 else "1 token", number,
             f"{number:,}", f"{number / contents.documents:.1%}")
            for low, number in contents.lengths]  # fmt: skip
    mean = f"{decimal(contents.mean_length)} tokens on average"
    empty = f"; {plural(contents.empty_documents, f'empty {what}')} left out"
    note = mean + empty * bool(contents.empty_documents)
    return f'<p class="quiet">{note}</p>{bars(rows)}'


def _duplicates(contents: Contents, what: str) -> str:
    rows = [
        (f"{what}s that equal an earlier one", f"{contents.copies:,} of {contents.documents:,}"),
        (f"validation {what}s that the training split has", f"{contents.copies_in_val:,}"),
    ]
    most = contents.most_copied
    shown = _sample(most, f"{contents.most_copies:,} times: {what}", is_open=False) if most else ""
    return table(rows, kind="facts") + shown


def _shares(counts: dict[str, int]) -> str:
    total = sum(counts.values())
    return bars((name, number, f"{number:,}", f"{number / total:.2%}")
                for name, number in counts.items())  # fmt: skip


def _tokens(contents: Contents, manifest: Manifest) -> str:
    rows = [(f"{text!r}" if text else f"id {token}", number, f"{number:,}",
             f"{number / max(1, contents.tokens_read):.2%}")
            for token, text, number in contents.frequent]  # fmt: skip
    return bars(rows)


def _sample(sample: Document, what: str, *, is_open: bool) -> str:
    title = f"{what} of {sample.tokens:,} tokens, {sample.split} from token {sample.start:,} on"
    # A parser drops a line break right after <pre>: this one, and none of the text.
    return details(title, f'<pre dir="auto">\n{escape(sample.text)}</pre>', is_open=is_open)


def _folder(manifest: Manifest) -> str:
    facts = manifest.recipe.model_dump(exclude={"tokenizer"}, exclude_none=True)
    facts |= {"tokenizer": manifest.tokenizer.name, "fingerprint": manifest.fingerprint}
    counts = [(f"{name}, {split}", f"{getattr(pair, split):,}")
              for name, pair in (("tokens", manifest.tokens), ("bytes of text", manifest.bytes))
              for split in ("train", "val")]  # fmt: skip
    return pairs([*counts, *facts.items()])
