"""Runs on several sources: planned, exact when they are resumed, scored source by source."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gptcli import cli
from gptcli.config.loader import load_config
from gptcli.errors import ConfigError, DataError
from gptcli.formatting import loss
from gptcli.plotting.curves import Axis, loss_curves
from gptcli.plotting.figure import draw_figure
from gptcli.plotting.report import render
from gptcli.runs import read_run
from gptcli.terminal.live import _numbers
from gptcli.terminal.run_state import RunState
from gptcli.trackers import _point
from gptcli.training.events import Evaluated, Started, describe
from gptcli.training.plan import plan
from support.chats import prepare_chats
from support.folders import copy_folder
from support.mixtures import FALLING, MIX, mixed, prepared_sources, write_sources
from support.runs import THOROUGH, finish, result_of, stop_after


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both sources prepared; nobody writes here."""
    return prepared_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture
def sources(prepared: Path) -> None:
    """Both sources, prepared as bytes."""
    copy_folder(prepared / "data", Path("data"))
    for name in ("a.txt", "b.txt"):
        shutil.copy(prepared / name, name)


@pytest.mark.parametrize("mix", [MIX, FALLING], ids=["constant", "schedule"])
def test_a_mixture_that_is_stopped_and_resumed_ends_with_the_same_bits(
    sources: None, mix: str
) -> None:
    straight = mixed(*THOROUGH, mix=mix, name="straight")
    finish(straight)
    stopped = mixed(*THOROUGH, mix=mix, name="stopped")
    stop_after(stopped, 7)
    finish(stopped, resume=True)
    assert result_of(stopped) == result_of(straight)


def test_the_plan_says_what_is_drawn_of_each_source(sources: None, gpt: Any) -> None:
    found = plan(mixed("train.max_steps=100"))
    drawn = found.json()["sources"]
    assert [each["name"] for each in drawn] == ["a", "b"]
    assert [round(each["share"], 3) for each in drawn] == [0.7, 0.3]
    assert sum(each["tokens"] for each in drawn) == 100 * found.spec.tokens_per_step
    lines = [text for label, text in found.lines() if not label]
    assert lines[0].startswith("a: 70.0%, 4,480 tokens, ") and " epochs of " in lines[0]
    assert dict(found.lines())["data"].startswith("2 sources: ")
    plain = describe(Started(found, 0)) or ""
    assert f"\n  {lines[0]}\n  b: 30.0%" in plain


def test_more_than_four_epochs_of_a_source_are_advised_against(sources: None) -> None:
    few = [one for one in plan(mixed("train.max_steps=60")).advice if "of b" in one.what]
    assert few == []
    [many] = [one for one in plan(mixed("train.max_steps=1000")).advice if "of b" in one.what]
    assert "epochs over" in many.what and "-s train.max_steps=" in many.set
    limited = mixed(mix=MIX.replace("0.3}", "0.3, max_epochs: 50}"))
    assert not [one for one in plan(limited).advice if "of b" in one.what]


def test_the_epochs_of_a_source_limit_the_run(sources: None) -> None:
    mix = MIX.replace("0.3}", "0.3, max_epochs: 1.5}")
    limited = plan(mixed("train.max_steps=null", "train.max_epochs=9", mix=mix))
    assert limited.json()["sources"][1]["epochs"] == pytest.approx(1.5, abs=0.05)
    most = limited.spec.max_steps
    assert plan(mixed(f"train.max_steps={most}", mix=mix)).spec.max_steps == most
    with pytest.raises(ConfigError, match=rf"allow {most} steps of 64 tokens, not {most + 1}") as e:
        plan(mixed(f"train.max_steps={most + 1}", mix=mix))
    assert e.value.hint is not None and f"-s train.max_steps={most}" in e.value.hint


