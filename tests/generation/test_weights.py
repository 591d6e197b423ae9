"""Weights in few bits: the same network, up to the rounding of what they hold."""

import functools
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gptcli.config import GenerateConfig, ModelConfig
from gptcli.errors import ConfigError
from gptcli.generation import native
from gptcli.generation import weights as module
from gptcli.generation.product import Product, quantize, widened
from gptcli.generation.weights import prepare_for_decoding
from gptcli.model import GPT
from gptcli.settled import processor
from support.draws import ids_drawn


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder for these tests, in which matvec.c is built once."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "gptcli"


@pytest.fixture(params=["AVX2", "AVX512_CORE", "AVX512_CORE_BF16"])
def each_class(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Build for each class of processor, where this one can stand in for it."""
    flags = processor().split()
    if ("avx512f" not in flags and request.param != "AVX2") or "avx2" not in flags:
        pytest.skip("this processor cannot stand in for it")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", request.param)
    monkeypatch.setattr(native, "library", functools.cache(native.library.__wrapped__))


def make_model() -> GPT:
    """Return a network wide enough for every kernel."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 32, "vocab_size": 101}
    model = GPT(ModelConfig(**shape))
    model.init_weights(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model.eval()


TOKENS = torch.randint(0, 101, (2, 9), generator=torch.Generator().manual_seed(0))


def logits(model: GPT) -> Tensor:
    """Return what the network says of two texts."""
    with torch.no_grad():
        found: Tensor = model(TOKENS).logits
    return found


@pytest.mark.parametrize(
    ("dtype", "int8", "error"),
    [(torch.float32, False, 1e-6), (torch.float16, False, 2e-3), (torch.bfloat16, False, 2e-2),
     (torch.float32, True, 5e-2), (torch.bfloat16, True, 5e-2)],
)  # fmt: skip
@pytest.mark.parametrize("rows", [1, 8])
def test_logits_stay_within_the_rounding(
    dtype: torch.dtype, int8: bool, error: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LARGE", 0)
    expected, model = logits(make_model()), make_model()
    said = prepare_for_decoding(model, dtype, rows=rows, int8=int8)
    found = logits(model)
    assert float((found - expected).norm() / expected.norm()) < error
    assert ("int8" in said) == int8
    if dtype != torch.float32 or int8:
        assert not torch.equal(found, expected)  # they were exchanged


ERRORS = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.int8: 1.2e-2}


@pytest.mark.parametrize("is_built", [True, False])
@pytest.mark.parametrize("dtype", ERRORS)
def test_every_precision_multiplies_alike_with_and_without_a_compiler(
    dtype: torch.dtype, is_built: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_built:
        monkeypatch.setattr(native, "library", lambda: None)
    torch.manual_seed(3)
    for width in (128, 36):  # the second is one that matvec.c does not take
        layer = torch.nn.Linear(width, 97)
        weight, bias, x = layer.weight.detach(), layer.bias.detach(), torch.randn(3, 1, width)
        expected = torch.nn.functional.linear(x, weight, bias)
        found = Product(dtype, weight, bias)(x)
        assert found.shape == expected.shape and found.dtype == torch.float32
        assert float((found - expected).norm() / expected.norm()) < ERRORS[dtype]


has_compiler = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="there matvec.c is not built"
)


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("N", [8, 16, 17, 40])
def test_weights_that_lie_in_columns_and_few_rows_of_them_multiply_alike(
    N: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(4)
    weight, x = torch.randn(128, N).t(), torch.randn(33, 128)  # as GPT-2's on the Hub
    product, expected = Product(dtype, weight, None), x @ weight.T
    for n_rows in (1, 33):  # more than 32 are multiplied by torch
        error = (product(x[:n_rows]) - expected[:n_rows]).norm() / expected[:n_rows].norm()
        assert float(error) < (ERRORS[dtype] if n_rows == 1 else max(ERRORS[dtype], 1e-2))


@has_compiler
@pytest.mark.parametrize("dtype", ERRORS)
def test_a_row_has_the_same_product_alone_and_among_others(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    weight, bias, x = torch.randn(203, 192), torch.randn(203), torch.randn(33, 192)
    product = Product(dtype, weight, bias)
    alone = torch.cat([product(row[None]) for row in x])
    for n_rows in (2, 3, 5, 8, 9, 32):
        assert torch.equal(product(x[:n_rows]), alone[:n_rows]), n_rows
    assert torch.equal(product(x.t().contiguous().t()[:8]), alone[:8])  # rows that lie apart
    many = product(x)  # by torch's product of matrices
    assert float((many - alone).norm() / alone.norm()) < 1e-2
    assert float((alone - (x @ weight.T + bias)).norm() / alone.norm()) < ERRORS[dtype]


@has_compiler
@pytest.mark.usefixtures("each_class")
def test_int8_weights_multiply_numbers_rounded_to_16_bits() -> None:
    torch.manual_seed(2)
    for N, K in ((8, 64), (16, 128), (203, 192)):
        weight, x = torch.randn(N, K), torch.randn(19, K) * torch.logspace(-9, 9, K)
        x[3], x[5, 32:64] = 0, 0
        groups = x.view(19, -1, 32)
        step = groups.abs().amax(-1, keepdim=True) / 32767
        rounded = (groups / step.clamp(min=1e-38)).round() * step
        held = widened(*(part.double() for part in quantize(weight, 32)))
        expected = rounded.double().flatten(1) @ held.T
        product = Product(torch.int8, weight, None)
        scale = (rounded.double().flatten(1).abs() @ held.abs().T).clamp(min=1e-30)
        for n_rows in (1, 3, 8, 19):
            error = (product(x[:n_rows]) - expected[:n_rows]).abs() / scale[:n_rows]
            assert float(error.max()) < 1e-6, (N, K, n_rows)
        for value in (float("nan"), float("inf")):
            x[1, 7] = value
            found = product(x[:3])
            assert not found[1].isfinite().any() and found[[0, 2]].isfinite().all()


@has_compiler
@pytest.mark.usefixtures("each_class")
def test_each_class_of_processor_multiplies_alike() -> None:
    torch.manual_seed(1)
    weight, x = torch.randn(40, 64), torch.randn(6, 64)
    for dtype, error in ERRORS.items():
        found, expected = Product(dtype, weight, None)(x), x @ weight.T
        assert float((found - expected).norm() / expected.norm()) < error


@has_compiler
def test_threads_are_those_of_torch() -> None:
    assert native.library() is not None
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert len({line.split()[-1] for line in maps if "libgomp" in line or "libiomp" in line}) == 1


def test_a_machine_without_a_compiler_decodes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    for int8 in (False, True):
        model = make_model()
        said = prepare_for_decoding(model, torch.bfloat16, int8=int8)
        assert said.startswith("int8" if int8 else "bfloat16")
        assert float((logits(model) - logits(make_model())).norm()) > 0


@pytest.mark.parametrize(
    ("rows", "is_built", "multiplies", "expected"),
    [(1, True, True, "float16"), (8, True, True, "float16"), (9, True, True, "bfloat16"),
     (64, True, False, "float16"), (1, False, True, "float32"), (64, False, True, "bfloat16")],
)  # fmt: skip
def test_the_precision_of_large_models_follows_from_the_machine(
    rows: int, is_built: bool, multiplies: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_built and native.library() is None:
        pytest.skip("there is no C compiler here")
    monkeypatch.setattr(module, "LARGE", 0)
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda: multiplies)
    if not is_built:
        monkeypatch.setattr(native, "library", lambda: None)
    assert prepare_for_decoding(make_model(), rows=rows).split()[0] == expected


def test_a_cache_folder_that_cannot_be_written_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(native, "library", functools.cache(native.library.__wrapped__))
    model = make_model()
    prepare_for_decoding(model, torch.float16)
    assert float((logits(model) - logits(make_model())).norm()) > 0


@pytest.mark.parametrize("shape", [{"n_embd": 36}, {"n_embd": 32, "n_inner": 43}])
def test_int8_of_widths_that_matvec_does_not_take(shape: dict[str, int]) -> None:
    sizes = {"n_layer": 2, "n_head": 2, "block_size": 32, "vocab_size": 101, **shape}
    model = GPT(ModelConfig(**sizes)).eval()
    model.init_weights(2)
    expected = logits(model)
    assert "int8" in prepare_for_decoding(model, torch.float32, rows=3, int8=True)
    assert float((logits(model) - expected).norm() / expected.norm()) < 5e-2


@pytest.mark.parametrize("group", [None, 32])
def test_quantizing_errs_by_half_a_step_at_most(group: int | None) -> None:
    torch.manual_seed(0)
    weight = torch.randn(20, 96) * torch.logspace(-6, 3, 20)[:, None]
    weight[3] = 0
    whole, scales = quantize(weight, group)
    assert scales.shape == (20, 96 // (group or 96))
    error = (widened(whole, scales.float()) - weight).abs()
    step = scales.float().repeat_interleave(group or 96, 1)
    assert (error <= 0.51 * step + 127 * 2**-8 * step).all()
    assert whole[3].eq(0).all() and whole.abs().max() <= 127


def test_small_networks_decode_in_float32() -> None:
    model = make_model()
    assert prepare_for_decoding(model) == "float32"
    # Sums of matvec.c have another order.
    torch.testing.assert_close(logits(model), logits(make_model()), rtol=1e-5, atol=1e-5)


def test_decoding_with_other_weights_agrees_with_itself() -> None:
    model = make_model()
    prepare_for_decoding(model, torch.float16)
    config = GenerateConfig(max_new_tokens=40, temperature=0)
    assert len(ids_drawn(model, [3], config)) == 40


def test_int8_is_refused_where_it_is_slower() -> None:
    with torch.device("meta"):
        model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=40))
    with pytest.raises(ConfigError, match="int8: it is slower than 16 bits on meta"):
        prepare_for_decoding(model, torch.bfloat16, int8=True)
