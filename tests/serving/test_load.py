"""Many clients: places, waiting ones, hang-ups, deadlines, and checkpoints on demand."""

import asyncio
import json
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gptcli.config import Config, load_config
from gptcli.generation.decode import Rows
from gptcli.serving.engine import Job, make_texts
from gptcli.serving.models import Models
from support.runs import Trained
from support.serving import Served, serving

WHERE = "/v1/completions"
SHORT = {"model": "tiny", "prompt": "The", "max_tokens": 3, "seed": 1}
LONG = {"model": "tiny", "prompt": "The", "max_tokens": 60000, "temperature": 0, "stream": True}


def hang_up_after_a_token(server: Served, body: dict[str, Any]) -> None:
    """Read the beginning of a stream, and close the connection."""
    with begin(server, body) as connection:
        answer = b""
        while b"data:" not in answer:
            part = connection.recv(65536)
            assert part, answer
            answer += part


def begin(server: Served, body: dict[str, Any]) -> socket.socket:
    """Send a request and do not read the answer."""
    raw = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    head = (
        f"POST {WHERE} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(raw)}\r\n\r\n"
    )
    connection.sendall(head.encode() + raw)
    return connection


def wait_until(is_so: Any) -> None:
    """Wait for something that happens soon."""
    ends = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_each_of_hundreds_of_requests_gets_the_text_it_gets_alone(run: Path) -> None:
    draw = random.Random(3)
    bodies = [
        {"model": "tiny", "prompt": draw.choice(["The", "a b", "", "x" * 16]), "seed": seed,
         "n": draw.choice([1, 2]), "max_tokens": draw.randint(1, 30),
         "stop": draw.choice([[], "e"]),
         "temperature": draw.choice([0, 0.8, 1.4]), "top_p": draw.choice([None, 0.9])}
        for seed in range(100)
    ]  # fmt: skip
    with serving("tiny") as server:

        def ask(body: dict[str, Any]) -> Any:
            status, answer = server.json(WHERE, body)
            assert status == 200
            return answer["choices"]

        alone = [ask(body) for body in bodies]
        with ThreadPoolExecutor(12) as pool:
            assert list(pool.map(ask, [*bodies, *bodies])) == alone + alone
        assert server.engine.n_running == server.engine.n_waiting == 0