def test_a_resumed_mixture_keeps_its_weights(sources: None, gpt: Any) -> None:
    stop_after(mixed(), 3)
    with pytest.raises(ConfigError, match=r"changed: data\.mix \(other weights\)"):
        finish(mixed(mix=MIX.replace("0.7", "0.6")), resume=True)
    finish(mixed("train.max_steps=9"), resume=True)
    assert "  data/a, data/b: " in gpt("runs", "show", "mixed").out


def test_a_schedule_keeps_the_length_that_it_covers(sources: None) -> None:
    stop_after(mixed(mix=FALLING), 3)
    with pytest.raises(ConfigError, match=r"train\.max_steps \(6 there, 9 here\), over which"):
        finish(mixed("train.max_steps=9", mix=FALLING), resume=True)


def test_a_schedule_covers_the_steps_of_a_time_budget(sources: None) -> None:
    timed = mixed("train.max_steps=null", "train.max_minutes=0.02", "threads=1", mix=FALLING,
                  name="timed")  # fmt: skip
    [started, *_] = finish(timed)
    assert isinstance(started, Started)
    steps = f"train.max_steps={started.spec.max_steps}"
    given = mixed(steps, "threads=1", mix=FALLING, name="given")
    finish(given)
    assert result_of(timed).bits == result_of(given).bits


def test_other_text_in_a_source_is_refused_on_resume(sources: None) -> None:
    stop_after(mixed(), 3)
    Path("b.txt").write_text("other text " * 400, encoding="utf-8")
    assert cli.run(["prepare", "b.txt", "--force", "-s", "tokenizer.name=bytes"]) == 0
    with pytest.raises(ConfigError, match="the tokens in data/b are not those of the run"):
        finish(mixed(), resume=True)


def test_each_source_is_scored_and_the_loss_is_their_mean_by_weight(sources: None) -> None:
    events = finish(mixed())
    found = [event for event in events if isinstance(event, Evaluated)]
    for event in found:
        a, b = event.sources["a"], event.sources["b"]
        assert a.val_loss is not None and b.val_loss is not None
        assert event.val_loss == pytest.approx(0.7 * a.val_loss + 0.3 * b.val_loss)
        assert a.train_loss is not None and b.train_loss is not None
        assert event.train_loss == pytest.approx(0.7 * a.train_loss + 0.3 * b.train_loss)
    run = read_run(mixed().run_folder)
    assert run.evaluations[-1].sources["b"].val_loss == found[-1].sources["b"].val_loss
    assert run.eval_tokens == found[-1].scored[0] == 64
    curves = loss_curves(run, Axis.STEPS, 100)
    assert curves["a"].kind == curves["b"].kind == "source"
    assert curves["b"].y == tuple(event.sources["b"].val_loss for event in found)
    text = describe(found[-1])
    assert text is not None and f"(a {found[-1].sources['a'].val_loss:.4f}, b " in text


def test_screen_report_figure_and_trackers_show_each_source(sources: None) -> None:
    events = finish(mixed())
    run, state = read_run(mixed().run_folder), RunState(0.0)
    for event in events:
        state.update(event, 0.0)
    shown = {label: value for label, value, _ in _numbers(state, 0.0)}
    last = run.evaluations[-1]
    assert [shown[name] for name in "ab"] == [loss(last.sources[name].val_loss) for name in "ab"]
    page = render(run, "now")
    assert "<th>a</th>" in page and f"<td>{loss(last.sources['b'].val_loss)}</td>" in page
    assert page.count('"kind":"source s') == 2
    draw_figure([run], Path("loss.svg"))
    assert Path("loss.svg").read_text().count("<!-- a -->") == 1
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    _, values = _point(json.loads([line for line in lines if "sources" in line][-1]))
    assert values["eval/b/val_loss"] == last.sources["b"].val_loss
    assert values["eval/val_loss"] == last.val_loss


def test_the_weights_at_the_end_of_a_schedule_make_the_mean(sources: None) -> None:
    [*_, last] = [event for event in finish(mixed(mix=FALLING)) if isinstance(event, Evaluated)]
    a, b = (each.val_loss or 0.0 for each in last.sources.values())
    assert last.val_loss == pytest.approx((0.1 * a + 0.5 * b) / 0.6)


