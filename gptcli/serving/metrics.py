"""What a server counts, as Prometheus reads it."""

from collections import Counter

from gptcli.serving.engine import Engine, Job


class Metrics:
    """Counts requests and tokens; only handlers write, on one thread."""

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, int]] = Counter()
        self._sums: Counter[str] = Counter()

    def count(self, route: str, status: int, seconds: float) -> None:
        """Count an answer."""
        self._requests[route, status] += 1
        self._sums["request_seconds_sum"] += seconds  # type: ignore[assignment]
        self._sums["request_seconds_count"] += 1

    def finish(self, job: Job, began: float, n_prompt: int) -> None:
        """Count the tokens of a request that is over."""
        self._sums["prompt_tokens_total"] += n_prompt
        self._sums["generated_tokens_total"] += job.n_tokens
        if job.first_token_at is not None:
            self._sums["first_token_seconds_sum"] += job.first_token_at - began  # type: ignore[assignment]
            self._sums["first_token_seconds_count"] += 1

    def text(self, engine: Engine) -> str:
        """Return all figures in Prometheus' text format."""
        lines = ["# TYPE gptcli_requests_total counter"]
        for (route, status), n in sorted(self._requests.items()):
            lines.append(f'gptcli_requests_total{{route="{route}",status="{status}"}} {n}')
        for name in ("prompt_tokens_total", "generated_tokens_total"):
            lines += [f"# TYPE gptcli_{name} counter", f"gptcli_{name} {self._sums[name]}"]
        for name in ("request_seconds", "first_token_seconds"):
            lines.append(f"# TYPE gptcli_{name} summary")
            lines += [f"gptcli_{name}_{part} {self._sums[f'{name}_{part}']}"
                      for part in ("sum", "count")]  # fmt: skip
        for name, value in (("running", engine.n_running), ("waiting", engine.n_waiting)):
            lines += [f"# TYPE gptcli_texts_{name} gauge", f"gptcli_texts_{name} {value}"]
        return "\n".join(lines) + "\n"
