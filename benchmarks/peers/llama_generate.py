"""Decoding with llama.cpp: FILE N_TOKENS, prints tokens/s. Run by a Python that has llama_cpp.

It draws nothing: the same token is fed again and again. Weights are not repacked for AMX, for
version 0.3.36 of llama-cpp-python crashes there with q8_0.
"""

import os
import sys
import time

import llama_cpp

path, n_tokens = sys.argv[1], int(sys.argv[2])
settings = llama_cpp.llama_model_default_params()
settings.use_extra_bufts = False
model = llama_cpp.llama_model_load_from_file(path.encode(), settings)
wanted = llama_cpp.llama_context_default_params()
wanted.n_ctx, wanted.n_threads, wanted.n_threads_batch = 256, os.cpu_count(), os.cpu_count()
context = llama_cpp.llama_init_from_model(model, wanted)


def feed(tokens: list[int]) -> None:
    """Process tokens and look at the logits."""
    array = (llama_cpp.llama_token * len(tokens))(*tokens)
    batch = llama_cpp.llama_batch_get_one(array, len(tokens))
    assert llama_cpp.llama_decode(context, batch) == 0
    llama_cpp.llama_get_logits_ith(context, -1)


feed(list(range(100, 116)))
began = time.perf_counter()
for _ in range(n_tokens):
    feed([5])
print(n_tokens / (time.perf_counter() - began))
