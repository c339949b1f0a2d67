"""What each method must do whatever its arithmetic: fixed points, endpoints, spectra, the statistics of masks."""

import hashlib
import json
import math

import pytest
import torch

from emomerge.checkpoints import MemoryCheckpoint
from emomerge.errors import BadInput
from emomerge.merging import METHODS, merge
from emomerge.merging.methods.sparse import uniform


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def merged_tau(exact_run):
    """τ_m of runs over a base of zeros, one tensor called w."""

    def build(taus, method, **params):
        base = MemoryCheckpoint({"w": torch.zeros_like(taus[0])})
        merged = merge(base, [exact_run(base, {"w": tau}) for tau in taus], method=method, **params)
        json.dumps(merged.diagnostics(), allow_nan=False)
        return merged["w"]

    return build


OF_THEIR_OWN = {"greedy-soup", "metrics-weighted", "positioning", "fisher", "slerp", "nuslerp"}
"""Methods that need a held-out loss, further files, or exactly two runs."""
AVERAGES = ["mean", "agreement", "ties", "sce", "model-stock", "slerp", "nuslerp", "karcher", "multislerp", "tall-mask"]


@pytest.mark.parametrize("method", AVERAGES)
def test_two_equal_runs_are_their_own_average(merged_tau, method):
    tau = normal(0, 12, 7)
    params = {"density": 1.0} if method == "ties" else {}
    torch.testing.assert_close(merged_tau([tau, tau], method, **params), tau)


@pytest.mark.parametrize("method", sorted({*METHODS} - OF_THEIR_OWN))
@pytest.mark.parametrize("runs", [1, 3])
@pytest.mark.parametrize("shape", [(), (1,), (5, 1), (1, 5), (3, 4, 2)])
def test_any_shape_and_opposite_runs_give_something_finite(merged_tau, method, runs, shape):
    taus = [(-1.0) ** t * (1 + normal(7, *shape).abs()) for t in range(runs)]
    merged = merged_tau(taus, method)
    assert merged.shape == shape
    assert merged.isfinite().all()


# Spherical.


def test_slerp_ends_at_the_runs_and_keeps_the_length_between(merged_tau):
    a, b = normal(1, 400), normal(2, 400)
    a, b = a / a.norm(), b / b.norm()
    torch.testing.assert_close(merged_tau([a, b], "slerp", t=0), a)
    torch.testing.assert_close(merged_tau([a, b], "slerp", t=1), b)
    third = merged_tau([a, b], "slerp", t=1 / 3)
    assert third.norm().item() == pytest.approx(1, rel=1e-6)
    assert math.acos(a @ third) == pytest.approx(math.acos(a @ b) / 3, rel=1e-5)


@pytest.mark.parametrize("method", ["slerp", "nuslerp"])
def test_methods_of_two_runs_refuse_other_numbers(merged_tau, method):
    with pytest.raises(BadInput, match="slerp merges exactly 2 runs; found 3"):
        merged_tau([normal(i, 4) for i in range(3)], method)


def test_karcher_of_two_runs_is_the_middle_of_their_great_circle(merged_tau):
    a, b = normal(1, 300), 2 * normal(2, 300)
    middle = merged_tau([a / a.norm(), b / b.norm()], "slerp")
    length = (a.norm() + b.norm()) / 2
    torch.testing.assert_close(merged_tau([a, b], "karcher"), length * middle)


def test_karcher_balances_the_logarithms(merged_tau):
    """At the mean, the tangent vectors towards the runs cancel."""
    taus, weights = [normal(i, 50) + normal(9, 50) for i in range(4)], torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    m = merged_tau(taus, "karcher", weights=weights.tolist()).double()
    assert m.norm().item() == pytest.approx(float(sum(w * t.norm() for w, t in zip(weights, taus, strict=True))), rel=1e-5)
    m = m / m.norm()
    units = torch.stack([tau.double() / tau.double().norm() for tau in taus])
    dots = units @ m
    logs = (dots.acos() / dots.acos().sin())[:, None] * (units - dots[:, None] * m)
    assert (weights @ logs).norm() < 1e-5


