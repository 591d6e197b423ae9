"""One run, one set of figures: the plan, the events, the screen, the log and the files agree."""

import json
import re
from pathlib import Path
from typing import Any

from gptcli.formatting import shares, size
from gptcli.plotting.report import render
from gptcli.runs import read_run
from gptcli.runs.compare import size_on_disk
from gptcli.terminal.live import frame
from gptcli.terminal.run_state import RunState
from gptcli.terminal.text import summary_text
from gptcli.training.events import Evaluated, Finished, Started, describe
from gptcli.training.loop import train
from gptcli.training.plan import plan
from support.runs import Tiny


def test_three_epochs_are_three_everywhere_when_windows_overlap(tiny: Tiny, gpt: Any) -> None:
    config = tiny("data.stride=4", "train.max_steps=null", "train.max_epochs=3",
                  "train.micro_batch_size=64", "train.eval_every=1000")  # fmt: skip
    planned = plan(config)
    events = list(train(config))
    started = events[0]
    assert isinstance(started, Started) and abs(started.spec.epochs - 3) < 0.1
    assert planned.spec.epochs == started.spec.epochs
    epochs = started.spec.epochs
    assert planned.json()["epochs"] == round(epochs, 3)
    told = f"{epochs:.3g} epochs"
    assert told in dict(planned.lines())["steps"] and told in gpt("runs", "show", "tiny").out
    assert told in (describe(started) or "") and told in Path("runs/tiny/log.txt").read_text()
    board = RunState(0.0)
    for event in events:
        board.update(event, 1.0)
    shown = "\n".join(line.plain for line in frame(board, 80, 24, 2.0))
    assert f"{epochs:.2f} of {epochs:.2f}" in shown
    assert told in render(read_run(Path("runs/tiny")), "now")
    assert [event.epoch for event in events if type(event).__name__ == "EpochDone"] == [1, 2, 3]


def test_a_loss_of_a_part_of_the_split_says_so_everywhere(tiny: Tiny, gpt: Any) -> None:
    events = list(train(tiny("train.eval_tokens=32", "train.max_steps=2")))
    started, finished = events[0], events[-1]
    assert isinstance(started, Started) and isinstance(finished, Finished)
    part = f"32 of {started.spec.val_tokens:,} tokens"
    assert f"evaluation: 1 time, {part} of the validation split" in (describe(started) or "")
    evaluated = next(event for event in events if isinstance(event, Evaluated))
    assert f"val_loss {evaluated.val_loss:.4f} ({part})" in (describe(evaluated) or "")
    assert f"({part})" in summary_text(finished)
    assert part in gpt("runs", "show", "tiny").out
    assert gpt("runs", "show", "tiny", "--json").json["val_tokens"] == 32


def test_a_padded_vocabulary_is_told_beside_the_tokenizers(
    tiny: Tiny, gpt: Any, data: Path
) -> None:
    config = tiny("model.vocab_size=320", "train.max_steps=1")
    started = next(iter(train(config)))
    assert "bytes of 257 ids (the model has 320 rows)" in (describe(started) or "")
    planned = plan(config).json()
    assert (planned["vocab_size"], planned["model_vocab_size"]) == (257, 320)


def test_a_runs_time_is_the_same_in_its_summary_its_status_and_its_parts(tiny: Tiny) -> None:
    finished = list(train(tiny()))[-1]
    assert isinstance(finished, Finished)
    assert finished.summary.seconds == sum(finished.spent.values())
    status = json.loads(Path("runs/tiny/status.json").read_text())
    assert status["summary"]["seconds"] == finished.summary.seconds


def test_the_shares_of_a_runs_time_are_the_same_everywhere(tiny: Tiny, gpt: Any) -> None:
    finished = list(train(tiny()))[-1]
    assert isinstance(finished, Finished)
    told = shares(finished.spent)
    line = ", ".join(f"{work} {share}" for work, share in told.items())
    for text in (describe(finished), Path("runs/tiny/log.txt").read_text(),
                 gpt("runs", "show", "tiny").out):  # fmt: skip
        assert line in (text or "")
    page = render(read_run(Path("runs/tiny")), "now").partition("Where the time went")[2]
    rows = re.findall(
        r"<td[^>]*>([a-z ]+)</td>.*?([\d.]+%)</td>", page.partition("<h2")[0], re.DOTALL
    )
    assert dict(rows) == told and list(dict(rows)) == list(told)


def test_a_files_size_is_the_same_everywhere(gpt: Any, tiny_set: list[str], data: Path) -> None:
    trained = gpt("train", *tiny_set)
    n_bytes = Path("runs/tiny/best.pt").stat().st_size
    assert gpt("runs", "show", "tiny", "--json").json["files"]["best.pt"] == n_bytes
    page = render(read_run(Path("runs/tiny")), "now")
    for text in (trained.err, gpt("runs", "show", "tiny").out, page):
        assert re.search(rf"best\.pt\W.*{size(n_bytes)}", text), text
    [listed] = gpt("runs", "list", "--json").json["runs"]
    assert listed["size_bytes"] == size_on_disk(Path("runs/tiny"))
    assert size(listed["size_bytes"]) in gpt("runs", "show", "tiny").out


def test_a_run_without_validation_names_its_best_epoch_and_commands_that_work(
    gpt: Any, corpus: Path, tiny_set: list[str]
) -> None:
    done = gpt("prepare", str(corpus), "--out", "data/all", "-s", "tokenizer.name=bytes",
               "-s", "data.val_fraction=0")  # fmt: skip
    assert done.code == 0, done.err
    trained = gpt("train", *tiny_set, "-s", "data.dir=data/all", "-s", "train.micro_batch_size=64")
    assert "best epoch ended at step" in trained.out and "mean training loss" in trained.out
    for told in (trained.err, gpt("runs", "show", "tiny").err):
        line = next(line for line in told.splitlines() if "gpt eval" in line)
        assert gpt(*line.partition("gpt ")[2].split()).code == 0, line
