"""Decoding: the same tokens however they are computed, together or alone, within the context."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gptcli.config import GenerateConfig, ModelConfig
from gptcli.errors import CheckpointError
from gptcli.generation import Decoding
from gptcli.generation.decode import StepGraph
from gptcli.model import GPT, KVCache


def make_model(vocab_size: int = 257, n_tokens: int | None = None, **changes: object) -> GPT:
    """Return a network with decided opinions."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, **changes}
    model = GPT(ModelConfig(**shape, vocab_size=vocab_size), n_tokens)
    model.init_weights(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)
    return model.eval()


def begin(
    model: GPT,
    prompt: list[int],
    config: GenerateConfig,
    numbers: tuple[int, ...] = (0,),
    *,
    eot: int = 256,
    seed: int = 1,
    logprobs: bool = False,
    replay: bool = False,
) -> Decoding:
    """Return a decoding with byte-like defaults."""
    return Decoding(
        model, prompt, config,
        ends=(eot,), seed=seed, samples=numbers, logprobs=logprobs, replay=replay,
    )  # fmt: skip


def sample(
    model: GPT, prompt: list[int], config: GenerateConfig, number: int = 0, **key: int
) -> list[int]:
    """Return the ids drawn for one sample."""
    return [drawn.token for drawn in begin(model, prompt, config, (number,), **key)]


def test_a_sample_is_a_function_of_seed_and_index() -> None:
    model, config = make_model(), GenerateConfig(max_new_tokens=12, temperature=1.5)
    one = sample(model, [1, 2], config, seed=7, number=0)
    torch.manual_seed(1)
    assert sample(model, [1, 2], config, seed=7, number=0) == one
    assert sample(model, [1, 2], config, seed=8, number=0) != one
    assert sample(model, [1, 2], config, seed=7, number=1) != one


def test_greedy_decoding_equals_recomputing_everything() -> None:
    model, config = make_model(), GenerateConfig(max_new_tokens=10, temperature=0)
    drawn = sample(model, [5, 6, 7], config, eot=-1)
    tokens = [5, 6, 7]
    with torch.no_grad():
        for _ in range(10):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1, :257].argmax()))
    assert drawn == tokens[3:]


def test_past_the_context_the_later_half_is_read_again() -> None:
    model, config = make_model(), GenerateConfig(max_new_tokens=40, temperature=0)
    drawn = sample(model, [5, 6, 7], config, eot=-1)
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
    assert len(sample(make_model(), list(range(16)), config, eot=-1)) == 3


def test_end_of_text_ends_it_and_is_not_yielded() -> None:
    model, config = make_model(), GenerateConfig(max_new_tokens=10, temperature=0)
    drawn = sample(model, [5], config, eot=-1)
    eot = drawn[3]
    assert sample(model, [5], config, eot=eot) == drawn[: drawn.index(eot)]


def test_padded_rows_of_the_vocabulary_are_never_drawn() -> None:
    model = make_model(vocab_size=320, n_tokens=257)
    with torch.no_grad():
        model.wte.weight[257:] *= 50
    drawn = sample(model, [5], GenerateConfig(max_new_tokens=12, temperature=2), eot=-1)
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
    for drawn in begin(model, [5, 6], config, tuple(together), eot=-1):
        together[drawn.sample].append(drawn.token)
    for number, tokens in together.items():
        assert sample(model, [5, 6], config, number, eot=-1) == tokens
        assert len(tokens) == 40


def test_a_text_that_ends_leaves_the_others_as_they_were() -> None:
    model, config = make_model(), GenerateConfig(max_new_tokens=12, temperature=1.5)
    decoding = begin(model, [5, 6], config, (0, 1, 2), eot=-1)
    found: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for drawn in decoding:
        found[drawn.sample].append(drawn.token)
        if drawn.sample == 1 and len(found[1]) == 3:
            decoding.end(1)
    assert len(found[1]) == 3
    for number in (0, 2):
        assert found[number] == sample(model, [5, 6], config, number, eot=-1)


def test_end_of_text_of_one_sample_ends_that_one() -> None:
    model, config = make_model(), GenerateConfig(max_new_tokens=12, temperature=1.5)
    whole = [sample(model, [5, 6], config, number, eot=-1) for number in range(3)]
    eot = whole[1][4]
    expected = [text[: text.index(eot)] if eot in text else text for text in whole]
    found: list[list[int]] = [[], [], []]
    for drawn in begin(model, [5, 6], config, (0, 1, 2), eot=eot):
        found[drawn.sample].append(drawn.token)
    assert found == expected


def test_a_repetition_penalty_counts_prompt_and_text() -> None:
    model = make_model()
    greedy = GenerateConfig(max_new_tokens=12, temperature=0)
    assert len(set(sample(model, [5, 6], greedy, eot=-1))) < 12
    strong = greedy.model_copy(update={"repetition_penalty": 1e6})
    found = sample(model, [5, 6], strong, eot=-1)
    assert len({5, 6, *found}) == 14
    assert found != sample(model, [5, 6], greedy, eot=-1)


def test_log_probabilities_are_the_network_s_own() -> None:
    model = make_model()
    config = GenerateConfig(max_new_tokens=5, temperature=0.3, top_k=2)
    found = list(begin(model, [5, 6], config, eot=-1, logprobs=True))
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
        sample(model, [5], GenerateConfig(max_new_tokens=2))


@pytest.mark.parametrize(
    "changes", [{}, {"position": "rope", "n_kv_head": 1, "norm": "rmsnorm", "qk_norm": True}]
)
@pytest.mark.parametrize("temperature", [0.0, 20.0])
def test_a_recorded_step_draws_the_same_tokens(
    changes: dict[str, object], temperature: float
) -> None:
    model = make_model(17, **changes)
    config = GenerateConfig(max_new_tokens=40, temperature=temperature)  # past the context
    how = {"numbers": (0, 1, 2, 3, 4), "eot": 3}
    plain = list(begin(model, [5, 6, 7], config, **how))  # type: ignore[arg-type]
    replayed = list(begin(model, [5, 6, 7], config, **how, replay=True))  # type: ignore[arg-type]
    assert replayed == plain
    if temperature:
        lengths = {number: sum(t.sample == number for t in plain) for number in range(5)}
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
