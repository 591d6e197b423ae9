"""The model: torch and the configuration's schema, nothing else."""

from gptcli.model.cache import KVCache
from gptcli.model.gpt import GPT
from gptcli.model.lora import init_adapters, is_adapter, merge_adapters

__all__ = ["GPT", "KVCache", "init_adapters", "is_adapter", "merge_adapters"]
