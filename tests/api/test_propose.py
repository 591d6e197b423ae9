"""`gpt config init SOURCE --minutes M`: one rule from the text, the time and the machine."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptcli.api.propose import Text, look_at, settings_for
from gptcli.config import Config, load_config
from gptcli.errors import ConfigError
from support.commands import Gpt

USUAL = 10_000.0  # tokens/s with the quickstart's model


def machine(tokens_per_second: float) -> Callable[[Config], float]:
    """Return the speed of a machine, which falls as models grow."""
    return lambda config: tokens_per_second * (4 / config.model.n_layer) ** 2


def about(n_bytes: int, **more: float) -> Text:
    """Return a text of English."""
    known: dict[str, Any] = {"bytes_per_character": 1.0, "n_characters": 90, "zlib_bits": 3.0}
    return Text(n_bytes, **{**known, **more})


def values(text: Text, minutes: float, speed: float = USUAL) -> dict[str, Any]:
    """Return the settings without their reasons."""
    found = settings_for(text, "book.txt", minutes, machine(speed)).settings
    return {key: value for key, (value, _) in found.items()}


def test_two_minutes_on_the_library_are_about_the_quickstart() -> None:
    found, quickstart = values(about(12_000_000), 2), load_config("quickstart")
    for key in ("tokenizer.vocab_size", "model.n_layer", "model.n_embd", "model.block_size",
                "model.dropout", "train.micro_batch_size", "train.max_minutes", "optim.lr",
                "optim.name", "model.mlp", "model.qk_norm"):  # fmt: skip
        assert found[key] == quickstart.get(key), key
    assert found["train.ema"] is None


def test_more_time_makes_a_larger_model_and_more_text_a_larger_vocabulary() -> None:
    short, long = (values(about(10**9), minutes) for minutes in (1, 600))
    assert short["model.n_embd"] < long["model.n_embd"]
    assert short["train.micro_batch_size"] * short["model.block_size"] < (
        long["train.micro_batch_size"] * long["model.block_size"]
    )
    assert short["optim.lr"] > long["optim.lr"]
    sizes = [values(about(n), 2)["tokenizer.vocab_size"] for n in (10**5, 10**6, 10**7, 10**9)]
    assert sizes == sorted(sizes) and sizes[0] == 512 and sizes[-1] == 32768
    chinese = about(10**6, bytes_per_character=2.9, n_characters=3_000)
    assert values(chinese, 2)["tokenizer.vocab_size"] >= 4096


def test_a_small_text_that_is_read_often_gets_a_small_model_dropout_and_an_average() -> None:
    small, large = values(about(100_000), 20), values(about(10**9), 20)
    assert small["model.dropout"] == 0.2 and 0.9 < small["train.ema"] < 1
    assert large["model.dropout"] == 0 and large["train.ema"] is None
    assert small["model.n_layer"] < large["model.n_layer"]


@pytest.mark.parametrize("minutes", [0.01, 1.0, 60.0, 10_000.0])
@pytest.mark.parametrize("n_bytes", [300, 20_000, 10**6, 10**12])
@pytest.mark.parametrize("speed", [1.0, 1e4, 1e7])
def test_what_is_proposed_is_always_valid(minutes: float, n_bytes: int, speed: float) -> None:
    found = settings_for(about(n_bytes), "book.txt", minutes, machine(speed))
    words = [f"{key}={'null' if value is None else str(value).lower()}"
             for key, (value, _) in found.settings.items()]  # fmt: skip
    config = load_config(None, words)
    assert config.model.is_whole and math.isfinite(found.bits_per_byte)


def test_a_text_is_looked_at_all_over() -> None:
    Path("one.txt").write_text("abc " * 1000)
    Path("two.txt").write_text("äöü " * 1000)
    found = look_at(load_config(None, flags={"data.source": "*.txt"}))
    assert found.n_bytes == 4000 + 7000 and found.n_characters == 7
    assert found.bytes_per_character == pytest.approx(11 / 8, abs=0.01)
    assert 0 < found.zlib_bits < 1


def test_a_text_elsewhere_is_refused() -> None:
    with pytest.raises(ConfigError, match="not on this machine"):
        look_at(load_config(None, flags={"data.source": "tinystories"}))


def test_conversations_are_refused(tmp_path: Path) -> None:
    row = '{"prompt": "Hi", "completion": "Yes."}\n'
    (tmp_path / "chat.jsonl").write_text(row * 3)
    with pytest.raises(ConfigError, match="holds conversations, not text"):
        look_at(load_config(None, flags={"data.source": str(tmp_path / "chat.jsonl")}))


def test_the_command_writes_a_file_that_trains(gpt: Gpt, corpus: Path) -> None:
    done = gpt("config", "init", "corpus.txt", "--minutes", "0.02")
    assert done.code == 0, done.err
    text = Path("run.yaml").read_text()
    assert "# Expected: about" in text and "# The text is read" in text
    assert load_config("run.yaml").train.max_minutes == 0.02
    small = ("-s", "model.n_embd=128", "-s", "model.n_layer=2", "-s", "device=cpu")
    trained = gpt("train", "-c", "run.yaml", *small, "--json")
    assert trained.code == 0 and trained.json["val_loss"] > 0, trained.err
    other = gpt("config", "init", "corpus.txt", "--minutes", "1", "-o", "b.yaml", "--json").json
    assert other["settings"]["train.max_minutes"][0] == 1 and other["bits_per_byte"] > 0


def test_minutes_need_a_text(gpt: Gpt) -> None:
    for words in (["--minutes", "1"], ["a.txt", "--minutes", "1", "--from", "quickstart"],
                  ["a.txt", "--minutes", "0"]):  # fmt: skip
        done = gpt("config", "init", *words)
        assert done.code == 2 and "gpt config init book.txt --minutes 10" in done.err
    assert gpt("config", "init", "nowhere.txt", "--minutes", "1").code == 3
    for minutes in ("nan", "inf", "1e300"):
        done = gpt("config", "init", "nowhere.txt", "--minutes", minutes)
        assert done.code == 2 and "train.max_minutes: expected a" in done.err