def test_model_stock_is_t_times_the_mean(merged_tau):
    """Runs at pairwise cosine c: t = N·c/(1 + (N−1)c)."""
    taus = torch.eye(4, 9) + 0.5
    cosine = torch.nn.functional.cosine_similarity(taus[0], taus[1], dim=0)
    expected = 4 * cosine / (1 + 3 * cosine) * taus.mean(0)
    torch.testing.assert_close(merged_tau(list(taus), "model-stock"), expected)
    orthogonal = torch.eye(3, 5)
    assert torch.equal(merged_tau(list(orthogonal), "model-stock"), torch.zeros(5))


# Spectral.


def test_iso_c_flattens_the_spectrum_and_keeps_its_sum(merged_tau):
    taus = [normal(i, 20, 30) for i in range(3)]
    before, after = torch.linalg.svdvals(sum(taus)), torch.linalg.svdvals(merged_tau(taus, "iso-c"))
    torch.testing.assert_close(after, before.mean().expand(20), rtol=1e-4, atol=1e-5)


def test_iso_c_leaves_directions_alone_that_no_run_uses(merged_tau):
    """Adapters have a low rank; rounding must not be stretched to the length of a direction."""
    left, right = normal(0, 40, 3), normal(1, 3, 30)
    merged = merged_tau([left @ right, 2 * left @ right], "iso-c")
    assert torch.linalg.matrix_rank(merged, rtol=1e-3) == 3


def test_tsv_of_runs_in_directions_of_their_own_is_their_sum(merged_tau):
    taus = torch.zeros(3, 9, 9)
    for run in range(3):
        taus[run, 3 * run : 3 * run + 3, 3 * run : 3 * run + 3] = normal(run, 3, 3)
    torch.testing.assert_close(merged_tau(list(taus), "tsv"), taus.sum(0), rtol=1e-4, atol=1e-5)


def test_tsv_of_one_run_is_the_run(merged_tau):
    tau = normal(0, 8, 5)
    torch.testing.assert_close(merged_tau([tau], "tsv"), tau, rtol=1e-4, atol=1e-5)


# Sparse.


def hashed(name, run, seed, index):
    """`uniform`, one element at a time, in plain integers."""
    digest = hashlib.blake2b(f"{seed}/{run}/{name}".encode(), digest_size=8).digest()
    start, stride = (int.from_bytes(part, "little") for part in (digest[:4], digest[4:]))
    x = (index * (stride | 1) + start) % 2**32
    x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
    x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
    return ((x ^ (x >> 16)) >> 8) / 2**24


def test_masks_are_a_hash_of_seed_run_tensor_and_element():
    got = uniform(torch.empty(3, 5), "a.weight", 2, 9, offset=7)
    expected = [hashed("a.weight", 2, 9, 7 + i) for i in range(15)]
    assert got.flatten().tolist() == expected
    assert min(expected) >= 0
    assert max(expected) < 1


def test_masks_are_uniform_and_independent():
    x = torch.stack([uniform(torch.empty(200_000), name, run, 0) for name in "ab" for run in range(2)])
    assert x.mean(dim=1).sub(0.5).abs().max() < 0.003
    assert torch.corrcoef(x).fill_diagonal_(0).abs().max() < 0.01
    assert torch.corrcoef(torch.stack([x[0, 1:], x[0, :-1]]))[0, 1].abs() < 0.01
    assert x.histc(20, 0, 1).div(x.numel()).sub(0.05).abs().max() < 0.001


def test_a_mask_does_not_depend_on_the_other_tensors(exact_run):
    taus = {name: normal(i, 40) for i, name in enumerate("abc")}

    def merged(names, seed=0):
        base = MemoryCheckpoint({name: torch.zeros(40) for name in names})
        runs = [exact_run(base, {name: taus[name] for name in names})] * 2
        return merge(base, runs, method="dare-ties", seed=seed)

    assert torch.equal(merged("abc")["b"], merged("b")["b"])
    assert not torch.equal(merged("b")["b"], merged("b", seed=1)["b"])
    assert not torch.equal(merged("abc")["a"] != 0, merged("abc")["c"] != 0)


@pytest.mark.parametrize("method", ["dare-linear", "della-linear"])
def test_dropping_keeps_the_sum_in_expectation(merged_tau, method):
    tau = 1 + normal(0, 50, 4000).abs()
    merged = merged_tau([tau], method, density=0.3)
    assert (merged != 0).float().mean().item() == pytest.approx(0.3, abs=0.005)
    assert merged.mean().item() == pytest.approx(tau.mean().item(), rel=0.01)
    restored = merged_tau([tau], method, density=0.3, rescale="l1")
    assert restored.abs().sum().item() == pytest.approx(tau.abs().sum().item(), rel=1e-5)


