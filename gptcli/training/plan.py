"""What a run would do, found out without training."""

from typing import Any

import torch

from gptcli.config.schema import Config
from gptcli.data.shards import read_manifest, read_tokenizer
from gptcli.data.sources import data_dir
from gptcli.model import GPT
from gptcli.training.initial import adopt, freeze, n_learning
from gptcli.training.parallel import rows_of
from gptcli.training.resolve import (
    make_loader,
    max_steps_of,
    open_tokens,
    resolve,
    with_compile,
)


def plan(config: Config, n_processes: int = 1) -> dict[str, Any]:
    """Check a fresh run as far as that is possible without training, and say what it would do.

    Args:
        config: The run.
        n_processes: That are to do it.

    Raises:
        ConfigError: The configuration does not fit the data.
        DataError: The data cannot be used.
        CheckpointError: The weights to start from cannot be used.
    """
    folder = data_dir(config.data)
    manifest = read_manifest(folder)
    config, origin = adopt(config, read_tokenizer(folder, manifest), None)
    config = resolve(config, folder, manifest, None, [])
    train_tokens, val_tokens = open_tokens(folder, manifest, config)
    loader = make_loader(config, train_tokens)
    with torch.device("meta"):
        model = GPT(config.model)
    freeze(model, config.train.freeze)
    rows_of(config, n_processes)
    max_steps = max_steps_of(config, loader)
    config = with_compile(config, max_steps)
    return {
        "run_dir": str(config.run_folder),
        "data_dir": str(folder),
        "init_from": config.model.init_from,
        "revision": origin.revision if origin is not None else None,
        "parameters": model.n_params(),
        "trained_parameters": n_learning(model),
        "train_tokens": len(train_tokens),
        "val_tokens": len(val_tokens) if val_tokens is not None else 0,
        "tokens_per_step": config.tokens_per_step,
        "grad_accum_steps": config.grad_accum_steps,
        "max_steps": max_steps,
        "epochs": round(max_steps * config.tokens_per_step / config.seq_len / loader.n_windows, 3),
        "device": config.device,
        "dtype": config.dtype,
        "compile": config.compile,
    }
