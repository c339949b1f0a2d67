"""geom_relation: the plain formula, any layout and dtype, no tensor of W's size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from emomerge.errors import BadInput
from emomerge.optim import EmoTion, geom_relation


def formula(w: Tensor, g: Tensor, eps: float = 1e-8) -> float:
    w, g = w.double(), g.double()
    return float((w * g).sum().abs() / (w.norm() * g.norm() + eps))


def pair(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    w, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return w.to(dtype), (0.3 * w + noise).to(dtype)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (100_003,), (3, 5), (300, 200), (2, 40_000), (4, 3, 50, 60), (0, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_is_the_formula(path: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    w, g = pair(*shape, dtype=dtype)
    rho = geom_relation(w, g)
    assert rho.shape == () and rho.device == w.device
    assert rho.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float(rho) == pytest.approx(formula(w, g), abs=1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("permutation", [(3, 2, 1, 0), (0, 2, 3, 1)])
def test_any_layout(path: str, permutation: tuple[int, ...]) -> None:
    w, g = pair(9, 8, 30, 31)
    w, g = w.permute(permutation), g.permute(permutation)
    assert not w.is_contiguous()
    assert float(geom_relation(w, g)) == pytest.approx(formula(w, g), abs=1e-6)
    assert float(geom_relation(w, g.contiguous())) == pytest.approx(formula(w, g), abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(scale=st.floats(-1e3, 1e3).filter(lambda x: abs(x) > 1e-3), seed=st.integers(0, 100))
def test_range_and_invariance(scale: float, seed: int) -> None:
    w, g = pair(40, 30, seed=seed)
    rho = float(geom_relation(w, g))
    assert 0 <= rho <= 1
    assert float(geom_relation(w, scale * g)) == pytest.approx(rho, abs=1e-5)
    assert float(geom_relation(g, w)) == pytest.approx(rho, abs=1e-6)
    assert 1 - 1e-5 <= float(geom_relation(w, scale * w)) <= 1


def test_zero_and_orthogonal(path: str) -> None:
    w, _ = pair(6, 6)
    assert float(geom_relation(w, torch.zeros_like(w))) == 0
    assert float(geom_relation(torch.tensor([1.0, 0.0]), torch.tensor([0.0, -2.0]))) == 0


class Allocations(TorchDispatchMode):
    """Records the largest output that is no view of the given tensors."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, t.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1_000_000,), (1000, 1000), (2, 500_000), (1000, 10, 10, 10)])
def test_allocates_nothing_of_the_weights_size(path: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    w, g = pair(*shape, dtype=dtype)
    for a, b in ((w, g), (w.transpose(0, -1), g.transpose(0, -1))):
        with Allocations(w, g) as seen:
            geom_relation(a, b)
        assert 0 < seen.largest <= 2**15
    with Allocations(w, g) as seen:
        w * g
    assert seen.largest == w.numel()  # the recorder does see such a tensor


def test_does_not_depend_on_the_number_of_threads(path: str) -> None:
    w, g = pair(200_001)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append((float(geom_relation(w, g)), float(EmoTion([w.clone()], geometry="l1").l1_norm())))
    finally:
        torch.set_num_threads(before)
    assert len(set(results)) == 1
    assert results[0][1] == pytest.approx(float(w.double().abs().sum()), rel=1e-6)


def test_shapes_must_agree() -> None:
    with pytest.raises(BadInput, match=r"expected \(2, 3\); found \(3, 2\)"):
        geom_relation(torch.ones(2, 3), torch.ones(3, 2))