def test_the_checkpoint_of_a_mixture_is_scored_by_source(sources: None, gpt: Any) -> None:
    finish(mixed("train.eval_tokens=1000000"))
    found = gpt("eval", "-s", "device=cpu", "--json").json
    row = read_run(mixed().run_folder).best
    assert row is not None and found["loss"] == pytest.approx(row.val_loss, rel=1e-5)
    assert found["weights"] == pytest.approx({"a": 0.7, "b": 0.3})
    one = gpt("eval", "--source", "b", "-s", "device=cpu", "--json").json
    assert one["loss"] == found["sources"]["b"]["loss"] and one["data"] == "data/b"
    assert one["loss"] == pytest.approx(row.sources["b"].val_loss, rel=1e-5)
    text = gpt("eval", "-s", "device=cpu").out
    assert "mean by the weights at the end of the run (a 70.0%, b 30.0%): loss " in text
    wrong = gpt("eval", "--source", "c")
    assert wrong.code == 2 and "hint: its sources: a, b" in wrong.err
    assert gpt("generate", "-p", "the", "--max-new-tokens", "4", "--json").code == 0


def test_prepare_writes_all_sources_with_the_vocabulary_of_the_first(gpt: Any) -> None:
    write_sources()
    Path("run.yaml").write_text(f"data: {{mix: {MIX.partition('=')[2]}}}\n"
                                "tokenizer: {name: bpe, vocab_size: 300}\n")  # fmt: skip
    planned = gpt("prepare", "-c", "run.yaml", "--dry-run", "--json")
    assert [each["dir"] for each in planned.json["sources"]] == ["data/a", "data/b"]
    assert not Path("data").exists()
    done = gpt("prepare", "-c", "run.yaml", "--json").json
    assert [each["dir"] for each in done["sources"]] == ["data/a", "data/b"]
    tokenizers = {Path(f"data/{name}/tokenizer.json").read_bytes() for name in "ab"}
    assert len(tokenizers) == 1
    again = gpt("prepare", "-c", "run.yaml")
    assert again.code == 0 and "next: gpt train -c run.yaml" in again.err
    assert gpt("train", "-c", "run.yaml", "-s", "model.block_size=16", "--dry-run").code == 0


def test_train_prepares_the_sources_that_are_here(gpt: Any) -> None:
    write_sources()
    words = ["-s", MIX, "-s", "tokenizer.name=bytes", "-s", "model.block_size=16"]
    assert gpt("train", *words, "--dry-run").code == 0
    assert Path("data/b/manifest.json").is_file()


def test_a_source_may_be_a_prepared_folder(sources: None) -> None:
    named = mixed(mix="data.mix=[{source: data/a, weight: 1}, {source: b.txt, weight: 1}]")
    assert [part.name for part in plan(named).spec.parts] == ["a", "b"]


def test_sources_of_another_tokenizer_are_refused_with_the_command_that_mends_it(
    sources: None, gpt: Any
) -> None:
    words = ["prepare", "b.txt", "--out", "data/b", "--force", "-s", "tokenizer.name=char"]
    assert gpt(*words).code == 0
    config = load_config(None, [*THOROUGH[:1], MIX, "model.block_size=16", "device=cpu"])
    with pytest.raises(DataError, match="data/b and data/a have different tokenizers") as caught:
        plan(config)
    assert caught.value.hint is not None
    command = caught.value.hint.partition("`")[2].rstrip("`")
    assert gpt(*command.split()[1:]).code == 0
    assert plan(config).spec.manifest.tokenizer.name == "bytes"


def test_two_sources_with_one_folder_are_refused(sources: None) -> None:
    with pytest.raises(ConfigError, match="two of the sources are prepared in data/a"):
        plan(mixed(mix="data.mix=[{source: a.txt, weight: 1}, {source: ./a.txt, weight: 1}]"))


