import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emomerge.merging import thresholds
from emomerge.merging.thresholds import kth_magnitude, kth_smallest, largest

floats32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
floats64 = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=100, deadline=None)
@given(
    typed=st.one_of(
        st.tuples(st.just(torch.float32), st.lists(floats32, min_size=1, max_size=12)),
        st.tuples(st.just(torch.float64), st.lists(floats64, min_size=1, max_size=12)),
    ),
    zeros=st.integers(0, 3),
    piece=st.integers(1, 5),
    data=st.data(),
)
def test_the_kth_magnitude_is_that_of_a_sort(typed, zeros, piece, data):
    dtype, values = typed
    rows = torch.tensor([values, values[::-1], [0.0] * len(values)], dtype=dtype)
    numel = len(values) + zeros
    ranks = [data.draw(st.integers(1, numel)) for _ in rows]
    found = kth_magnitude(lambda: rows.split(piece, dim=1), ranks, numel=numel, dtype=dtype)
    padded = torch.cat([rows.abs(), torch.zeros(3, zeros, dtype=dtype)], dim=1).sort(dim=1).values
    assert found.tolist() == [padded[row, rank - 1].item() for row, rank in enumerate(ranks)]


def test_narrower_pieces_are_widened():
    found = kth_magnitude(lambda: [torch.tensor([[0.5, -3.0]])], [2], numel=2, dtype=torch.float64)
    assert found.dtype == torch.float64
    assert found.item() == 3.0


@pytest.mark.parametrize("numel", [0, 5])
def test_nothing_to_read_gives_zero(numel):
    assert kth_magnitude(list, [1, 1], numel=numel, dtype=torch.float32).tolist() == [0.0, 0.0]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**20), kind=st.sampled_from(["normal", "equal", "sorted", "heavy"]), data=st.data())
def test_the_kth_smallest_is_that_of_a_sort(seed, kind, data):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5000, generator=generator)
    x = {"normal": x, "equal": x.round(), "sorted": x.sort().values, "heavy": x.pow(9)}[kind].abs()
    k = data.draw(st.integers(1, len(x)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thresholds, "SAMPLE", 64)
        assert kth_smallest(x, k) == x.sort().values[k - 1]


@given(values=st.lists(st.integers(-3, 3), min_size=1, max_size=12), data=st.data())
def test_exactly_so_many_of_the_largest_and_of_equal_ones_the_first(values, data):
    x = torch.tensor(values, dtype=torch.float32)
    count = data.draw(st.integers(-1, len(values) + 1))
    order = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))
    expected = set(order[: max(count, 0)])
    split = data.draw(st.integers(0, len(values)))
    cut, rows = largest([x, x], [count, 1]), torch.stack([x, x])
    mask = torch.cat([cut.mask(rows[:, :split]), cut.mask(rows[:, split:], offset=split)], dim=1)
    assert {i for i, kept in enumerate(mask[0]) if kept} == expected
    assert {i for i, kept in enumerate(mask[1]) if kept} == {order[0]}
