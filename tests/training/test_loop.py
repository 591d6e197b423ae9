"""The loop: exact resume, golden losses, the order of events, what a run leaves on the disk."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptcli.checkpoint import load_checkpoint
from gptcli.config import Config
from gptcli.errors import ConfigError, NonFiniteError
from gptcli.runs import folder as module
from gptcli.training.events import (
    EpochDone,
    Evaluated,
    Finished,
    Sampled,
    Saved,
    Started,
    StepDone,
    Stopped,
    Working,
)
from gptcli.training.loop import train
from gptcli.training.signals import StopRequest
from support.runs import THOROUGH, Tiny, Trained, finish, last_state, metrics, result_of, stop_after


def samples(config: Config) -> list[dict[str, Any]]:
    """Return samples.jsonl."""
    lines = (config.run_folder / "samples.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_stopping_and_resuming_changes_no_bit(
    tiny: Tiny, dtype: str, optimizer: str, schedule: str
) -> None:
    how = (*THOROUGH, f"dtype={dtype}", f"optim.name={optimizer}", f"optim.schedule={schedule}")
    straight, broken = tiny(*how, name="straight"), tiny(*how, name="broken")
    finish(straight)
    stop_after(broken, 11)
    finish(broken, resume=True)
    assert result_of(broken) == result_of(straight)


def test_stopping_after_every_step_changes_no_bit(tiny: Tiny, trained: Trained) -> None:
    straight, broken = trained.copy(*THOROUGH, name="straight"), tiny(*THOROUGH, name="broken")
    for step in range(1, 20):
        assert isinstance(stop_after(broken, step, resume=step > 1)[-1], Stopped)
    finish(broken, resume=True)
    assert result_of(broken) == result_of(straight)
    best = [load_checkpoint(c.run_folder / "best.pt").state["step"] for c in (straight, broken)]
    assert best[0] == best[1]


def test_samples_are_kept_and_read_as_those_of_one_run(tiny: Tiny) -> None:
    how = ("train.max_steps=8", "train.eval_every=4", "train.save_every=3", "train.sample_every=2",
           "generate.prompt=The")  # fmt: skip
    straight, broken = tiny(*how, name="straight"), tiny(*how, name="broken")
    drawn = [event for event in finish(straight) if isinstance(event, Sampled)]
    assert samples(straight) == [
        {"step": event.step, "prompt": "The", "text": event.text} for event in drawn
    ]
    assert [line["step"] for line in samples(straight)] == [2, 4, 6, 8]
    stop_after(broken, 6)  # the sample at step 6 is cut short by the stop
    with (broken.run_folder / "samples.jsonl").open("a") as file:
        file.write('{"step": 7, "prompt": "", "text": "of a future that was lost"}\n{"ste')
    finish(broken, resume=True)
    assert samples(straight) == samples(broken)


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_killed_before_the_last_link_it_is_made_on_resuming(
    corpus: Path, gpt: Any, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    no_val = ("--out", "data/all", "-s", "tokenizer.name=bytes", "-s", "data.val_fraction=0")
    assert gpt("prepare", str(corpus), *no_val).code == 0
    config = tiny("data.dir=data/all")  # without validation the best is by epoch
    real = module.atomic.link

    def link(file: Path, place: Path) -> None:
        if file.name.endswith("6.pt") and place.name == name:
            raise KeyboardInterrupt
        real(file, place)

    with monkeypatch.context() as spoilt, pytest.raises(KeyboardInterrupt):
        spoilt.setattr(module.atomic, "link", link)
        list(train(config))
    list(train(config, resume=True))
    assert load_checkpoint(config.run_folder / name).state["step"] == 6


def test_a_folder_made_from_another_file_is_told(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("another text")

    def notes(*how: str) -> str:
        started = next(iter(train(tiny("train.max_steps=1", *how), overwrite=True)))
        assert isinstance(started, Started)
        return " ".join(started.notes)

    assert "corpus.txt, not from other.txt" in notes("data.source=other.txt")
    assert "not from" not in notes("data.source=./corpus.txt")
    assert "not from" not in notes()


def test_resuming_without_validation_keeps_the_epochs(corpus: Path, gpt: Any, tiny: Tiny) -> None:
    gpt("prepare", str(corpus), "--out", "data/whole", "-s", "tokenizer.name=bytes",
        "-s", "data.val_fraction=0")  # fmt: skip
    how = ("data.dir=data/whole", "train.tokens_per_step=960", "train.micro_batch_size=6",
           "train.max_epochs=3", "train.max_steps=null", "train.save_every=4")  # fmt: skip
    straight, broken = tiny(*how, name="straight"), tiny(*how, name="broken")
    events = finish(straight)
    stop_after(broken, 7)
    finish(broken, resume=True)
    assert result_of(broken) == result_of(straight)
    epochs = [event for event in events if isinstance(event, EpochDone)]
    assert [event.epoch for event in epochs] == [1, 2, 3]
    assert epochs[2].train_loss < epochs[0].train_loss
    best = load_checkpoint(straight.run_folder / "best.pt").state
    assert best["best_loss"] == min(event.train_loss for event in epochs)


def test_evaluating_more_often_changes_no_weight(tiny: Tiny) -> None:
    rare = tiny("train.eval_every=100", "model.dropout=0.1", name="rare")
    often = tiny("train.eval_every=1", "model.dropout=0.1", "train.sample_every=1", name="often")
    finish(rare)
    finish(often)
    (one, _), (two, _) = last_state(rare), last_state(often)
    weights = [name for name in one if name.startswith("model ")]
    assert weights and all(one[name] == two[name] for name in weights)


def test_the_micro_batch_size_changes_the_loss_only_by_rounding(tiny: Tiny) -> None:
    losses = []
    for size in (1, 2, 6):
        config = tiny(f"train.micro_batch_size={size}", "train.tokens_per_step=96", name=f"m{size}")
        losses.append([e.loss for e in finish(config) if isinstance(e, StepDone)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)


# Measured once; a change of data order, initialisation, network or optimizer shows here.
GOLDEN = [
    5.5834,
    5.337178,
    5.163331,
    5.057385,
    4.968867,
    4.889416,
    4.826603,
    4.739695,
    4.710191,
    4.717339,
]


def test_ten_golden_losses(tiny: Tiny) -> None:
    config = tiny("train.max_steps=10", "train.tokens_per_step=128", "model.dropout=0.0")
    losses = [event.loss for event in finish(config) if isinstance(event, StepDone)]
    assert losses == pytest.approx(GOLDEN, rel=2e-4)


def test_events_come_in_the_order_of_the_contract(tiny: Tiny) -> None:
    events = finish(tiny("train.max_steps=4", "train.eval_every=2", "train.sample_every=4"))
    told = [event for event in events if not isinstance(event, Working)]
    kinds = [(type(event), getattr(event, "step", None)) for event in told]
    assert kinds == [
        (Started, 0), (Saved, 0), (StepDone, 1), (StepDone, 2), (Saved, 2), (Evaluated, 2),
        (StepDone, 3), (StepDone, 4), (Saved, 4), (Evaluated, 4), (Sampled, 4), (Finished, 4),
    ]  # fmt: skip
    before = {type(after): event.work for event, after in itertools.pairwise(events)
              if isinstance(event, Working)}  # fmt: skip
    assert before == {Saved: "saving", Evaluated: "evaluating", Sampled: "sampling"}


def test_the_last_step_is_evaluated_saved_and_linked(tiny: Tiny) -> None:
    config = tiny("train.max_steps=5", "train.eval_every=1000", "train.save_every=1000")
    finish(config)
    folder = config.run_folder
    assert [line["step"] for line in metrics(config) if "val_loss" in line] == [5]
    files = [folder / "best.pt", folder / "last.pt", folder / "checkpoints/step-00000005.pt"]
    assert len({file.stat().st_ino for file in files}) == 1
    assert json.loads((folder / "status.json").read_text())["exit_code"] == 0


def test_metrics_have_the_keys_of_the_contract(tiny: Tiny) -> None:
    config = tiny("train.max_epochs=1", "train.max_steps=null", "train.log_every=5")
    finish(config)
    raw = (config.run_folder / "metrics.jsonl").read_text().splitlines()
    kinds = {frozenset(json.loads(line)) for line in raw}
    assert kinds == {
        frozenset({"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second",
                   "memory_bytes", "seconds"}),
        frozenset({"step", "val_loss", "train_loss"}),
        frozenset({"step", "epoch", "train_loss"}),
    }  # fmt: skip
    assert all(json.loads(line).get("memory_bytes", 1) > 0 for line in raw)


def test_only_the_newest_and_the_best_are_kept(tiny: Tiny) -> None:
    config = tiny("train.max_steps=8", "train.save_every=1", "train.keep_last=3")
    finish(config)
    names = sorted(path.name for path in (config.run_folder / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}.pt" for step in (6, 7, 8)]
    assert not list(config.run_folder.rglob(".tmp-*"))


def test_a_resumed_run_may_go_on_longer(tiny: Tiny) -> None:
    constant = ("optim.schedule=constant", "train.eval_every=3")
    short, long = tiny("train.max_steps=4", *constant), tiny("train.max_steps=9", *constant)
    finish(short)
    events = finish(long, resume=True)
    assert isinstance(events[-1], Finished) and events[-1].step == 9
    assert any("train.max_steps changed from 4 to 9" in note for note in events[0].notes)  # type: ignore[union-attr]
    straight = tiny("train.max_steps=9", *constant, name="straight")
    finish(straight)
    told = metrics(long)
    assert told[5]["step"] == 4 and "val_loss" in told[5]  # the shorter run's last evaluation
    assert [*told[:5], *told[6:]] == metrics(straight)


def test_resuming_a_finished_run_does_nothing(tiny: Tiny) -> None:
    config = tiny()
    done = finish(config)[-1]
    before = (config.run_folder / "metrics.jsonl").read_bytes()
    again = finish(config, resume=True)
    assert again == [replace(done, spent={})]
    assert (config.run_folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("model.n_layer=3", "model.n_layer (2 there, 3 here)"),
        ("model.dropout=0.5", "model.dropout"),
        ("seed=2", "seed (1337 there, 2 here)"),
        ("data.seq_len=8", "data.seq_len (16 there, 8 here)"),
        ("data.stride=3", "data.stride (16 there, 3 here)"),
        ("train.tokens_per_step=128", "train.tokens_per_step (64 there, 128 here)"),
    ],
)
def test_a_resumed_run_keeps_its_model_data_and_seed(tiny: Tiny, change: str, named: str) -> None:
    stop_after(tiny(), 2)
    with pytest.raises(ConfigError) as caught:
        finish(tiny(change), resume=True)
    assert named in caught.value.message and caught.value.exit_code == 2


def test_a_resumed_run_keeps_its_data(tiny: Tiny, corpus: Path, gpt: Any) -> None:
    stop_after(tiny(), 2)
    corpus.write_text(corpus.read_text() * 2)
    gpt("prepare", str(corpus), "--out", "data/tiny", "-s", "tokenizer.name=bytes", "--force")
    with pytest.raises(ConfigError, match="data"):
        finish(tiny(), resume=True)


def test_settings_once_resolved_are_taken_up_again(tiny: Tiny) -> None:
    stop_after(tiny("dtype=bfloat16"), 2)
    events = stop_after(tiny("dtype=auto", "device=auto", "compile=auto"), 4, resume=True)
    assert isinstance(events[0], Started) and events[0].spec.config.dtype == "bfloat16"
    assert events[0].notes == ()


def test_resuming_where_nothing_is_starts_at_step_0_and_says_so(tiny: Tiny) -> None:
    events = finish(tiny(), resume=True)
    assert isinstance(events[0], Started) and events[0].step == 0
    assert "nothing to resume here: starting at step 0" in events[0].notes


def test_a_damaged_checkpoint_is_passed_over(tiny: Tiny, trained: Trained) -> None:
    broken = tiny(*THOROUGH, name="broken")
    stop_after(broken, 11)
    newest = broken.run_folder / "checkpoints/step-00000011.pt"
    raw = bytearray(newest.read_bytes())
    raw[len(raw) // 2] ^= 1
    newest.unlink()  # last.pt is the same file
    newest.write_bytes(raw)
    events = finish(broken, resume=True)
    assert any("skipped" in note and "step-00000011" in note for note in events[0].notes)  # type: ignore[union-attr]
    assert result_of(broken) == trained.straight(*THOROUGH)


def test_damaged_checkpoints_alone_never_start_afresh(tiny: Tiny) -> None:
    stop_after(tiny(), 2)
    for path in (tiny().run_folder / "checkpoints").iterdir():
        path.write_bytes(b"nonsense")
    with pytest.raises(Exception, match="none of its") as caught:
        finish(tiny(), resume=True)
    assert getattr(caught.value, "exit_code", None) == 4


def test_a_loss_that_is_not_finite_never_reaches_the_weights(tiny: Tiny) -> None:
    config = tiny("optim.lr=1e12", "optim.grad_clip=0", "train.max_steps=50", "train.save_every=1")
    with pytest.raises(NonFiniteError, match="was the last good one") as caught:
        finish(config)
    assert caught.value.exit_code == 7
    for path in (config.run_folder / "checkpoints").iterdir():
        weights = load_checkpoint(path).model.values()
        assert all(bool(weight.isfinite().all()) for weight in weights)
    assert json.loads((config.run_folder / "status.json").read_text())["exit_code"] == 7


@pytest.mark.parametrize("reads", range(20, 32))
@pytest.mark.parametrize("seen", [True, False])
def test_a_stop_at_any_moment_of_a_step_changes_no_bit(
    tiny: Tiny, trained: Trained, reads: int, seen: bool
) -> None:
    how = (*THOROUGH, "train.max_steps=9", "train.log_every=1")
    broken, straight = tiny(*how, name="broken"), trained.straight(*how)

    class AtRead(StopRequest):
        """Asks at the given look of the loop, or just after it."""

        looks = 0

        def requested(self) -> bool:
            self.looks += 1
            before = super().requested()
            if self.looks == reads:
                self.exit_code = 130
            return super().requested() if seen else before

    last = list(train(broken, stop=AtRead()))[-1]
    assert isinstance(last, Stopped) and 0 < last.step <= 9
    finish(broken, resume=True)
    assert result_of(broken) == straight


def test_a_prompt_that_cannot_be_sampled_is_refused_before_training(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match="the prompt has 20 tokens"):
        finish(tiny(f"generate.prompt={'x' * 20}"))


def test_learning_happens(tiny: Tiny) -> None:
    config = tiny("train.max_steps=300", "train.eval_every=300", "optim.lr=1e-2")
    losses = [event.loss for event in finish(config) if isinstance(event, StepDone)]
    assert losses[0] == pytest.approx(5.55, abs=0.1)  # ln 257
    assert sum(losses[-5:]) / 5 < 2.2
