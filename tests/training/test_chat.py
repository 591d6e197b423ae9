"""Training on conversations: only what is trained on counts, each of it once, however it is cut."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcli.api.generate import Chat, Sampler
from gptcli.checkpoint import load_checkpoint, load_model
from gptcli.config import Config, load_config
from gptcli.data.conversations import ConversationReader
from gptcli.data.shards import read_manifest
from gptcli.distributed.process_group import SINGLE_PROCESS
from gptcli.errors import ConfigError, DataError
from gptcli.model.loss import IGNORED
from gptcli.runs.folder import ReadOnlyRun
from gptcli.training.events import Evaluated, Sampled, StepDone
from gptcli.training.setup import set_up
from gptcli.training.step import Stepper
from support.chats import CHATTY, prepare_chats
from support.folders import copy_folder
from support.runs import Trained, finish, result_of, settings, stop_after


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/tiny, which holds conversations; nobody writes here."""
    folder = tmp_path_factory.mktemp("chats")
    with contextlib.chdir(folder):
        prepare_chats()
    return folder


@pytest.fixture(scope="module")
def trained(prepared: Path) -> Trained:
    return Trained(prepared)


@pytest.fixture
def chatty(prepared: Path) -> Callable[..., Config]:
    """Make tiny configurations on conversations."""
    copy_folder(prepared / "data/tiny", Path("data/tiny"))
    return lambda *more, name="tiny": load_config(None, settings(*CHATTY, *more, name=name))