def test_della_keeps_the_large_more_often(merged_tau):
    tau = torch.arange(1.0, 1001).expand(200, 1000)
    kept = (merged_tau([tau], "della", density=0.5, epsilon=0.3) != 0).float().mean(0)
    assert kept[:100].mean().item() == pytest.approx(0.2 + 0.03, abs=0.01)
    assert kept[-100:].mean().item() == pytest.approx(0.8 - 0.03, abs=0.01)
    with pytest.raises(BadInput, match="`epsilon` of della.*density 0.2, ε 0.3"):
        merged_tau([tau], "della", density=0.2, epsilon=0.3)


def test_breadcrumbs_lack_both_tails(merged_tau):
    tau = torch.arange(1.0, 11) * torch.tensor([1.0, -1.0] * 5)
    kept = merged_tau([tau], "breadcrumbs", density=0.5, gamma=0.2)
    assert kept.tolist() == [0, 0, 0, -4, 5, -6, 7, -8, 0, 0]


def test_sce_weighs_by_energy_and_erases_the_minority(merged_tau):
    taus = [torch.tensor([1.0, 1, 1]), torch.tensor([-2.0, 2, 2]), torch.tensor([2.0, -0.5, 2])]
    e = [3, 12, 8.25]
    expected = [(e[0] * 1 + e[2] * 2) / (e[0] + e[2]), (e[0] + 2 * e[1]) / (e[0] + e[1]), (e[0] + 2 * e[1] + 2 * e[2]) / sum(e)]
    torch.testing.assert_close(merged_tau(taus, "sce"), torch.tensor(expected))


def test_ties_takes_the_largest_or_the_count(merged_tau):
    taus = [torch.tensor([1.0, -1]), torch.tensor([3.0, -2]), torch.tensor([-1.0, 2.5])]
    common = {"method": "ties", "density": 1.0, "preset": "peft"}
    assert merged_tau(taus, aggregate="max", **common).tolist() == [3, -2]
    assert merged_tau(taus, aggregate="max", elect="count", **common).tolist() == [3, -2]
    assert merged_tau(taus, aggregate="sum", **common).tolist() == [4, -3]
    assert merged_tau(taus, weights=[2.0, 1, 1], **common).tolist() == [2.5, -2]


# Fisher.


def test_equal_information_gives_the_mean_and_a_run_that_knows_more_counts_more(tmp_path, exact_run):
    from safetensors.torch import save_file

    base = MemoryCheckpoint({"w": torch.zeros(4)})
    runs = [exact_run(base, {"w": torch.full((4,), x)}) for x in (1.0, 3.0)]
    save_file({"w": torch.tensor([1.0, 1, 0, 0])}, tmp_path / "p.safetensors")
    save_file({"w": torch.tensor([1.0, 3, 2, 0])}, tmp_path / "q.safetensors")
    files = [str(tmp_path / "p.safetensors"), str(tmp_path / "q.safetensors")]
    assert merge(base, runs, method="fisher", information=files)["w"].tolist() == [2, 2.5, 3, 2]


def test_information_must_fit(tmp_path, exact_run):
    from safetensors.torch import save_file

    base = MemoryCheckpoint({"w": torch.zeros(4)})
    run, file = exact_run(base, {"w": torch.ones(4)}), tmp_path / "f.safetensors"
    with pytest.raises(BadInput, match="a run without squared gradients: run; expected fisher.safetensors"):
        merge(base, [run], method="fisher")
    save_file({"w": torch.ones(3)}, file)
    with pytest.raises(BadInput, match=r"w in .*f.safetensors; expected \[4\]; found \[3\]"):
        merge(base, [run], method="fisher", information=[str(file)])
    save_file({"v": torch.ones(4)}, file)
    with pytest.raises(BadInput, match="no such tensor"):
        merge(base, [run], method="fisher", information=[str(file)])
    save_file({"w": torch.tensor([1.0, -1, 0, 0])}, file)
    with pytest.raises(BadInput, match="not negative: w in"):
        merge(base, [run], method="fisher", information=[str(file)])["w"]
