import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emomerge.checkpoints import MemoryCheckpoint
from emomerge.merging import merge, thresholds
from emomerge.merging.thresholds import Bracket, kth_magnitude, kth_smallest, largest, sample_step

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


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    kind=st.sampled_from(["normal", "equal", "zeros", "heavy", "two"]),
    n=st.integers(1, 3000),
    misled=st.booleans(),
    data=st.data(),
)
def test_a_bracket_finds_a_rank_or_says_that_it_does_not(seed, kind, n, misled, data):
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    x = {"normal": x, "equal": (4 * x).round(), "zeros": x * (x > 1), "heavy": x.pow(9), "two": x.sign()}[kind].abs()
    rank = data.draw(st.integers(1, n))
    patterns = x.numpy().view(np.int32)
    bracket = Bracket.of(patterns[:20] if misled else patterns[:: sample_step(n)], rank, n)
    for piece in patterns[: n // 2], patterns[n // 2 :]:
        inside = piece[(piece > bracket.low) & (piece < bracket.high)]
        counts = [(piece < bracket.low).sum(), (piece == bracket.low).sum(), (piece == bracket.high).sum(), len(inside)]
        bracket.add(counts, inside[: bracket.room])
    found = bracket.find(rank)
    ordered = x.sort().values
    value = ordered[rank - 1]
    if found is None:
        assert misled or n > 40
    else:
        below = int((x < value).sum())
        assert found == (value, int((x == value).sum()), rank - below)


def test_a_misled_search_takes_the_longer_way(monkeypatch):
    """Two of a thousand elements far from the rest, and a sample that holds only these."""
    monkeypatch.setattr("emomerge.merging.vectors.sample_step", lambda _: 500)
    monkeypatch.setattr("emomerge.merging.native.sample_step", lambda _: 500)
    base = MemoryCheckpoint({"w": torch.zeros(1000)})
    values = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    values[::500] = 100 + values[::500]
    runs = [MemoryCheckpoint({"w": values}), MemoryCheckpoint({"w": -values})]
    for preset in ("paper", "mergekit"):
        kept = merge(base, runs, method="ties", preset=preset, density=0.3).diagnostics()["mask_density"]
        assert all(share == pytest.approx(0.3, abs=0.0011) for share in kept.values())
