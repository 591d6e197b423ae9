"""Measurements for gpu.py that need torch in their own process: each prints one JSON object.

python benchmarks/gpu_probes.py NAME DEVICE [--tiny]
"""

import json
import os
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from gptcli import load_config
from gptcli.config.model import ModelConfig
from gptcli.model import GPT
from gptcli.model.loss import IGNORED, cross_entropy, token_losses
from gptcli.training.events import Started, StepDone
from gptcli.training.loop import train

DTYPES = {"float32": (torch.float32, 1e-5), "bfloat16": (torch.bfloat16, 1e-2),
          "float16": (torch.float16, 2e-3)}  # fmt: skip


def loss(device: str, tiny: bool) -> dict[str, Any]:
    """Compare the loss and both gradients with plain float64, for odd and aligned vocabularies."""
    torch.set_float32_matmul_precision("highest")
    worst: dict[str, float] = {}
    for n_vocab in (257, 320) if tiny else (50257, 50304):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(4, 64, 128, generator=generator, dtype=torch.float64)
        w = 0.2 * torch.randn(n_vocab, 128, generator=generator, dtype=torch.float64)
        targets = torch.randint(n_vocab, (4, 64), generator=generator)
        targets[1, :9] = IGNORED
        for name, (dtype, _) in DTYPES.items():
            if name == "float16" and device == "cpu":
                continue
            for compiled in (False, True):
                error = _loss_error(device, dtype, x, w, targets, compiled)
                worst[name] = max(worst.get(name, 0.0), error)
    ok = all(error < DTYPES[name][1] for name, error in worst.items())
    return {"ok": ok, "figure": ", ".join(f"{name} {error:.1e}" for name, error in worst.items())}


