"""Stochastic rounding returns only neighbours and is exact in expectation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from emomerge.numerics.rounding import PIECE, round_at_random, round_to, stochastic_round

HALVES = [torch.bfloat16, torch.float16]
HALF = pytest.mark.parametrize("dtype", HALVES)


def draw(x: Tensor, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return stochastic_round(x, dtype, torch.Generator().manual_seed(seed))


def every_value(dtype: torch.dtype) -> Tensor:
    """All 65536 of them."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


def finite_sorted(dtype: torch.dtype) -> Tensor:
    """Each finite value once, ascending, as float64."""
    values = every_value(dtype)
    return values[values.isfinite()].double().unique()


@HALF
def test_representable_values_are_unchanged(dtype: torch.dtype) -> None:
    values = every_value(dtype)
    for seed in range(3):
        rounded = draw(values.float(), dtype, seed)
        assert rounded.dtype == dtype
        assert torch.equal(rounded.isnan(), values.isnan())
        assert torch.equal(rounded[~values.isnan()], values[~values.isnan()])  # zeros, subnormals and infinities too


@HALF
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=50), st.integers(0, 2**32))
def test_only_neighbours_are_returned(dtype: torch.dtype, values: list[float], seed: int) -> None:
    x = torch.tensor(values)
    grid = finite_sorted(dtype)
    inside = x.abs() <= grid[-1]
    rounded = draw(x, dtype, seed)
    assert torch.equal(rounded[~inside], x[~inside].to(dtype))  # as in ordinary rounding
    x, rounded = x[inside].double(), rounded[inside].double()
    lower = grid[torch.searchsorted(grid, x, right=True) - 1]
    upper = grid[torch.searchsorted(grid, x)]
    assert ((rounded == lower) | (rounded == upper)).all()


@pytest.mark.parametrize(
    ("dtype", "x"),
    [(dtype, sign * x) for dtype in HALVES for sign in (1, -1) for x in (1 + 1e-4, 0.1, 1 / 3, 3e4 + 1, 2 - 2**-13, 7e-5)]
    + [(torch.float16, 3.1e-7), (torch.float16, -1e-9), (torch.bfloat16, 2e-38), (torch.bfloat16, 2.5e-40)],
)
def test_the_mean_is_exact(dtype: torch.dtype, x: float) -> None:
    count = 200_000
    values = torch.full((count,), x)
    rounded = draw(values, dtype).double()
    exact = values[0].double()
    grid = finite_sorted(dtype)
    lower, upper = grid[torch.searchsorted(grid, exact) - 1], grid[torch.searchsorted(grid, exact)]
    share = (exact - lower) / (upper - lower)
    error = (upper - lower) * (share * (1 - share) / count).sqrt()
    assert 0 < share < 1
    assert abs(rounded.mean() - exact) <= 5 * error
    if share * count > 20:  # else there may be no draw at all
        assert set(rounded.tolist()) == {lower.item(), upper.item()}


@HALF
def test_the_largest_values(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    step = largest - float(finite_sorted(dtype)[-2])
    x = torch.tensor([largest, largest + step / 4, largest + step / 2, largest + 0.75 * step, math.inf], dtype=torch.float64)
    x = torch.cat([x, -x]).float()
    for seed in range(20):
        assert torch.equal(draw(x, dtype, seed), x.to(dtype))  # no finite value becomes infinite by chance
    nearly = torch.full((1000,), largest - step / 2)
    assert set(draw(nearly, dtype).tolist()) == {largest, largest - step}


@HALF
def test_any_shape_and_layout(dtype: torch.dtype) -> None:
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    for t in (x.mT, x[:, ::2], x[0, 0], x[:0]):
        rounded = draw(t, dtype)
        assert rounded.shape == t.shape
        assert torch.allclose(rounded.float(), t, rtol=2 * torch.finfo(dtype).eps)


def test_the_same_generator_gives_the_same_bits() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(x, torch.bfloat16), draw(x, torch.bfloat16))
    assert not torch.equal(draw(x, torch.bfloat16), draw(x, torch.bfloat16, seed=1))


def test_draws_depend_on_seed_and_name_alone() -> None:
    x = torch.randn(3, PIECE, generator=torch.Generator().manual_seed(0))[:, 1:]  # several pieces, not contiguous
    first = round_at_random(x, torch.bfloat16, name="w", seed=0)
    torch.rand(5)
    assert torch.equal(first, round_at_random(x.clone(), torch.bfloat16, name="w", seed=0))
    assert not torch.equal(first, round_at_random(x, torch.bfloat16, name="v", seed=0))
    assert not torch.equal(first, round_at_random(x, torch.bfloat16, name="w", seed=1))
    assert first.shape == x.shape
    assert abs((first.double() - x).mean()) < 5e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.float8_e4m3fn])
def test_only_rounding_to_sixteen_bits_is_stochastic(dtype: torch.dtype) -> None:
    x = torch.randn(50, dtype=torch.float64)
    assert torch.equal(round_at_random(x, dtype, name="w", seed=0).double(), round_to(x, dtype).double())
    whole = torch.arange(20, dtype=torch.bfloat16)
    assert torch.equal(round_at_random(whole, torch.float16, name="w", seed=0), whole.half())
    assert round_at_random(torch.tensor(1.001), torch.bfloat16, name="w", seed=0).shape == ()
    assert round_at_random(torch.empty(0, 3), torch.bfloat16, name="w", seed=0).shape == (0, 3)
