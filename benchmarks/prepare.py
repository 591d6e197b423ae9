"""`gpt prepare` beside the common way, on the same 100 MB of Parquet, whole process, interleaved.

    python benchmarks/prepare.py [--megabytes 100] [--files 8] [--rounds 5]

The common way is what most training scripts do: `datasets.map` with tiktoken's `encode_ordinary`
in two processes, then a numpy memmap. The text is the running Python's standard library with its
tests, cut into documents, over and over until there is enough. Peak memory is that of all
processes together, sampled 20 times a second.
"""

import argparse
import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from common import Report

COMMON = "the common way"
COMMON_WAY = """
import sys
import numpy as np
import tiktoken
from datasets import load_dataset
from gptcli.tokenizers.bpe import gpt2
from tiktoken_ext.openai_public import r50k_pat_str

def main():
    # As tiktoken.get_encoding("gpt2") makes it, without the download.
    encoding = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=gpt2().ranks,
                                 special_tokens={"<|endoftext|>": 50256})

    def process(example):
        ids = encoding.encode_ordinary(example["text"])
        ids.append(50256)
        return {"ids": ids, "len": len(ids)}

    rows = load_dataset("parquet", data_files=sys.argv[2:], split="train")
    rows = rows.map(process, remove_columns=["text"], num_proc=2)
    total = int(np.sum(rows["len"], dtype=np.uint64))
    out = np.memmap(sys.argv[1], dtype=np.uint16, mode="w+", shape=(total,))
    at = 0
    for index in range(64):
        part = rows.shard(num_shards=64, index=index, contiguous=True).with_format("numpy")
        ids = np.concatenate(part["ids"])
        out[at : at + len(ids)] = ids
        at += len(ids)
    out.flush()

if __name__ == "__main__":
    main()
"""


def make_corpus(folder: Path, megabytes: int, n_files: int) -> list[Path]:
    """Write Parquet files of documents of a few kilobytes, no two files alike."""
    root = Path(sysconfig.get_path("stdlib"))
    texts = [path.read_text(errors="ignore") for path in sorted(root.rglob("*.py"))
             if "site-packages" not in path.parts]  # fmt: skip
    chunks = [text[i : i + 5000] for text in texts for i in range(0, len(text), 5000)]
    documents, size, turn = [], 0, 0
    while size < megabytes * 1_000_000:
        text = chunks[turn % len(chunks)]
        turn += 1
        documents.append(f"{turn}\n{text}")
        size += len(documents[-1].encode())
    files = []
    for index in range(n_files):
        files.append(folder / f"part-{index:02d}.parquet")
        table = pa.table({"text": documents[index::n_files]})
        pq.write_table(table, files[-1], row_group_size=1000)
    return files


def family_memory(pid: int) -> int:
    """Return the resident bytes of a process and all its descendants, shared pages once each."""
    total, waiting = 0, [pid]
    while waiting:
        one = waiting.pop()
        try:
            rollup = Path(f"/proc/{one}/smaps_rollup").read_text()
            total += sum(int(line.split()[1]) for line in rollup.splitlines()
                         if line.startswith("Pss:")) * 1024  # fmt: skip
            for task in Path(f"/proc/{one}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except (OSError, ProcessLookupError):
            continue
    return total


def run(command: list[str], env: dict[str, str]) -> tuple[float, int]:
    """Run a command; return its seconds and its peak memory in bytes."""
    peak = 0
    began = time.perf_counter()
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.05):
            peak = max(peak, family_memory(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, err = process.communicate()
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{command[:4]} failed:\n{err}")
    return seconds, peak


def main() -> None:
    """Measure both ways in turn and print medians, spread and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ours-only", action="store_true", help="for memory at larger sizes")
    options = parser.parse_args()
    report = Report("Preparing")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "parquet").mkdir()
        files = make_corpus(folder / "parquet", options.megabytes, options.files)
        script = folder / "common_way.py"
        script.write_text(COMMON_WAY)
        env = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
        out = folder / "ours"
        ours = [sys.executable, "-m", "gptcli", "prepare", str(folder / "parquet"),
                "--out", str(out), "--workers", "2"]  # fmt: skip
        ways = {
            COMMON: ([sys.executable, str(script), str(folder / "common.bin"), *map(str, files)],
                     env),
            "gpt prepare, tiktoken": (ours, {**env, "GPTCLI_FAST": "0"}),
            "gpt prepare, gigatoken": (ours, env),
        }  # fmt: skip
        if options.ours_only:
            del ways[COMMON]
        if importlib.util.find_spec("gigatoken") is None:
            del ways["gpt prepare, gigatoken"]
            report.line("gigatoken is not installed (extra `fast`): its row is left out")
        outputs = set()
        measured: dict[str, list[tuple[float, int]]] = {way: [] for way in ways}
        for _ in range(options.rounds):
            for way, (command, its_env) in ways.items():
                shutil.rmtree(folder / "cache", ignore_errors=True)
                shutil.rmtree(out, ignore_errors=True)
                measured[way].append(run(command, its_env))
                if out.exists():
                    outputs.add((out / "manifest.json").read_text())
        if len(outputs) != 1:
            raise SystemExit("the manifests, which hold every shard's sha256, differ")
        medians = {}
        for way, runs in measured.items():
            seconds = [one for one, _ in runs]
            medians[way] = statistics.median(seconds)
            report.line(
                f"{way:<22} {options.megabytes / medians[way]:6.1f} MB/s   median"
                f" {medians[way]:.2f} s ({min(seconds):.2f} to {max(seconds):.2f})   peak"
                f" {max(peak for _, peak in runs) / 1e6:,.0f} MB"
            )
            if COMMON in medians and way != COMMON:
                report.line(f"    {medians[COMMON] / medians[way]:.2f} times as fast as {COMMON}")
    report.save()


if __name__ == "__main__":
    main()
