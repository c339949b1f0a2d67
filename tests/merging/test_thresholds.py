import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emomerge.merging.thresholds import kth_magnitude

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