def test_texts_that_wait_join_together(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptcli.serving.engine._JOIN_SECONDS", 60)
    with serving("tiny") as server:
        model, loop, n_running = server.models.served["tiny"], asyncio.new_event_loop(), list[int]()
        step = model.rows.step
        monkeypatch.setattr(
            model.rows, "step", lambda: (n_running.append(len(model.rows.rows)), step())[1]
        )
        config = model.defaults.model_copy(update={"max_new_tokens": 3, "temperature": 0})
        jobs = [
            Job(model, make_texts(model, [ids], config, n=1, seed=0, n_top=None), 1e9, True, loop)
            for ids in ([1], [1, 2], [3])
        ]
        with server.engine._lock:
            for job in jobs:
                server.engine.submit(job)
        wait_until(lambda: all(job.is_done for job in jobs))
        loop.close()
        assert n_running == [3, 3]  # the first token is that of joining


def test_a_client_that_hangs_up_frees_its_place(run: Path) -> None:
    with serving("tiny", max_texts=2) as server:
        for is_streamed in (True, False):
            body = LONG | {"n": 2, "stream": is_streamed}
            with begin(server, body):
                wait_until(lambda: server.engine.n_running == 2)
            wait_until(lambda: server.engine.n_running == 0)
        hang_up_after_a_token(server, LONG)
        wait_until(lambda: server.engine.n_running == 0)
        with begin(server, LONG | {"n": 2}), begin(server, LONG) as waiting:
            wait_until(lambda: server.engine.n_waiting == 1)
            waiting.close()
            wait_until(lambda: server.engine.n_waiting == 0)
        assert server.json(WHERE, SHORT)[0] == 200


def test_too_many_waiting_are_turned_away_with_a_time_to_come_back(run: Path) -> None:
    with serving("tiny", max_texts=1, max_waiting=1) as server:
        with begin(server, LONG), begin(server, LONG):
            wait_until(lambda: server.engine.n_running == server.engine.n_waiting == 1)
            status, headers, body = server.ask(WHERE, SHORT)
        assert (status, json.loads(body)["error"]["type"]) == (429, "rate_limit_error")
        assert 1 <= int(headers["retry-after"]) <= 60
        wait_until(lambda: server.engine.n_running == 0)
        assert server.json(WHERE, SHORT)[0] == 200


def test_more_texts_than_the_server_ever_takes_are_no_matter_of_waiting(run: Path) -> None:
    with serving("tiny", max_texts=1, max_waiting=1) as server:
        status, answer = server.json(WHERE, SHORT | {"n": 3})
        assert (status, answer["error"]["param"]) == (400, "n")
        assert "at most 2 texts" in answer["error"]["message"]
        assert server.json(WHERE, SHORT | {"n": 2})[0] == 200


def test_a_request_ends_at_its_deadline_with_what_there_is(run: Path) -> None:
    with serving("tiny", seconds=0.5, max_texts=1) as server:
        began = time.monotonic()
        status, answer = server.json(WHERE, LONG | {"stream": False})
        assert time.monotonic() - began < 10
        assert (status, answer["choices"][0]["finish_reason"]) == (200, "length")
        assert 0 < answer["usage"]["completion_tokens"] < 60000
        with begin(server, LONG):
            wait_until(lambda: server.engine.n_running == 1)
            assert server.json(WHERE, SHORT)[0] in (200, 429)  # its place came in time or not


def test_a_client_that_does_not_read_holds_up_no_other(run: Path) -> None:
    with serving("tiny", max_texts=4) as server:
        lazy = [begin(server, LONG | {"logprobs": 5}) for _ in range(3)]
        for _ in range(5):
            assert server.json(WHERE, SHORT)[0] == 200
        for connection in lazy:
            connection.close()
        wait_until(lambda: server.engine.n_running == 0)


def test_an_error_of_ours_is_one_answer_and_the_next_is_served(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving("tiny") as server:
        with monkeypatch.context() as broken:
            broken.setattr(Rows, "step", lambda self: 1 / 0)
            status, answer = server.json(WHERE, SHORT)
        assert (status, answer["error"]["type"]) == (500, "server_error")
        assert "ZeroDivision" not in answer["error"]["message"]
        assert server.json(WHERE, SHORT)[0] == 200


def test_threads_that_open_a_model_leave_the_cores_to_the_engine(trained: Trained) -> None:
    trained.copy("train.keep_last=9", "train.save_every=1", "train.max_steps=2")
    opened = list[threading.Thread]()

    def settings(run: dict[str, Any] | None) -> Config:
        opened.append(threading.current_thread())
        return load_config(None, ["device=cpu"], {}, run)

    models = Models(["tiny"], settings, int8=False, max_bytes=1 << 30)
    n_served = len(opened)
    asyncio.run(models.use("tiny@1"))
    assert len(opened) > n_served > 0
    assert not any(thread.is_alive() for thread in opened)


def test_kept_checkpoints_are_models_too_as_many_as_fit(trained: Trained) -> None:
    trained.copy("train.keep_last=9", "train.save_every=1", "train.max_steps=6")
    with serving("tiny", max_bytes=250_000) as server:
        _, listed = server.json("/v1/models")
        assert listed["data"][0]["gptcli"]["steps"] == [0, 1, 2, 3, 4, 5, 6]
        texts = {}
        for step in (1, 2, 3, 4, 5, 6, 1):
            status, answer = server.json(WHERE, SHORT | {"model": f"tiny@{step}"})
            assert (status, answer["model"]) == (200, f"tiny@{step}")
            assert texts.setdefault(step, answer["choices"]) == answer["choices"]
        kept = server.models._kept
        assert 1 <= len(kept) < 6 and "tiny@1" in kept
        status, model = server.json("/v1/models/tiny@2")
        assert (status, model["gptcli"]["step"]) == (200, 2)


def test_files_beside_the_checkpoints_are_no_steps(run: Path) -> None:
    for name in ("step-final.pt", "step-00000006~1.pt", "step-.pt"):
        (run / "checkpoints" / name).write_text("notes")
    with serving("tiny") as server:
        _, listed = server.json("/v1/models")
        assert listed["data"][0]["gptcli"]["steps"] == [3, 6]


def test_a_damaged_checkpoint_is_named_without_its_place(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (run / "checkpoints" / "step-00000003.pt").write_bytes(b"damaged")
    with serving("tiny") as server:
        status, answer = server.json("/v1/models/tiny@3")
        assert (status, answer["error"]["param"]) == (503, "model")
        assert "tiny@3" in answer["error"]["message"] and "/" not in answer["error"]["message"]
    assert "step-00000003.pt: damaged" in caplog.text


def test_the_log_has_a_line_for_each_completion_and_each_refusal_without_texts(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "gptcli")
    with serving("tiny") as server:
        server.json(WHERE, SHORT | {"prompt": "Secret"})
        server.json(WHERE, SHORT | {"prompt": "Secret", "n": 0})
        server.json("/Secret")
        server.ask("/healthz")
    logged = [record.getMessage() for record in caplog.records]
    assert [line.partition(":")[0] for line in logged] == [
        "/v1/completions 200", "/v1/completions 400", "other 404"
    ]  # fmt: skip
    assert "Secret" not in "".join(logged)


def test_the_samples_of_a_run_are_given(run: Path) -> None:
    with serving("tiny") as server:
        status, answer = server.json("/v1/gptcli/samples?model=tiny")
        assert (status, answer["data"][0].keys()) == (200, {"step", "prompt", "text"})


def test_figures_are_prometheus_text(run: Path) -> None:
    with serving("tiny") as server:
        server.json(WHERE, SHORT)
        server.json("/nowhere")
        status, headers, body = server.ask("/metrics")
        assert (status, headers["content-type"].split(";")[0]) == (200, "text/plain")
        lines = body.decode().splitlines()
        assert 'gptcli_requests_total{route="/v1/completions",status="200"} 1' in lines
        assert 'gptcli_requests_total{route="other",status="404"} 1' in lines
        assert "gptcli_texts_running 0" in lines
        assert all(line.startswith("# TYPE ") or len(line.split(" ")) == 2 for line in lines)


def test_long_prompts_are_shortened_on_demand(run: Path) -> None:
    with serving("tiny") as server:
        body = SHORT | {"prompt": "a" * 40 + "The", "truncate_prompt_tokens": 3, "logprobs": 1}
        _, cut = server.json(WHERE, body)
        assert cut["choices"][0]["logprobs"]["gptcli"]["prompt"] == list(b"The")
        _, short = server.json(WHERE, SHORT)
        assert cut["choices"][0]["text"] == short["choices"][0]["text"]
        assert server.json(WHERE, body | {"truncate_prompt_tokens": -1})[0] == 200


def test_requests_that_end_together_leave_no_thread(run: Path) -> None:
    before = threading.active_count()
    with serving("tiny") as server:
        server.json(WHERE, SHORT)
    wait_until(lambda: threading.active_count() <= before + 1)  # and the pool of to_thread
