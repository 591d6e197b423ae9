"""Text and shards behind addresses: from a server on this machine, whole, broken and wrong."""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants

from gptcli.config import load_config
from gptcli.data import hub, remote
from gptcli.data.conversations import ConversationReader
from gptcli.data.inspection import damaged_shards
from gptcli.data.presets import data_dir
from gptcli.data.shards import TokenReader, read_manifest
from gptcli.errors import ConfigError, GptError
from support.folders import Prepared, Refusal, Write
from support.web import Bucket, Web

OUT = Path("data/out")
TEXT = "".join(f"line {i} of a text that is somewhere else\n" for i in range(3000))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no waiting between tries."""
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "_WAITS", (0.0, 0.0, 0.0))
    remote.refresh.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    """A server of the folder `site`."""
    (tmp_path / "site").mkdir()
    with Web(tmp_path / "site") as server:
        yield server


def hashes(manifest: Any) -> list[str]:
    """Return the hashes of the shards."""
    return [shard.sha256 for unit in manifest.units for shard in unit.shards]


def test_a_text_at_an_address_is_prepared_as_the_file_is(
    write: Write, prepared: Prepared, web: Web, cache: Path
) -> None:
    write("site/a.txt.gz", TEXT)
    here = prepared("site/a.txt.gz")
    there = prepared(f"{web.url}/a.txt.gz?download=1", out=Path("data/there"))
    assert hashes(here) == hashes(there) and there.documents == 1
    assert there.recipe.source == f"{web.url}/a.txt.gz?download=1"
    n_requests = len(web.requests)
    again = prepared(f"{web.url}/a.txt.gz?download=1", out=Path("data/there"))
    assert hashes(again) == hashes(there) and len(web.requests) == n_requests + 1
    [kept] = cache.rglob("*a.txt.gz")
    assert kept.read_bytes() == Path("site/a.txt.gz").read_bytes()


def test_downloads_are_removed_where_that_is_asked_for(
    write: Write, prepared: Prepared, web: Web, cache: Path
) -> None:
    write("site/a.jsonl", b"".join(b'{"text": "row %d"}\n' % i for i in range(200)))
    assert prepared(f"{web.url}/a.jsonl", "data.keep_downloads=false").documents == 200
    assert not [*cache.rglob("*a.jsonl")]


@pytest.mark.parametrize("times", [1, 2])
def test_a_connection_that_breaks_is_resumed_where_it_broke(
    write: Write, prepared: Prepared, web: Web, times: int
) -> None:
    write("site/a.txt", b"\0" * 200_000 + TEXT.encode())
    here = prepared("site/a.txt")
    [file] = remote.files_at(f"{web.url}/a.txt")
    web.trouble = Web.broken_after(70_000, times)
    assert file.fetch().read_bytes() == Path("site/a.txt").read_bytes()
    assert ("/a.txt", 70_000 * times) in web.requests and here.documents == 1


def test_a_server_that_stays_broken_is_refused_and_the_same_command_resumes(
    write: Write, refusal: Refusal, prepared: Prepared, web: Web
) -> None:
    path = write("site/a.txt", b"\0" * 90_000 + TEXT.encode())
    url = f"{web.url}/a.txt"

    def trouble(handler: Any, start: int) -> bool:
        if len(web.requests) > 1:
            handler.answer(206 if start else 200, path.read_bytes()[start:], cut=10_000)
        return len(web.requests) > 1

    web.trouble = trouble
    error = refusal(url)
    assert "its server is overloaded or the connection dropped" in error.message
    assert error.hint == "run the same command again: it resumes"
    web.trouble = None
    assert prepared(url).documents == 1
    assert max(start for _, start in web.requests) == 40_000


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (404, "no such file"), (403, "its server refuses to send it (HTTP Error 403: Forbidden)"),
        (401, "its server refuses to send it"), (500, "its server is overloaded"),
    ],
)  # fmt: skip
def test_what_a_server_says_is_said(refusal: Refusal, web: Web, status: int, says: str) -> None:
    def trouble(handler: Any, start: int) -> bool:
        handler.answer(status, b"")
        return True

    web.trouble = trouble
    error = refusal(f"{web.url}/a.txt")
    assert error.message.startswith(f"{web.url}/a.txt: {says}")
    assert not Path("data").exists()


def test_without_a_server_nothing_is_written(refusal: Refusal) -> None:
    assert "its server cannot be reached" in refusal("http://127.0.0.1:9/a.txt").message
    assert not Path("data").exists()


def test_a_file_that_changes_meanwhile_is_refused(write: Write, refusal: Refusal, web: Web) -> None:
    path = write("site/a.txt", TEXT)

    def trouble(handler: Any, start: int) -> bool:
        os.utime(path, ns=(1, len(web.requests)))
        return False

    web.trouble = trouble
    assert refusal(f"{web.url}/a.txt").message == f"{web.url}/a.txt: changed meanwhile"


@pytest.mark.parametrize(
    "address",
    [
        "https://me:SECRET@host/a.txt", "https://SECRET@host/a.txt",
        "https://host/a.txt?X-Amz-Signature=SECRET", "https://host/a?sig=SECRET",
        "https://host/a?access_token=SECRET", "https://host/a?api_key=SECRET&b=1",
        "s3://ID:SECRET@bucket/a.txt",
    ],
)  # fmt: skip
def test_secrets_in_addresses_are_refused_and_not_repeated(gpt: Any, address: str) -> None:
    for words in (("prepare", address), ("prepare", address, "--dry-run", "--json"),
                  ("train", "-s", f"data.source={address}", "-s", "data.dir=data/x"),
                  ("train", "-s", f"data.dir={address}"), ("data", "info", address)):  # fmt: skip
        done = gpt(*words)
        assert done.code == 2 and "holds a password or key" in done.out + done.err
        assert "SECRET" not in done.out + done.err and "Traceback" not in done.err
    assert not Path("data").exists() and not Path("runs").exists()


def test_addresses_that_cannot_be_used_say_why(gpt: Any) -> None:
    assert gpt("prepare", "ftp://host/a.txt").code == 2
    assert "file:// is not supported" in gpt("prepare", "file:///a.txt").err
    assert gpt("data", "info", "https://host/a?b=1").code == 2
    Path("a.txt").write_text("text")
    done = gpt("prepare", "a.txt", "--out", "s3://bucket/data")
    assert done.code == 2 and "is not on this machine" in done.err


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A store that speaks S3's language as far as reading takes it."""
    with Bucket(tmp_path / "store") as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SECRET")
        remote._client.cache_clear()
        yield server
    remote._client.cache_clear()


