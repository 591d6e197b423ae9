"""The names that `gptcli` offers: light until used, the same results as the commands, silent."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gptcli
from gptcli import evaluate, generate, load, load_config, prepare, train
from gptcli.api.train import train as api
from gptcli.config import Config
from gptcli.errors import CheckpointError, ConfigError, DataError, GptError
from gptcli.training.events import Finished, StepDone, Stopped


def test_importing_the_package_loads_nothing() -> None:
    code = (
        "import sys, gptcli; before = {name.partition('.')[0] for name in sys.modules};"
        "from gptcli import Config; light = set(sys.modules);"
        "from gptcli import train;"
        "print(before & {'torch', 'pydantic', 'yaml'}, 'torch' in light, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set() False True\n"


def test_every_public_name_is_there() -> None:
    for name in gptcli.__all__:
        assert getattr(gptcli, name) is not None
        assert name in dir(gptcli)
    assert gptcli.train is api and gptcli.Config is Config
    with pytest.raises(AttributeError, match="no attribute 'trane'"):
        gptcli.trane  # noqa: B018


def test_prepare_does_what_the_command_does(data: Path, corpus: Path) -> None:
    config = load_config(None, [f"data.source={corpus}", "data.dir=data/mine",
                                "tokenizer.name=bytes"])  # fmt: skip
    prepared = prepare(config)
    assert prepared.folder == Path("data/mine")
    for file in sorted(data.glob("*.bin")):
        assert (prepared.folder / file.name).read_bytes() == file.read_bytes()
    assert prepare(config) == prepared
    assert prepare(str(corpus)).manifest.tokenizer.name == "gpt2"
    assert prepare(str(data)).folder == data  # token files are taken where they are


def test_train_gives_events_and_ends_as_the_command_does(
    tiny: Callable[..., Config], run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    training = train(tiny(name="mine"))
    assert training.summary is None
    events = list(training)
    assert [event.step for event in events if isinstance(event, StepDone)] == [1, 2, 3, 4, 5, 6]
    assert isinstance(events[-1], Finished) and events[-1].summary == training.summary
    theirs, ours = (Path(folder, "config.yaml").read_text() for folder in (run, "runs/mine"))
    assert ours == theirs.replace('name: "tiny"', 'name: "mine"').replace("runs/tiny", "runs/mine")
    assert evaluate("mine").nats == evaluate(run).nats
    assert capfd.readouterr() == ("", "")


def test_a_run_without_a_name_has_that_of_its_data(tiny: Callable[..., Config]) -> None:
    summary = train(tiny("name=null")).finish()
    assert Path(summary.run_dir) == Path("runs/tiny")


def test_train_prepares_text_of_this_machine_and_says_so(
    tiny: Callable[..., Config], corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "gptcli")
    mine = tiny(f"data.source={corpus}", "data.dir=data/mine", "tokenizer.name=bytes")
    assert train(mine).finish().step == 6
    assert "data/mine does not exist yet: preparing" in caplog.text


def test_what_a_command_warns_of_is_a_warning_here(
    corpus: Path, caplog: pytest.LogCaptureFixture, gpt: Callable[..., Any]
) -> None:
    words = [f"data.source={corpus}", "tokenizer.name=bpe", "tokenizer.vocab_size=5000"]
    prepare(load_config(None, words))
    [warning] = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert "fewer than the 5,000 of tokenizer.vocab_size" in warning
    done = gpt("prepare", *(part for word in words for part in ("-s", word)), "--force")
    assert f"warning: {warning}" in done.err


def test_stop_saves_and_resume_goes_on(tiny: Callable[..., Config]) -> None:
    training = train(tiny())
    for event in training:
        if isinstance(event, StepDone) and event.step == 2:
            training.stop()
    assert isinstance(event, Stopped) and training.summary is not None
    assert training.summary.step == 2
    assert train(tiny(), resume=True).finish().step == 6


def test_a_loop_left_early_frees_the_folder(tiny: Callable[..., Config]) -> None:
    training = train(tiny())
    next(iter(training))
    training.close()
    assert train(tiny(), resume=True).finish().step == 6


@pytest.mark.skipif(os.name == "nt", reason="signals are sent as POSIX has them")
def test_an_interrupted_finish_has_saved(tiny: Callable[..., Config]) -> None:
    metrics = Path("runs/tiny/metrics.jsonl")

    def interrupt() -> None:
        while not metrics.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=interrupt)
    sender.start()
    training = train(tiny("train.max_steps=100000"))
    with pytest.raises(KeyboardInterrupt):
        training.finish()
    sender.join()
    assert training.summary is not None and training.summary.checkpoint is not None
    assert load("runs/tiny/last.pt").step == training.summary.step > 0


def test_evaluate_gives_the_figures_of_the_command(
    run: Path, corpus: Path, gpt: Callable[..., Any]
) -> None:
    for words, arguments in (
        ([], {}),
        (["--text", str(corpus)], {"text": corpus}),
        (["--split", "train", "--stride", "8", "--max-tokens", "100"],
         {"split": "train", "stride": 8, "max_tokens": 100}),
    ):  # fmt: skip
        theirs = gpt("eval", "--checkpoint", str(run), *words, "--json").json
        ours = evaluate(run, **arguments)
        for key in ("loss", "perplexity", "bits_per_byte", "tokens", "standard_error"):
            assert getattr(ours, key) == theirs[key], (words, key)


def test_generate_gives_the_text_of_the_command(run: Path, gpt: Callable[..., Any]) -> None:
    [theirs] = gpt("generate", "--checkpoint", str(run), "The", "--seed", "7", "--json").json[
        "samples"
    ]
    assert "".join(generate(run, "The", seed=7)) == theirs["text"]
    network = load(run)
    texts = {"".join(generate(network, "The", seed=seed, temperature=2.0)) for seed in range(4)}
    assert len(texts) == 4
    assert evaluate(network).nats == evaluate(run).nats  # decoding has left it as it was


def test_errors_are_of_the_kinds_of_the_commands(run: Path, tiny: Callable[..., Config]) -> None:
    wrong: list[tuple[type[GptError], Callable[[], object]]] = [
        (ConfigError, lambda: load_config(None, base={"model": {"n_heads": 3}})),
        (ConfigError, lambda: prepare("nowhere.txt", workers=0)),
        (GptError, lambda: prepare("nowhere.txt")),
        (ConfigError, lambda: train(tiny(), resume=True, overwrite=True)),
        (ConfigError, lambda: train(tiny()).finish()),  # the folder holds a run
        (DataError, lambda: train(tiny("data.dir=nowhere", name="b")).finish()),
        (CheckpointError, lambda: evaluate("nowhere")),
        (ConfigError, lambda: evaluate(run, text="a", data="b")),
        (ConfigError, lambda: evaluate(run, stride=17)),
        (ConfigError, lambda: evaluate(run, split="test")),  # type: ignore[arg-type]
        (ConfigError, lambda: generate(run, temperature=-1.0)),
        (CheckpointError, lambda: generate("nowhere")),
    ]
    for kind, action in wrong:
        with pytest.raises(kind):
            action()


def test_a_name_is_no_configuration_and_nothing_is_no_source() -> None:
    with pytest.raises(ConfigError, match="train takes a Config, not a str"):
        train("quickstart")  # type: ignore[arg-type]
    Path("train_000000.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match="no dataset named"):
        prepare("")
    assert [path.name for path in Path.cwd().iterdir()] == ["train_000000.bin"]
