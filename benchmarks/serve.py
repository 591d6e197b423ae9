"""How `gpt serve` holds up: its speed against `gpt generate`, and a soak with hostile clients.

    python benchmarks/serve.py speed --checkpoint quickstart
    python benchmarks/serve.py soak --checkpoint quickstart --minutes 5

`speed`: tokens per second of 1 and 8 clients, streaming and not, against the same texts drawn
without a server in this process; the time to the first token of a ninth request while eight run.
`soak`: clients that ask, stream, hang up, read slowly and send what is no request. Every text is
compared with what `gpt generate` draws for its seed in float32; memory is read as it goes.
"""

import argparse
import asyncio
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


async def many(server: Server, n: int, n_tokens: int, *, stream: bool) -> float:
    """Return the tokens per second of n clients at once."""
    body = {"model": server.model, "prompt": "def ", "max_tokens": n_tokens, "stream": stream,
            "temperature": 1.0, "stop": []}  # fmt: skip
    began = time.perf_counter()
    bodies = [json.dumps(body | {"seed": seed}).encode() for seed in range(n)]
    answers = await asyncio.gather(*(ask(server.port, one) for one in bodies))
    seconds = time.perf_counter() - began
    assert all(status == 200 for status, _, _ in answers)
    return n * n_tokens / seconds


async def ninth(server: Server, n_tokens: int) -> tuple[float, float]:
    """Return seconds to the first token of a ninth stream, and of a step of all eight before."""
    body = {"model": server.model, "prompt": "def ", "max_tokens": n_tokens, "stream": True,
            "temperature": 1.0}  # fmt: skip
    began = time.perf_counter()
    eight = [asyncio.create_task(ask(server.port, json.dumps(body | {"seed": k}).encode()))
             for k in range(8)]  # fmt: skip
    await asyncio.sleep(1.0 if n_tokens >= 200 else 0.5)  # all have begun
    asked = time.perf_counter()
    _, _, first = await ask(server.port, json.dumps(body | {"seed": 9, "max_tokens": 2}).encode())
    await asyncio.gather(*eight)
    return first - asked, (time.perf_counter() - began) / n_tokens


def generated(checkpoint: str, n: int, n_tokens: int, words: Sequence[str]) -> float:
    """Return the tokens per second of `gpt generate`, decoding alone."""
    command = [sys.executable, "-m", "gptcli", "generate", "--checkpoint", checkpoint, "def ",
               "--json", "--num-samples", str(n), "--max-new-tokens", str(n_tokens),
               "--temperature", "1.0", "--seed", "1", *words]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)["tokens_per_second"])


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["speed", "soak"])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--laps", type=int, default=3)
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
    server = Server(options.checkpoint)
    try:
        for n in (1, 8):
            laps: dict[str, list[float]] = {"generate": [], "whole": [], "streamed": []}
            for _ in range(options.laps):  # in turn, so that a busy machine slows all of them
                laps["generate"].append(generated(options.checkpoint, n, options.tokens, ()))
                for kind, stream in (("whole", False), ("streamed", True)):
                    laps[kind].append(asyncio.run(many(server, n, options.tokens, stream=stream)))
            best = {kind: max(values) for kind, values in laps.items()}
            shares = {kind: round(value / best["generate"], 2) for kind, value in best.items()}
            print(n, "clients, tokens/s:", {k: round(v, 1) for k, v in best.items()}, shares)
        firsts, steps = zip(*(asyncio.run(ninth(server, options.tokens)) for _ in range(5)),
                            strict=True)  # fmt: skip
        print(f"ninth: first token {statistics.median(firsts) * 1e3:.1f} ms,"
              f" a step of eight {statistics.median(steps) * 1e3:.1f} ms")  # fmt: skip
    finally:
        server.stop()


if __name__ == "__main__":
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    )
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    main()
