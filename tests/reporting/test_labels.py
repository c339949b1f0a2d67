from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from emomerge.reporting import labels
from emomerge.reporting.labels import Box, place, spread

spots = st.tuples(st.floats(0, 700), st.floats(0, 430))


@settings(max_examples=30, deadline=None)
@given(st.lists(spots, min_size=1, max_size=18))
def test_labels_cover_neither_points_nor_each_other_and_stay_inside(points):
    texts = [f"artefact-{i}" for i in range(len(points))]
    boxes = [
        labels._box(p, t, o) for p, t, o in zip(points, texts, place(points, texts, 700, 430), strict=True) if o is not None
    ]
    for i, box in enumerate(boxes):
        assert box.left >= 0
        assert box.right <= 700
        assert box.top >= 0
        assert box.bottom <= 430
        assert not any(box.meets(other) for other in boxes[:i])
        assert not any(box.meets(Box(x, y, x, y)) for x, y in points)


def test_a_lone_label_sits_at_its_point():
    (offset,) = place([(100.0, 100.0)], ["a"], 200, 200)
    assert offset is not None
    assert offset.align == "left"
    assert not offset.far


def test_a_label_without_room_is_left_out():
    assert place([(5.0, 5.0)], ["a very long name"], 10, 10) == [None]


@given(st.lists(st.floats(0, 300), min_size=1, max_size=30))
def test_spread_keeps_order_gap_and_range(positions):
    placed = spread(positions, 14, 0, 300)
    gap = min(14, 300 / max(len(positions) - 1, 1))
    ordered = sorted(placed)
    assert ordered[0] >= -1e-6
    assert ordered[-1] <= 300 + 1e-6
    assert all(b - a >= gap - 1e-6 for a, b in pairwise(ordered))
    pairs = sorted(zip(positions, placed, strict=True))
    assert [p for _, p in pairs] == sorted(p for _, p in pairs)


def test_spread_moves_nothing_that_has_room():
    assert spread([10.0, 100.0, 50.0], 14, 0, 300) == [10.0, 100.0, 50.0]
