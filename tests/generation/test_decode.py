"""Decoding: the same tokens however they are computed, together or alone, within the context."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gptcli.config import GenerateConfig, ModelConfig
from gptcli.errors import CheckpointError
from gptcli.generation import Row, Rows
from gptcli.generation.decode import StepGraph
from gptcli.model import GPT, KVCache
from support.draws import draws, ids_drawn


def make_model(vocab_size: int = 257, n_tokens: int | None = None, **changes: object) -> GPT:
    """Return a network with decided opinions."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, **changes}
    model = GPT(ModelConfig(**shape, vocab_size=vocab_size), n_tokens)
    model.init_weights(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)
    return model.eval()


def test_a_sample_is_a_function_of_seed_and_index() -> None:
    model, config = make_model(), GenerateConfig(max_new_tokens=12, temperature=1.5)
    one = ids_drawn(model, [1, 2], config, seed=7, number=0)
    torch.manual_seed(1)
    assert ids_drawn(model, [1, 2], config, seed=7, number=0) == one
    assert ids_drawn(model, [1, 2], config, seed=8, number=0) != one
    assert ids_drawn(model, [1, 2], config, seed=7, number=1) != one


def test_greedy_decoding_equals_recomputing_everything() -> None:
    model, config = make_model(), GenerateConfig(max_new_tokens=10, temperature=0)
    drawn = ids_drawn(model, [5, 6, 7], config)
    tokens = [5, 6, 7]
    with torch.no_grad():
        for _ in range(10):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1, :257].argmax()))
    assert drawn == tokens[3:]


def test_past_the_context_the_later_half_is_read_again() -> None:
    model, config = make_model(), GenerateConfig(max_new_tokens=40, temperature=0)
    drawn = ids_drawn(model, [5, 6, 7], config)
    tokens, seen = [5, 6, 7], 0
    with torch.no_grad():
        for _ in range(40):
            if len(tokens) - seen > 16:
                seen = len(tokens) - 8
            logits = model(torch.tensor([tokens[seen:]])).logits[0, -1, :257]
            tokens.append(int(logits.argmax()))
    assert drawn == tokens[3:]
    assert len(drawn) == 40


def test_a_prompt_may_fill_the_context() -> None:
    config = GenerateConfig(max_new_tokens=3, temperature=0)
    assert len(ids_drawn(make_model(), list(range(16)), config)) == 3


def test_end_of_text_ends_it_and_is_not_yielded() -> None:
    model, config = make_model(), GenerateConfig(max_new_tokens=10, temperature=0)
    drawn = ids_drawn(model, [5], config)
    eot = drawn[3]
    assert ids_drawn(model, [5], config, ends=(eot,)) == drawn[: drawn.index(eot)]


def test_padded_rows_of_the_vocabulary_are_never_drawn() -> None:
    model = make_model(vocab_size=320, n_tokens=257)
    with torch.no_grad():
        model.wte.weight[257:] *= 50
    drawn = ids_drawn(model, [5], GenerateConfig(max_new_tokens=12, temperature=2))
    assert max(drawn) < 257


