"""What a training step multiplies and activates on a CPU, beside torch and oneDNN.

    python benchmarks/products.py [--isa CLASS...]

A layer's result, and the gradients of its input and of its weight, in GFLOP/s: by torch, by oneDNN
and by products.c, in float32 and, where products.c takes it, in bfloat16, with the weight and its
gradient in float32 (torch calls oneDNN there, between two copies); and the gradient of an exact
GELU together with its value, in milliseconds. Each is the median of 15 laps, in turn, on all cores;
each class of processors is measured in a new process.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from common import Report, add_isa, run
from torch import Tensor

from gptcli.model import kernels, products

LAPS = 15
# Rows, and what goes out of and into a weight: of 0.8M, 11M and 124M as throughput.py trains them.
SHAPES = [(768, 512, 128), (768, 128, 512), (4096, 1536, 384), (4096, 384, 1536),
          (2048, 3072, 768), (2048, 768, 3072), (2048, 50304, 768)]  # fmt: skip


def medians(kinds: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median seconds of each kind of work."""
    laps: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(LAPS + 1):
        for name, work in kinds.items():
            began = time.perf_counter()
            work()
            laps[name].append(time.perf_counter() - began)
    return {name: statistics.median(times[1:]) for name, times in laps.items()}  # one to warm up


def layer(R: int, N: int, K: int, dtype: torch.dtype) -> Iterator[str]:
    """Yield a line about each product of a layer with R rows and a weight (N, K)."""
    x, weight, grad = torch.randn(R, K).to(dtype), torch.randn(N, K), torch.randn(R, N).to(dtype)
    products_of = {"result": (grad, x, weight.T), "input's gradient": (x, grad, weight),
                   "weight's gradient": (weight, grad.T, x)}  # fmt: skip
    for what, (like, a, b) in products_of.items():
        found = gflops(torch.empty_like(like), a, b)
        rates = (f"  {name} {rate:5.0f}" for name, rate in found.items())
        label = str(dtype).removeprefix("torch.")
        yield f"{R:5,} rows, {N:6,} x {K:5,}, {label}, GFLOP/s, {what:<17}:{''.join(rates)}"


def gflops(y: Tensor, a: Tensor, b: Tensor) -> dict[str, float]:
    """Return the rate of each library at a (M, K) times b (K, N), as y."""
    (M, K), N = a.shape, b.shape[1]
    kinds: dict[str, Callable[[], object]] = {"ours": lambda: products.multiply_into(y, a, b)}
    if a.dtype == torch.float32:
        kinds["torch"] = lambda: torch.mm(a, b, out=y)
        kinds["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")
    else:
        kinds["torch"] = lambda: torch.mm(a, b.to(a.dtype)).to(y.dtype)
    found = medians(kinds)
    return {name: 2e-9 * M * N * K / seconds for name, seconds in found.items()}


def gelu(R: int, K: int) -> str:
    """Return a line about one shape."""
    x, grad = torch.randn(R, K), torch.randn(R, K)
    y, back = torch.empty_like(x), grad.clone()
    found = medians({
        "torch": lambda: (F.gelu(x), torch.ops.aten.gelu_backward(grad, x)),
        "ours": lambda: kernels.activate_back("gelu_erf", x, None, back, y),
    })  # fmt: skip
    times = (f"  {name} {1e3 * seconds:.2f}" for name, seconds in found.items())
    return f"GELU and its gradient, {R:,} x {K:,}, ms:{''.join(times)}"


def measure() -> None:
    """Print the lines of one class of processors as JSON."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    dtypes = [torch.float32]
    if products.can_multiply(torch.ones(64, 64, dtype=torch.bfloat16)):
        dtypes.append(torch.bfloat16)
    lines = [line for dtype in dtypes for shape in SHAPES for line in layer(*shape, dtype)]
    print(json.dumps([*lines, gelu(768, 512), gelu(4096, 1536)]))


def main() -> None:
    """Measure each class in its own process, and save the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_isa(parser)
    parser.add_argument("--measure", action="store_true", help="this process, and print JSON")
    arguments = parser.parse_args()
    if arguments.measure:
        measure()
        return
    report = Report("Products of training")
    for isa in arguments.isa:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(Path(__file__).resolve()), "--measure"]
            for line in json.loads(run(command, Path(folder), isa).output.splitlines()[-1]):
                report.line(f"{isa:<16} {line}")
    report.save()


if __name__ == "__main__":
    main()
