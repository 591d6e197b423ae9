"""The first weights of a run, random or pretrained, and which of them are frozen."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from gptcli.checkpoint import Checkpoint, load_weights
from gptcli.config.model import ModelConfig
from gptcli.config.schema import Config
from gptcli.errors import CheckpointError, ConfigError
from gptcli.model import GPT
from gptcli.seeding import derive_seed
from gptcli.tokenizers import Tokenizer

if TYPE_CHECKING:  # of other programs only what starts from their weights imports them
    from gptcli.interop.weights import Pretrained

# What the run decides.
_OWN = {"init_from", "dropout", "lora", "zero_init", "zero_init_head", "init_std"}
_BLOCKS = re.compile(r"h\.(\d{1,9})-(\d{1,9})((?:\..+)?)\Z")


def apply_pretrained_shape(
    config: Config, tokenizer: Tokenizer, checkpoint: Checkpoint | None
) -> tuple[Config, "Pretrained | None"]:
    """Return `config` with the shape of the weights it starts from, and these; None for random.

    Of a resumed run, the checkpoint has the shape: the pretrained weights may be gone.

    Raises:
        ConfigError: A key that is set contradicts the shape, or the tokenizer is not the weights'.
        CheckpointError: The weights are missing or cannot be used.
    """
    name = config.model.init_from
    if name == "scratch":
        return config, None
    if checkpoint is not None:
        try:
            values = {**checkpoint.config["model"], "init_from": "scratch", "lora": None}
            shape = ModelConfig(**values)
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"a checkpoint without a model's shape ({error})") from error
        return _with_shape(config, shape, "the run"), None
    from gptcli.interop.pretrained import open_pretrained

    pretrained = open_pretrained(name)
    config = _with_shape(config, pretrained.shape_for(tokenizer), name)
    pretrained.require_tokenizer(tokenizer)
    return config, pretrained


def _with_shape(config: Config, shape: ModelConfig, whose: str) -> Config:
    """Return `config` with an imported shape; a smaller context and more rows may be requested."""
    values = shape.model_dump() | {key: getattr(config.model, key) for key in _OWN}
    imported = shape.resolved()
    for key in sorted(config.model.model_fields_set - _OWN):
        value, given = getattr(config.model, key), getattr(imported, key)
        if value is None or value == given:
            continue
        change = {"block_size": "smaller", "vocab_size": "larger"}.get(key)
        if not change or (value > given) != (change == "larger"):
            raise ConfigError(
                f"model.{key}: {str(value).lower()} is set, but {whose} has {str(given).lower()}"
                + (f"; it can only be made {change}" if change else ""),
                "drop the setting: the shape comes with the weights",
            )
        values[key] = value
    try:
        Config.model_validate({**config.model_dump(), "model": values})
        model = ModelConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = (first.get("ctx") or {}).get("key", "model")
        raise ConfigError(f"{key}: {first['msg']} (the shape is that of {whose})") from error
    return config.model_copy(update={"model": model})


def build_model(config: Config, pretrained: "Pretrained | None", n_tokens: int) -> GPT:
    """Make the model of a fresh run with its weights.

    Raises:
        CheckpointError: The weights are damaged or of another model.
    """
    if pretrained is None:
        model = GPT(config.model, n_tokens)
        model.init_weights(derive_seed("weights", config.seed))
        return model
    from gptcli.interop.weights import add_tokens, resize_vocab

    # Read first: nothing is allocated before the file has shown that it is of that size.
    weights, n_known = pretrained.weights(), pretrained.n_known
    if n_tokens > n_known:
        weights = add_tokens(weights, config.model, range(n_known, n_tokens), config.seed)
    else:
        weights = resize_vocab(weights, config.model)
    model = GPT(config.model, n_tokens)
    if config.model.lora is not None:
        from gptcli.model.lora import init_adapters, is_adapter  # which few runs have

        init_adapters(model, derive_seed("adapters", config.seed))
        weights |= {name: p for name, p in model.named_parameters() if is_adapter(name)}
    load_weights(model, weights, Path(pretrained.place))
    return model


def freeze(model: GPT, names: list[str]) -> None:
    """Freeze the modules or parameters named (`h.0-5`: blocks 0 to 5), and all beside adapters.

    Raises:
        ConfigError: Nothing has such a name, or nothing is left to learn.
    """
    frozen = frozen_names(model, names)
    parameters = dict(model.named_parameters())
    if model.config.lora is not None:
        from gptcli.model.lora import is_adapter

        frozen |= {name for name in parameters if not is_adapter(name)}
    for name in frozen:
        parameters[name].requires_grad_(False)
    if len(frozen) == len(parameters):
        raise ConfigError("train.freeze: everything is frozen, nothing is left to train")


def frozen_names(model: GPT, names: Iterable[str]) -> set[str]:
    """Return the parameters that the names of `train.freeze` stand for.

    Raises:
        ConfigError: Nothing has such a name.
    """
    parameters = [name for name, _ in model.named_parameters()]
    frozen: set[str] = set()
    for name in names:
        for prefix in _expand(name):
            matches = [p for p in parameters if p == prefix or p.startswith(f"{prefix}.")]
            if not matches:
                raise ConfigError(f"train.freeze: {_no_such(name, prefix, model)}")
            frozen.update(matches)
    return frozen


def _expand(name: str) -> Iterator[str]:
    match = _BLOCKS.match(name)
    if match is None:
        yield name
        return
    first, last = int(match[1]), int(match[2])
    if first > last:
        raise ConfigError(f"train.freeze: {name}: the range ends before it begins")
    # The first missing block ends it: no need to count to a typed-in million.
    yield from (f"h.{block}{match[3]}" for block in range(first, last + 1))


def _no_such(name: str, prefix: str, model: GPT) -> str:
    if prefix.startswith("lm_head") and model.config.tie_embeddings:
        return f"{name} is wte itself (model.tie_embeddings); freeze wte"
    names = dict.fromkeys(re.sub(r"^h\.\d+", "h.N", name.rpartition(".")[0])
                          for name, _ in model.named_parameters())  # fmt: skip
    last = model.config.n_layer - 1
    return f"nothing is named {prefix!r}; there are {', '.join(names)}, with N from 0 to {last}"