VARIANTS = {
    "gpt2": {},
    "modern": {"position": "rope", "norm": "rmsnorm", "qk_norm": True, "mlp": "swiglu",
               "bias": False, "n_kv_head": 1, "tie_embeddings": False},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_a_sample_is_the_same_alone_and_among_others(variant: str, temperature: float) -> None:
    model = make_model(**VARIANTS[variant])
    config = GenerateConfig(max_new_tokens=40, temperature=temperature)  # past the context
    together: dict[int, list[int]] = {number: [] for number in range(5)}
    for drawn in draws(model, [5, 6], config, numbers=range(5)):
        together[drawn.row.number].append(drawn.token)
    for number, tokens in together.items():
        assert ids_drawn(model, [5, 6], config, number) == tokens
        assert len(tokens) == 40


def test_a_text_that_ends_leaves_the_others_as_they_were() -> None:
    model, config = make_model(), GenerateConfig(max_new_tokens=12, temperature=1.5)
    rows, found = Rows(model), {number: list[int]() for number in range(3)}
    some = [Row([5, 6], config, (), seed=1, number=number) for number in range(3)]
    drawn = rows.join(some)
    for n_drawn in range(1, 13):
        for one in drawn:
            found[one.row.number].append(one.token)
        if n_drawn == 3:
            rows.leave(some[1])
        drawn = rows.step()
    assert len(found[1]) == 3
    for number in (0, 2):
        assert found[number] == ids_drawn(model, [5, 6], config, number)


def test_end_of_text_of_one_sample_ends_that_one() -> None:
    model, config = make_model(), GenerateConfig(max_new_tokens=12, temperature=1.5)
    whole = [ids_drawn(model, [5, 6], config, number) for number in range(3)]
    eot = whole[1][4]
    expected = [text[: text.index(eot)] if eot in text else text for text in whole]
    found: list[list[int]] = [[], [], []]
    for drawn in draws(model, [5, 6], config, numbers=range(3), ends=(eot,)):
        found[drawn.row.number].append(drawn.token)
    assert found == expected


def test_a_repetition_penalty_counts_prompt_and_text() -> None:
    model = make_model()
    greedy = GenerateConfig(max_new_tokens=12, temperature=0)
    assert len(set(ids_drawn(model, [5, 6], greedy))) < 12
    strong = greedy.model_copy(update={"repetition_penalty": 1e6})
    found = ids_drawn(model, [5, 6], strong)
    assert len({5, 6, *found}) == 14
    assert found != ids_drawn(model, [5, 6], greedy)


def test_log_probabilities_are_the_network_s_own() -> None:
    model = make_model()
    config = GenerateConfig(max_new_tokens=5, temperature=0.3, top_k=2)
    found = list(draws(model, [5, 6], config, n_top=0))
    tokens = [5, 6, *(drawn.token for drawn in found)]
    with torch.no_grad():
        log_p = model(torch.tensor([tokens])).logits[0, :, :257].log_softmax(-1)
    for place, drawn in enumerate(found):
        expected = float(log_p[1 + place, drawn.token])
        assert drawn.logprob == pytest.approx(expected, abs=1e-4)


def test_a_network_that_overflows_is_named() -> None:
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(CheckpointError, match="not finite"):
        ids_drawn(model, [5], GenerateConfig(max_new_tokens=2))


@pytest.mark.parametrize(
    "changes", [{}, {"position": "rope", "n_kv_head": 1, "norm": "rmsnorm", "qk_norm": True}]
)
@pytest.mark.parametrize("temperature", [0.0, 20.0])
def test_a_recorded_step_draws_the_same_tokens(
    changes: dict[str, object], temperature: float
) -> None:
    model = make_model(17, **changes)
    config = GenerateConfig(max_new_tokens=40, temperature=temperature)  # past the context

    def drawn(replay: bool) -> list[tuple[int, int | None]]:
        found = draws(model, [5, 6, 7], config, ends=(3,), numbers=range(5), replay=replay)
        return [(one.row.number, one.token) for one in found]

    plain = drawn(replay=False)
    assert drawn(replay=True) == plain
    if temperature:
        lengths = {number: sum(one == number for one, _ in plain) for number in range(5)}
        assert len(set(lengths.values())) > 2  # texts ended at several times


def test_a_recorded_step_has_the_same_shapes_at_every_position() -> None:
    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            seen[-1].append((str(func), getattr(out, "shape", None)))
            return out

    seen: list[list[object]] = []
    with torch.device("meta"):  # where what asks for a value raises
        model = make_model(position="rope")
    cache = KVCache(16)
    with torch.no_grad():
        model.next_logits(torch.zeros(2, 3, dtype=torch.int64, device="meta"), cache)
        step = StepGraph(model, cache, 2)
        for _ in range(4):
            seen.append([])
            with Shapes():
                step([[3, 1], [3, 2]])
    assert cache.length == 7
    assert len(seen[0]) > 20 and all(one == seen[0] for one in seen)
