"""Products of factors: the compiled code against torch's operations, which it must equal to the bit, however they are split."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from emomerge import native
from emomerge.checkpoints import MemoryCheckpoint, RoundingLoss, rounded_sum
from emomerge.checkpoints.factors import KERNELS, Factors, Term, compiled, summed

SHAPES = [(7, 3), (1, 16), (41, 131), (33, 640), (9, 5, 3, 3), (300, 1280), (37, 5003), (3, 131077)]
"""Rows shorter than a vector, of no whole number of vectors, of several panels, and longer than fit into the cache."""

needs_compiler = pytest.mark.skipif(native.library(KERNELS) is None, reason="no C compiler")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def factors(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Factors:
    """Two terms over all rows and one over some, of different ranks, scales and strengths."""
    generator = torch.Generator().manual_seed(len(shape) + shape[0])
    columns = torch.Size(shape[1:]).numel()

    def term(rank: int, rows: int, *given: float) -> Term:
        a, b = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
        return Term(a.to(dtype), b.to(dtype), *given)

    some = max(1, shape[0] // 3)
    return Factors(shape, (term(5, shape[0], 0.3), term(16, some, 1.7, shape[0] - some, -0.6), term(1, shape[0], 2.0, 0, 0.25)))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bits_are_those_of_torch_for_any_number_of_threads(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    given = factors(shape, dtype)
    expected = given._by_torch()
    assert expected.shape == shape and expected.abs().min() < expected.abs().max()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(given.dense(), expected)


@pytest.mark.parametrize("native_code", [False, pytest.param(True, marks=needs_compiler)])
def test_the_value(native_code: bool) -> None:
    given = factors((41, 131))
    total = torch.zeros(41, 131, dtype=torch.float64)
    for term in given.terms:
        rows = total[term.start : term.start + len(term.b)]
        rows += term.strength * term.scale * (term.b.double() @ term.a.double())
    found = given.dense() if native_code else given._by_torch()
    assert torch.allclose(found.double(), total, rtol=1e-5, atol=1e-5)


def test_sums_and_multiples() -> None:
    first, second = (Factors((20, 33), (factors((20, 33)).terms[place],)) for place in (0, 2))
    assert torch.equal(summed((20, 33), [first, second.times(-0.6)]).dense(), first.dense() + second.dense() * -0.6)
    assert torch.equal(first.times(2.0).dense(), 2 * first.dense())
    assert first.times(1.0) is first


@needs_compiler
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_sum_is_rounded_as_with_the_dense_change(shape: tuple[int, ...], stored: torch.dtype) -> None:
    given = factors(shape)
    base, found = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(stored), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        loss = RoundingLoss(MemoryCheckpoint({}))
        rounded = rounded_sum(base, given, torch.float16, loss)
        assert rounded is not None and torch.equal(rounded, (base.float() + given.dense()).half())
        found.append(loss.figures())
    other = RoundingLoss(MemoryCheckpoint({}))
    rounded_sum(base, given.dense(), torch.float16, other)
    assert found[0] == found[1] == found[2]
    assert found[0] == pytest.approx(other.figures(), rel=1e-9)


@needs_compiler
def test_memory_of_the_caller_is_used() -> None:
    given, out = factors((41, 131)), torch.empty(41, 131, dtype=torch.bfloat16)
    base = torch.zeros(41, 131)
    assert rounded_sum(base, given, torch.bfloat16, None, out) is out
    assert torch.equal(out, given.dense().bfloat16())


@needs_compiler
def test_what_is_not_finite_is_left_to_the_caller() -> None:
    given = factors((20, 33))
    given.terms[0].a[2, 7] = torch.inf
    assert compiled() and rounded_sum(torch.zeros(20, 33), given, torch.float32, None) is None
