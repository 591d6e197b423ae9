"""What nulls and `auto` become, as far as that is known before any data or device is looked at.

Knows nothing of files: what only the data tells is said in the schema's own words.
"""

from collections.abc import Collection, Mapping
from typing import Any

from gptcli.config.reference import keys
from gptcli.config.schema import Config

_VOCABULARIES = {"gpt2": 50257, "bytes": 257}
DEFAULT_BPE_SIZE = 4096
# Null by default, and what others are derived from.
_KEPT = {"data.source", "train.max_epochs", "tokenizer.path"}
# What an automatic choice depends on.
_AUTO = {
    "device": "the first there is of cuda, mps, cpu",
    "dtype": "16 bits where that is fast; eval float32",
    "compile": "if the run is long enough to repay it",
    "train.micro_batch_size": "the most rows that fit in memory",
    "train.async_save": "on cuda",
    "train.parallel": "ddp, or fsdp where that is needed",
}


def derived(config: Config, data_dir: str | None = None) -> dict[str, Any]:
    """Return, by key, what each null or automatic value of `config` becomes.

    Args:
        config: The configuration.
        data_dir: The folder that a null `data.dir` stands for, if there is a source.

    Returns:
        Plain values where they follow from the configuration, else a few words. Keys whose null
        simply means "none" are left out.
    """
    found: dict[str, Any] = {}
    known = _known(config, data_dir)
    for key, info in keys().items():
        value = config.get(key)
        if value is None and key in known:
            found[key] = known[key]
        elif value is None and info.null_means is not None:
            if not (key == "tokenizer.vocab_size" or key.startswith("model.lora.")):
                found[key] = info.null_means
        elif value == "auto":
            found[key] = known.get(key, _AUTO.get(key, "decided when it starts"))
        if key.startswith("model.") and not config.model.is_whole and not config.is_set(key):
            found[key] = f"as in {config.model.init_from}"
    return found


def _known(config: Config, data_dir: str | None) -> dict[str, Any]:
    """Return the values that follow from the configuration alone."""
    model = config.model
    found: dict[str, Any] = {"deterministic": False, "optim.min_lr": config.min_lr}
    folder = data_dir.replace("\\", "/") if data_dir else None
    if folder is not None:
        found["data.dir"] = folder
    name = config.name or (folder.rstrip("/").rpartition("/")[2] if folder else "run")
    found |= {"name": name, "run_dir": f"runs/{name}"}
    if config.tokenizer.name == "bpe" and config.tokenizer.path is None:
        found["tokenizer.vocab_size"] = DEFAULT_BPE_SIZE
    if config.train.max_epochs is None:
        found["train.max_steps"] = "one epoch"
    else:
        found["train.max_steps"] = f"{config.train.max_epochs:g} epochs"
    if not model.is_whole:
        return found
    found |= {"data.seq_len": config.seq_len, "data.stride": config.stride}
    if config.train.micro_batch_size != "auto":
        found["train.tokens_per_step"] = config.tokens_per_step
    found |= {
        "model.n_kv_head": model.n_head,
        "model.n_inner": model.mlp_width,
        "model.head_dim": model.head_size,
        "model.qkv_bias": model.bias,
    }
    if config.tokenizer.path is None and config.tokenizer.name in _VOCABULARIES:
        found["model.vocab_size"] = _VOCABULARIES[config.tokenizer.name]
    return found


def explicit_settings(
    settings: Mapping[str, object], given: Collection[str] | None
) -> dict[str, object]:
    """Return the settings of a run that neither are defaults nor follow from the others.

    Args:
        settings: Every settled value by its dotted key, as config.yaml has them.
        given: The keys that were set, where that is known.
    """
    known = keys()
    changed = {
        key: value
        for key, value in settings.items()
        if key not in known or known[key].default != value
    }
    values: dict[str, Any] = {}
    for key, value in changed.items():
        if key not in known or (known[key].default in (None, "auto") and key not in _KEPT):
            continue
        *sections, name = key.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    try:
        config = Config.model_validate(values)
    except ValueError:  # another version's
        return changed
    called = settings.get("name")  # how the run is called, not what it is set to
    becomes = derived(config) | {"name": called, "run_dir": f"runs/{called}"}
    unset = object()
    return {
        key: value
        for key, value in changed.items()
        if becomes.get(key, unset) != value
        and (key in (given or ()) or key not in known or not _is_settled(key, known[key].default))
    }


def _is_settled(key: str, default: object) -> bool:
    """Tell whether a run itself chooses the value, from its machine or its data."""
    return default == "auto" or key in ("data.dir", "model.vocab_size")
