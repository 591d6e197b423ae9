"""Decoding with the transformers library: FOLDER DTYPE N_TEXTS N_TOKENS, prints tokens/s.

The prompt's pass is taken out by a run that draws a single token.
"""

import sys
import time

import torch
from transformers import AutoModelForCausalLM

folder, dtype, n_texts, n_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
prompt = torch.arange(100, 116).expand(n_texts, -1)


def seconds(n: int) -> float:
    """Draw `n` tokens for each text."""
    began = time.perf_counter()
    model.generate(prompt, attention_mask=torch.ones_like(prompt), min_new_tokens=n,
                   max_new_tokens=n, do_sample=True, top_k=50, temperature=0.8,
                   pad_token_id=0)  # fmt: skip
    return time.perf_counter() - began


seconds(5)
first = seconds(1)
print(n_texts * n_tokens / (seconds(n_tokens + 1) - first))
