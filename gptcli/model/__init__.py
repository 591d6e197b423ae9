"""The model: torch, the configuration's schema and kernels of our own, nothing else."""

from gptcli.model.cache import KVCache
from gptcli.model.gpt import GPT
from gptcli.model.lora import init_adapters, is_adapter, merge_adapters

__all__ = ["GPT", "KVCache", "init_adapters", "is_adapter", "merge_adapters"]
