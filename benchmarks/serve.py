"""How `gpt serve` holds up: its speed against `gpt generate`, and a soak with hostile clients.

    python benchmarks/serve.py speed --checkpoint quickstart
    python benchmarks/serve.py soak --checkpoint quickstart --minutes 5

`speed`: tokens per second of 1 and 8 clients, streaming and not, over whole requests; in turn with
them, in this process, those of `gpt generate`, over the whole call and, as it prints, decoding.
Both sides are warm. Then the time to the first token of a ninth request while eight run.
`soak`: clients that ask, stream, hang up, read slowly and send what is no request. Every text is
compared with what `gpt generate` draws for its seed in float32; memory is read as it goes.
"""

import argparse
import asyncio
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_LONG_TEXTS = range(8)  # seeds of texts that run on
PROMPTS = ("def ", "import os\n", "class Thing:\n    ", "", "The quick brown fox", "# " * 40)


class Server:
    """`gpt serve` as a process."""

    def __init__(self, checkpoint: str, *words: str) -> None:
        command = [sys.executable, "-m", "gptcli", "serve", "--checkpoint", checkpoint, "--port",
                   "0", "--json", *words]  # fmt: skip
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert self._process.stdout is not None
        ready = json.loads(self._process.stdout.readline())
        self.model: str = ready["models"][0]
        self.port = int(ready["url"].rpartition(":")[2])

    @property
    def memory(self) -> float:
        """MB in use."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmRSS"))

    def stop(self) -> int:
        """End it, and return its exit code."""
        self._process.terminate()
        return self._process.wait(60)


async def ask(
    port: int, body: bytes, *, hang_up_after: int | None = None, slowly: bool = False
) -> tuple[int, bytes, float]:
    """Send a request; return status, body, and when its first byte came."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            "Content-Type: application/json\r\nConnection: close\r\n\r\n"
        )
        writer.write(head.encode() + body)
        await writer.drain()
        found, status, first = b"", 0, 0.0
        while part := await reader.read(256 if slowly else 65536):
            found += part
            if not first and len(found.partition(b"\r\n\r\n")[2]) > 0:
                first = time.perf_counter()
            if hang_up_after is not None and len(found) > hang_up_after:
                return 0, b"", first
            if slowly:
                await asyncio.sleep(0.02)
        head_, _, content = found.partition(b"\r\n\r\n")
        status = int(head_.split()[1])
        return status, dechunked(content) if b"chunked" in head_.lower() else content, first
    finally:
        writer.close()


def dechunked(content: bytes) -> bytes:
    """Return a body that came in chunks."""
    whole = b""
    while content:
        size, _, content = content.partition(b"\r\n")
        whole, content = whole + content[: int(size, 16)], content[int(size, 16) + 2 :]
    return whole


def text_of(content: bytes, is_streamed: bool) -> tuple[list[str], list[str]]:
    """Return the texts of an answer and why each ended, which must be said."""
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    if is_streamed:
        lines = content.decode().split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""], lines[-2:]
        events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    else:
        events = [json.loads(content)]
    for event in events:
        for choice in event["choices"]:
            at = choice["index"]
            texts[at] = texts.get(at, "") + choice["text"]
            if choice["finish_reason"]:
                reasons[at] = choice["finish_reason"]
    assert texts.keys() == reasons.keys()
    return [texts[at] for at in sorted(texts)], [reasons[at] for at in sorted(reasons)]


def make_requests(model: str, n: int) -> list[dict[str, Any]]:
    """Return requests that can be compared: some twice, as there are few seeds."""
    draw = random.Random(1)
    kinds = []
    for seed in range(min(n, 150)):
        kinds.append(
            {"model": model, "prompt": draw.choice(PROMPTS), "seed": seed,
             "n": draw.choice([1, 1, 1, 2, 3]), "max_tokens": draw.randint(1, 48),
             "temperature": draw.choice([0, 0.7, 1.0, 1.3]), "top_p": draw.choice([1.0, 0.9]),
             "top_k": draw.choice([0, 0, 40]), "min_p": draw.choice([0, 0.05]),
             "stop": draw.choice([[], ["\n"], ["self", "\n\n"]])}
        )  # fmt: skip
    return kinds


