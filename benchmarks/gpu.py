"""Whether `gpt` is right and fast on this machine's GPU: one command, a quarter of an hour.

    python benchmarks/gpu.py [--gpus N] [--nanogpt DIR] [--device cuda|mps] [--only NAME...]

Each check prints `ok|FAIL name figure limit` and the next one follows whatever happened; the table
goes to RESULTS.md. The exit code is 1 if a check failed, 2 without a GPU. Checks of correctness
come before checks of speed. Each runs in its own processes, so that one that crashes or runs out
of memory harms no other. No network is needed: the text is the standard library of this Python.

`--rehearse` runs the checks on a CPU with a tiny model and judges no speed: the script itself is
tested so, for it is seldom run.
"""

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from common import GPT, Report, as_nanogpt_data, nanogpt_command, run, stdlib_text

PROBES = Path(__file__).parent / "gpu_probes.py"
REAL = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50304}
TINY = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 64, "vocab_size": 50304}
ON_A_STEP = 491_520  # tokens, as GPT-2 was trained on
FIRST = 5  # steps that are not counted: compiling, and clocks that rise
KEPT = ("plain", "shards")  # runs that later checks read
# bfloat16, dense, by a part of the name; for the MFU beside the rates.
PEAK = {"H200": 989.5e12, "H100": 989.5e12, "A100": 312e12, "B200": 2250e12}


@dataclass(frozen=True)
class Outcome:
    """What a check found.

    Attributes:
        ok: Whether it passed.
        figure: What was measured.
        limit: What it is compared with.
    """

    ok: bool
    figure: str
    limit: str


