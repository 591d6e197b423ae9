"""Decoding with llama.cpp: FILE N_TOKENS [VARIANT], prints tokens/s.

Run by a Python that has llama_cpp. VARIANT names the processor whose kernels are loaded, such as
haswell; without it, and in a build that has no variants, they are the fastest. Tokens are drawn as
by `gpt generate --top-k 50`. Weights are not repacked for AMX, for version 0.3.36 of
llama-cpp-python crashes there with q8_0.
"""

import ctypes
import os
import sys
import time
from pathlib import Path

import llama_cpp

path, n_tokens = sys.argv[1], int(sys.argv[2])
package = Path(llama_cpp.__file__).parent
# Some versions install what is loaded on demand beside the package.
folder = next((f for f in (package / "lib", package.parent / "bin")
               if any(f.glob("libggml-cpu-*.so"))), None)  # fmt: skip
if folder is not None:
    ggml = ctypes.CDLL("libggml.so.0")  # as llama.cpp names it: of a copy it would know nothing
    ggml.ggml_backend_load.restype = ctypes.c_void_p
    if len(sys.argv) > 3:
        file = folder / f"libggml-cpu-{sys.argv[3]}.so"
        assert ggml.ggml_backend_load(os.fsencode(file)), f"{file} cannot be loaded here"
    else:
        ggml.ggml_backend_load_all_from_path(os.fsencode(folder))
settings = llama_cpp.llama_model_default_params()
settings.use_extra_bufts = False
model = llama_cpp.llama_model_load_from_file(path.encode(), settings)
wanted = llama_cpp.llama_context_default_params()
wanted.n_ctx, wanted.n_threads, wanted.n_threads_batch = 256, os.cpu_count(), os.cpu_count()
context = llama_cpp.llama_init_from_model(model, wanted)


drawing = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
for part in (llama_cpp.llama_sampler_init_top_k(50), llama_cpp.llama_sampler_init_temp(1.0),
             llama_cpp.llama_sampler_init_dist(1)):  # fmt: skip
    llama_cpp.llama_sampler_chain_add(drawing, part)


def next_token(tokens: list[int]) -> int:
    """Process tokens and draw the one that follows."""
    array = (llama_cpp.llama_token * len(tokens))(*tokens)
    batch = llama_cpp.llama_batch_get_one(array, len(tokens))
    assert llama_cpp.llama_decode(context, batch) == 0
    return int(llama_cpp.llama_sampler_sample(drawing, context, -1))


token = next_token(list(range(100, 116)))
began = time.perf_counter()
for _ in range(n_tokens):
    token = next_token([token])
print(n_tokens / (time.perf_counter() - began))
