"""Cheap capacity: causal, the same however it is computed, and off unless it is asked for."""

import warnings
from functools import partial

import pytest
import torch

from gptcli.config import GenerateConfig
from gptcli.generation.decode import StepGraph
from gptcli.model import GPT, KVCache
from gptcli.model.extras import bigram_rows, offset_keys
from support.draws import draws
from support.models import N_TOKENS, tiny_model, tokens_of

KEYS: dict[str, dict[str, object]] = {
    "x0_scalars": {"x0_scalars": True},
    "n_value_embd": {"n_value_embd": 2},
    "bigram_rows": {"bigram_rows": 97},
    "key_offset": {"key_offset": True},
}
ALL = {key: value for changes in KEYS.values() for key, value in changes.items()}
CASES = [*KEYS.values(), ALL]
IDS = [*KEYS, "all"]


def make(**changes: object) -> GPT:
    shape = {"n_layer": 3, "n_kv_head": 2, "block_size": 16, "position": "rope", "qk_norm": True}
    return tiny_model(**{**shape, **changes})


@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("changes", CASES, ids=IDS)
@torch.no_grad()
def test_no_token_sees_a_later_one(changes: dict[str, object], position: str) -> None:
    model = make(**changes, position=position)
    tokens = tokens_of(2, 16)
    logits = model(tokens).logits
    for place in range(1, 16):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % N_TOKENS
        assert torch.equal(model(changed).logits[:, :place], logits[:, :place])
        assert not torch.equal(model(changed).logits[:, place], logits[:, place])


@pytest.mark.parametrize("changes", CASES, ids=IDS)
@torch.no_grad()
def test_each_changes_what_the_model_computes(changes: dict[str, object]) -> None:
    plain, other = make(), make(**changes)
    other.load_state_dict(plain.state_dict(), strict=False)
    assert not torch.equal(plain(tokens_of(1, 16)).logits, other(tokens_of(1, 16)).logits)


@pytest.mark.parametrize("changes", CASES, ids=IDS)
@torch.no_grad()
def test_a_fresh_model_computes_as_if_they_were_not_there(changes: dict[str, object]) -> None:
    if "key_offset" in changes:
        pytest.skip("which keys are read has no neutral beginning")
    plain = GPT(make().config)
    plain.init_weights(5)
    other = GPT(make(**changes).config)
    other.init_weights(5)
    assert torch.equal(plain(tokens_of(1, 16)).logits, other(tokens_of(1, 16)).logits)


@pytest.mark.parametrize("changes", CASES, ids=IDS)
@torch.no_grad()
def test_cached_logits_equal_uncached_ones(changes: dict[str, object]) -> None:
    model, tokens, cache = make(**changes), tokens_of(3, 16), KVCache(16)
    whole, spans = (
        model(tokens).logits,
        [(0, 1), (1, 6), (6, 9), *((i, i + 1) for i in range(9, 16))],
    )
    parts = [model(tokens[:, first:last], cache=cache).logits for first, last in spans]
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-4
    # And when the context slides, the cache begins again in the same memory.
    cache.length = 0
    parts = [model(tokens[:, 5:9], cache=cache).logits, model(tokens[:, 9:12], cache=cache).logits]
    assert (torch.cat(parts, 1) - model(tokens[:, 5:12]).logits).abs().max() < 1e-4


@pytest.mark.parametrize("changes", CASES, ids=IDS)
@torch.no_grad()
def test_a_recorded_step_computes_the_same_at_every_position(changes: dict[str, object]) -> None:
    model, tokens, cache = make(**changes), tokens_of(3, 16), KVCache(16)
    whole = model(tokens).logits
    model.next_logits(tokens[:, :4], cache)
    step = StepGraph(model, cache, 3)
    step._compute()  # a CUDA graph is warmed up so, with tokens that do not count
    for place in range(4, 16):
        logits = step(tokens[:, place - 1 : place + 1].tolist())
        assert (logits - whole[:, place]).abs().max() < 1e-4, place
        assert cache.length == place + 1


@pytest.mark.parametrize("changes", CASES, ids=IDS)
def test_samples_are_the_same_replayed_and_in_a_batch_past_the_context(
    changes: dict[str, object],
) -> None:
    model = make(**changes)
    config = GenerateConfig(max_new_tokens=40, temperature=1.0)

    def drawn(samples: tuple[int, ...], replay: bool) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {sample: [] for sample in samples}
        for one in draws(
            model, [1, 2, 3], config, ends=(7,), seed=3, numbers=samples, replay=replay
        ):
            found[one.row.number].append(one.token)
        return found

    plain = drawn((0, 1, 2), replay=False)
    assert drawn((0, 1, 2), replay=True) == plain
    assert drawn((1,), replay=False)[1] == plain[1]
    assert max(map(len, plain.values())) > 16


@pytest.mark.parametrize("recompute", [False, True])
def test_everything_learns_also_when_it_is_recomputed(recompute: bool) -> None:
    model = make(**ALL).train()
    tokens = tokens_of(2, 16)
    model(tokens, tokens.roll(-1, 1), recompute=recompute).loss.backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


@pytest.mark.parametrize("way", ["blocks", "trunk"])
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_it_learns_the_same(
    way: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Traced, split and differentiated; only C++ is not generated, which takes minutes.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    tokens = tokens_of(2, 16)

    def gradients(compiled: bool) -> dict[str, torch.Tensor]:
        torch._dynamo.reset()
        model = make(**ALL).train()
        runs = model
        if compiled and way == "blocks":  # as FSDP has them
            model.compile_blocks()
        elif compiled:  # as DDP has it
            runs = model.compiled(2)
        for _ in range(2):
            model.zero_grad()
            with warnings.catch_warnings(action="ignore"):
                runs(tokens, tokens.roll(-1, 1), recompute=recompute).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected, found = gradients(False), gradients(True)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-4), name


def test_pairs_are_hashed_evenly_and_by_order() -> None:
    first, second = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    pairs = torch.stack((first.flatten(), second.flatten()), dim=1)
    rows = bigram_rows(pairs, None, 1024)[:, 1]
    counts = torch.bincount(rows, minlength=1024)
    assert int(counts.min()) > 16 and int(counts.max()) < 256  # 64 each on average
    assert not torch.equal(rows, bigram_rows(pairs.flip(1), None, 1024)[:, 1])
    before = torch.tensor([[5]])
    assert torch.equal(
        bigram_rows(torch.tensor([[6, 7]]), before, 1024)[0],
        bigram_rows(torch.tensor([[5, 6, 7]]), None, 1024)[0, 1:],
    )


def test_half_of_each_key_is_that_of_the_token_before() -> None:
    keys = torch.arange(2.0 * 3 * 8).view(1, 2, 3, 8)
    moved = offset_keys(keys, None)
    late = [2, 3, 6, 7]
    early = [0, 1, 4, 5]
    assert torch.equal(moved[..., early], keys[..., early])
    assert torch.equal(moved[:, :, 1:, late], keys[:, :, :-1, late])
    assert not moved[:, :, 0, late].any()
