"""Loggers: read back, they hold what metrics.jsonl holds, once, after stops and resumes too."""

import importlib.util
import json
import os
import struct
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptcli.api import train as api
from gptcli.commands import train as command
from gptcli.distributed.environment import Place
from gptcli.trackers import Trackers
from gptcli.training.loop import train
from support.commands import Gpt

Points = dict[str, list[tuple[int, float]]]
LONG = ("train.max_steps=12", "train.sample_every=6")
needs_wandb = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason="wandb is not installed (extra wandb)"
)
# Stands in for the package: it keeps what it is told, and can refuse.
FAKE_WANDB = """
import json, os, pathlib, types

def say(*what):
    with open("wandb.jsonl", "a") as file:
        print(json.dumps(what), file=file)

class Settings(dict):
    mode = os.environ.get("WANDB_MODE", "online")

class Run:
    url = "https://wandb.example/run"
    def log(self, row, step, commit):
        if os.environ.get("FULL") and step > 2:
            raise OSError("no space\\nleft")
        if os.environ.get("DIES") and step == 5:
            os._exit(0)
        say("log", step, row)
    def finish(self, exit_code):
        say("finish", exit_code)

def setup():
    return types.SimpleNamespace(settings=Settings())

def login(prompt, verify):
    assert not prompt and not verify
    return bool(os.environ.get("WANDB_API_KEY"))

def init(**given):
    pathlib.Path(given["dir"], "wandb").mkdir(exist_ok=True)
    say("init", {key: given[key] for key in ("id", "mode", "resume", "project", "name", "config")})
    return Run()
"""


