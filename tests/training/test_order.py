import torch
from hypothesis import given
from hypothesis import strategies as st

from emomerge.numerics.seeds import seed_of
from emomerge.training.order import BatchOrder


@given(rows=st.integers(1, 40), size=st.integers(1, 50), count=st.integers(1, 12), seed=st.integers(0, 5))
def test_every_epoch_holds_every_row_once(rows, size, count, seed):
    order = BatchOrder(rows, size, seed)
    stream = torch.cat([order.batch(i) for i in range(count)])
    assert len(stream) == size * count
    for epoch in range(len(stream) // rows):
        assert sorted(stream[epoch * rows : (epoch + 1) * rows].tolist()) == list(range(rows))


@given(rows=st.integers(1, 40), size=st.integers(1, 50), number=st.integers(0, 12))
def test_a_batch_does_not_depend_on_those_asked_for_before(rows, size, number):
    walked = BatchOrder(rows, size, 3)
    for i in range(number):
        walked.batch(i)
    assert torch.equal(walked.batch(number), BatchOrder(rows, size, 3).batch(number))


def test_keys_decide_the_order():
    orders = [BatchOrder(50, 50, *key).batch(0).tolist() for key in [(0,), (0,), (1,), (0, "sens")]]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert orders[0] != orders[3]


def test_seeds_are_stable_and_fit_torch():
    assert seed_of("dropout", 0, 7) == 726927367887389693
    torch.Generator().manual_seed(seed_of("dropout", 0, 7))
    assert len({seed_of("dropout", 0, micro) for micro in range(1000)}) == 1000
