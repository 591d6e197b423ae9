"""Muon in stacks does what torch's does one by one."""

import pytest
import torch

from gptcli.training import muon as module
from gptcli.training.muon import muon, orthogonalized, stacks

CPU = torch.device("cpu")
SHAPES = [(48, 16), (16, 16), (64, 16), (16, 64)] * 3


def test_it_is_bit_for_bit_torchs() -> None:
    generator = torch.Generator().manual_seed(1)
    theirs = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES]
    ours = [p.detach().clone() for p in theirs]
    momenta = [torch.zeros_like(p) for p in ours]
    reference = torch.optim.Muon(
        theirs, lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(4):
        gradients = [torch.randn(s, generator=generator) for s in SHAPES]
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient
        reference.step()
        for stack in stacks(ours, CPU):
            muon(
                [ours[i] for i in stack], [gradients[i] for i in stack],
                [momenta[i] for i in stack], lr=0.02, momentum=0.9, weight_decay=0.1,
            )  # fmt: skip
    for one, other, momentum in zip(ours, theirs, momenta, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
        assert torch.equal(momentum, reference.state[other]["momentum_buffer"])


def test_stacks_hold_each_matrix_once_and_shapes_apart() -> None:
    matrices = [torch.empty(s) for s in SHAPES]
    found = stacks(matrices, CPU)
    assert sorted(i for stack in found for i in stack) == list(range(len(SHAPES)))
    for stack in found:
        assert len({tuple(sorted(matrices[i].shape)) for i in stack}) == 1


def test_stacks_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LARGEST_STACK", {"cpu": 2 * 48 * 16, "cuda": 1 << 28})
    small = [torch.empty(48, 16) for _ in range(5)]
    assert [len(stack) for stack in stacks(small, CPU)] == [2, 2, 1]
    large = [torch.empty(480, 160) for _ in range(3)]
    assert [len(stack) for stack in stacks(large, CPU)] == [1, 1, 1]
    assert [len(stack) for stack in stacks(large, torch.device("cuda"))] == [3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_become_nearly_orthonormal(dtype: torch.dtype) -> None:
    x = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    values = torch.linalg.svdvals(orthogonalized(x).float())
    assert 0.5 < float(values.min()) and float(values.max()) < 1.5
