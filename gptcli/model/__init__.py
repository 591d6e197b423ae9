"""The network: torch and the configuration's schema, nothing else."""

from gptcli.model.cache import KVCache
from gptcli.model.gpt import GPT, GPTOutput
from gptcli.model.lora import init_adapters, is_adapter, merge_adapters

__all__ = ["GPT", "GPTOutput", "KVCache", "init_adapters", "is_adapter", "merge_adapters"]
