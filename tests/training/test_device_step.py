"""A step on a device that computes nothing: torch's `meta`, which stands in for a GPU.

It has shapes and no values, so whatever asks for a value (`.item()`, `.cpu()`, `bool(tensor)`)
raises here; on a GPU it would wait for it. What is meant for CUDA runs on it as well.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gptcli.config.model import ModelConfig
from gptcli.config.schema import OptimConfig
from gptcli.model import GPT, loss, products
from gptcli.training.optim import Optimizer, clip_gradients

SHAPE = ModelConfig(n_layer=2, n_head=2, n_embd=64, block_size=32, vocab_size=97)
MODERN = SHAPE.model_copy(update={
    "position": "rope", "norm": "rmsnorm", "qk_norm": True, "mlp": "swiglu", "n_kv_head": 1,
    "tie_embeddings": False,
})  # fmt: skip


@pytest.fixture
def micro_batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.zeros(4, 32, dtype=torch.int64, device="meta")
    return tokens, tokens


@pytest.fixture(autouse=True)
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Multiply in bfloat16; there is no autocast for `meta`."""
    monkeypatch.setattr(loss, "products_dtype", lambda x: torch.bfloat16)
    yield


def test_values_cannot_be_asked_for() -> None:
    value = torch.zeros((), device="meta")
    for ask in (value.item, value.cpu, value.tolist, lambda: bool(value)):
        with pytest.raises((RuntimeError, NotImplementedError)):
            ask()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("config", [SHAPE, MODERN], ids=["gpt2", "modern"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_waits_for_nothing(
    config: ModelConfig,
    optimizer: str,
    recompute: bool,
    micro_batch: tuple[torch.Tensor, torch.Tensor],
) -> None:
    with torch.device("meta"):
        model = GPT(config)
    updates = Optimizer(model, OptimConfig(name=optimizer), torch.device("cuda"))  # type: ignore[arg-type]
    for _ in range(2):
        total = model(*micro_batch, recompute=recompute).loss
        torch.autograd.backward(total / 128)
        norm = clip_gradients(model.parameters(), 1.0)
        updates.step(1e-3)
        updates.zero_grad()
        assert total.device.type == norm.device.type == "meta"
        assert torch.stack((total.detach(), norm)).shape == (2,)


@pytest.mark.parametrize("vocab_size", [97, 128])
def test_the_heads_products_are_aligned(
    vocab_size: int, micro_batch: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    class Recorded:
        """torch as the loss sees it: torch's own rules for `meta` may call `torch.mm` as well."""

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        def mm(self, *operands: Any, **options: Any) -> torch.Tensor:
            made.append(torch.mm(*operands, **options))
            return made[-1]

    for module in (loss, products):
        monkeypatch.setattr(module, "torch", Recorded())
    with torch.device("meta"):
        model = GPT(SHAPE.model_copy(update={"vocab_size": vocab_size}))
    total = model(*micro_batch).loss
    torch.autograd.backward(total)
    assert made and all(n % 64 == 0 for product in made for n in product.shape)
    assert model.wte.weight.grad is not None
    assert model.wte.weight.grad.shape == (vocab_size, 64)


def test_an_evaluation_waits_for_nothing(
    micro_batch: tuple[torch.Tensor, torch.Tensor],
) -> None:
    with torch.device("meta"):
        model = GPT(SHAPE)
    with torch.no_grad():
        losses = model.token_losses(*micro_batch)
    assert losses.device.type == "meta" and losses.shape == (4, 32)


def test_the_padding_of_the_head_changes_no_loss_and_no_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loss, "products_dtype", lambda x: x.dtype)
    generator = torch.Generator().manual_seed(3)
    x, weight = torch.randn(2, 8, 16, generator=generator), torch.randn(97, 16, generator=generator)
    targets = torch.randint(97, (2, 8), generator=generator)
    targets[0, :3] = loss.IGNORED
    found = []
    for plain in (("cpu",), ()):  # without a plain device, the CPU takes the way of a GPU
        monkeypatch.setattr(loss, "_PLAIN", plain)
        given = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        total = loss.cross_entropy(*given, targets, 97)
        torch.autograd.backward(total)
        each = loss.token_losses(x, weight, targets, 97)
        found.append([total.detach(), each, *(tensor.grad for tensor in given)])
    for plainly, padded in zip(*found, strict=True):
        assert plainly.shape == padded.shape  # type: ignore[union-attr]
        assert torch.allclose(plainly, padded, rtol=1e-5, atol=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_loss_is_the_eager_one(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 128, generator=generator).to(dtype)
    logits[:, 97:] = -torch.inf
    targets = torch.randint(97, (12,), generator=generator)
    targets[3:5] = loss.IGNORED
    one, other = logits.clone(), logits.clone()
    ours, fused = loss._losses(one, targets, True), loss._fused_losses(other, targets, True)
    assert torch.allclose(ours, fused, atol=1e-5) and not ours[3:5].any() and not fused[3:5].any()
    assert torch.allclose(one.float(), other.float(), atol=1e-6 if dtype == torch.float32 else 4e-3)
    assert not other[:, 97:].any() and not other[3:5].any()