def _loss_error(
    device: str, dtype: torch.dtype, x: Tensor, w: Tensor, targets: Tensor, compiled: bool
) -> float:
    rounded = [t.to(dtype).double().requires_grad_() for t in (x, w)]
    logits = (rounded[0] @ rounded[1].T).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(
        logits, targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    torch.autograd.backward(expected)
    ours = [t.detach().to(device, torch.float32).requires_grad_() for t in rounded]
    aims = targets.to(device)
    with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
        total = cross_entropy(ours[0], ours[1], aims, len(w), compiled)
        each = token_losses(ours[0], ours[1], aims, len(w))
    torch.autograd.backward(total)
    pairs = [(total.detach(), expected.detach()), (each.sum(), expected.detach())]
    pairs += [(a.grad, b.grad) for a, b in zip(ours, rounded, strict=True)]  # type: ignore[misc]
    return max(float((a.cpu().double() - b).norm() / b.norm()) for a, b in pairs)


def gradients(device: str, tiny: bool) -> dict[str, Any]:
    """Compare every gradient of one float32 step with the CPU's."""
    torch.set_float32_matmul_precision("highest")
    config = ModelConfig(n_layer=2, n_head=4, n_embd=128, block_size=128, vocab_size=257)
    tokens = torch.randint(257, (4, 129), generator=torch.Generator().manual_seed(1))
    found = []
    for place in (device, "cpu"):
        model = GPT(config)
        model.init_weights(1)
        model.to(place)
        on = tokens.to(place)
        torch.autograd.backward(model(on[:, :-1].contiguous(), on[:, 1:].contiguous()).loss)
        found.append({name: cast(Tensor, p.grad).cpu() for name, p in model.named_parameters()})
    pairs = [(found[0][name], found[1][name]) for name in found[1]]
    return {"worst": max(float((a - b).norm() / b.norm().clamp(min=1e-20)) for a, b in pairs)}


def _steps(
    device: str, tiny: bool, n_steps: int, *sets: str, at: Callable[[int], None] = lambda step: None
) -> list[float]:
    """Train in this process, on the data beside it; return the losses."""
    shape = (2, 2, 64, 64) if tiny else (12, 12, 768, 1024)
    keys = ("n_layer", "n_head", "n_embd", "block_size")
    settings = [f"model.{key}={value}" for key, value in zip(keys, shape, strict=True)]
    rows = 2 if tiny else 16
    folder = tempfile.mkdtemp(dir=".")
    config = load_config(None, [
        *settings, f"run_dir={folder}/run", "data.dir=data", f"device={device}",
        f"train.micro_batch_size={rows}", f"train.max_steps={n_steps}", "model.vocab_size=50304",
        "train.eval_every=1000000", "train.save_every=1000000", "train.log_every=1",
        f"train.eval_tokens={shape[3]}", "generate.max_new_tokens=1",
        f"compile={str(device == 'cuda').lower()}", *sets,  # short runs leave it out
    ])  # fmt: skip
    losses = []
    for event in train(config):
        if isinstance(event, StepDone):
            losses.append(event.loss)
        if isinstance(event, Started | StepDone):
            at(event.step)
    return losses


def waits(device: str, tiny: bool) -> dict[str, Any]:
    """Count the warnings of torch's sync debug mode over steps of four micro-batches."""
    first, last = 4, 8
    counts: list[int] = []
    tokens = 4 * (128 if tiny else 16 * 1024)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def at(step: int) -> None:
            counts.append(sum("a synchronizing CUDA" in str(w.message) for w in caught))
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("warn" if first <= step < last else "default")

        _steps(device, tiny, last + 1, f"train.tokens_per_step={tokens}", at=at)
    return {"a_step": (counts[last] - counts[first]) / (last - first)}


def profile(device: str, tiny: bool) -> dict[str, Any]:
    """Trace a step: the share of kernels by kind, and the GPU's idle time."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA][: device == "cuda"]]
    trace = profile(activities=kinds)
    tokens = 4 * (128 if tiny else 16 * 1024)

    def at(step: int) -> None:
        if step == 4:
            trace.start()
        elif step == 5:
            trace.stop()

    _steps(device, tiny, 6, f"train.tokens_per_step={tokens}", at=at)
    spans = sorted((e.time_range.start, e.time_range.end, e.name) for e in cast(Any, trace).events()
                   if "CUDA" in str(e.device_type))  # fmt: skip
    by_name: Counter[str] = Counter()
    for start, end, name in spans:
        by_name[name] += end - start
    total = sum(by_name.values()) or 1.0
    loss_time = sum(t for name, t in by_name.items() if re.search("softmax|nll|logsumexp", name))
    busy, reached = 0.0, spans[0][0] if spans else 0.0
    for start, end, _ in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    wall = reached - spans[0][0] if spans else 1.0
    attention = {kind for kind in ("cudnn", "flash", "fmha") for name in by_name if kind in name}
    bad = sorted({what for what in ("align1", "sm_75", "sm75") for name in by_name if what in name})
    return {"loss": loss_time / total, "idle": 1 - busy / wall if spans else 0.0, "bad": bad,
            "attention": "+".join(sorted(attention)) or "none"}  # fmt: skip


def one_rank(device: str, tiny: bool) -> dict[str, Any]:
    """Train as one rank of a group, in every way, against training without one."""
    import torch.distributed as dist

    from gptcli.device import init_runtime
    from gptcli.training.optim import Optimizer
    from gptcli.training.parallel import apply_fsdp, full_tensor, wrap_ddp

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29581"}
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, rank=0, world_size=1)
    shape = ModelConfig(n_layer=2, n_head=4, n_embd=128, block_size=128, vocab_size=257)
    tokens = torch.randint(257, (4, 128), generator=torch.Generator().manual_seed(1)).to(device)
    weights_apart = losses_apart = 0.0
    for optimizer in ("adamw", "muon"):
        ends = {}
        for kind in ("none", "ddp", "fsdp"):
            for compiled in (False, True):
                config = load_config(None, [f"device={device}", "dtype=float32",
                                            f"compile={str(compiled).lower()}",
                                            f"optim.name={optimizer}"])  # fmt: skip
                compute = init_runtime(config)
                model = GPT(shape)
                model.init_weights(1)
                if kind == "fsdp":
                    apply_fsdp(model, compute)
                else:
                    model.to(device)
                network: Any = model.compiled() if compiled and kind != "fsdp" else model
                network = (
                    wrap_ddp(network, compute, (tokens, tokens), False)
                    if kind == "ddp"
                    else network
                )
                updates = Optimizer(model, config.optim, compute.device)
                for _ in range(3):
                    total = network(tokens, tokens).loss / tokens.numel()
                    torch.autograd.backward(total)
                    updates.step(1e-3)
                    updates.zero_grad()
                weights = [full_tensor(p.detach()).cpu() for p in model.parameters()]
                end = torch.cat([w.flatten() for w in weights])
                ends[kind, compiled] = end, float(total.detach())
        plain, plain_loss = ends["none", False]
        for (_, compiled), (end, last) in ends.items():
            losses_apart = max(losses_apart, abs(last / plain_loss - 1))
            if not compiled:  # a compiler rounds otherwise, and Muon makes much of it
                apart = float((end - plain).norm() / plain.norm())
                weights_apart = max(weights_apart, apart)
    counted = torch._dynamo.utils.counters
    limits = sum(n for key, n in counted["unimplemented"].items() if "recompile_limit" in key)
    dist.destroy_process_group()
    return {"weights": weights_apart, "losses": losses_apart, "recompiles": limits}


def main() -> None:
    """Run the probe that the command line names, quietly."""
    name, device = sys.argv[1:3]
    probes = {f.__name__: f for f in (loss, gradients, waits, profile, one_rank)}
    sys.path.insert(0, str(Path(__file__).parent))
    print(json.dumps(probes[name](device, "--tiny" in sys.argv)))


if __name__ == "__main__":
    main()