def fill(write: Write, folder: str) -> None:
    """Write texts, rows, and what is not read."""
    rows = b"".join(b'{"text": "row %d"}\n' % i for i in range(150))
    for name, data in (("b.txt", b"words " * 99), ("in/a.jsonl", rows), ("x.jpg", b"\0"),
                       (".h/c.txt", b"no")):  # fmt: skip
        write(f"{folder}/{name}", data)


def test_a_folder_of_a_store_is_its_files_in_order(
    write: Write, prepared: Prepared, refusal: Refusal, bucket: Bucket
) -> None:
    fill(write, "store/texts")
    base = "s3://texts"
    manifest = prepared(base)
    assert [unit.name for unit in manifest.units] == [f"{base}/b.txt", f"{base}/in/a.jsonl"]
    assert manifest.documents == 151
    assert prepared(f"{base}/**/*.jsonl", out=Path("data/rows")).documents == 150
    assert prepared(f"{base}/in/a.jsonl", out=Path("data/row")).documents == 150
    assert refusal(f"{base}/*.csv").message == f"{base}/*.csv: no text at this address"
    assert (
        refusal(f"{base}/c.txt", out=Path("data/c")).message
        == f"{base}/c.txt: no text at this address"
    )


def test_shards_in_a_store_are_the_shards(
    write: Write, prepared: Prepared, bucket: Bucket, cache: Path
) -> None:
    write("a.txt", TEXT)
    prepared("a.txt", "data.shard_tokens=10000", out=Path("store/texts/folder"))
    there = read_all(remote.folder_of("s3://texts/folder"))
    assert (there == read_all(Path("store/texts/folder"))).all()
    stored = [path.read_bytes() for path in cache.rglob("*.json")]
    assert stored and not any(b"SECRET" in content for content in stored)