def gradients(config: Config) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the sum of the losses of the first step and its gradients, before clipping."""
    run = ReadOnlyRun(config.run_folder)
    with contextlib.closing(set_up(run, config, SINGLE_PROCESS, resume=False)) as session:
        stepper = Stepper(session)
        total = stepper._accumulate(*stepper._read(), lambda: False)
        stepper.feed.close()
        assert total is not None
        found = {name: p.grad for name, p in session.parameters.items() if p.grad is not None}
        return float(total), found


def gap(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - g).norm() / g.norm()) for name, g in other.items())


def test_gradients_are_the_same_in_one_micro_batch_and_in_four(chatty: Any) -> None:
    how = "train.tokens_per_step=1024"
    one_loss, one = gradients(chatty(how, "train.micro_batch_size=8"))
    loss, four = gradients(chatty(how, "train.micro_batch_size=2"))
    assert loss == pytest.approx(one_loss, rel=1e-6)
    assert gap(four, one) < 1e-6


def test_they_are_the_mean_over_each_conversation_alone(chatty: Any) -> None:
    config = chatty("train.tokens_per_step=1024", "train.micro_batch_size=2")
    with contextlib.closing(
        set_up(ReadOnlyRun(config.run_folder), config, SINGLE_PROCESS, resume=False)
    ) as session:
        [(tokens, targets, starts)] = session.loader.micro_batches(0, 8)
        model, n_targets = session.model, int((targets != IGNORED).sum())
        for row, aims, begins in zip(tokens, targets, starts, strict=True):
            for begin in begins.unique().tolist():
                alone = begins == begin
                loss = model(row[None, alone], aims[None, alone]).loss
                torch.autograd.backward(loss / n_targets)
        wanted = {name: p.grad for name, p in session.parameters.items()}
    assert gap(gradients(config)[1], wanted) < 1e-5


def test_a_micro_batch_that_trains_on_nothing_changes_nothing(chatty: Any) -> None:
    config = chatty()
    with contextlib.closing(
        set_up(ReadOnlyRun(config.run_folder), config, SINGLE_PROCESS, resume=False)
    ) as session:
        [(tokens, targets, starts)] = session.loader.micro_batches(0, 4)
        loss = session.model(tokens, torch.full_like(targets, IGNORED), starts).loss
        torch.autograd.backward(loss)
        assert loss.item() == 0
        assert not any(p.grad.any() for p in session.parameters.values() if p.grad is not None)


@pytest.mark.parametrize("more", [(), ("model.dropout=0.1", "train.activation_checkpointing=true")])
def test_stopped_and_resumed_it_ends_with_the_same_bits(
    chatty: Any, trained: Trained, more: tuple[str, ...]
) -> None:
    how = ("train.tokens_per_step=512", "train.micro_batch_size=2", *more)
    stop_after(chatty(*how), 4)
    finish(chatty(*how), resume=True)
    assert result_of(chatty(*how)) == trained.straight(*CHATTY, *how)


def test_the_losses_are_means_over_what_is_trained_on(chatty: Any) -> None:
    config = chatty("model.block_size=256", "train.eval_tokens=1000000", "optim.lr=1e-30")
    events = finish(config)
    trained = load_model(config.run_folder / "last.pt", torch.device("cpu"))
    reader = ConversationReader(Path("data/tiny"), read_manifest(Path("data/tiny")), "val")
    nats = n_targets = 0.0
    for number in range(len(reader)):
        assert reader.lengths[number] <= 257
        tokens, mask = (torch.from_numpy(part.astype("int64")) for part in reader.read(number))
        targets = torch.where(mask[1:] == 1, tokens[1:], IGNORED)
        nats += float(trained.model.token_losses(tokens[None, :-1], targets[None]).double().sum())
        n_targets += int((targets != IGNORED).sum())
    reader.close()
    *_, last = (event for event in events if isinstance(event, Evaluated))
    assert last.val_loss == pytest.approx(nats / n_targets, rel=1e-5)
    *_, step = (event for event in events if isinstance(event, StepDone))
    assert step.loss == pytest.approx(last.train_loss, rel=0.1)


def test_a_plan_says_how_rows_hold_conversations(chatty: Any, gpt: Any) -> None:
    chatty()
    words = [part for each in settings(*CHATTY, "train.max_epochs=2") for part in ("-s", each)]
    plan = gpt("train", *words, "-s", "train.max_steps=null", "--dry-run", "--json").json
    manifest = read_manifest(Path("data/tiny"))
    assert plan["conversations"] == manifest.documents
    assert plan["trained_tokens"] == manifest.trained("train") < plan["train_tokens"]
    assert "of them padding" in plan["packing"]
    assert plan["epochs"] == pytest.approx(2, abs=0.2)
    text = gpt("train", *words, "--dry-run").out
    assert f"{manifest.documents} conversations, " in text and "training tokens trained on" in text


def test_rows_too_short_for_any_answer_are_refused(chatty: Any) -> None:
    with pytest.raises(DataError, match="fits in a row of 4 tokens, not even up to its first"):
        finish(chatty("data.seq_len=4", "train.tokens_per_step=16"))


def test_a_stride_is_refused(chatty: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.stride: 64 applies to windows of text"):
        finish(chatty("data.stride=64"))


@pytest.fixture
def base(prepared_corpus: Path) -> Iterator[str]:
    """A base model: a tiny run on text, in bytes."""
    place = Path("base")
    copy_folder(prepared_corpus / "data/tiny", place / "data/tiny")
    with contextlib.chdir(place):
        finish(load_config(None, settings("model.block_size=128", name="base")))
    yield "base/runs/base"


@pytest.mark.parametrize(
    "how",
    [(), ("model.lora.rank=2",), ("train.freeze=[wte, wpe, h.0]",)],
    ids=["all", "lora", "frozen"],
)
def test_a_base_model_learns_to_answer(chatty: Any, base: str, how: tuple[str, ...]) -> None:
    shape = ("n_layer", "n_head", "n_embd", "block_size")
    chosen = [word for word in CHATTY if not word.startswith(tuple(f"model.{k}" for k in shape))]
    words = [word for word in settings() if not word.startswith("model.")]
    config = load_config(
        None,
        [*words, *chosen, f"model.init_from={base}", "train.max_steps=30", "optim.lr=1e-2", *how],
    )
    losses = [event.loss for event in finish(config) if isinstance(event, StepDone)]
    assert sum(losses[-5:]) < (1 if how else 0.95) * sum(losses[:5])
    found = load_checkpoint(config.run_folder / "last.pt")
    before = load_checkpoint(Path(base) / "best.pt").model["wte.weight"]
    rows = found.model["wte.weight"]
    assert len(rows) == 259 and found.tokenizer["chat"] == [257, 258]
    assert not torch.equal(rows[257], rows[258])  # even where they stay as they were drawn
    if how:
        assert torch.equal(rows[:257], before)
    lines = (config.run_folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["val_loss"] < losses[0]


def test_a_sample_answers_the_prompt(chatty: Any) -> None:
    config = chatty("train.sample_every=6", "generate.prompt=what is ab", "generate.temperature=0")
    [sample] = [event for event in finish(config) if isinstance(event, Sampled)]
    path = str(config.run_folder / "last.pt")
    chat = Chat(Sampler(path, lambda run: load_config(None, (), {"device": "cpu"}, run)))
    answer = "".join(chat.ask("what is ab"))
    assert (sample.prompt, sample.text) == ("what is ab\n", answer)