@dataclass
class Bench:
    """The machine, the data and what checks learn from earlier ones."""

    folder: Path
    device: str
    gpus: int
    nanogpt: Path | None
    rehearse: bool
    rates: dict[str, float] = field(default_factory=dict)

    @property
    def shape(self) -> dict[str, int]:
        """The model that is trained."""
        return TINY if self.rehearse else REAL

    @property
    def rows(self) -> int:
        """Rows of a micro-batch."""
        return 2 if self.rehearse else 16

    def steps(self, n: int) -> int:
        """Return how many steps stand for `n`."""
        return min(n, 8) if self.rehearse else n

    def gpt(self, *words: str, limit: float = 240, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command of ours."""
        return subprocess.run(
            [*GPT, *words], cwd=self.folder, env={**os.environ, **env}, capture_output=True,
            text=True, timeout=limit, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def train_words(self, name: str, steps: int, *sets: str) -> list[str]:
        """Return the command line of a training run that neither evaluates nor saves on the way."""
        model = [f"model.{key}={value}" for key, value in self.shape.items()]
        # Compiled where that is usual: `auto` would leave it out of runs as short as these.
        settings = [
            *model, f"name={name}", "data.dir=data", f"device={self.device}", "model.bias=false",
            "model.mlp=gelu_erf", f"train.micro_batch_size={self.rows}", f"train.max_steps={steps}",
            "train.eval_every=1000000", "train.save_every=1000000", "train.log_every=1",
            f"train.eval_tokens={self.shape['block_size']}", "generate.max_new_tokens=1",
            "optim.warmup_steps=2000", f"compile={str(self.device == 'cuda').lower()}", *sets,
        ]  # fmt: skip
        return ["train", *(word for one in settings for word in ("-s", one))]

    def train(
        self, name: str, steps: int, *sets: str, options: Iterable[str] = (), **env: str
    ) -> "Trained":
        """Train from the beginning."""
        words = self.train_words(name, steps, *sets)
        done = self.gpt(*words, "--overwrite", "--json", *options, limit=300, **env)
        metrics = self.folder / "runs" / name / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        logged = [line for line in map(json.loads, lines) if "tokens_per_second" in line]
        result = json.loads(done.stdout) if done.stdout.startswith("{") else {}
        if name not in KEPT:  # a card's machine has a small disk
            shutil.rmtree(self.folder / "runs" / name, ignore_errors=True)
        return Trained(done.returncode, done.stderr, result, logged)

    def probe(self, name: str, limit: float = 200) -> dict[str, Any]:
        """Run a probe inside of torch, in a process of its own, and return what it measured."""
        words = [sys.executable, str(PROBES), name, self.device, *["--tiny"][: self.rehearse]]
        done = subprocess.run(words, cwd=self.folder, capture_output=True, text=True,
                              timeout=limit, check=False)  # fmt: skip
        lines = done.stdout.strip().splitlines()
        if done.returncode or not lines:
            raise RuntimeError(done.stderr.strip().splitlines()[-1][:160] if done.stderr else "?")
        found: dict[str, Any] = json.loads(lines[-1])
        return found

    def judged(self, is_fast: bool) -> bool:
        """Return whether a limit of speed holds; a rehearsal has none."""
        return is_fast or self.rehearse


@dataclass(frozen=True)
class Trained:
    """A training run: exit code, messages, JSON result and logged steps."""

    code: int
    said: str
    result: dict[str, Any]
    logged: list[dict[str, Any]]

    @property
    def rate(self) -> float:
        """The median of the tokens per second of its later steps."""
        return float(statistics.median([x["tokens_per_second"] for x in self.logged][FIRST:]))

    def require(self) -> "Trained":
        """Return itself, if it ended well."""
        if self.code:
            raise RuntimeError(f"exit {self.code}: {self.result.get('error', self.said[-160:])}")
        return self


def doctor(b: Bench) -> Outcome:
    """The device is found, with its precision."""
    checks = json.loads(b.gpt("doctor", "--json").stdout)["checks"]
    found = f"{checks['device']['found']}; {checks['dtype']['found']}"
    return Outcome(checks["device"]["found"].startswith(b.device), found, f"device {b.device}")


def loss_gradients(b: Bench) -> Outcome:
    """The chunked loss against float64, for aligned and odd vocabularies."""
    found = b.probe("loss")
    return Outcome(found["ok"], found["figure"], "1e-5 in float32, 1e-2 in 16 bits")


def step_gradients(b: Bench) -> Outcome:
    """One step of two blocks in float32, against the CPU's."""
    worst = b.probe("gradients")["worst"]
    return Outcome(worst < 1e-4, f"{worst:.1e} relative", "< 1e-4")


def training(b: Bench) -> Outcome:
    """The model compiles once, learns, and takes the memory that was announced."""
    steps = b.steps(40)
    learning = "optim.warmup_steps=20"
    done = b.train("plain", steps, learning, TORCH_LOGS="recompiles,graph_breaks").require()
    b.rates["one"] = done.rate
    again = len(re.findall(r"Recompiling function|Graph break", done.said))
    plan = b.gpt(*b.train_words("planned", steps), "--dry-run", "--json")
    planned = json.loads(plan.stdout)["memory_bytes"]["total"]
    used, last = done.logged[-1]["memory_bytes"], done.logged[-1]["loss"]
    ok = again == 0 and "not compiled" not in done.said
    ok = ok and b.judged(last < 8.5 and abs(used / planned - 1) < 0.15)
    figure = f"loss {last:.2f}, {again} recompiles or breaks, {used / planned:.2f} of the plan"
    return Outcome(ok, figure, "loss < 8.5, none, 0.85 to 1.15")


def waits(b: Bench) -> Outcome:
    """How often the host waits for the GPU in a step of four micro-batches."""
    found = b.probe("waits")
    return Outcome(found["a_step"] <= 1, f"{found['a_step']:.1f} a step", "<= 1")


def profile(b: Bench) -> Outcome:
    """Which kernels a step runs, and how long the GPU has nothing to do."""
    found = b.probe("profile")
    ok = b.judged(not found["bad"] and found["loss"] < 0.06 and found["idle"] < 0.02)
    figure = f"loss {found['loss']:.1%}, idle {found['idle']:.1%}, attention {found['attention']}"
    return Outcome(ok, figure + f", {', '.join(found['bad']) or 'aligned'}", "< 6 %, < 2 %")


def odd_vocabulary(b: Bench) -> Outcome:
    """GPT-2's own 50,257 tokens, against the padded 50,304."""
    rate = b.train("odd", b.steps(20), "model.vocab_size=null").require().rate
    share = rate / b.rates["one"]
    return Outcome(b.judged(share >= 0.97), f"{share:.3f} of {b.rates['one']:,.0f}/s", ">= 0.97")


def nanogpt_ratio(b: Bench) -> Outcome:
    """Tokens per second beside nanoGPT's, with one micro-batch a step and with eight."""
    if b.nanogpt is None:
        return Outcome(True, "left out: NANOGPT=DIR names its folder", ">= 1.0")
    as_nanogpt_data(b.folder / "data", b.nanogpt, "gpu")
    (b.nanogpt / "data" / "gpu" / "meta.pkl").unlink()  # or it takes 50,257 from there
    ratios = []
    for n in (1, 8):
        theirs = _nanogpt_rate(b, n)
        tokens = n * b.rows * b.shape["block_size"]
        ours = b.train(f"beside-{n}", b.steps(40), f"train.tokens_per_step={tokens}").require()
        ratios.append((n, ours.rate, theirs))
    figure = "; ".join(f"{n} a step: {us:,.0f}/{them:,.0f} = {us / them:.2f} (MFU {_mfu(us)})"
                       for n, us, them in ratios)  # fmt: skip
    return Outcome(b.judged(all(us >= them for _, us, them in ratios)), figure, ">= 1.0 in both")


def _nanogpt_rate(b: Bench, n_micro: int) -> float:
    assert b.nanogpt is not None
    shape, steps = b.shape, b.steps(40)
    command = nanogpt_command(
        dataset="gpu", device=b.device, compile=not b.rehearse, eval_interval=10**6, eval_iters=1,
        log_interval=1, block_size=shape["block_size"], batch_size=b.rows,
        gradient_accumulation_steps=n_micro, n_layer=shape["n_layer"], n_head=shape["n_head"],
        n_embd=shape["n_embd"], max_iters=steps, always_save_checkpoint=False, out_dir="out-bench",
        dtype="float32" if b.rehearse else "bfloat16",
    )  # fmt: skip
    output = run(command, b.nanogpt).output
    times = re.findall(r"^iter \d+: loss .*? time ([\d.]+)ms", output, re.MULTILINE)
    tokens = n_micro * b.rows * shape["block_size"]
    return tokens / statistics.median([float(ms) for ms in times][FIRST:]) * 1000


def _mfu(rate: float) -> str:
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((peak for part, peak in PEAK.items() if part in name), None)
    return f"{rate * 855e6 / peak:.0%}" if peak else "?"


def verify_resume(b: Bench) -> Outcome:
    """A resumed run has the same bits with deterministic: true, and says so where it may not."""
    sets = ("model.n_layer=4", "deterministic=true", "compile=true")
    words = b.train_words("exact", 12, *sets)
    exact = b.gpt(*words, "--overwrite", "--verify-resume", "6", limit=300)
    words = b.train_words("equivalent", 12, "model.n_layer=4")
    other = b.gpt(*words, "--overwrite", "--verify-resume", "6", limit=300)
    is_told = other.returncode == 0 or "deterministic" in other.stderr + other.stdout
    figure = f"deterministic: exit {exact.returncode}; default: exit {other.returncode}"
    return Outcome(exact.returncode == 0 and is_told, figure, "0; 0, or it names deterministic")


def float16(b: Bench) -> Outcome:
    """The scaled loss of float16 beside bfloat16's."""
    if b.rehearse:
        return Outcome(True, "float16 is a GPU's", "")
    losses, skipped = {}, 0
    for dtype in ("float16", "bfloat16"):
        done = b.train(dtype, 60, f"dtype={dtype}").require()
        losses[dtype] = statistics.mean(line["loss"] for line in done.logged[-5:])
        skipped += len(re.findall(r"skipped", done.said))
    gap = abs(losses["float16"] / losses["bfloat16"] - 1)
    figure = f"{gap:.2%} apart, {skipped} skipped"
    return Outcome(gap < 0.02 and skipped <= 3, figure, "< 2 %, <= 3")


def automatic_rows(b: Bench) -> Outcome:
    """micro_batch_size: auto picks rows that training then has room for, small and large."""
    if b.rehearse:
        return Outcome(True, "auto is tried on a GPU", "")
    shares, n_tokens = [], f"train.tokens_per_step={ON_A_STEP}"
    for shape in ((12, 12, 768), (36, 20, 1280)):  # larger ones leave no room on a small disk
        sets = [
            f"model.{k}={v}" for k, v in zip(("n_layer", "n_head", "n_embd"), shape, strict=True)
        ]
        sets += ["train.keep_last=1", "compile=false"]
        done = b.train("auto", 3, "train.micro_batch_size=auto", n_tokens, *sets).require()
        shares.append(done.logged[-1]["memory_bytes"] / _memory())
    figure = ", ".join(f"{share:.0%} of the card" for share in shares)
    return Outcome(max(shares) < 0.92, figure, "no error, < 92 %")


def _memory() -> int:
    import torch

    return torch.cuda.get_device_properties(0).total_memory or 0  # asking for it takes none


def out_of_memory(b: Bench) -> Outcome:
    """Asking for too much ends with exit 8 and a hint."""
    if b.rehearse:
        return Outcome(True, "on a CPU the plan refuses it before", "")
    rows = 100_000
    big = b.train("big", 3, f"train.micro_batch_size={rows}", "compile=false")
    hint = big.result.get("hint")
    return Outcome(big.code == 8 and bool(hint), f"exit {big.code}: {hint}", "8, with a hint")


def evaluation(b: Bench) -> Outcome:
    """Tokens per second of `gpt eval`, and its loss beside the CPU's."""
    most = "4000" if b.rehearse else "500000"
    here = json.loads(b.gpt("eval", "--checkpoint", "plain", "--split", "train", "--max-tokens",
                            most, "--json", "-s", f"device={b.device}").stdout)  # fmt: skip
    rate = here["tokens"] / here["seconds"]
    few = ("eval", "--checkpoint", "plain", "--max-tokens", "20000", "--json", "-s")
    losses = [json.loads(b.gpt(*few, f"device={device}", limit=400).stdout)["loss"]
              for device in (b.device, "cpu")]  # fmt: skip
    gap = abs(losses[0] - losses[1])
    ok = gap < 1e-4 and b.judged(rate >= 400_000)
    return Outcome(ok, f"{rate:,.0f} tokens/s, {gap:.1e} nats from the CPU", ">= 400,000, < 1e-4")


def generation(b: Bench) -> Outcome:
    """Tokens per second of one text and of 64."""
    n = "20" if b.rehearse else "300"
    rates = {}
    for samples in (1, 64):
        done = b.gpt("generate", "--checkpoint", "plain", "--max-new-tokens", n, "--num-samples",
                     str(samples), "--seed", "1", "--json", "-s", f"device={b.device}")  # fmt: skip
        rates[samples] = json.loads(done.stdout)["tokens_per_second"]
    ok = b.judged(rates[1] >= 250 and rates[64] >= 20 * rates[1])
    figure = f"{rates[1]:,.0f}/s alone, {rates[64]:,.0f}/s of 64"
    return Outcome(ok, figure, ">= 250, >= 20 times that")


def greedy(b: Bench) -> Outcome:
    """Greedy decoding in float32 gives the CPU's ids, alone and among others."""
    words = ("generate", "--checkpoint", "plain", "--temperature", "0", "--max-new-tokens", "30",
             "--json", "-s", "dtype=float32", "import os", "-s")  # fmt: skip
    texts = [json.loads(b.gpt(*words, f"device={device}", "--num-samples", str(n)).stdout)
             ["samples"][0]["text"] for device, n in
             ((b.device, 1), ("cpu", 1), (b.device, 8))]  # fmt: skip
    same = [text == texts[0] for text in texts]
    return Outcome(same[1], f"CPU {'same' if same[1] else 'differs'}, among 8"
                   f" {'same' if same[2] else 'differs'}", "the CPU's ids")  # fmt: skip


def saving(b: Bench) -> Outcome:
    """What a save in the background costs the steps beside it, and that a killed run resumes."""
    every = 5 if b.rehearse else 100  # steps, in which a disk takes one checkpoint
    sets = (f"train.save_every={every}", "train.async_save=true", "train.max_steps=100000")
    words = b.train_words("killed", b.steps(40), *sets)
    process = subprocess.Popen([*GPT, *words, "--overwrite"], cwd=b.folder,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    metrics = b.folder / "runs" / "killed" / "metrics.jsonl"
    end = time.monotonic() + 150
    while time.monotonic() < end and process.poll() is None:
        if metrics.exists() and len(metrics.read_text().splitlines()) > 6 * every:
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    lines = [json.loads(line) for line in metrics.read_text().splitlines()[:-1]]
    seconds = {line["step"]: line["seconds"] for line in lines if "seconds" in line}
    took = {step: seconds[step] - seconds[step - 1] for step in seconds if step - 1 in seconds}
    beside = [took[step] for step in took if step % every == 1 and step > FIRST]
    others = [took[step] for step in took if step % every not in (0, 1) and step > FIRST]
    stall = statistics.median(beside) - statistics.median(others)
    last = max(seconds)
    again = b.gpt(*b.train_words("killed", last + 5, *sets[:2]), "--resume", "--json")
    resumed = json.loads(again.stdout).get("step") == last + 5
    ok = resumed and b.judged(stall < 0.3)
    return Outcome(ok, f"{stall:.2f} s a save, resumed: {resumed}", "< 0.3 s, resumed")


def one_rank(b: Bench) -> Outcome:
    """DDP and FSDP on one rank over the GPU's own backend, compiled and not, AdamW and Muon."""
    found = b.probe("one_rank", limit=300)
    figure = f"weights {found['weights']:.1e} apart, losses {found['losses']:.1e}"
    ok = found["weights"] < 1e-5 and found["losses"] < 1e-4 and not found["recompiles"]
    return Outcome(ok, f"{figure}, {found['recompiles']} recompile limits", "< 1e-5, < 1e-4, 0")


def contexts(b: Bench) -> Outcome:
    """One process holds one context on the GPU."""
    if b.device != "cuda":
        return Outcome(True, "nvidia-smi is CUDA's", "")
    process = subprocess.Popen([*GPT, *b.train_words("contexts", 100_000), "--overwrite"],
                               cwd=b.folder, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)  # fmt: skip
    metrics, end = b.folder / "runs" / "contexts" / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < end and not metrics.exists():
        time.sleep(0.5)
    asked = ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"]
    pids = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
    process.send_signal(signal.SIGTERM)
    process.wait()
    return Outcome(len(pids) <= 1, f"{len(pids)} for one process", "1")


def scaling(b: Bench) -> Outcome:
    """Tokens per second of all GPUs beside one, and the loss they reach."""
    tokens = f"train.tokens_per_step={ON_A_STEP if not b.rehearse else 4 * b.gpus * 128}"
    alone = b.train("alone", b.steps(20), tokens).require()
    all_ = b.train("all", b.steps(20), tokens, options=("--gpus", str(b.gpus))).require()
    times = all_.rate / alone.rate
    gap = abs(all_.logged[-1]["loss"] - alone.logged[-1]["loss"])
    ok = gap < 1e-2 and b.judged(times >= 0.93 * b.gpus)
    return Outcome(ok, f"{times:.2f} times one, losses {gap:.1e} apart", f">= {0.93 * b.gpus:.1f}")


def shards(b: Bench) -> Outcome:
    """FSDP, compiled, with samples, evaluations and a stop, resumed where a sample is due."""
    sets = ("train.parallel=fsdp", "train.sample_every=4", "train.save_every=4",
            "train.eval_every=8", f"train.tokens_per_step={b.gpus * 128 * b.rows * 8}")  # fmt: skip
    gpus = ("--gpus", str(b.gpus))
    first = b.train("shards", 4, *sets, options=gpus).require()
    words = b.train_words("shards", 12, *sets)
    again = b.gpt(*words, "--resume", "--json", *gpus, limit=300)
    result = json.loads(again.stdout)
    figure = f"step {result.get('step')}: {result.get('error', 'resumed')}"
    return Outcome(first.code == 0 and result.get("step") == 12, figure, "12 steps")


Check = Callable[[Bench], Outcome]
CHECKS: tuple[Check, ...] = (
    doctor, loss_gradients, step_gradients, training, waits, profile, generation, nanogpt_ratio,
    odd_vocabulary, evaluation, greedy, verify_resume, float16, automatic_rows, out_of_memory,
    saving, one_rank, contexts,
)  # fmt: skip
ON_MPS: tuple[Check, ...] = (
    doctor, loss_gradients, step_gradients, training, evaluation, generation, greedy, saving,
)  # fmt: skip
ON_SEVERAL: tuple[Check, ...] = (scaling, shards)


def tell(report: Report, check: Check, bench: Bench) -> bool:
    """Run a check and print its line; what it raises is a failure like others."""
    began = time.perf_counter()
    try:
        found = check(bench)
    except (Exception, SystemExit) as error:  # the next check may still pass
        text = (str(error) or type(error).__name__).splitlines()[0][:120]
        found = Outcome(False, f"{type(error).__name__}: {text}", "")
    word, seconds = "ok" if found.ok else "FAIL", time.perf_counter() - began
    report.line(f"{word:<4} {check.__name__:<16} {found.figure}   [{found.limit}] {seconds:.0f} s")
    return found.ok


def main() -> None:
    """Run the checks and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--nanogpt", type=Path, help="folder of nanoGPT's train.py")
    parser.add_argument("--device", default="cuda", choices=["cuda", "mps"])
    parser.add_argument("--only", nargs="+", help="names of checks")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, tiny, no speed judged")
    options = parser.parse_args()
    import torch

    there = torch.cuda.is_available() if options.device == "cuda" else torch.mps.is_available()
    if not there and not options.rehearse:
        print(f"no {options.device} device here: torch {torch.__version__} finds none;"
              " --rehearse runs the checks on the CPU", file=sys.stderr)  # fmt: skip
        raise SystemExit(2)
    device = "cpu" if options.rehearse else options.device
    checks = ON_MPS if options.device == "mps" else CHECKS
    checks += ON_SEVERAL if options.gpus > 1 else ()
    if options.only:
        checks = tuple(check for check in checks if check.__name__ in options.only)
    report = Report(f"On a GPU: {device}, {options.gpus} of them")
    if device == "cuda":
        report.line(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, cuDNN"
                    f" {cast(Any, torch.backends.cudnn).version()}, {_driver()}")  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), device, options.gpus, options.nanogpt, options.rehearse)
        n_characters = 400_000 if options.rehearse else 20_000_000
        (bench.folder / "text.txt").write_text(stdlib_text(n_characters))
        words = ("prepare", "./text.txt", "--out", "data", "-s", "data.val_fraction=0.05")
        prepared = bench.gpt(*words)
        if prepared.returncode:
            raise SystemExit(prepared.stderr)
        passed = [tell(report, check, bench) for check in checks]
    report.line(f"{sum(passed)} of {len(passed)} passed")
    if not options.rehearse and not options.only:
        report.save()
    raise SystemExit(0 if all(passed) else 1)


def _driver() -> str:
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
    return f"driver {found[0]}" if found else "driver unknown"


if __name__ == "__main__":
    main()
