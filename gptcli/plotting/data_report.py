"""A data folder as one HTML page: documents, tokens, characters, duplicates, samples."""

from pathlib import Path

from gptcli.data.contents import Contents, Document
from gptcli.data.shards import Manifest
from gptcli.formatting import count, decimal, plural, size
from gptcli.plotting import page


def render(folder: Path, manifest: Manifest, contents: Contents, now: str) -> str:
    """Return the page of a data folder."""
    what = "conversation" if manifest.is_chat else "document"
    tiles = [
        ("Tokens", count(manifest.tokens.total), f"{manifest.val_share:.2%} for validation"),
        (f"{what.capitalize()}s", count(manifest.documents), ""),
        ("Text", size(manifest.bytes.total), ""),
        ("Tokens per byte", decimal(contents.tokens_per_byte), ""),
        ("Median length", plural(contents.median_length, "token"), f"at most {contents.longest:,}"),
        ("Vocabulary", f"{manifest.tokenizer.vocab_size:,}",
         f"{contents.unused_ids:,} ids do not occur"),
        ("Copies", f"{contents.copies / max(1, contents.documents):.2%}", f"of the {what}s"),
    ]  # fmt: skip
    lengths = [(f"{low:,} to {2 * low - 1:,} tokens" if low > 1 else "1 token", number)
               for low, number in contents.lengths]  # fmt: skip
    frequent = [(f"{text!r}" if text else f"id {token}", number)
                for token, text, number in contents.frequent]  # fmt: skip
    counts = [(f"{name}, {split}", f"{getattr(pair, split):,}")
              for name, pair in (("tokens", manifest.tokens), ("bytes of text", manifest.bytes))
              for split in ("train", "val")]  # fmt: skip
    facts = manifest.recipe.model_dump(exclude={"tokenizer"}, exclude_none=True)
    facts |= {"tokenizer": manifest.tokenizer.name, "fingerprint": manifest.fingerprint}
    return page.fill(
        "data.html", numbers=None, name=folder.resolve().name, tiles=tiles, now=now, folder=folder,
        manifest=manifest, contents=contents, what=what, about=_about,
        lengths=_bars(lengths, contents.documents),
        characters=_bars([*contents.characters.items()], sum(contents.characters.values())),
        frequent=_bars(frequent, contents.tokens_read),
        folder_facts=[*counts, *facts.items()],
    )  # fmt: skip


def _bars(rows: list[tuple[str, int]], total: int) -> list[tuple[str, int, str, str]]:
    return [(name, n, f"{n:,}", f"{n / max(1, total):.2%}") for name, n in rows]


def _about(document: Document) -> str:
    return f" of {document.tokens:,} tokens, {document.split} from token {document.start:,} on"
