"""Scoring: every token once, sums divided once, the same whatever the batches."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import gptcli.evaluation.score
from gptcli.config import Config, ModelConfig
from gptcli.config.windows import scoring_windows
from gptcli.device import init_runtime
from gptcli.errors import DataError
from gptcli.evaluation import TokenArray, evaluate, windows
from gptcli.model import GPT
from gptcli.model.loss import IGNORED

CPU = init_runtime(Config(device="cpu", dtype="float32"))


def make_model(n_tokens: int | None = None) -> GPT:
    """Return a tiny network whose predictions differ from token to token."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 31}
    model = GPT(ModelConfig(**shape), n_tokens)
    model.init_weights(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    return model


TOKENS = np.random.default_rng(0).integers(0, 31, 203).astype(np.uint16)


def slow_loss(model: GPT, tokens: np.ndarray, context: int, stride: int) -> tuple[float, int]:
    """Score token after token, each in the window that the definition names."""
    total, count = 0.0, 0
    for target in range(1, len(tokens)):
        index = 0 if target <= context else math.ceil((target - context) / stride)
        start = index * stride
        inputs = torch.from_numpy(tokens[start:target].astype(np.int64))[None]
        with torch.no_grad():
            logits = model(inputs).logits[0, -1]
        total -= float(logits.log_softmax(0)[int(tokens[target])])
        count += 1
    return total / count, count


@pytest.mark.parametrize(("context", "stride"), [(16, 16), (16, 5), (16, 1), (7, 3)])
def test_loss_equals_scoring_one_token_at_a_time(context: int, stride: int) -> None:
    model = make_model().eval()
    found = evaluate(model, TokenArray(TOKENS), CPU, context=context, stride=stride)
    assert found is not None
    expected, count = slow_loss(model, TOKENS, context, stride)
    assert found.tokens == count == len(TOKENS) - 1
    assert found.loss == pytest.approx(expected, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(expected), rel=1e-4)


@given(st.integers(2, 300), st.integers(1, 40), st.data())
def test_windows_score_every_token_once(n_tokens: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    window = windows(n_tokens, context, stride)
    scored: list[int] = []
    for index in range(scoring_windows(n_tokens, context, stride)[1]):
        found = window(index)
        assert 1 <= found.n_scored <= found.length <= context
        end = found.start + found.length
        scored += range(end - found.n_scored + 1, end + 1)
    assert scored == list(range(1, n_tokens))


def test_batches_do_not_change_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    whole = evaluate(model, TokenArray(TOKENS), CPU, context=16)
    monkeypatch.setattr(gptcli.evaluation.score, "_WIDEST", 1)
    single = evaluate(model, TokenArray(TOKENS), CPU, context=16)
    assert whole is not None and single is not None
    assert whole.loss == pytest.approx(single.loss, rel=1e-6)
    assert whole.tokens == single.tokens


def test_every_token_has_the_loss_that_cross_entropy_gives_it() -> None:
    model = make_model().eval()
    rows = torch.from_numpy(TOKENS[:32].astype(np.int64)).view(2, 16)
    targets = rows.roll(-1, 1).clone()
    targets[0, :5] = IGNORED
    with torch.no_grad():
        found = model.token_losses(rows, targets)
        logits = model(rows).logits
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    assert torch.allclose(found.flatten(), expected, rtol=1e-5, atol=1e-6)
    assert (found[0, :5] == 0).all()


def test_spans_add_up_to_the_whole() -> None:
    model = make_model()
    whole = evaluate(model, TokenArray(TOKENS), CPU, context=16, stride=5)
    parts = evaluate(
        model, TokenArray(TOKENS), CPU, context=16, stride=5, span_of=lambda places: places // 100
    )
    assert whole is not None and parts is not None
    assert parts.paired.tokens[:3].tolist() == [99, 100, 3]
    assert parts.loss == pytest.approx(whole.loss, rel=1e-12)


def test_max_tokens_scores_about_that_many_evenly_spaced() -> None:
    found = evaluate(make_model(), TokenArray(TOKENS), CPU, context=16, max_tokens=48)
    assert found is not None and found.tokens == 48


def test_mode_and_random_numbers_stay_as_they_were() -> None:
    model = make_model().train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    evaluate(model, TokenArray(TOKENS), CPU, context=16)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stop_ends_it_without_a_result() -> None:
    assert evaluate(make_model(), TokenArray(TOKENS), CPU, context=16, stopped=lambda: True) is None


def test_a_token_that_the_model_does_not_have_is_refused() -> None:
    model = make_model(n_tokens=30)  # the row of the last one is there, for reading it
    with pytest.raises(DataError, match="tokens that the model does not have"):
        evaluate(model, TokenArray(TOKENS), CPU, context=16)
