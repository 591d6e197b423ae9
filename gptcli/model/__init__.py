"""The model: torch, the configuration's schema and kernels of our own, nothing else."""

from gptcli.model.cache import KVCache
from gptcli.model.gpt import GPT

__all__ = ["GPT", "KVCache"]
