"""Positioning seeks the lowest held-out loss in the span of the runs; of a quadratic that is known in closed form."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emomerge.checkpoints import MemoryCheckpoint
from emomerge.errors import BadInput
from emomerge.merging import merge, reference
from emomerge.merging.methods import positioning

D = 60


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Bowl:
    """½(θ − θ₀ − centre)ᵀH(θ − θ₀ − centre) + floor, with a count of how often it was asked."""

    def __init__(self, base, centre, hessian, floor=1.0):
        self.base, self.centre, self.hessian, self.floor = base, centre, hessian, floor
        self.calls = 0

    def of(self, tau):
        away = tau.double() - self.centre.double()
        return float(away @ self.hessian.double() @ away / 2) + self.floor

    def __call__(self, checkpoint):
        self.calls += 1
        return self.of(checkpoint["w"].double() - self.base["w"].double())


@pytest.fixture
def base():
    return MemoryCheckpoint({"w": normal(0, D), "steps": torch.tensor(3)})


@pytest.fixture
def make_runs(base, exact_run):
    return lambda taus: [exact_run(base, {"w": tau, "steps": None}) for tau in taus]


@pytest.fixture
def taus():
    return normal(1, D) + 0.5 * normal(2, 5, D)


@pytest.fixture
def bowl(base):
    """Its centre is none of the runs; curvatures from 0.01 to 1."""
    q = torch.linalg.qr(normal(3, D, D)).Q
    return Bowl(base, normal(1, D) + 0.3 * normal(4, D), q @ torch.logspace(-2, 0, D).diag() @ q.T)


def params_of(merged):
    return merged.diagnostics()["params"]


def test_the_lowest_point_of_a_quadratic_is_found(base, make_runs, taus, bowl):
    merged = merge(base, make_runs(taus), method="positioning", held_out_loss=bowl)
    best = reference.positioning(taus, bowl.centre, bowl.hessian)
    found, start = bowl.of(merged.delta("w", base)), min(bowl.of(tau) for tau in (*taus, taus.mean(0)))
    assert 0 <= found - bowl.of(best) < 0.02 * (start - bowl.of(best))
    torch.testing.assert_close(merged.delta("w", base).double(), best, rtol=0, atol=0.25 * float(best.std()))
    assert merged["steps"] is base["steps"]


def test_the_merge_is_the_sum_that_the_diagnostics_name(base, make_runs, taus, bowl):
    merged = merge(base, make_runs(taus), method="positioning", held_out_loss=bowl)
    params = params_of(merged)
    expected = reference.task_arithmetic(taus, torch.tensor(params["coefficients"]))
    assert torch.equal(merged.delta("w", base), expected)
    assert params["measured_loss"] == bowl(merged)
    assert params["predicted_loss"] == pytest.approx(params["measured_loss"], rel=1e-2)


def test_no_more_losses_are_measured_than_allowed(base, make_runs, taus, bowl):
    losses = [bowl(run) for run in make_runs(taus)]
    for evaluations in (0, 1, 7, 40):
        bowl.calls = 0
        merged = merge(
            base, make_runs(taus), method="positioning", evaluations=evaluations, held_out_loss=bowl, run_losses=losses
        )
        calls = bowl.calls
        assert calls == 1 + evaluations if evaluations < 10 else 1 + 10 < calls <= 1 + evaluations
        assert params_of(merged)["evaluations_used"] == calls
        assert bowl.of(merged.delta("w", base)) <= min(losses)


def test_more_evaluations_are_never_worse(base, make_runs, taus, bowl):
    found = [
        params_of(merge(base, make_runs(taus), method="positioning", evaluations=count, held_out_loss=bowl))["measured_loss"]
        for count in range(0, 40, 5)
    ]
    assert found == sorted(found, reverse=True)
    assert found[-1] < found[0]


@given(st.integers(0, 2**31), st.integers(1, 6), st.floats(0, 3), st.integers(0, 30))
@settings(max_examples=40)
def test_never_worse_than_the_best_run_and_the_mean(exact_run, seed, runs, noise, evaluations):
    base = MemoryCheckpoint({"w": normal(0, D)})
    taus = normal(seed, D) + normal(seed + 1, runs, D)
    generator = torch.Generator().manual_seed(seed + 2)
    known = {}

    def loss(checkpoint):
        w = checkpoint["w"]
        key = w.numpy().tobytes()
        rough = noise * float(torch.rand((), generator=generator))  # the same weights have the same loss
        return known.setdefault(key, float((w - base["w"]).cos().mean()) + rough)

    models = [exact_run(base, {"w": tau}) for tau in taus]
    mean = merge(base, models, method="task-arithmetic", weights=[1 / runs] * runs)
    rivals = [loss(model) for model in (*models, mean)]
    merged = merge(base, models, method="positioning", evaluations=evaluations, held_out_loss=loss)
    assert loss(merged) <= min(rivals)
    assert not any("worse" in warning for warning in merged.diagnostics()["warnings"])


def test_little_noise_does_little_harm(base, make_runs, taus, bowl):
    best = bowl.of(reference.positioning(taus, bowl.centre, bowl.hessian))
    start = min(bowl.of(tau) for tau in (*taus, taus.mean(0)))
    generator = torch.Generator().manual_seed(0)

    def noisy(checkpoint):
        return bowl(checkpoint) + 0.02 * (start - best) * float(torch.randn((), generator=generator))

    merged = merge(base, make_runs(taus), method="positioning", held_out_loss=noisy)
    assert bowl.of(merged.delta("w", base)) - best < 0.2 * (start - best)


def test_of_one_run_the_scale_is_found(base, make_runs, bowl):
    tau = normal(5, D)
    bowl.centre = 0.6 * tau
    merged = merge(base, make_runs([tau]), method="positioning", held_out_loss=bowl)
    assert params_of(merged)["coefficients"] == pytest.approx([0.6], abs=1e-3)


def test_collinear_runs_span_what_one_of_them_does(base, make_runs, bowl):
    tau, other = normal(5, D), normal(6, D)
    bowl.centre = 0.5 * tau + other
    taus = torch.stack([tau, 2 * tau, tau, other])
    merged = merge(base, make_runs(taus), method="positioning", held_out_loss=bowl)
    assert bowl.of(merged.delta("w", base)) - bowl.floor < 1e-3
    assert max(map(abs, params_of(merged)["coefficients"])) < 2


def test_runs_alike_but_for_rounding_are_not_played_off_against_each_other(base, make_runs, bowl):
    tau = normal(5, D)
    taus = tau + 1e-3 * normal(6, 3, D)
    merged = merge(base, make_runs(taus), method="positioning", held_out_loss=bowl)
    assert max(map(abs, params_of(merged)["coefficients"])) < 2


def test_runs_of_very_different_lengths_are_all_used(base, make_runs, taus, bowl):
    lengths = torch.tensor([1.0, 20, 0.1, 3, 1])
    losses = [
        params_of(merge(base, make_runs(some), method="positioning", evaluations=80, held_out_loss=bowl))["measured_loss"]
        for some in (taus, lengths.unsqueeze(1) * taus)
    ]
    best = bowl.of(reference.positioning(taus, bowl.centre, bowl.hessian))
    assert max(losses) - best < 0.05 * (min(map(bowl.of, taus)) - best)


def test_runs_that_did_not_move_are_left_alone(base, make_runs):
    merged = merge(base, make_runs(torch.zeros(3, D)), method="positioning", held_out_loss=lambda _: 2.0)
    assert torch.equal(merged["w"], base["w"])


def test_where_the_best_run_did_not_move_the_others_are_tried(base, make_runs, bowl):
    bowl.centre = 0.05 * normal(5, D)
    taus = torch.stack([torch.zeros(D), normal(5, D)])
    merged = merge(base, make_runs(taus), method="positioning", held_out_loss=bowl)
    assert params_of(merged)["coefficients"][1] == pytest.approx(0.05, abs=1e-3)


def test_where_nothing_is_better_than_a_run_the_merge_is_that_run_and_says_so(base, make_runs, taus, bowl):
    bowl.centre = taus[2]
    runs = make_runs(taus)
    merged = merge(base, runs, method="positioning", held_out_loss=bowl, names=list("abcde"))
    report = merged.diagnostics()
    assert report["params"]["coefficients"] == [0, 0, 1, 0, 0]
    assert report["params"]["start"] == "c"
    assert "predicted_loss" not in report["params"]
    assert report["warnings"] == ["no combination of the runs was better on held-out data than run c; the merge is that run"]
    assert torch.equal(merged["w"], runs[2]["w"])


def test_the_mean_is_the_start_where_it_is_best(base, make_runs, taus, bowl):
    bowl.centre = taus.mean(0)
    report = merge(base, make_runs(taus), method="positioning", held_out_loss=bowl).diagnostics()
    assert report["params"]["start"] == "mean"
    assert report["warnings"] == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("runs", [1, 3])
def test_tensors_of_any_shape_and_dtype_share_one_set_of_coefficients(exact_run, dtype, runs):
    shapes = {"scalar": (), "empty": (0, 3), "column": (5, 1), "cube": (3, 4, 2), "still": (4,)}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    base = MemoryCheckpoint({name: normal(1, *shape).to(dtype) for name, shape in shapes.items()})
    taus = [{name: normal(run, *shape).to(wide) for name, shape in shapes.items()} | {"still": None} for run in range(runs)]
    taus[-1]["cube"] = None

    def loss(checkpoint):
        return sum(float((checkpoint[name] - base[name] - 0.7 * taus[0][name]).double().square().sum())
                   for name in ("scalar", "column", "cube") if taus[0][name] is not None)  # fmt: skip

    merged = merge(base, [exact_run(base, tau) for tau in taus], method="positioning", held_out_loss=loss)
    c = torch.tensor(params_of(merged)["coefficients"], dtype=wide)
    assert c[0] == pytest.approx(0.7, abs=0.01)
    for name in shapes:
        moved = [weight * tau[name] for weight, tau in zip(c, taus, strict=True) if tau[name] is not None]
        expected = base[name].to(wide) + (sum(moved) if moved else 0)
        torch.testing.assert_close(merged[name].to(wide), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_coefficients_without_a_loss_are_passed_over(base, make_runs, taus, bowl, bad):
    start = min(bowl.of(tau) for tau in taus)

    def walled(checkpoint):
        loss = bowl(checkpoint)
        return loss if loss <= 1.1 * start else bad

    losses = [bowl(run) for run in make_runs(taus)]
    merged = merge(base, make_runs(taus), method="positioning", held_out_loss=walled, run_losses=losses)
    assert bowl(merged) < start


@pytest.mark.parametrize("losses", [None, [1.0] * 5])
def test_without_a_held_out_loss_a_recipe_is_asked_for(base, make_runs, taus, losses):
    with pytest.raises(BadInput, match=r"^positioning .*--recipe"):
        merge(base, make_runs(taus), method="positioning", run_losses=losses)


def test_a_run_without_a_finite_loss_is_named(base, make_runs, taus, bowl):
    with pytest.raises(BadInput, match="run lost.*nan"):
        merge(base, make_runs(taus), method="positioning", held_out_loss=bowl,
              run_losses=[1.0, math.nan, 1.0, 1.0, 1.0], names=["a", "lost", "c", "d", "e"])  # fmt: skip


def test_a_negative_count_is_refused(base, make_runs, taus, bowl):
    with pytest.raises(BadInput, match="`evaluations` of positioning"):
        merge(base, make_runs(taus), method="positioning", evaluations=-1, held_out_loss=bowl)


def test_the_bits_do_not_depend_on_the_threads(base, make_runs, taus, bowl):
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(params_of(merge(base, make_runs(taus), method="positioning", held_out_loss=bowl)))
    assert found[0] == found[1]


def test_losses_are_measured_with_all_threads(base, make_runs, taus, bowl):
    torch.set_num_threads(2)
    seen = set()

    def loss(checkpoint):
        seen.add(torch.get_num_threads())
        return bowl(checkpoint)

    merge(base, make_runs(taus), method="positioning", held_out_loss=loss)
    assert seen == {2}


def test_a_network_is_better_on_held_out_data_than_every_run_of_it():
    x, labels = normal(7, 200, 6), (normal(7, 200, 6) @ normal(8, 6, 3)).argmax(1)
    base = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    with torch.no_grad():
        for seed, p in enumerate(base.parameters()):
            p.copy_(0.3 * normal(seed, *p.shape))
    start = MemoryCheckpoint({k: v.clone() for k, v in base.state_dict().items()})

    def run(seed):
        base.load_state_dict(dict(start))
        rows = torch.randperm(100, generator=torch.Generator().manual_seed(seed))[:40]
        optimizer = torch.optim.SGD(base.parameters(), lr=0.5)
        for _ in range(25):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(base(x[rows]), labels[rows]).backward()
            optimizer.step()
        return MemoryCheckpoint({k: v.detach().clone() for k, v in base.state_dict().items()})

    def loss(checkpoint):
        weights = {name: checkpoint[name] for name in start}
        return float(torch.nn.functional.cross_entropy(torch.func.functional_call(base, weights, x[100:]), labels[100:]))

    runs = [run(seed) for seed in range(4)]
    with torch.no_grad():
        assert loss(merge(start, runs, method="positioning", held_out_loss=loss)) < min(map(loss, runs)) - 0.01


def test_the_fit_knows_gradient_and_hessian():
    a, g = normal(9, 3, 3).double(), normal(10, 3).double()
    h = a + a.T
    search = positioning.Search(lambda c: float(g @ c + c @ h @ c / 2))
    for c in 0.5 * normal(11, 40, 3).double():
        search.measure(c)
    search.record(torch.ones(3, dtype=torch.float64), math.inf)
    model = positioning.fit(search, torch.diag(torch.tensor([1.0, 2, 4], dtype=torch.float64)), 0.5)
    units = torch.tensor([0.5, 1, 2], dtype=torch.float64)  # of c in a step of u
    torch.testing.assert_close(model.g, units * (g + h @ search.best), rtol=0.02, atol=0.02)
    torch.testing.assert_close(model.h, units[:, None] * h * units, rtol=0.02, atol=0.02)


def test_the_radius_follows_a_narrow_bent_valley():
    def rosenbrock(c):
        x, y = c.tolist()
        return (1 - x) ** 2 + 100 * (y - x * x) ** 2

    search = positioning.Search(rosenbrock)
    search.measure(torch.tensor([-1.2, 1], dtype=torch.float64))
    positioning.descend(search, torch.eye(2, dtype=torch.float64), 120, min_gain=1e-6)
    assert search.lowest < 0.05


def test_the_trust_region_subproblem_is_solved():
    for seed in range(50):
        a, g = normal(seed, 4, 4).double(), normal(seed + 100, 4).double()
        model = positioning.Quadratic(g, a + a.T)
        u = positioning.lowest_within(model, 1.0)
        assert u.norm() <= 1 + 1e-9
        others = torch.nn.functional.normalize(normal(seed + 200, 2000, 4).double(), dim=1)
        others = others * torch.rand(2000, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert model.gain(u) >= max(model.gain(other) for other in others) - 1e-9