def test_a_store_that_refuses_says_so(write: Write, refusal: Refusal, bucket: Bucket) -> None:
    fill(write, "store/texts")
    bucket.is_closed = True
    error = refusal("s3://texts/b.txt")
    assert error.message.startswith("s3://texts/b.txt: its server refuses to send it")
    assert "SECRET" not in error.message


def test_a_store_that_cannot_be_reached_is_given_up_at_once(
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client would ask for a minute."""
    began = time.monotonic()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(hub, "_WAITS", (1.0, 30.0))
    message = "s3://texts/a: not in the cache, and its server cannot be reached"
    assert refusal("s3://texts/a").message == message
    assert time.monotonic() - began < 15


@pytest.fixture
def site(write: Write, prepared: Prepared, web: Web) -> str:
    """A data folder of many shards behind an address."""
    write("a.txt", TEXT)
    prepared("a.txt", "data.shard_tokens=10000", out=Path("site/folder"))
    return f"{web.url}/folder"


def read_all(folder: Path, **options: Any) -> np.ndarray:
    """Read random windows of a split."""
    manifest = read_manifest(folder)
    with TokenReader(folder, manifest, "train", **options) as tokens:
        places = np.random.default_rng(7).integers(0, len(tokens) - 65, 200)
        return np.stack([tokens.read(int(place), 65) for place in places])


def test_shards_behind_an_address_are_the_shards(site: str, web: Web) -> None:
    folder = data_dir(load_config(None, flags={"data.dir": site + "/"}).data)
    expected = read_all(Path("site/folder"))
    assert not web.requests
    assert (read_all(folder) == expected).all()
    n_shards = len(read_manifest(folder).shards("train"))
    assert n_shards > 5 and len(web.requests) == 2 + n_shards
    assert (read_all(folder) == expected).all() and len(web.requests) == 2 + n_shards
    assert damaged_shards(folder, read_manifest(folder)) == []


def test_opening_downloads_no_shard(site: str, web: Web, gpt: Any) -> None:
    done = gpt("data", "info", site, "--json")
    assert done.code == 0 and json.loads(done.out)["dir"] == site
    assert {path for path, _ in web.requests} == {"/folder/manifest.json", "/folder/tokenizer.json"}


def test_overlap_downloads_a_folder_at_an_address(site: str, web: Web, gpt: Any) -> None:
    Path("b.txt").write_text(TEXT[:5000], encoding="utf-8")
    for pair in ((site, "b.txt"), ("b.txt", site)):
        assert gpt("data", "overlap", *pair).out == gpt(
            "data", "overlap", *(each.replace(site, "site/folder") for each in pair)
        ).out.replace("site/folder", site)
    done = gpt("data", "overlap", "b.txt", f"{web.url}/none.txt")
    assert done.code == 3 and f"{web.url}/none.txt" in done.err.splitlines()[0], done.err


def test_the_cache_stays_within_its_bound_and_the_reads_exact(
    site: str, web: Web, cache: Path, prepared: Prepared, write: Write
) -> None:
    write("b.txt", TEXT.upper())
    prepared("b.txt", "data.shard_tokens=10000", out=Path("site/other"))
    n_bytes = sum(p.stat().st_size for p in Path("site/folder").glob("train*.bin"))
    bound = 1.3 * n_bytes / 1e9
    for name in ("folder", "other", "folder"):
        found = read_all(remote.folder_of(f"{web.url}/{name}"), cache_gb=bound)
        assert (found == read_all(Path("site", name))).all()
        assert sum(p.stat().st_size for p in cache.rglob("*.bin")) <= bound * 1e9
    with pytest.raises(ConfigError, match=r"data.cache_gb: the train split takes .* kB") as caught:
        read_all(remote.folder_of(site), cache_gb=0.9 * n_bytes / 1e9)
    assert caught.value.hint == "-s data.cache_gb=1, if the disk has room"


def test_conversations_behind_an_address_are_the_conversations(
    web: Web, write: Write, prepared: Prepared
) -> None:
    rows = ({"prompt": f"question {i}", "completion": f"answer {i} " * 9} for i in range(200))
    write("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    prepared("a.jsonl", out=Path("site/chat"))
    found = []
    for folder in (Path("site/chat"), remote.folder_of(f"{web.url}/chat")):
        with ConversationReader(folder, read_manifest(folder), "train") as reader:
            found.append([part.tolist() for n in range(len(reader)) for part in reader.read(n)])
    assert found[0] == found[1] and len(web.requests) == 5
    assert damaged_shards(folder, read_manifest(folder)) == []


@pytest.mark.parametrize("damage", ["flipped", "short", "long", "missing"])
def test_a_shard_that_is_not_the_manifests_is_refused(site: str, damage: str, cache: Path) -> None:
    [path, *_] = sorted(Path("site/folder").glob("train*.bin"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    match damage:
        case "flipped":
            path.write_bytes(data)
        case "short":
            path.write_bytes(data[:-2])
        case "long":
            path.write_bytes(data + b"00")
        case "missing":
            path.unlink()
    with pytest.raises(GptError) as caught:
        read_all(remote.folder_of(site))
    assert caught.value.exit_code == 3
    assert caught.value.message.startswith(f"{site}/{path.name}: ")
    assert not [*cache.rglob(path.name)]


def test_a_connection_that_breaks_is_resumed_and_a_slow_one_waited_for(site: str, web: Web) -> None:
    size = min(path.stat().st_size for path in Path("site/folder").glob("train*.bin"))
    expected = read_all(Path("site/folder"))

    def trouble(handler: Any, start: int) -> bool:
        file = Path("site") / handler.path.lstrip("/")
        time.sleep(0.01)
        if start or file.suffix == ".json":
            return False
        handler.answer(200, file.read_bytes(), cut=size // 2)
        return True

    web.trouble = trouble
    assert (read_all(remote.folder_of(site)) == expected).all()
    assert sum(start > 0 for _, start in web.requests) > 5


def test_what_is_in_the_cache_needs_no_server(site: str, web: Web) -> None:
    expected = read_all(remote.folder_of(site))

    def gone(handler: Any, start: int) -> bool:
        handler.answer(503, b"")
        return True

    web.trouble = gone
    remote.refresh.cache_clear()
    assert (read_all(remote.folder_of(site)) == expected).all()


def test_other_data_at_the_address_replaces_what_was_copied(
    site: str, write: Write, prepared: Prepared
) -> None:
    before = read_all(remote.folder_of(site))
    write("a.txt", TEXT.replace("line", "LINE"))
    prepared("a.txt", "data.shard_tokens=10000", out=Path("site/folder"), force=True)
    remote.refresh.cache_clear()
    after = read_all(remote.folder_of(site))
    assert (after == read_all(Path("site/folder"))).all() and (after != before).any()


def test_a_place_that_is_no_data_folder_says_so(web: Web, gpt: Any) -> None:
    done = gpt("data", "info", f"{web.url}/nothing")
    assert done.code == 3 and f"{web.url}/nothing/manifest.json: no such file" in done.err


def test_a_run_from_an_address_is_the_run_from_the_folder(
    site: str, gpt: Callable[..., Any]
) -> None:
    """Its order and its bits; it stores the address, and resumes when the server is back."""
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 16}
    tiny = [word for key, n in sizes.items() for word in ("-s", f"model.{key}={n}")]
    tiny += ["-s", "train.save_every=2", "-s", "device=cpu"]
    losses = []
    for name, folder in (("here", "site/folder"), ("there", site)):
        words = ["train", *tiny, "-s", f"name={name}", "-s", f"data.dir={folder}"]
        assert gpt(*words, "-s", "train.max_steps=4").code == 0
        done = gpt(*words, "-s", "train.max_steps=6", "--resume", "--json")
        assert done.code == 0, done.err
        losses.append(json.loads(done.out)["val_loss"])
    assert losses[0] == losses[1]
    stored = Path("runs/there/config.yaml").read_text()
    assert f'dir: "{site}"' in stored and "shards" not in stored
    done = gpt("eval", "--checkpoint", "runs/there", "--json")
    assert done.code == 0 and json.loads(done.out)["loss"] == pytest.approx(losses[0], rel=1e-4)