def drawn_alone(checkpoint: str, requests: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the texts of `gpt generate` for each request, each sample alone."""
    from gptcli.api.generate import Sampler
    from gptcli.config import load_config
    from gptcli.generation import encode_prompt
    from gptcli.generation.samples import draw_samples

    sampler = Sampler(checkpoint, lambda run: load_config(None, ["dtype=float32"], {}, run))
    model, tokenizer = sampler.trained.model, sampler.trained.tokenizer
    found = []
    for request in requests:
        config = sampler.config.generate.model_copy(
            update={"max_new_tokens": request["max_tokens"], "temperature": request["temperature"],
                    "top_p": request["top_p"], "top_k": request["top_k"] or None,
                    "min_p": request["min_p"], "stop": request["stop"]}
        )  # fmt: skip
        ids = encode_prompt(tokenizer, request["prompt"], model.config.block_size)
        texts = []
        for number in range(request["n"]):
            pieces = draw_samples(
                model, tokenizer, ids, config, seed=request["seed"], numbers=[number]
            )
            texts.append("".join(text for _, text in pieces))
        found.append(texts)
    return found


async def soak(server: Server, expected: list[list[str]], kinds: list[dict[str, Any]],
               n_clients: int, n_requests: int, minutes: float) -> Counter[str]:  # fmt: skip
    """Let clients ask until the time is over or enough is asked."""
    counts: Counter[str] = Counter()
    ends, memory, n_begun = time.perf_counter() + 60 * minutes, [server.memory], 0

    async def client(number: int) -> None:
        nonlocal n_begun
        draw = random.Random(number)
        while time.perf_counter() < ends and n_begun < n_requests:
            n_begun += 1
            if n_begun % 1000 == 0:
                memory.append(server.memory)
                print(f"{n_begun:6} requests  {memory[-1]:.0f} MB  {dict(counts)}", flush=True)
            at, chance = draw.randrange(len(kinds)), draw.random()
            is_streamed = draw.random() < 0.5
            body = kinds[at] | {"stream": is_streamed}
            raw = json.dumps(body).encode()
            if chance < 0.1:
                await ask(server.port, raw, hang_up_after=draw.randrange(600))
                counts["hung up"] += 1
            elif chance < 0.2:
                bad = draw.choice([raw[: len(raw) // 2], b"\xff" + raw, b"[" * 5000, raw + raw])
                status, content, _ = await ask(server.port, bad)
                assert status == 400 and set(json.loads(content)) == {"error"}, content
                counts["refused"] += 1
            else:
                slowly = chance < 0.25
                status, content, _ = await ask(server.port, raw, slowly=slowly)
                if status == 429:
                    counts["busy"] += 1
                    await asyncio.sleep(0.5)
                    continue
                assert status == 200, content
                texts, _ = text_of(content, is_streamed)
                counts["slow"] += slowly
                counts["right" if texts == expected[at] else "WRONG"] += 1
                if texts != expected[at]:
                    print("WRONG", kinds[at], texts, expected[at])

    await asyncio.gather(*map(client, range(n_clients)))
    memory.append(server.memory)
    print("memory, MB:", [round(value) for value in memory])
    return counts


async def many(server: Server, n: int, n_tokens: int, seed: int, *, stream: bool) -> float:
    """Return the tokens per second of n clients at once, from the first connection to the end."""
    body = _body(server, n_tokens) | {"stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    bodies = [json.dumps(body | {"seed": seed + number}).encode() for number in range(n)]
    began = time.perf_counter()
    answers = await asyncio.gather(*(ask(server.port, one) for one in bodies))
    seconds = time.perf_counter() - began
    assert all(status == 200 for status, _, _ in answers)
    drawn = [re.findall(rb'"completion_tokens": (\d+)', content) for _, content, _ in answers]
    return sum(int(numbers[-1]) for numbers in drawn) / seconds


async def ninth(server: Server, n_tokens: int) -> tuple[list[float], float]:
    """Return seconds to the first tokens of ninth streams, and of a step of all eight before."""
    body = _body(server, n_tokens) | {"stream": True}

    def begin(seed: int, **more: Any) -> asyncio.Task[tuple[int, bytes, float]]:
        raw = json.dumps(body | {"seed": seed} | more).encode()
        return asyncio.create_task(ask(server.port, raw))

    eight, found = [begin(seed) for seed in _LONG_TEXTS], []
    await asyncio.sleep(0.3)  # all have begun
    draw = random.Random(n_tokens)
    for seed in range(5):
        await asyncio.sleep(draw.uniform(0.05, 0.1))
        asked = time.perf_counter()
        _, _, first = await begin(seed, max_tokens=1)
        found.append(first - asked)
    assert not any(task.done() for task in eight), "more --tokens are needed"
    answers = await asyncio.gather(*eight)
    return found, (time.perf_counter() - max(first for _, _, first in answers)) / (n_tokens - 1)


def _body(server: Server, n_tokens: int) -> dict[str, Any]:
    return {"model": server.model, "prompt": "def ", "max_tokens": n_tokens, "temperature": 1.0,
            "stop": []}  # fmt: skip


class Generate:
    """What `gpt generate` does, in this process and as often as needed."""

    def __init__(self, checkpoint: str, n_tokens: int) -> None:
        from gptcli.commands.options import over_run

        settings = over_run(None, None, {"generate.num_samples": 8, "generate.prompt": "def ",
                                         "generate.max_new_tokens": n_tokens,
                                         "generate.temperature": 1.0})  # fmt: skip
        from gptcli.api.generate import Sampler  # which loads torch, after what that sets

        self._sampler = Sampler(checkpoint, settings)
        self.weights = self._sampler.weights

    def __call__(self, n: int, seed: int) -> tuple[float, float]:
        """Return the tokens per second of a whole call, and of decoding alone."""
        sampler = self._sampler
        wanted = sampler.config.generate.model_copy(update={"num_samples": n, "stop": []})
        sampler.config = sampler.config.model_copy(update={"seed": seed, "generate": wanted})
        began = time.perf_counter()
        samples = {sample.index: sample for sample, _ in sampler.samples()}
        seconds = time.perf_counter() - began
        n_drawn = sum(sample.text.n_tokens for sample in samples.values())
        return n_drawn / seconds, sampler.timings.tokens_per_second


def speed(checkpoint: str, n_tokens: int, laps: int) -> None:
    """Measure both sides in turn, and report medians and the medians of each lap's ratios."""
    generate, server = Generate(checkpoint, n_tokens), Server(checkpoint)
    from common import Report

    report = Report(f"Serving, {checkpoint}")
    report.line(f"{n_tokens} tokens each, {generate.weights}; {laps} laps, {4 * laps} of one text")
    try:
        for n, more in ((1, 4), (8, 1)):
            found: dict[str, list[float]] = {}
            for seed in range(-100, 100 * laps * more, 100):  # in turn; the first warms both up
                whole, decoding = generate(n, max(0, seed))
                rates = {"generate, whole call": whole, "generate, decoding": decoding}
                for name, stream in (("whole answers", False), ("streams", True)):
                    rate = asyncio.run(many(server, n, n_tokens, max(0, seed), stream=stream))
                    rates[f"serve, {name}"] = rate
                for name, rate in rates.items() if seed >= 0 else ():
                    found.setdefault(name, []).append(rate)
            for name, values in found.items():
                words = f"{n} at once: {name:<21} {statistics.median(values):7,.1f} tokens/s"
                for other in ("whole call", "decoding") if name.startswith("serve") else ():
                    pairs = zip(values, found[f"generate, {other}"], strict=True)
                    ratio = statistics.median(ours / theirs for ours, theirs in pairs)
                    words += f"  {ratio:.2f} of the {other}"
                report.line(words)
        tries = [asyncio.run(ninth(server, 2 * n_tokens)) for _ in range(laps)]
        ratios = [first / step for firsts, step in tries for first in firsts]
        first = statistics.median(first for firsts, _ in tries for first in firsts)
        step = statistics.median(step for _, step in tries)
        report.line(f"ninth: first token {first * 1e3:.1f} ms, a step of eight {step * 1e3:.1f} ms,"
                    f" ratio {statistics.median(ratios):.2f}")  # fmt: skip
    finally:
        server.stop()
    report.save()


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["speed", "soak"])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--laps", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=24)
    options = parser.parse_args()
    if options.what == "soak":
        server = Server(options.checkpoint, "-s", "dtype=float32", "--max-texts", "16")
        kinds = make_requests(server.model, options.requests)
        expected = drawn_alone(options.checkpoint, kinds)
        counts = asyncio.run(soak(server, expected, kinds, options.clients, options.requests,
                                  options.minutes))  # fmt: skip
        print(dict(counts), "exit code", server.stop())
        assert not counts["WRONG"]
        return
    speed(options.checkpoint, options.tokens, options.laps)


if __name__ == "__main__":
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    )
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    main()