def test_two_sources_with_one_folder_are_refused_before_anything_is_prepared(gpt: Any) -> None:
    write_sources()
    Path("other").mkdir()
    shutil.copy("b.txt", "other/a.txt")
    mix = "data.mix=[{source: a.txt, weight: 1}, {source: other/a.txt, weight: 1}]"
    for words in (["prepare"], ["prepare", "--dry-run"], ["train"]):
        done = gpt(*words, "-s", mix, "-s", "tokenizer.name=bytes")
        assert done.code == 2 and "two of the sources are prepared in data/a" in done.err
        assert "`gpt prepare other/a.txt --out DIR`" in done.err and not Path("data").exists()


def test_a_source_and_its_own_folder_are_refused_with_a_command_that_runs(
    sources: None, gpt: Any
) -> None:
    for mix in ("a.txt, weight: 1}, {source: data/a", "data/a, weight: 1}, {source: a.txt"):
        done = gpt("prepare", "-s", f"data.mix=[{{source: {mix}, weight: 1}}]")
        assert done.code == 2 and "`gpt prepare a.txt --out DIR`" in done.err
    mix = "data.mix=[{source: data/a, weight: 1}, {source: ./data/a, weight: 1}]"
    assert "name each folder once" in gpt("prepare", "-s", mix).err


def test_the_command_that_mends_a_folder_keeps_the_seed_of_its_splits(gpt: Any) -> None:
    rows = [json.dumps({"text": f"row {n} " * 9}) for n in range(200)]
    Path("rows.jsonl").write_text("\n".join(rows))
    mix = "data.mix=[{source: rows.jsonl, weight: 1}]"
    words = ["-s", mix, "-s", "seed=7", "-s", "tokenizer.name=bytes", "-s", "model.block_size=16"]
    assert gpt("prepare", *words).code == 0
    before = json.loads(Path("data/rows/manifest.json").read_text())
    assert gpt("prepare", "rows.jsonl", "--force", "-s", "tokenizer.name=char").code == 0
    done = gpt("train", *words, "--dry-run")
    assert done.code == 3
    command = done.err.partition("again: `")[2].partition("`")[0]
    assert gpt(*command.split()[1:]).code == 0
    after = json.loads(Path("data/rows/manifest.json").read_text())
    assert after["units"] == before["units"]


def test_conversations_and_text_are_mixed_in_one_run(sources: None) -> None:
    prepare_chats()
    words = ["prepare", "a.txt", "--force", "-s", "tokenizer.path=data/tiny"]
    assert cli.run(words) == 0
    mix = "data.mix=[{source: data/tiny, weight: 0.5}, {source: data/a, weight: 0.5}]"
    config = mixed("model.block_size=64", "train.eval_every=6", mix=mix, name="both")
    events = finish(config)
    assert isinstance(events[0], Started)
    packing, chats = dict(events[0].plan.lines())["packing"], events[0].spec.parts[0].manifest
    share = chats.trained("train") / chats.tokens.train
    assert packing.startswith(f"{chats.documents:,} conversations, {share:.0%} of their training")
    assert "tiny: " in packing and events[0].plan.json()["conversations"] == chats.documents
    [last] = [event for event in events if isinstance(event, Evaluated)]
    assert last.sources["tiny"].val_loss and last.sources["a"].val_loss
    again = mixed("model.block_size=64", "train.eval_every=6", mix=mix, name="again")
    stop_after(again, 2)
    finish(again, resume=True)
    assert result_of(again) == result_of(config)


def test_a_run_of_before_has_no_mixture(sources: None) -> None:
    config = mixed(mix="data.dir=data/a", name="plain")
    [*_, last] = [event for event in finish(config) if isinstance(event, Evaluated)]
    assert last.sources == {}
    lines = (config.run_folder / "metrics.jsonl").read_text().splitlines()
    assert not any("sources" in json.loads(line) for line in lines)
