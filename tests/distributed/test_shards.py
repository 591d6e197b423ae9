"""What ranks divide: a model (FSDP2), compiled or resumed, and the products of Muon."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from gptcli.config import Config, ModelConfig, load_config
from gptcli.device import init_runtime
from gptcli.distributed.process_group import process_group
from gptcli.model import GPT
from gptcli.training import muon
from gptcli.training.events import Started
from gptcli.training.loop import train
from gptcli.training.parallel import apply_fsdp, gradient_sync, to_local
from support.processes import Start

from .test_training import MODERN, end_of, finish, gap

EXTRAS = (
    "model.bigram_rows=97", "model.n_value_embd=1", "model.x0_scalars=true",
    "model.key_offset=true",
    "optim.embed_lr=1e-2",
)  # fmt: skip
SHARDS = (*MODERN, "train.parallel=fsdp")


def test_a_run_resumes_where_only_a_sample_is_due(
    tiny: Callable[..., Config], start: Start
) -> None:
    how = (*SHARDS, "train.save_every=2", "train.sample_every=2", "optim.schedule=constant")
    straight, cut = tiny(*how, name="straight"), partial(tiny, *how, name="cut")

    def stopped(rank: int) -> None:
        for event in train(cut()):
            if event.step == 2 and type(event).__name__ == "Saved":
                raise SystemExit(3)

    assert start(2, lambda rank: finish(straight)).wait() == [0, 0]
    start(2, stopped).wait()
    assert start(2, lambda rank: finish(cut(), resume=True)).wait() == [0, 0]
    assert gap(end_of(cut()), end_of(straight)) == 0


@pytest.mark.parametrize(
    ("kind", "checkpointing"), [("fsdp", "false"), ("fsdp", "true"), ("ddp", "true")]
)
def test_compiled_blocks_compute_what_others_do(
    tiny: Callable[..., Config],
    start: Start,
    kind: str,
    checkpointing: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Traced, split and differentiated as ever; only C++ is not generated, which takes minutes here.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    option = f"train.activation_checkpointing={checkpointing}"
    how = (*MODERN, *EXTRAS, f"train.parallel={kind}", option, "train.max_steps=4",
           "train.eval_every=2", "train.sample_every=2")  # fmt: skip
    eager, compiled = tiny(*how, name="eager"), tiny(*how, "compile=true", name="compiled")
    said: list[Started] = []

    def work(rank: int) -> None:
        said.extend(event for event in train(compiled) if isinstance(event, Started))
        assert said[0].spec.config.compile

    assert start(2, lambda rank: finish(eager)).wait() == [0, 0]
    assert start(2, work).wait() == [0, 0]
    assert gap(end_of(compiled), end_of(eager)) < 1e-4
    samples = [(run.run_folder / "samples.jsonl").read_text() for run in (eager, compiled)]
    assert samples[0] == samples[1]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_muon_divided_among_the_ranks_ends_where_one_process_does(
    tiny: Callable[..., Config], start: Start, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = (*MODERN, *EXTRAS, "optim.name=muon", "train.max_steps=4", f"train.parallel={kind}")
    alone, divided = tiny(*how, name="alone"), tiny(*how, name="divided")
    finish(alone)
    monkeypatch.setattr(muon, "_SHARED", 0)
    assert start(2, lambda rank: finish(divided)).wait() == [0, 0]
    assert gap(end_of(divided), end_of(alone)) < 1e-5


def test_gradients_that_are_accumulated_are_shards(start: Start) -> None:
    def work(rank: int) -> None:
        with process_group("cpu"):
            config = load_config(None, ["device=cpu", "dtype=float32", "compile=false"])
            model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=64))
            model.init_weights(1)
            apply_fsdp(model, init_runtime(config))
            tokens = torch.zeros(2, 16, dtype=torch.int64)
            with gradient_sync(model, False):
                torch.autograd.backward(model(tokens, tokens).loss)
            held = sum(to_local(p.grad).numel() for p in model.parameters() if p.grad is not None)
            assert 0 < held <= 0.6 * sum(p.numel() for p in model.parameters())

    assert start(2, work).wait() == [0, 0]
