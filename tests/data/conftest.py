"""What the tests of the data share: files and prepared folders."""

import gzip
from pathlib import Path
from typing import Any

import pytest

from gptcli.config import load_config
from gptcli.config.schema import Split
from gptcli.data import shards
from gptcli.data.prepare import make_plan, prepare
from gptcli.data.shards import Manifest
from gptcli.errors import GptError
from gptcli.tokenizers import Tokenizer
from support.folders import Encoded, Prepared, Refusal, TokensOf, Write

OUT = Path("data/out")


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes a file into `tmp_path`, gzipped if its name says so."""

    def write_file(name: str | Path, content: str | bytes, raw: bool = False) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content.encode() if isinstance(content, str) else content
        zipped = path.name.lower().endswith(".gz") and not raw
        path.write_bytes(gzip.compress(data) if zipped else data)
        return path

    return write_file


@pytest.fixture
def prepared() -> Prepared:
    """Return a function that prepares a source, as bytes unless told otherwise."""

    def run(source: str, *sets: str, out: Path = OUT, **options: Any) -> Manifest:
        name = [] if any(s.startswith("tokenizer.") for s in sets) else ["tokenizer.name=bytes"]
        flags = {"data.source": source, "data.dir": str(out)}
        return prepare(make_plan(load_config(None, [*name, *sets], flags)), **options)

    return run


@pytest.fixture
def refusal(prepared: Prepared) -> Refusal:
    """Return a function that returns the error of a source that is refused."""

    def run(source: str, *sets: str, code: int = 3, **options: Any) -> GptError:
        with pytest.raises(GptError) as caught:
            prepared(source, *sets, **options)
        assert caught.value.exit_code == code
        return caught.value

    return run


@pytest.fixture
def tokens_of() -> TokensOf:
    """Return a function that returns the tokens of one split of `OUT`, or of both in order."""

    def read(manifest: Manifest, *splits: Split) -> list[int]:
        tokens: list[int] = []
        for split in splits or shards.SPLITS:
            with shards.TokenReader(OUT, manifest, split) as reader:
                tokens += reader.read(0, len(reader)).tolist()
        return tokens

    return read


@pytest.fixture
def encoded() -> Encoded:
    """Return a function that returns the tokens of documents, end-of-text before each."""

    def encode(tokenizer: Tokenizer, *texts: str) -> list[int]:
        return [id for text in texts for id in [tokenizer.eot, *tokenizer.encode(text).tolist()]]

    return encode
