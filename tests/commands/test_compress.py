"""`gpt compress` and `gpt decompress` end to end."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from gptcli.checkpoint import load_checkpoint, save_checkpoint

TEXT = b"The cat sat on a mat.\r\n" * 20 + b"\xff\x00"


def test_a_file_is_compressed_and_comes_back(gpt: Any, run: Path) -> None:
    Path("a.txt").write_bytes(TEXT)
    found = gpt("compress", "a.txt", "--json").json
    assert list(found) == ["checkpoint", "file", "bytes", "compressed_bytes", "bits_per_byte",
                           "tokens", "bytes_aside", "stride", "sha256", "seconds"]  # fmt: skip
    assert found["file"] == "a.txt.gptz" and found["sha256"] == hashlib.sha256(TEXT).hexdigest()
    assert found["compressed_bytes"] == Path("a.txt.gptz").stat().st_size
    refused = gpt("decompress", "a.txt.gptz")
    assert refused.code == 2 and "a.txt exists" in refused.err and "--force" in refused.err
    done = gpt("decompress", "a.txt.gptz", "-o", "b.txt", "--json").json
    assert Path("b.txt").read_bytes() == TEXT and done["sha256"] == found["sha256"]
    Path("a.txt").write_bytes(b"other")
    assert gpt("decompress", "a.txt.gptz", "--force").code == 0
    assert Path("a.txt").read_bytes() == TEXT and Path("a.txt~1").read_bytes() == b"other"
    again = gpt("compress", "a.txt")
    assert again.code == 2 and "a.txt.gptz exists" in again.err
    shown = gpt("compress", "a.txt", "-o", "c.gptz")
    assert "bits per byte" in shown.out and "deflated" in shown.out


@pytest.mark.parametrize("content", [b"", b"a", b"\xff"])
def test_files_of_no_and_one_byte(gpt: Any, run: Path, content: bytes) -> None:
    Path("a").write_bytes(content)
    assert gpt("compress", "a").code == 0
    assert gpt("decompress", "a.gptz", "-o", "b").code == 0
    assert Path("b").read_bytes() == content


def test_another_model_and_damage_are_refused_and_nothing_is_written(gpt: Any, run: Path) -> None:
    Path("a.txt").write_bytes(TEXT)
    assert gpt("compress", "a.txt", "-o", "x.gptz").code == 0
    checkpoint = load_checkpoint(run / "best.pt")
    checkpoint.model["ln_f.weight"][0] *= 1.5
    save_checkpoint(Path("other.pt"), checkpoint)
    done = gpt("decompress", "x.gptz", "--checkpoint", "other.pt")
    assert done.code == 4 and "x.gptz: compressed with another model than other.pt" in done.err
    assert "tiny/best.pt" in done.err
    data = Path("x.gptz").read_bytes()
    Path("x.gptz").write_bytes(data[:-20] + b"\0" + data[-19:])
    done = gpt("decompress", "x.gptz", "--json")
    assert done.code == 3 and done.json["error"].startswith("x.gptz: damaged")
    assert not Path("x").exists()


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["compress", "nowhere"], 3, "nowhere: No such file"),
        (["compress", "."], 3, "is a folder"),
        (["compress", "corpus.txt", "-o", "data"], 2, "is a folder"),
        (["compress", "corpus.txt", "-o", "corpus.txt/x"], 5, "expected a folder"),
        (["compress", "corpus.txt", "--stride", "99"], 2, "the context is 16"),
        (["decompress", "corpus.txt"], 2, "-o OUT"),
        (["decompress", "corpus.txt", "-o", "x"], 3, "not a file of gpt compress"),
    ],
)
def test_what_is_refused(gpt: Any, run: Path, words: list[str], code: int, part: str) -> None:
    before = sorted(Path().iterdir())
    done = gpt(*words)
    assert done.code == code and part in done.err and len(done.err_lines) <= 3, done.err
    assert sorted(Path().iterdir()) == before