def logged(folder: Path) -> Points:
    """Return what metrics.jsonl holds, by the name a logger has for it."""
    found: Points = defaultdict(list)
    for text in (folder / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        group = "eval" if "val_loss" in line else "epoch" if "epoch" in line else "train"
        for key, value in line.items():
            if key not in ("step", "epoch"):
                found[f"{group}/{key}"].append((line["step"], value))
    return found


def in_tensorboard(folder: Path) -> tuple[Points, dict[str, list[int]]]:
    """Return the curves and the steps of the texts that TensorBoard's own reader finds."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    everything = {"tensors": 0}
    found = EventAccumulator(str(folder / "tensorboard"), everything, everything).Reload()
    points, texts = {}, {}
    for tag in found.Tags()["tensors"]:
        plugin = found.SummaryMetadata(tag).plugin_data.plugin_name
        at = [(one.step, make_ndarray(one.tensor_proto)) for one in found.Tensors(tag)]
        if plugin == "text":
            texts[tag] = [step for step, _ in at]
        else:
            points[tag] = [(step, float(value)) for step, value in at]
    return points, texts


def require_same(found: Points, expected: Points) -> None:
    """Require the same points; event files hold single precision."""
    assert found.keys() == expected.keys()
    for tag, points in expected.items():
        assert [step for step, _ in found[tag]] == [step for step, _ in points], tag
        assert [y for _, y in found[tag]] == pytest.approx([y for _, y in points], rel=1e-6), tag


def train_until(config: Any, step: int | None, *, resume: bool, told: list[str]) -> None:
    """Train as the command does; `step` is where the process dies, its last event unread."""
    with Trackers(config.train.loggers, told.append) as loggers:
        events = train(config, resume=resume)
        for event in events:
            loggers.show(event)
            if step is not None and getattr(event, "loss", None) and event.step == step:  # type: ignore[union-attr]
                events.close()  # type: ignore[attr-defined]
                break


def test_tensorboard_holds_the_metrics(tiny: Callable[..., Any]) -> None:
    told: list[str] = []
    config = tiny("train.loggers=[tensorboard]", *LONG)
    train_until(config, None, resume=False, told=told)
    points, texts = in_tensorboard(config.run_folder)
    require_same(points, logged(config.run_folder))
    assert {"train/loss", "train/lr", "eval/val_loss"} <= points.keys()
    assert texts == {"config": [0], "sample": [6, 12]}
    assert told == []


@pytest.mark.parametrize("dies_at", [2, 7, 9])
def test_a_resumed_tensorboard_has_no_point_twice(tiny: Callable[..., Any], dies_at: int) -> None:
    config = tiny("train.loggers=[tensorboard]", "train.save_every=3", *LONG)
    train_until(config, dies_at, resume=False, told=[])
    train_until(config, None, resume=True, told=[])
    points, texts = in_tensorboard(config.run_folder)
    expected = logged(config.run_folder)
    assert [step for step, _ in expected["train/loss"]] == list(range(1, 13))
    require_same(points, expected)
    assert texts["sample"] == [6, 12]


def test_a_logger_switched_on_later_is_told_the_whole_run(tiny: Callable[..., Any]) -> None:
    config = tiny("train.save_every=3", *LONG)
    train_until(config, 8, resume=False, told=[])
    config = tiny("train.loggers=[tensorboard]", "train.save_every=3", *LONG)
    train_until(config, None, resume=True, told=[])
    points, texts = in_tensorboard(config.run_folder)
    require_same(points, logged(config.run_folder))
    assert texts["sample"] == [6, 12]


def test_a_logger_that_fails_is_off_and_the_run_goes_on(
    tiny_set: list[str], gpt: Callable[..., Any]
) -> None:
    Path("runs/tiny").mkdir(parents=True)
    Path("runs/tiny/tensorboard").write_text("in the way")
    done = gpt("train", *tiny_set, "-s", "train.loggers=[tensorboard]")
    assert done.code == 0
    [line] = [line for line in done.err_lines if "tensorboard" in line]
    assert line.startswith("note: tensorboard disabled after an error; training continues: runs")
    assert len(logged(Path("runs/tiny"))["train/loss"]) == 6


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full disk here")
def test_tensorboard_on_a_disk_that_fills_up(tiny: Callable[..., Any]) -> None:
    config = tiny("train.loggers=[tensorboard]")
    told: list[str] = []
    with Trackers(config.train.loggers, told.append) as loggers:
        for event in train(config):
            loggers.show(event)
            if getattr(event, "loss", None) and event.step == 2:  # type: ignore[union-attr]
                [file] = (config.run_folder / "tensorboard").iterdir()
                numbers = Path("/proc/self/fd").iterdir()
                [number] = [link.name for link in numbers if link.resolve() == file.resolve()]
                full = os.open("/dev/full", os.O_WRONLY)
                os.dup2(full, int(number))
                os.close(full)
    assert len(told) == 1 and "No space left" in told[0], told
    points, _ = in_tensorboard(config.run_folder)
    assert [step for step, _ in points["train/loss"]] == [1, 2]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_said_before_anything_is_done(
    name: str, tiny_set: list[str], gpt: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = gpt("train", *tiny_set, "-s", f"train.loggers=[{name}]", "--json")
    assert done.code == 2
    assert done.json["error"] == f"train.loggers: {name} is not installed"
    assert done.json["hint"] == f"pip install 'gptcli[{name}]'"
    assert not Path("runs").exists()


def test_only_the_first_process_logs(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "place", lambda: Place(rank=1, size=2))
    config = tiny("train.loggers=[tensorboard]")
    api.train(config).finish()
    assert not (config.run_folder / "tensorboard").exists()


@pytest.fixture
def with_fake_wandb(tiny_set: list[str], fork_server: Gpt) -> Callable[..., tuple[str, list[Any]]]:
    """Train in a process that finds our stand-in; return its stderr and what wandb was told."""
    Path("fake").mkdir()
    Path("fake/wandb.py").write_text(FAKE_WANDB)

    def run(*words: str, **env: str) -> tuple[str, list[Any]]:
        paths = [str(Path("fake").resolve()), str(Path(command.__file__).parents[2])]
        clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
        done = fork_server(
            "train", *tiny_set, "-s", "train.loggers=[wandb]", *words,
            env={**clean, "PYTHONPATH": os.pathsep.join(paths), **env},
        )  # fmt: skip
        assert done.code == 0, done.err
        file = Path("wandb.jsonl")
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return done.err, [json.loads(line) for line in lines]

    return run


def points_of(rows: list[tuple[int, dict[str, Any]]]) -> Points:
    """Return rows as curves."""
    found: Points = defaultdict(list)
    for step, row in rows:
        for tag, value in row.items():
            if tag != "sample":
                found[tag].append((step, value))
    return found


def test_wandb_without_an_account_is_offline_and_resumes(
    with_fake_wandb: Callable[..., tuple[str, list[Any]]],
) -> None:
    said, first = with_fake_wandb("-s", "train.max_steps=4")
    assert "wandb: offline, in " in said
    again, second = with_fake_wandb("--resume", "-s", "train.max_steps=8")
    (_, began), (_, went_on) = first[0], second[0]
    assert (began["mode"], began["project"], began["name"]) == ("offline", "gptcli", "tiny")
    assert began["config"]["dtype"] == "float32" and "wandb: offline" in again
    assert went_on["id"] == began["id"]
    assert first[-1] == second[-1] == ["finish", 0]
    rows = [(step, row) for _, step, row in [*first[1:-1], *second[1:-1]]]
    assert [step for step, _ in rows] == list(range(1, 9))
    expected = logged(Path("runs/tiny"))
    require_same(points_of(rows), expected)


def test_wandb_with_an_account_or_switched_off(
    with_fake_wandb: Callable[..., tuple[str, list[Any]]],
) -> None:
    said, told = with_fake_wandb(WANDB_API_KEY="k", WANDB_PROJECT="p", WANDB_NAME="n")
    assert told[0][1] | {"id": "", "config": {}} == {
        "id": "", "config": {}, "mode": "online", "resume": "allow", "project": "p", "name": "n",
    }  # fmt: skip
    assert "wandb: https://wandb.example/run" in said
    said, told = with_fake_wandb("--overwrite", WANDB_MODE="disabled")
    assert told == [] and "wandb is off: its mode is disabled" in said


def test_a_wandb_that_fails_is_made_up_for_when_the_run_is_resumed(
    with_fake_wandb: Callable[..., tuple[str, list[Any]]],
) -> None:
    said, told = with_fake_wandb(FULL="1")
    assert said.count("wandb disabled") == 1 and "continues: no space left\n" in said
    assert [line[1] for line in told if line[0] == "log"] == [1, 2]
    _, told = with_fake_wandb("--resume", "-s", "train.max_steps=8")
    assert [line[1] for line in told if line[0] == "log"] == [3, 4, 5, 6, 7, 8]


def test_a_wandb_run_that_was_killed_has_no_row_twice(
    with_fake_wandb: Callable[..., tuple[str, list[Any]]],
) -> None:
    _, told = with_fake_wandb(DIES="1")  # after step 6, the last save being that of step 3
    assert [line[1] for line in told if line[0] == "log"] == [1, 2, 3, 4]
    _, told = with_fake_wandb("--resume")
    assert [line[1] for line in told if line[0] == "log"] == [5, 6]


def rows_of(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Read the rows of a file of wandb: LevelDB's log format, each record a protocol buffer."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, rows, whole = path.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if left < 7 or kind == 0:
            at += left
            continue
        whole = (whole if kind in (3, 4) else b"") + data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = Record.FromString(whole)
            if record.HasField("history"):
                items = {item.key or "/".join(item.nested_key): json.loads(item.value_json)
                         for item in record.history.item}  # fmt: skip
                own = {key: value for key, value in items.items() if not key.startswith("_")}
                rows.append((items["_step"], own))
    return rows


@needs_wandb
def test_the_real_wandb_offline(tiny_set: list[str], gpt_process: Callable[..., Any]) -> None:
    words = ["train", *tiny_set, "-s", "train.loggers=[wandb]", "-s", "train.save_every=2"]
    env = {"WANDB_MODE": "offline"}
    for more in (["-s", "train.max_steps=5"], ["-s", "train.max_steps=9", "--resume"]):
        done = gpt_process(*words, *more, **env)
        assert done.code == 0, done.err
        assert [line for line in done.err_lines if "wandb" in line.lower()] == [
            f"wandb: offline, in {Path('runs/tiny/wandb')};"
            " `wandb sync runs/tiny/wandb/offline-run-*` sends it later"
        ]
    files = sorted(Path("runs/tiny/wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and files[0].name == files[1].name
    rows = [row for file in files for row in rows_of(file)]
    assert [step for step, _ in rows] == list(range(1, 10))
    require_same({"train/loss": points_of(rows)["train/loss"]},
                 {"train/loss": logged(Path("runs/tiny"))["train/loss"]})  # fmt: skip
