"""The compiled sum against torch's operations, which it must equal to the bit."""

from __future__ import annotations

import pytest
import torch

from emomerge import native
from emomerge.checkpoints import MemoryCheckpoint, RoundingLoss, rounded_sum
from emomerge.checkpoints.native import KERNELS, PIECE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.skipif(native.library(KERNELS) is None, reason="no C compiler")


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("written", DTYPES)
def test_the_bits_and_the_loss(stored: torch.dtype, written: torch.dtype) -> None:
    torch.manual_seed(0)
    base = (torch.randn(3, PIECE // 2 + 7) * torch.logspace(-6, 3, PIECE // 2 + 7)).to(stored)
    delta = torch.randn(base.shape) * 1e-4
    delta[1, :50] = 0
    losses = [RoundingLoss(MemoryCheckpoint({})) for _ in range(2)]
    found = rounded_sum(base, delta, written, losses[0])
    expected = (base.float() + delta).to(written)
    losses[1].add(base, delta, expected)
    assert found is not None and torch.equal(found, expected)
    for ours, theirs in zip(losses[0].figures().values(), losses[1].figures().values(), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize(
    ("value", "dtype"), [(7e4, torch.float16), (float("nan"), torch.bfloat16), (float("inf"), torch.float32)]
)
def test_what_is_not_finite_is_left_to_the_caller(value: float, dtype: torch.dtype) -> None:
    delta = torch.zeros(3000)
    delta[2000] = value
    assert rounded_sum(torch.zeros(3000), delta, dtype, None) is None


def test_other_dtypes_are_left_to_the_caller() -> None:
    assert rounded_sum(torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), torch.float32, None) is None
