"""Sums do not depend on pieces or threads, seeds do not change between versions, and one_thread ends with its block."""

from __future__ import annotations

import math

import pytest
import torch

from emomerge.numerics import sums
from emomerge.numerics.seeds import cpu_seed, generator_of, key_of, seed_default_generators, seed_of
from emomerge.numerics.threads import one_thread


@pytest.mark.parametrize("n", [0, 1, 4095, 4096, 4097, 3 * 4096 + 5])
def test_sums_of_any_length_are_those_of_the_elements(n: int) -> None:
    x = torch.linspace(-1, 2, n, dtype=torch.float64)
    assert sums.inner(x, x + 1) == pytest.approx(math.fsum((x * (x + 1)).tolist()), abs=1e-9)
    assert float(sums.total(x.view(1, -1))) == pytest.approx(math.fsum(x.tolist()), abs=1e-9) if n else True
    assert math.fsum(sums.squared_row_lengths(x)) == pytest.approx(sums.square_sum(x), abs=1e-9)
    assert len(sums.row_sums(x)) == -(-n // sums.ROW)


def test_sums_do_not_depend_on_the_number_of_threads() -> None:
    x = torch.randn(3 * 2**20 + 11, generator=torch.Generator().manual_seed(0))
    found = sums.inner(x, x), sums.squared_row_lengths(x), sums.total(x.view(1, -1)).tolist()
    with one_thread():
        assert torch.get_num_threads() == 1
        assert found == (sums.inner(x, x), sums.squared_row_lengths(x), sums.total(x.view(1, -1)).tolist())


def test_the_number_of_threads_is_restored_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), one_thread():
        raise ZeroDivisionError
    assert torch.get_num_threads() == before


def test_seeds_equal_those_of_earlier_versions() -> None:
    assert seed_of("dropout", 0, 7) == 726927367887389693
    assert seed_of("a", 1) == int.from_bytes(key_of("a/1"), "little") >> 1
    assert generator_of("x", 3).initial_seed() == seed_of("x", 3)


def test_cpu_seed_restores_the_generator() -> None:
    seed_default_generators(5, torch.device("cpu"))
    expected = torch.rand(2)
    seed_default_generators(5, torch.device("cpu"))
    with cpu_seed(1):
        inside = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(inside, torch.rand(2, generator=torch.Generator().manual_seed(1)))
