"""Decoding with nanoGPT: its FOLDER, CKPT.PT and N_TOKENS, prints tokens/s, the prompt's pass too.

Its `sample.py` would fetch a tokenizer; this calls the same `generate` with ids.
"""

import sys
import time

import torch

folder, checkpoint, n_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
sys.path.insert(0, folder)
from model import GPT, GPTConfig  # noqa: E402  # nanoGPT's own file

content = torch.load(checkpoint, map_location="cpu")
model = GPT(GPTConfig(**content["model_args"]))
model.load_state_dict(content["model"])
model.eval()
prompt = torch.arange(100, 116)[None]
with torch.no_grad():
    model.generate(prompt, 2, temperature=0.8, top_k=50)
    began = time.perf_counter()
    model.generate(prompt, n_tokens, temperature=0.8, top_k=50)
print(n_tokens / (time.perf_counter() - began))
