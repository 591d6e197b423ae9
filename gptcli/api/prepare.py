"""Text to token shards: what `gpt prepare` calls, and `gptcli.prepare` is."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptcli.config import Config, load_config
from gptcli.data import prepare as preparing
from gptcli.data.adopt import adopt, fetch_ready_made, token_files
from gptcli.data.conversations import skipped_rows
from gptcli.data.estimate import Estimate, estimate, require_room
from gptcli.data.loader import combined, part_configs, read_parts
from gptcli.data.presets import data_dir
from gptcli.data.shards import SPLITS, Manifest, read_manifest
from gptcli.data.sources import PreparePlan
from gptcli.errors import ConfigError

OnBytes = Callable[[str, int, int | None], None]
"""Called with a kind of work, the bytes newly done, and the bytes in all where that is known."""

_log = logging.getLogger("gptcli")


@dataclass(frozen=True)
class Prepared:
    """A folder of token shards.

    Attributes:
        folder: What `data.dir` names.
        manifest: What is in it: tokenizer, documents, tokens and bytes of each split.
        sources: Of a mixture, whose manifest counts all of them; the folder is the first one's.
    """

    folder: Path
    manifest: Manifest
    sources: "tuple[Prepared, ...]" = ()

    def facts(self) -> dict[str, Any]:
        """Return the counts as plain values."""
        manifest = self.manifest
        more: dict[str, Any] = {}
        if manifest.is_chat:
            more["trained_tokens"] = {split: manifest.trained(split) for split in SPLITS}
        if manifest.is_chat or manifest.recipe.filters or manifest.recipe.dedup:
            rows = skipped_rows(manifest.units)
            more["skipped"] = {reason: each.model_dump() for reason, each in rows.items()}
        return {
            "dir": None if self.sources else str(self.folder),
            "tokenizer": manifest.tokenizer.name,
            "vocab_size": manifest.tokenizer.vocab_size,
            "documents": manifest.documents,
            "tokens": manifest.tokens.model_dump(),
            "bytes": manifest.bytes.model_dump(),
            "shards": sum(len(unit.shards) for unit in manifest.units),
            **more,
            **({"sources": [each.facts() for each in self.sources]} if self.sources else {}),
        }


def prepare(
    source: str | Config,
    *,
    workers: int | None = 1,
    force: bool = False,
    finalize: bool = False,
    on_plan: Callable[[PreparePlan, Estimate], None] = lambda plan, cost: None,
    on_bytes: OnBytes = lambda kind, n_bytes, total: None,
) -> Prepared:
    """Download, tokenize and write shards; what is finished already is left as it is.

    Args:
        source: A configuration, or what its `data.source` would be: a preset, a path or glob of
            text, or hf:org/name.
        workers: Processes that tokenize; above 1 only in a program that guards its main module.
            None: one per core, for a large source.
        force: Replace a folder that holds other data.
        finalize: Only write the manifest over what all ranks have prepared.
        on_plan: Called before the work starts, with what it will take.
        on_bytes: Called as bytes are downloaded and text is tokenized.

    Raises:
        GptError: The configuration, the text or the disk does not allow it.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"workers: expected at least 1, got {workers}")
    config = source
    if not isinstance(config, Config):
        config = load_config(None, flags={"data.source": config})
    if config.data.mix is not None:
        how: dict[str, Any] = {"workers": workers, "force": force, "on_plan": on_plan}
        return _prepare_all(config, finalize, on_bytes=on_bytes, **how)
    if (ready := token_files(config.data)) is not None:
        if config.data.filters or config.data.dedup:
            raise ConfigError("data.dedup and data.filters: token files are used as they are")
        folder, preset, part = ready
        if preset is not None:
            total = None if part else preset.download_bytes
            fetch_ready_made(preset, part, folder, lambda n: on_bytes("downloading", n, total))
        return Prepared(folder, adopt(folder, config, lambda n: on_bytes("reading", n, None)))
    plan = preparing.make_plan(config)
    is_finished, cost = preparing.is_finished(plan), None
    if not is_finished and not finalize:
        cost = estimate(plan)
        on_plan(plan, cost)
        require_room(plan, cost)
    if finalize:
        manifest = preparing.finalize(plan)
    else:
        sizes = {"tokenizing": cost.text_bytes, "downloading": cost.download_bytes} if cost else {}
        manifest = preparing.prepare(
            plan, workers=workers, force=force,
            on_bytes=lambda kind, n_bytes: on_bytes(kind, n_bytes, sizes.get(kind)),
        )  # fmt: skip
    if is_finished and not force and not finalize:
        _log.info(f"{plan.folder} is prepared already; --force prepares it again")
    else:
        for warning in _unexpected(plan, manifest):
            _log.warning(warning)
    return Prepared(plan.folder, manifest)


def _prepare_all(config: Config, finalize: bool, **how: Any) -> Prepared:
    """Prepare each source of a mixture; what is in a folder that it names is left as it is."""
    if finalize:
        raise ConfigError("data.mix: prepare the sources one by one: gpt prepare SOURCE")
    done = []
    for each in part_configs(config):
        folder, is_ready = data_dir(each.data), each.data.source is None
        done.append(Prepared(folder, read_manifest(folder)) if is_ready else prepare(each, **how))
    return Prepared(done[0].folder, combined(read_parts(config)), tuple(done))


def _unexpected(plan: PreparePlan, manifest: Manifest) -> Iterator[str]:
    """Yield where counts are not those of a known data set, or sizes not those asked for."""
    expected = plan.source.expected
    counts = []
    if expected is not None:
        counts.append(("documents", manifest.documents, expected.documents))
        if manifest.tokenizer.name == "gpt2":
            total = manifest.tokens.train + manifest.tokens.val
            counts.append(("tokens", total, expected.gpt2_tokens))
    for what, counted, known in counts:
        if known is not None and counted != known:
            yield (f"{plan.source.name} should have {known:,} {what}, but {counted:,} were found:"
                   " something is missing, or the source has changed")  # fmt: skip
    most, vocab_size = plan.tokenizer.vocab_size, manifest.tokenizer.vocab_size
    if plan.tokenizer.name == "bpe" and plan.tokenizer.path is None and most and vocab_size < most:
        yield (f"the text has pieces for a vocabulary of {vocab_size:,} ids, fewer than the"
               f" {most:,} of tokenizer.vocab_size")  # fmt: skip
    share, fraction = manifest.val_share, plan.val_fraction
    is_drawn = fraction and any(unit.held_out == "documents" for unit in plan.source.units)
    if is_drawn and not 2 / 3 < share / fraction < 1.5:
        yield (f"{share:.2%} of the tokens are for validation, not the {fraction:.2%} of"
               " data.val_fraction: documents are held out as a whole, and there are few or of"
               " very different lengths")  # fmt: skip
