"""Plans: what a run needs and takes, beforehand, with nothing written."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcli.config import Config
from gptcli.device import peak_flops, resolve_auto
from gptcli.errors import ConfigError
from gptcli.model import GPT
from gptcli.training import memory
from gptcli.training import plan as planning
from gptcli.training.events import Started
from gptcli.training.loop import train
from gptcli.training.memory import estimate_memory, model_size
from gptcli.training.optim import Optimizer
from gptcli.training.plan import (
    TimedSteps,
    flops_per_token,
    plan,
    plan_with_steps,
    time_steps,
)
from gptcli.training.weights import freeze
from support.runs import Tiny

EXTRAS = (
    "model.bigram_rows=97", "model.n_value_embd=2", "model.x0_scalars=true",
    "model.key_offset=true",
    "model.tie_embeddings=false",
)  # fmt: skip
OLD_KEYS = {
    "run_dir", "data_dir", "init_from", "revision", "parameters", "trained_parameters",
    "train_tokens", "val_tokens", "tokens_per_step", "grad_accum_steps", "max_steps", "epochs",
    "device", "dtype", "compile",
}  # fmt: skip


def parameters(config: Config) -> int:
    """Return the parameters of the tiny network on bytes."""
    return GPT(config.model.model_copy(update={"vocab_size": 257})).n_params()


def test_memory_has_its_parts(tiny: Tiny) -> None:
    config = tiny()
    n_params, memory = parameters(config), plan(config).memory
    assert memory.weights == memory.gradients == 4 * n_params
    assert memory.optimizer == pytest.approx(8 * n_params, rel=1e-3)  # and the counts of steps
    assert memory.total == memory.model + memory.activations + memory.program and memory.fits
    assert not replace(memory, available=memory.total - 1).fits
    assert not replace(memory, available=memory.total, processes=2).fits


def test_activations_grow_with_rows_blocks_and_length(tiny: Tiny) -> None:
    def kept(*overrides: str) -> int:
        return plan(tiny(*overrides)).memory.activations

    few, more = kept("train.micro_batch_size=8"), kept("train.micro_batch_size=16")
    assert 1.9 < more / few < 2.1
    assert kept("model.n_layer=4") > 1.4 * kept()
    assert kept("model.block_size=64") > 3 * kept()
    deep = ("model.n_layer=8",)
    assert kept(*deep, "train.activation_checkpointing=true") < kept(*deep) / 2


def test_activations_are_those_that_the_network_keeps(tiny: Tiny) -> None:
    config = tiny("model.n_layer=3", "model.n_embd=64", "model.block_size=128")
    model = GPT(config.model.model_copy(update={"vocab_size": 257}))
    model.init_weights(0)
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def size_of(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tokens = torch.zeros(4, 128, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(size_of, lambda tensor: tensor):
        loss = model(tokens, tokens).loss
    assert loss is not None
    # The estimate adds what one block's backward pass takes, and the loss.
    assert 1.0 < plan(config).memory.activations / sum(kept.values()) < 1.7


def test_shards_are_a_part_of_it_and_copies_are_not(tiny: Tiny) -> None:
    one = plan(tiny()).memory
    copies = plan(tiny("train.parallel=ddp"), 4)
    shards = plan(tiny("train.parallel=fsdp"), 4)
    assert (copies.spec.parallel, shards.spec.parallel) == ("ddp", "fsdp")
    assert copies.memory.weights == one.weights
    assert shards.memory.gradients == one.gradients // 4
    assert copies.spec.rows == 1 and copies.spec.grad_accum_steps == 1
    with pytest.raises(ConfigError, match="divided evenly"):
        plan(tiny(), 3)


def test_muon_keeps_one_average_of_the_matrices(tiny: Tiny) -> None:
    adam, muon = plan(tiny()).memory, plan(tiny("optim.name=muon")).memory
    assert adam.optimizer / 2 < muon.optimizer < adam.optimizer


def test_the_disk_is_that_of_the_checkpoints(tiny: Tiny) -> None:
    config = tiny()
    disk = plan(config).disk
    list(train(config))
    written = (config.run_folder / "last.pt").stat().st_size
    assert written * 0.9 < disk.checkpoint < written * 1.2
    assert disk.needed == 4 * disk.checkpoint and disk.held == 0
    assert plan(config).disk.held > 0 and plan(config).holds_run


def test_a_little_is_timed_and_nothing_is_written(tiny: Tiny) -> None:
    config = tiny()
    before = sorted(Path.cwd().rglob("*"))
    found, timing = plan_with_steps(config)
    assert sorted(Path.cwd().rglob("*")) == before
    assert timing is not None and timing.seconds_per_step > 0 and timing.step == 0
    spent = found.seconds_left(timing)
    assert spent["steps"] == pytest.approx(6 * timing.seconds_per_step)


def test_the_time_left_counts_all_that_a_run_does(tiny: Tiny) -> None:
    found = plan(tiny("train.max_steps=100", "train.eval_every=10", "train.eval_tokens=64"))
    spent = found.seconds_left(TimedSteps(50, 2.0, 64, 1.0, 0))
    assert spent["setting up"] == 1.0 and spent["steps"] == 100.0
    assert found.json()["evaluations"] == 10 and found.spec.eval_tokens == (64, 64)
    assert spent["evaluating"] == pytest.approx(5 * 128 * 2.0 / 64 / 3)
    assert spent["saving"] > 0 and spent["sampling"] > 0


@pytest.mark.parametrize(
    ("eval_tokens", "said"),
    [
        ("64", "2 times, 64 of 457 tokens of the validation split and 64 of 4,107 tokens of"),
        ("null", "2 times, 456 tokens of the validation split and 448 of 4,107 tokens of the"),
    ],
)
def test_the_plan_evaluates_on_as_many_tokens_as_the_run(
    gpt: Any, tiny_set: list[str], eval_tokens: str, said: str
) -> None:
    words = [*tiny_set, "-s", f"train.eval_tokens={eval_tokens}"]
    planned = gpt("train", *words, "--dry-run", "--json").json
    assert said in gpt("train", *words, "--dry-run").out
    assert planned["eval_tokens"] == gpt("train", *words, "--json").json["val_tokens"]


def test_steps_of_a_few_tokens_do_not_make_the_rest_of_a_run_look_dear(tiny: Tiny) -> None:
    few = plan(tiny("train.micro_batch_size=1", "model.block_size=1", "train.max_steps=1000"))
    spent = few.seconds_left(TimedSteps(0, 0.002, 1, 0.0, 0))
    assert spent["steps"] == pytest.approx(2.0)
    # As measured, an evaluation of all 20,000 tokens of a text took 0.6 s with such a step.
    assert spent["evaluating"] + spent["saving"] + spent["sampling"] < 50


def test_what_a_measured_plan_shows_is_advised_about(tiny: Tiny) -> None:
    found = plan(tiny("train.max_steps=100", "train.save_every=1"))
    assert not [one for one in found.advice if "saving" in one.what]
    assert found.measured_advice(None) == ()
    assert found.measured_advice(TimedSteps(0, 0.001, 64, 0.0, 0)) == ()
    slow = TimedSteps(0, 1.0, 64, 0.0, 0)
    spent = found.seconds_left(slow)
    assert spent["saving"] > sum(spent.values()) / 3
    [one] = found.measured_advice(slow)
    assert "saving 101 times takes about" in one.what
    assert any("saving" in told["what"] for told in found.json(slow)["advice"])


def test_a_rehearsal_goes_on_from_a_run_and_leaves_it_as_it_was(gpt: Any, tiny_set: Any) -> None:
    assert gpt("train", *tiny_set).code == 0
    folder = Path("runs/tiny")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    more = ("-s", "train.max_steps=20")
    found = gpt("train", *tiny_set, *more, "--resume", "--dry-run", "--json").json
    assert found["step"] == 6 and found["holds_run"]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_automatic_rows_are_found_out(tiny: Tiny) -> None:
    config = tiny("train.micro_batch_size=auto", "train.tokens_per_step=64")
    found, timing = plan_with_steps(config)
    assert timing is not None and found.spec.rows == 4


def test_the_json_result_keeps_its_keys(gpt: Any, tiny_set: list[str]) -> None:
    found = gpt("train", *tiny_set, "-s", "optim.warmup_steps=50", "--dry-run", "--json").json
    assert found.keys() >= OLD_KEYS
    assert found["memory_bytes"]["total"] > 0 and found["disk_bytes"]["free"] > 0
    assert found["seconds"] > 0 and found["measured_memory_bytes"] > 0
    assert found["parallel"] == "none" and found["peak_flops"] is None
    assert [one["set"] for one in found["advice"]] == ["-s optim.warmup_steps=0"]
    assert json.dumps(found)


def test_the_plan_is_readable_and_on_stdout(gpt: Any, tiny_set: list[str]) -> None:
    done = gpt("train", *tiny_set, "-s", "optim.warmup_steps=50", "--dry-run")
    labels = [line.split()[0] for line in done.out.splitlines() if not line.startswith(" ")]
    assert labels == ["run", "model", "machine", "data", "steps", "evaluation", "memory", "disk",
                      "advice", "time"]  # fmt: skip
    assert "an estimate" in done.out and " a step, " in done.out
    assert "\x1b" not in done.out and not Path("runs").exists()


def test_several_processes_are_planned_for(gpt: Any, tiny_set: list[str]) -> None:
    done = gpt("train", *tiny_set, "--gpus", "2", "--dry-run")
    assert "2 x cpu (ddp)" in done.out and "for each of 2 processes" in done.out
    assert gpt("train", *tiny_set, "--gpus", "3", "--dry-run").code == 2
    shards = ("-s", "train.parallel=fsdp")
    assert "not measured" in gpt("train", *tiny_set, *shards, "--gpus", "2", "--dry-run").out


def test_every_run_begins_with_the_short_form(tiny: Tiny, gpt: Any, tiny_set: list[str]) -> None:
    first = next(iter(train(tiny("optim.warmup_steps=50"))))
    assert isinstance(first, Started) and first.plan.memory.fits
    done = gpt("train", *tiny_set, "-s", "name=two", "-s", "optim.warmup_steps=50")
    assert "memory: about" in done.err and "an estimate" in done.err
    assert "disk: " in done.err and "advice: warm-up of 50 steps in a run of 6" in done.err
    assert "advice: " in Path("runs/two/log.txt").read_text()


def test_flops_of_gpt2_are_those_of_nanogpt() -> None:
    from gptcli.config.model import ModelConfig

    shape = ModelConfig(vocab_size=50257)
    counted = flops_per_token(shape, 124_439_808, 0, 1024)
    assert counted == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024
    untied = ModelConfig(vocab_size=50257, tie_embeddings=False)
    assert flops_per_token(untied, 124_439_808 + 50257 * 768, 0, 1024) == counted
    assert flops_per_token(shape, 124_439_808, 100_000_000, 1024) == counted - 200_000_000


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("NVIDIA A100-SXM4-80GB", "float32", 156e12),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.5e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA A10G", "float16", 70e12),
        ("NVIDIA A10", "float16", 125e12),
        ("NVIDIA L4", "bfloat16", 121e12),
        ("Tesla T4", "float16", 65e12),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2e12),
        ("Some other card", "bfloat16", None),
        ("", "bfloat16", None),
    ],
)
def test_peaks_are_found_by_name(name: str, dtype: str, peak: float | None) -> None:
    assert peak_flops(name, dtype) == peak


@pytest.mark.parametrize(
    ("huge", "what"),
    [
        (["model.n_layer=1000", "model.n_embd=4096"], "201,"),
        (["train.micro_batch_size=1048576", "model.block_size=400"], "(rows: 1,048,576 x 1)"),
    ],
)
def test_what_no_memory_holds_is_planned_in_seconds_and_not_measured(
    gpt: Any, tiny_set: list[str], huge: list[str], what: str
) -> None:
    words = [part for word in [*huge, "train.max_steps=1"] for part in ("-s", word)]
    done = gpt("train", *tiny_set, *words, "--dry-run")
    assert done.code == 0, done.err
    assert what in done.out and "exceeds the available memory" in done.out
    assert "not measured: too little memory" in done.out
    started = gpt("train", *tiny_set, *words)
    assert started.code == 8 and "TB of memory" in started.err and "use a smaller" in started.err


def test_a_batch_grows_while_there_is_time(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny("model.block_size=128", "train.micro_batch_size=8")
    whole = time_steps(config)
    assert whole.measured_tokens == 8 * 128 and whole.seconds_per_step > 0
    monkeypatch.setattr(planning, "SECONDS", 0.0)
    assert time_steps(config).measured_tokens == 64  # the least, when there is none


def test_the_plan_is_said_before_anything_is_timed(tiny: Tiny) -> None:
    order: list[str] = []
    plan_with_steps(tiny(), on_plan=lambda found: order.append(str(found.spec.max_steps)))
    assert order == ["6"]
    open_rows = tiny("train.micro_batch_size=auto", "train.tokens_per_step=64")
    plan_with_steps(open_rows, on_plan=lambda found: order.append(f"{found.spec.rows} rows"))
    assert order == ["6", "4 rows"]


@pytest.mark.parametrize(
    "variant",
    [(), ("optim.name=muon",), ("train.freeze=[wte, h.1]",), ("model.mlp=swiglu",), EXTRAS],
)
def test_what_is_counted_of_one_block_is_that_of_all(tiny: Tiny, variant: tuple[str, ...]) -> None:
    config = tiny("model.n_layer=5", *variant)
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"vocab_size": 257})}
    )
    model, size = GPT(config.model), model_size(config)
    freeze(model, config.train.freeze)
    state = Optimizer(model, config.optim, torch.device("cpu")).bytes_by_name()
    assert size.parameters == model.n_params()
    assert size.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert size.optimizer_bytes == sum(state.values())


def test_what_is_only_looked_up_takes_no_operations(tiny: Tiny) -> None:
    plain = tiny("model.vocab_size=257", "model.tie_embeddings=false")
    extended = tiny("model.vocab_size=257", *EXTRAS)
    more = model_size(extended).parameters - model_size(plain).parameters
    assert more == 97 * 32 + 2 * 257 * 32 + 2
    per_token = [
        flops_per_token(config.model, model_size(config).parameters, 0, 16)
        for config in (plain, extended)
    ]
    assert per_token[1] - per_token[0] == 6 * 2  # a scalar for each block


def test_a_large_block_is_looked_at_without_its_weights(tiny: Tiny) -> None:
    config = resolve_auto(tiny("model.n_embd=64", "model.block_size=32"))
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"vocab_size": 257})}
    )
    real = estimate_memory(config, model_size(config), 4, "none", 1).activations
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "_LARGE_PROBE", 0)
        memory._saved_bytes.cache_clear()
        assert estimate_memory(config, model_size(config), 4, "none", 1).activations == real
