"""The real presets and a Hub that is busy, cuts lines, or lacks a file."""

import io
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gptcli.data.presets import PRESETS
from support.commands import Gpt
from support.hub import Hub, environment


def parquet(name: str, rows: list[str]) -> bytes:
    """Return a Parquet file with a text column."""
    out = io.BytesIO()
    pq.write_table(pa.table({"text": rows, "url": [name] * len(rows)}), out)
    return out.getvalue()


def rows(name: str, count: int = 400) -> list[str]:
    """Return rows that differ."""
    return [f"{name} row {index} and some more words" for index in range(count)]


README = b"---\nconfigs:\n- config_name: plain_text\n  data_files: plain_text/train-*\n---\n"
OPENWEBTEXT = {
    "README.md": README,
    **{f"plain_text/train-{i:05d}-of-00003.parquet": parquet(str(i), rows(f"file {i}"))
       for i in range(3)},
}  # fmt: skip
LINES = [" = Title = \n", "\n", " First line of it . \n", "", " Second line . \n"]
WIKITEXT = {
    "README.md": (
        b"---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n"
        b"  - split: train\n    path: wikitext-2-raw-v1/train-*\n"
        b"  - split: validation\n    path: wikitext-2-raw-v1/validation-*\n---\n"
    ),
    "wikitext-2-raw-v1/train-00000.parquet": parquet("t", LINES * 20),
    "wikitext-2-raw-v1/validation-00000.parquet": parquet("v", LINES),
}
REPOSITORIES = {"Skylion007/openwebtext": OPENWEBTEXT, "Salesforce/wikitext": WIKITEXT}
BYTES = ("-s", "tokenizer.name=bytes", "-s", "data.val_fraction=0.1")


def shards(folder: Path) -> dict[str, bytes]:
    """Return the shards of a data folder."""
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


def test_openwebtext_comes_through_a_busy_hub(tmp_path: Path, gpt_at: Gpt) -> None:
    names = [name for name in OPENWEBTEXT if name.endswith("parquet")]
    faults = {names[0]: [503], names[1]: ["cut"], names[2]: [429]}
    with Hub(REPOSITORIES) as hub:
        assert gpt_at(hub.url, "prepare", "openwebtext", *BYTES, "--out", "calm").code == 0
    (tmp_path / "stormy").mkdir()
    with Hub(REPOSITORIES, faults) as hub:
        done = gpt_at(
            hub.url, "prepare", "openwebtext", *BYTES, "--json", folder=tmp_path / "stormy"
        )
    assert done.code == 0, done.err
    assert done.json["documents"] == 1200
    assert shards(tmp_path / "stormy/data/openwebtext") == shards(tmp_path / "calm")
    # Three small files are not OpenWebText, which is said loudly.
    assert "openwebtext should have 8,013,769 documents, but 1,200 were found" in done.err
    assert len(done.err_lines) == 1
    assert any(f"/{PRESETS['openwebtext'].revision}/" in request for request in hub.requests)


def test_a_download_that_is_cut_is_counted_once(tmp_path: Path, fork_server: Gpt) -> None:
    [name, *_] = [name for name in OPENWEBTEXT if name.endswith("parquet")]
    script = (
        "from gptcli.data import hub\n"
        "hub._WAITS = (0.1, 0.1)\n"
        "told = []\n"
        f"file = hub.HubFile('Skylion007/openwebtext', {name!r}, 'main')\n"
        "path = file.fetch(told.append)\n"
        "assert file.fetch(told.append) == path\n"
        "print(sum(told), path.stat().st_size)"
    )
    with Hub(REPOSITORIES, {name: ["cut", 503]}) as hub:
        done = fork_server(code=script, env=environment(tmp_path, hub.url))
    assert done.code == 0, done.err
    told, size = map(int, done.out.split())
    assert told == size == len(OPENWEBTEXT[name])


def test_a_missing_file_keeps_what_is_finished(tmp_path: Path, gpt_at: Gpt) -> None:
    names = [name for name in OPENWEBTEXT if name.endswith("parquet")]
    faults = {names[2]: [503] * 20}
    words = ("prepare", "openwebtext", *BYTES, "-s", "data.keep_downloads=false")
    with Hub(REPOSITORIES, faults) as hub:
        done = gpt_at(hub.url, *words)
        assert done.code == 3 and len(done.err_lines) <= 3
        assert "overloaded" in done.err and "run the same command again: it resumes" in done.err
    folder = tmp_path / "data/openwebtext"
    assert not (folder / "manifest.json").exists()
    assert len(list((folder / ".progress").glob("unit-*.json"))) == 2
    with Hub(REPOSITORIES) as hub:
        assert gpt_at(hub.url, *words).code == 0
        fetched = [r for r in hub.requests if r.startswith("GET") and r.endswith(".parquet")]
    assert [request.rpartition("/")[2] for request in fetched] == [names[2].rpartition("/")[2]]
    with Hub(REPOSITORIES) as hub:
        (tmp_path / "whole").mkdir()
        assert gpt_at(hub.url, *words[:-2], folder=tmp_path / "whole").code == 0
    assert shards(folder) == shards(tmp_path / "whole/data/openwebtext")
    # What this run downloaded is gone, what another one keeps is there.
    assert not [path for path in (tmp_path / "hf").rglob("*.parquet") if path.exists()]
    assert len(list((tmp_path / "whole/hf").rglob("*.parquet"))) == 3


def test_files_that_were_in_the_cache_before_stay(tmp_path: Path, gpt_at: Gpt) -> None:
    with Hub(REPOSITORIES) as hub:
        gpt_at(hub.url, "prepare", "openwebtext", *BYTES, "--out", "one")
        words = (*BYTES, "-s", "data.keep_downloads=false", "--out", "two")
        assert gpt_at(hub.url, "prepare", "openwebtext", *words).code == 0
    kept = [path for path in (tmp_path / "hf").rglob("*.parquet") if path.exists()]
    assert len(kept) == 3


def test_lines_of_wikitext_are_joined_as_they_are(tmp_path: Path, gpt_at: Gpt) -> None:
    with Hub(REPOSITORIES) as hub:
        done = gpt_at(hub.url, "prepare", "wikitext-2", "-s", "tokenizer.name=bytes", "--json")
    assert done.code == 0, done.err
    assert done.json["documents"] == 2
    [val] = (tmp_path / "data/wikitext-2").glob("val_*.bin")
    tokens = np.fromfile(val, "<u2")[512:].tolist()
    assert tokens == [256, *"".join(LINES).encode()]


def test_a_wrong_part_is_named(tmp_path: Path, gpt_at: Gpt) -> None:
    with Hub(REPOSITORIES) as hub:
        done = gpt_at(hub.url, "prepare", "openwebtext:nothing")
    assert done.code == 2 and re.search("nothing", done.err)
    assert len(done.err_lines) <= 3
