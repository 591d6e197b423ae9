"""A trillion tokens in ten thousand shards: what opening them costs, shown with sparse files."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gptcli.data.shards import (
    MAGIC,
    Counts,
    Manifest,
    Recipe,
    Shard,
    TokenizerRecord,
    UnitRecord,
    write_manifest,
)

N_SHARDS, PER_SHARD = 10_000, 100_000_000

OPENING = """
import json, os, resource, sys, time
from pathlib import Path
import torch
from gptcli.data.loader import TokenLoader
from gptcli.data.shards import TokenReader, read_manifest

def peak():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

before, began = peak(), time.perf_counter()
folder = Path(sys.argv[1])
with TokenReader(folder, read_manifest(folder), "train") as tokens:
    loader = TokenLoader(tokens, seq_len=1024, stride=1024, windows_per_step=512, seed=1)
    next(loader.micro_batches(0, 1 << 20))
    seconds = time.perf_counter() - began
    for step in range(1, 5):
        inputs, _ = next(loader.micro_batches(step * 100_000, 1 << 20))
    print(json.dumps({
        "tokens": len(tokens), "seconds": seconds, "bytes": peak() - before,
        "across": tokens.read(int(sys.argv[2]) - 2, 4).tolist(), "shape": list(inputs.shape),
        "open": len(list(Path("/proc/self/fd").iterdir())) if Path("/proc").exists() else 0,
    }))
"""


def make_folder(folder: Path, n_shards: int = N_SHARDS) -> int:
    """Write the shards as holes, with four tokens around a border; return where that is."""
    folder.mkdir()
    header = np.zeros(256, dtype="<i4")
    header[:3] = *MAGIC["uint16"], PER_SHARD
    units = []
    for index in range(n_shards):
        shard = Shard(
            file=f"train_{index:06d}_000.bin", split="train", tokens=PER_SHARD, sha256="0" * 64
        )
        with (folder / shard.file).open("wb") as file:
            file.write(header.tobytes())
            if index == 5000:
                file.write(np.array([3, 4], dtype="<u2").tobytes())
            file.truncate(1024 + 2 * PER_SHARD)
            if index == 4999:
                file.seek(-4, 2)
                file.write(np.array([1, 2], dtype="<u2").tobytes())
        counts = Counts(train=PER_SHARD)
        units.append(UnitRecord(name=f"{index}", sha256="0" * 64, documents=1, tokens=counts,
                                bytes=counts, shards=[shard]))  # fmt: skip
    tokenizer = TokenizerRecord(name="gpt2", vocab_size=50257, sha256="0" * 64)
    recipe = Recipe(source="holes", revision=None, text_field="text", encoding_errors="strict",
                    val_fraction=0, seed=1, shard_tokens=PER_SHARD, max_vocab_size=None,
                    tokenizer=tokenizer)  # fmt: skip
    write_manifest(folder, Manifest.of(recipe, units))
    return 5000 * PER_SHARD


@pytest.mark.skipif(sys.platform == "win32", reason="its files have no holes unless asked for")
def test_opening_a_trillion_tokens_costs_no_memory_to_speak_of(tmp_path: Path) -> None:
    border = make_folder(tmp_path / "holes")
    done = subprocess.run([sys.executable, "-c", OPENING, str(tmp_path / "holes"), str(border)],
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["tokens"] == N_SHARDS * PER_SHARD == 10**12
    assert found["across"] == [1, 2, 3, 4]
    assert found["bytes"] < 200_000_000
    assert found["open"] < 100  # of some 2,000 shards that were read
    assert found["shape"] == [512, 1024]


MIXING = """
import json, resource, sys, time
import torch
from gptcli.config import load_config
from gptcli.data.loader import make_loader, open_parts, read_parts

def peak():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

before, began = peak(), time.process_time()
sources = ", ".join(f"{{source: holes{i}, weight: {i + 1}}}" for i in range(5))
config = load_config(None, [f"data.mix=[{sources}]", "train.tokens_per_step=524288"])
parts = read_parts(config)
train, _ = open_parts(parts, config)
loader = make_loader([*train.values()], config, 10**6)
next(loader.micro_batches(0, 1 << 20))
seconds = time.process_time() - began
inputs, _ = next(loader.micro_batches(900_000, 1 << 20))
print(json.dumps({
    "tokens": sum(len(tokens) for tokens in train.values()), "seconds": seconds,
    "bytes": peak() - before, "shape": list(inputs.shape), "windows": loader.n_windows,
}))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="its files have no holes unless asked for")
def test_opening_a_mixture_of_a_trillion_tokens_takes_seconds_and_little_memory(
    tmp_path: Path,
) -> None:
    for index in range(5):
        make_folder(tmp_path / f"holes{index}", N_SHARDS // 5)
    done = subprocess.run([sys.executable, "-c", MIXING], cwd=tmp_path,
                          capture_output=True, text=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["tokens"] == N_SHARDS * PER_SHARD == 10**12
    assert found["bytes"] < 300_000_000 and found["seconds"] < 3
    assert found["shape"] == [512, 1024] and found["windows"] == 5 * ((10**12 // 5 - 1) // 1024)
