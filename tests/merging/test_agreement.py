import pytest
import torch
from torch.nn.functional import cosine_similarity

from emomerge.checkpoints import MemoryCheckpoint
from emomerge.merging import merge


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def merged(taus, **options):
    """Merge runs over a base of zeros, of which each has two tensors."""
    base = MemoryCheckpoint({"a": torch.zeros(3, 4), "b": torch.zeros(len(taus[0]) - 12)})
    runs = [MemoryCheckpoint({"a": tau[:12].view(3, 4), "b": tau[12:]}) for tau in taus]
    found = merge(base, runs, method="agreement", names=[f"run {i}" for i in range(len(taus))], **options)
    return torch.cat([found["a"].flatten(), found["b"]]), found.diagnostics()["params"]["shares"]


def test_the_shares_are_cosines_to_the_mean_of_the_others_over_all_tensors():
    taus = normal(0, 50) + torch.tensor([0.2, 0.5, 1.0, 3.0])[:, None] * normal(1, 4, 50)
    total = taus.sum(0)
    cosines = torch.stack([cosine_similarity(tau, total - tau, dim=0) for tau in taus])
    tau, shares = merged(taus)
    assert shares == pytest.approx((cosines / cosines.sum()).tolist(), rel=1e-4)
    assert shares[3] == min(shares)
    torch.testing.assert_close(tau, torch.tensor(shares) @ taus)


def test_the_length_of_a_run_does_not_change_its_own_share():
    taus = normal(0, 50) + normal(1, 2, 50)
    assert merged([taus[0], 7 * taus[1]])[1] == pytest.approx([0.5, 0.5])


def test_a_run_against_the_others_is_left_out():
    one, other = normal(0, 50) + 0.1 * normal(1, 2, 50)
    tau, shares = merged([one, -0.5 * one, other])
    assert shares[1] == 0
    torch.testing.assert_close(tau, shares[0] * one + shares[2] * other)


@pytest.mark.parametrize("runs", [1, 2, 3])
def test_where_no_run_agrees_it_is_the_mean(runs):
    taus = torch.eye(3, 20)[:runs]
    assert merged(list(taus))[1] == pytest.approx([1 / runs] * runs)
    assert merged([torch.zeros(20)] * runs)[1] == pytest.approx([1 / runs] * runs)


def test_what_rounding_leaves_of_others_that_cancel_is_no_direction():
    tau = normal(0, 50)
    assert merged([normal(1, 50), tau, -tau])[1] == pytest.approx([1 / 3] * 3)
