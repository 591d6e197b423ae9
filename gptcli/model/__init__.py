"""The network: torch and the configuration's schema, nothing else."""

from gptcli.model.cache import KVCache
from gptcli.model.gpt import GPT, GPTOutput

__all__ = ["GPT", "GPTOutput", "KVCache"]
