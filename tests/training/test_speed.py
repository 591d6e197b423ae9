"""What makes a run fast changes nothing else: compiled, recomputed, read ahead, timed."""

from pathlib import Path

import pytest
import torch

from gptcli.checkpoint import load_checkpoint
from gptcli.config import Config
from gptcli.model import GPT
from gptcli.training.events import Finished, Started, StepDone, describe
from gptcli.training.loop import train
from gptcli.training.signals import StopRequest
from gptcli.training.spec import compiling_pays
from support.commands import Gpt
from support.runs import Tiny

EVERY_OPTION = (
    "compile=true", "dtype=bfloat16", "optim.name=muon", "optim.momentum=0.9", "model.norm=rmsnorm",
    "model.position=rope", "model.mlp=relu2", "model.qk_norm=true", "model.tie_embeddings=false",
    "model.zero_init=true", "model.bias=false", "model.dropout=0.1", "optim.schedule=wsd",
    "model.bigram_rows=97", "model.n_value_embd=1", "model.x0_scalars=true",
    "model.key_offset=true",
    "model.zero_init_head=true", "optim.embed_lr=1e-2", "optim.head_lr=1e-3",
    "optim.scalar_lr=2e-3",
    "train.activation_checkpointing=true", "train.micro_batch_size=2", "train.tokens_per_step=96",
    "train.max_steps=6", "train.eval_every=3", "train.log_every=1",
)  # fmt: skip


def losses(config: Config) -> list[float]:
    return [event.loss for event in train(config) if isinstance(event, StepDone)]


def test_resuming_is_exact_compiled_and_with_every_option(tiny: Tiny) -> None:
    whole, cut = (tiny(*EVERY_OPTION, f"name={name}") for name in ("whole", "cut"))
    events = list(train(whole))
    assert isinstance(events[0], Started) and events[0].spec.config.compile, events[0].notes
    stop = StopRequest()
    for event in train(cut, stop=stop):
        if isinstance(event, StepDone) and event.step == 2:
            stop.exit_code = 130
    event = list(train(cut, resume=True))[-1]
    one, other = (load_checkpoint(c.run_folder / "last.pt") for c in (whole, cut))
    assert [n for n in one.model if not torch.equal(one.model[n], other.model[n])] == []
    for name, state in one.optimizer.items():
        assert all(torch.equal(state[key], other.optimizer[name][key]) for key in state)
    assert isinstance(event, Finished) and event.spent["compiling"] > 0


def test_computing_activations_again_gives_the_same_bits(tiny: Tiny) -> None:
    sets = ("model.dropout=0.1", "train.max_steps=4", "train.eval_every=4")
    plain = losses(tiny(*sets, "name=plain"))
    again = losses(tiny(*sets, "name=again", "train.activation_checkpointing=true"))
    assert plain == again


def test_it_keeps_less_for_the_backward_pass(tiny: Tiny) -> None:
    config = tiny()
    shape = config.model.model_copy(update={"vocab_size": 257, "n_layer": 6})
    kept = []
    for recompute in (False, True):
        model = GPT(shape)
        model.init_weights(1)
        storages: dict[int, int] = {}

        def count(t: torch.Tensor, storages: dict[int, int] = storages) -> torch.Tensor:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        tokens = torch.zeros(2, config.seq_len, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            loss = model(tokens, tokens, recompute=recompute).loss
        assert loss is not None
        kept.append(sum(storages.values()) - 4 * model.n_params())
    assert kept[1] < 0.4 * kept[0]


def test_compiling_is_settled_by_the_length_of_a_run(tiny: Tiny) -> None:
    config = tiny("device=cpu", "model.n_layer=4", "model.n_embd=256", "model.n_head=4")
    assert not compiling_pays(config, 1_000_000_000)  # the C kernels are faster than compiled ones
    on_cuda = config.model_copy(update={"device": "cuda"})
    assert compiling_pays(on_cuda, 1_000_000_000)
    assert not compiling_pays(on_cuda, 10)
    assert not compiling_pays(on_cuda, 1_000_000_000, minutes=1)
    started, *_ = train(tiny("device=cpu", "compile=auto"))
    assert isinstance(started, Started) and not started.spec.config.compile
    assert load_checkpoint(Path("runs/tiny/last.pt")).config["compile"] is False


def test_a_compiler_that_fails_is_one_note_and_kept(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **more: object) -> object:
        raise RuntimeError("InvalidCxxCompiler: no working C++ compiler\nmore")

    monkeypatch.setattr(torch, "compile", lambda *args, **more: broken)
    config = tiny("compile=true", "train.max_steps=2")
    started = next(event for event in train(config) if isinstance(event, Started))
    assert not started.spec.config.compile
    assert any("not compiled: InvalidCxxCompiler" in note for note in started.notes)


def test_where_the_time_went_adds_up(tiny: Tiny) -> None:
    finished = list(train(tiny()))[-1]
    assert isinstance(finished, Finished)
    assert {"steps", "waiting for data", "evaluating", "saving", "sampling"} <= set(finished.spent)
    assert all(seconds >= 0 for seconds in finished.spent.values())
    text = describe(finished)
    assert text is not None and "time: " in text and "steps" in text


def test_a_short_run_imports_no_compiler(tiny_set: list[str], fork_server: Gpt) -> None:
    # Each takes most of a second to import.
    code = f"""
import sys
from gptcli.config import load_config
from gptcli.training.loop import train
for event in train(load_config(None, {tiny_set[1::2]!r})): pass
assert "torch._dynamo" not in sys.modules, "torch's compiler was imported"
assert "sympy" not in sys.modules, "what its compiler computes shapes with was imported"
"""
    done = fork_server(code=code)
    assert done.code == 0, done.err
