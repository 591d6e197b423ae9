"""Data sets of the Hub, from a Hub on this machine: online, offline, and not at all."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptcli.tokenizers import bpe
from support.commands import Gpt, Result
from support.hub import COMMIT, Hub, environment

# Runs the command lines it is given in one process, since importing `datasets` takes a second.
# The Hub's client waits 23 seconds between its tries; no test needs to.
DRIVER = """
import json, sys, time
time.sleep = lambda seconds: None
from gptcli import cli
for arguments in json.loads(sys.argv[1]):
    code = cli.run(arguments)
    print("\\x1e", code, end="\\x1f", flush=True)
    print("\\x1f", end="", file=sys.stderr, flush=True)
"""


def parquet(name: str, rows: int) -> bytes:
    """Return a Parquet file whose rows tell where they are from."""
    file = io.BytesIO()
    pq.write_table(pa.table({"text": [f"{name} {i}" for i in range(rows)]}), file)
    return file.getvalue()


REPOSITORIES = {
    "me/tiny": {
        "README.md": b"# Tiny\n",
        "data/train-00000-of-00002.parquet": parquet("first", 20),
        "data/train-00001-of-00002.parquet": parquet("second", 30),
        "data/validation-00000-of-00001.parquet": parquet("held out", 10),
        "data/test-00000-of-00001.parquet": parquet("test", 5),
    },
    "me/rows.v1": {
        "train.jsonl": b"".join(b'{"content": "row %d"}\n' % i for i in range(200)),
    },
    "me/parts": {
        "README.md": (
            b"---\nconfigs:\n- config_name: one\n  data_files: one/*.parquet\n"
            b"- config_name: two\n  data_files: two/*.parquet\n---\n"
        ),
        "one/a.parquet": parquet("one", 40),
        "two/b.parquet": parquet("two", 40),
    },
    "me/talks": {
        "README.md": (
            b"---\ndataset_info:\n  features:\n  - name: id\n    dtype: int64\n"
            b"  - name: conversations\n    list:\n    - name: from\n      dtype: string\n"
            b"    - name: value\n      dtype: string\n---\n"
        ),
        "train.jsonl": b"".join(
            b'{"id": %d, "conversations": [{"from": "human", "value": "Hi %d"},'
            b' {"from": "gpt", "value": "Yes"}]}\n' % (i, i)
            for i in range(120)
        ),
    },
    "me/json": {"train.json": b'[{"text": "a"}]'},
}


def run_all(server: Gpt, folder: Path, url: str, *commands: list[str], **env: str) -> list[Result]:
    """Run command lines in `folder` in a process that sees a Hub."""
    seen = environment(folder, url) | env
    done = server(json.dumps(commands), code=DRIVER, folder=folder, env=seen)
    assert done.code == 0, done.err
    outs, errs = done.out.split("\x1f")[:-1], done.err.split("\x1f")[:-1]
    printed = [out.split("\x1e") for out in outs]
    results = [Result(int(code), out, err) for (out, code), err in zip(printed, errs, strict=True)]
    assert len(results) == len(commands)
    return results


def prepare(source: str, *more: str) -> list[str]:
    """Return the command line that prepares a data set as bytes."""
    return ["prepare", source, "--json", "-s", "tokenizer.name=bytes", *more]


@dataclass
class Online:
    """A folder in which data sets were prepared from a Hub that is gone now."""

    folder: Path
    url: str
    commit: str
    done: dict[str, Result]
    requests: list[str]


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory, fork_server: Gpt) -> Iterator[Online]:
    """Everything that is asked of a Hub, asked in one go."""
    folder = tmp_path_factory.mktemp("online")
    commands = {
        "tiny": ["prepare", "hf:me/tiny", "--json"],
        "dry run": prepare("hf:me/tiny", "--dry-run", "--out", "planned"),
        "rows": prepare("hf:me/rows.v1", "-s", "data.text_field=content"),
        "own fraction": prepare("hf:me/tiny", "-s", "data.val_fraction=0.5", "--out", "fraction"),
        "no validation": prepare("hf:me/tiny", "-s", "data.val_fraction=0", "--out", "none"),
        "unknown": prepare("hf:me/none"),
        "wrong field": prepare("hf:me/tiny", "--out", "a", "-s", "data.text_field=body"),
        "part": prepare("hf:me/parts:two"),
        "other part": prepare("hf:me/parts", "-s", "data.config=one", "--out", "one"),
        "unknown part": prepare("hf:me/parts", "--out", "b", "-s", "data.config=three"),
        "kind": prepare("hf:me/json"),
    }
    with Hub(REPOSITORIES) as hub:
        done = run_all(fork_server, folder, hub.url, *commands.values())
    results = dict(zip(commands, done, strict=True))
    yield Online(folder, hub.url, COMMIT, results, hub.requests)


def tokens(folder: Path, pattern: str) -> list[int]:
    """Return the tokens of shards in the order of their names."""
    files = sorted(folder.glob(pattern))
    return [int(t) for file in files for t in np.fromfile(file, "<u2")[512:]]


def test_a_data_set_is_prepared_end_to_end(online: Online) -> None:
    done = online.done["tiny"]
    assert done.code == 0
    assert done.json["dir"] == "data/tiny"
    assert (done.json["tokenizer"], done.json["vocab_size"]) == ("gpt2", 50257)
    assert done.json["documents"] == 60  # the test split is left alone
    assert done.json["shards"] == 3
    gpt2 = bpe.gpt2()
    rows = [f"first {i}" for i in range(20)] + [f"second {i}" for i in range(30)]
    expected = [id for row in rows for id in [gpt2.eot, *gpt2.encode(row).tolist()]]
    assert tokens(online.folder / "data/tiny", "train_*.bin") == expected
    assert done.json["tokens"]["train"] == len(expected)
    assert done.json["bytes"]["train"] == len("".join(rows))


def test_a_validation_split_of_its_own_is_used(online: Online) -> None:
    gpt2 = bpe.gpt2()
    rows = [f"held out {i}" for i in range(10)]
    expected = [id for row in rows for id in [gpt2.eot, *gpt2.encode(row).tolist()]]
    assert tokens(online.folder / "data/tiny", "val_*.bin") == expected


def test_an_explicit_fraction_draws_from_the_training_rows(online: Online) -> None:
    done = online.done["own fraction"]
    assert (done.code, done.json["documents"]) == (0, 50)
    assert 100 < done.json["bytes"]["val"] < 350
    assert b"held" not in bytes(t for t in tokens(online.folder / "fraction", "*.bin") if t < 256)
    none = online.done["no validation"]
    assert (none.code, none.json["documents"], none.json["tokens"]["val"]) == (0, 50, 0)


def test_rows_without_a_split_are_held_out_by_hash(online: Online) -> None:
    done = online.done["rows"]
    assert (done.code, done.json["dir"], done.json["documents"]) == (0, "data/rows.v1", 200)
    assert 5 * 6 < done.json["bytes"]["val"] < 40 * 7


def test_the_manifest_pins_the_commit(online: Online) -> None:
    manifest = json.loads((online.folder / "data/tiny/manifest.json").read_text())
    assert manifest["recipe"]["revision"] == online.commit
    assert manifest["recipe"]["source"] == "me/tiny"


def test_a_dry_run_downloads_no_text(online: Online) -> None:
    facts = online.done["dry run"].json
    assert (facts["files"], facts["units"], facts["revision"]) == (3, 3, online.commit)
    files = REPOSITORIES["me/tiny"]
    used = [name for name in files if name.startswith(("data/train", "data/val"))]
    assert facts["source_bytes"] == sum(len(files[name]) for name in used)


def test_each_file_is_downloaded_once(online: Online) -> None:
    gets = [line for line in online.requests if line.startswith("GET") and "/resolve/" in line]
    parquets = [line for line in gets if "me/tiny" in line and line.endswith(".parquet")]
    assert len(parquets) == 3
    assert not any("test-" in line for line in gets)


def test_a_part_is_chosen_by_its_name(online: Online) -> None:
    for folder, part, other in (("data/parts-two", b"two", b"one"), ("one", b"one", b"two")):
        text = bytes(t for t in tokens(online.folder / folder, "*.bin") if t < 256)
        assert text.count(part) == 40 and other not in text


@pytest.mark.parametrize(
    ("name", "code", "parts"),
    [
        ("unknown", 3, ["hf:me/none: no such repository on the Hub, or it is private"]),
        ("wrong field", 3, ["no field 'body'; the fields are: text"]),
        ("unknown part", 2, ["hf:me/parts: ", "'three'", "'one', 'two'"]),
        ("kind", 3, ["hf:me/json: train.json is an unsupported file type"]),
    ],
)
def test_what_goes_wrong_is_one_error(
    online: Online, name: str, code: int, parts: list[str]
) -> None:
    done = online.done[name]
    assert (done.code, done.json["exit_code"]) == (code, code)
    assert all(part in done.json["error"] for part in parts), done.json
    assert done.err.startswith("error: ")
    assert len(done.err.splitlines()) <= 3, done.err


def test_nothing_is_left_of_what_failed(online: Online) -> None:
    made = {path.name for path in online.folder.iterdir()}
    assert made >= {"data", "fraction", "none", "one"} and not made & {"a", "b"}
    prepared = {path.name for path in (online.folder / "data").iterdir()}
    assert prepared == {"parts-two", "rows.v1", "tiny"}


@pytest.mark.parametrize("env", [{"HF_HUB_OFFLINE": "1"}, {}], ids=["offline", "server down"])
def test_what_was_downloaded_is_used_without_the_hub(
    online: Online, fork_server: Gpt, env: dict[str, str]
) -> None:
    again, elsewhere, other = run_all(
        fork_server,
        online.folder,
        online.url,
        ["prepare", "hf:me/tiny", "--json"],
        ["prepare", "hf:me/tiny", "--json", "--out", f"copy{len(env)}"],
        prepare("hf:me/other"),
        **env,
    )
    first = online.done["tiny"].json
    for done in (again, elsewhere):
        assert done.code == 0, done.err
        assert done.json | {"seconds": 0, "dir": ""} == first | {"seconds": 0, "dir": ""}
    shards = sorted((online.folder / "data/tiny").iterdir())
    copies = sorted((online.folder / f"copy{len(env)}").iterdir())
    assert [path.read_bytes() for path in shards] == [path.read_bytes() for path in copies]
    assert other.code == 3


@pytest.mark.parametrize("env", [{"HF_HUB_OFFLINE": "1"}, {}], ids=["offline", "server down"])
def test_an_empty_cache_without_the_hub_is_an_error(
    tmp_path: Path, fork_server: Gpt, env: dict[str, str]
) -> None:
    [done] = run_all(fork_server, tmp_path, "http://127.0.0.1:9", prepare("hf:me/tiny"), **env)
    assert done.code == 3
    assert done.json["error"] == "hf:me/tiny: not in the cache, and the Hub cannot be reached"
    assert "error: hf:me/tiny: not in the cache" in done.err
    assert not (tmp_path / "data").exists()


def test_a_damaged_memory_of_the_hub_is_no_memory(online: Online, fork_server: Gpt) -> None:
    [file] = (online.folder / "hf/assets/gptcli").rglob("me--tiny/**/*.json")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    [done] = run_all(
        fork_server, online.folder, online.url, prepare("hf:me/tiny", "--out", "x"),
        HF_HUB_OFFLINE="1",
    )  # fmt: skip
    file.write_bytes(whole)
    assert done.code == 3
    assert "not in the cache" in done.json["error"]


def test_conversations_are_found_by_the_fields_that_the_dataset_names(
    fork_server: Gpt, tmp_path: Path
) -> None:
    with Hub(REPOSITORIES) as hub:
        plan, done = run_all(
            fork_server, tmp_path, hub.url,
            ["prepare", "hf:me/talks", "--out", "talks", "--dry-run", "--json"],
            ["prepare", "hf:me/talks", "--out", "talks", "--json"],
        )  # fmt: skip
    assert (plan.code, done.code) == (0, 0), plan.err + done.err
    assert done.json["documents"] == 120 and sum(done.json["trained_tokens"].values()) == 240
    manifest = json.loads((tmp_path / "talks/manifest.json").read_text())
    assert manifest["recipe"]["conversation_format"] == "conversations"
