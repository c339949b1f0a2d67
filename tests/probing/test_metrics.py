"""Every metric on functions whose answer is known, and what each costs."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from emomerge.errors import BadInput
from emomerge.probing import METRICS, Perturbable, basin, landscape, reestimate_batch_norm, rms, sharpness, worst_case
from emomerge.probing.basics import agreement


class Quadratic(nn.Module):
    """L(w) = ½ (w−c)ᵀH(w−c) + gᵀ(w−c), times the batch."""

    def __init__(self, w, hessian, gradient=0.0, c=0.0):
        super().__init__()
        self.w = nn.Parameter(torch.as_tensor(w, dtype=torch.float64))
        self.hessian, self.gradient, self.c = torch.as_tensor(hessian), torch.as_tensor(gradient), c

    def forward(self, batch):
        step = self.w - self.c
        return batch * (0.5 * step @ self.hessian @ step + (self.gradient * step).sum())


def loss(model, batch):
    return model(batch), 1.0


def probe_of(model, reference=None, batches=(1.0,), **options):
    return Perturbable(model, loss, list(batches), reference or {"w": 1.0}, **options)


def random_quadratic(seed, n=20, slope=0.1):
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(n, n)))
    spectrum = np.append(rng.uniform(0, 0.7, n - 1), 1.0)
    return basis @ np.diag(spectrum) @ basis.T, slope * rng.normal(size=n)


def trust_region_maximum(hessian, gradient, radius):
    """max ½uᵀHu + gᵀu over ‖u‖ ≤ radius, by the secular equation ‖(μ − H)⁻¹g‖ = radius with μ > λmax."""
    spectrum, basis = np.linalg.eigh(hessian)
    g = basis.T @ gradient
    low, high = spectrum[-1], spectrum[-1] + np.linalg.norm(g) / radius + 1
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.linalg.norm(g / (middle - spectrum)) > radius else (low, middle)
    u = basis @ (g / (high - spectrum))
    return 0.5 * u @ hessian @ u + gradient @ u


# Worst case.


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("slope", [0.1, 3.0])
def test_the_l2_worst_case_of_a_quadratic_is_that_of_its_trust_region(seed, slope):
    hessian, gradient = random_quadratic(seed, slope=slope)
    probe = probe_of(Quadratic(np.ones(20), hessian, gradient, c=1.0))
    found = worst_case.worst_case(probe, norms=("l2",), balls=("base",), radii={"l2": (0.5,)})
    exact = trust_region_maximum(hessian, gradient, 0.5)
    assert found.values.item() == pytest.approx(exact, rel=0.01)
    assert found.values.item() <= exact * (1 + 1e-9)
    figures = found.summary["l2"]["0.5"]
    assert figures["gradient"] == pytest.approx(0.5 * np.linalg.norm(gradient))
    assert figures["excess"] == pytest.approx(exact - figures["gradient"], rel=0.01, abs=0.01 * exact)


def test_where_there_is_no_slope_twenty_steps_of_power_iteration_find_the_top_curvature_as_a_rule():
    ratios = []
    for seed in range(12):
        hessian, _ = random_quadratic(seed)
        probe = probe_of(Quadratic(np.ones(20), hessian, c=1.0))
        found = worst_case.worst_case(probe, norms=("l2",), balls=("base",), radii={"l2": (0.5,)})
        ratios.append(found.values.item() / (0.5 * 0.5**2))  # λmax = 1, the next at most 0.7
    assert np.median(ratios) > 0.999
    assert min(ratios) > 0.7  # a start nearly orthogonal to it
    assert max(ratios) <= 1 + 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_the_linf_worst_case_of_a_separable_function_is_at_a_corner(seed):
    rng = np.random.default_rng(seed)
    h, g = rng.uniform(0.1, 1, 12), rng.normal(size=12)
    probe = probe_of(Quadratic(np.ones(12), np.diag(h), g, c=1.0), {"w": 2.0})
    found = worst_case.worst_case(probe, norms=("linf",), balls=("base",), radii={"linf": (0.1,)})
    assert found.values.item() == pytest.approx(0.5 * 0.2**2 * h.sum() + 0.2 * np.abs(g).sum(), rel=1e-6)
    assert found.summary["linf"]["0.1"]["gradient"] == pytest.approx(0.2 * np.abs(g).sum())


def test_zero_weights_stay_zero_in_the_adaptive_balls():
    seen = []

    class Watched(Quadratic):
        def forward(self, batch):
            seen.append(self.w.detach().clone())
            return super().forward(batch)

    model = Watched([0.0, 2.0, -1.0, 0.0], np.eye(4), np.full(4, 0.3))
    found = worst_case.worst_case(probe_of(model), balls=("own",), radii={"l2": (0.5,), "linf": (0.1,)})
    assert np.isfinite(found.values).all()
    assert (found.values > 0).all()
    assert torch.stack(seen)[:, [0, 3]].abs().max() == 0
    assert torch.stack(seen)[:, 1].max() > 2.0


def test_the_worst_case_has_a_maximiser_for_each_batch_and_values_by_group():
    model = Quadratic(np.ones(6), np.eye(6), c=1.0)

    def groups(model, batch):
        return torch.stack([model(1.0) * batch, 3 * model(1.0) * batch]), [1.0, 3.0]

    probe = Perturbable(model, groups, [1.0, 5.0], {"w": 1.0})
    found = worst_case.worst_case(probe, radii={"l2": (0.1, 0.2), "linf": (0.1, 0.2)})
    assert found.values.shape == (2, 2, 2, 4)
    np.testing.assert_allclose(found.values[0, 0, 1], 0.5 * 0.2**2 * np.array([1, 3, 5, 15]), rtol=1e-6)


def test_a_worst_case_that_diverges_is_a_finding():
    class Cliff(Quadratic):
        def forward(self, batch):
            return super().forward(batch) + torch.log(1.2 - self.w.max()) * 0

    found = worst_case.worst_case(probe_of(Cliff(np.ones(3), np.eye(3), 1.0)), radii={"l2": (0.1, 2.0), "linf": (0.1, 2.0)})
    assert found.summary["l2"]["0.1"]["rise"] > 0
    assert found.summary["l2"]["2"]["rise"] is None
    assert found.summary["adaptive linf"]["2"]["finding"] == "diverged at radius 2"


def test_the_worst_case_refuses_half_precision():
    probe = Perturbable(nn.Linear(2, 2).to(torch.bfloat16), loss, [torch.ones(1, 2)], {"weight": 1.0})
    with pytest.raises(BadInput, match=r"parameter weight; expected float32; found torch\.bfloat16"):
        worst_case.worst_case(probe)


# Averages.


def test_adaptive_sharpness_of_a_quadratic():
    w, h = np.array([0.0, 1.0, -3.0]), np.array([1e6, 2.0, 0.5])
    probe = probe_of(Quadratic(w, np.diag(h)))
    found = sharpness.adaptive(probe, (0.1,), directions=2).values
    for number in range(2):
        z = probe.direction(number, "own")["w"].numpy()
        assert found[0, number, 0] == pytest.approx(0.5 * 0.1**2 * (h * z**2).sum(), rel=1e-9)
        assert z[0] == 0.0


class DeepLinear(nn.Module):
    def __init__(self, c=1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a, self.b = (nn.Linear(5, 5, bias=False).double() for _ in range(2))
        with torch.no_grad():
            self.a.weight.copy_(c * torch.randn(5, 5, generator=generator, dtype=torch.float64))
            self.b.weight.copy_(torch.randn(5, 5, generator=generator, dtype=torch.float64) / c)

    def forward(self, x):
        return self.b(self.a(x)).square().mean()


@pytest.mark.parametrize("c", [0.01, 7.0])
def test_adaptive_measures_do_not_see_a_rescaling_that_keeps_the_function(c):
    x = torch.linspace(-1, 1, 20, dtype=torch.float64).view(4, 5)
    plain, scaled = (Perturbable(m, loss, [x], rms(DeepLinear())) for m in (DeepLinear(), DeepLinear(c)))
    averages = [sharpness.adaptive(p, directions=2).values for p in (plain, scaled)]
    np.testing.assert_allclose(*averages, rtol=1e-6)
    radii = {"l2": (0.1,), "linf": (0.01,)}
    worst = [worst_case.worst_case(p, balls=("own",), radii=radii).values for p in (plain, scaled)]
    np.testing.assert_allclose(*worst, rtol=1e-6)
    shared = [sharpness.gaussian(p, (0.1,), 2).values for p in (plain, scaled)]
    assert abs(np.log(shared[0].mean() / shared[1].mean())) > 1  # the measure in one ball for all does see it


def test_baked_measures_do_not_see_how_an_adapter_is_factored():
    """A → RA, B → BR⁻¹ leaves W + BA, and with it all that is measured of the baked weights."""
    generator = torch.Generator().manual_seed(0)
    base, a, b, r = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((6, 6), (2, 6), (6, 2), (2, 2)))
    x, found = torch.randn(4, 6, generator=generator, dtype=torch.float64), []
    for delta in (b @ a, (b @ torch.linalg.inv(r)) @ (r @ a)):
        model = nn.Sequential(nn.Linear(6, 6, bias=False).double(), nn.Tanh())
        with torch.no_grad():
            model[0].weight.copy_(base + delta)
        probe = Perturbable(model, lambda m, x: (m(x).square().mean(), 1.0), [x], {"0.weight": 1.0})
        radii = {"l2": (0.5,), "linf": (0.01,)}
        found.append([sharpness.gaussian(probe, (0.1,), 2).values, worst_case.worst_case(probe, radii=radii).values.squeeze()])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("h", [0.01, 1.0, 30.0])
def test_the_basin_of_a_quadratic_has_its_closed_form_width(h):
    probe = probe_of(Quadratic(np.ones(50), h * np.eye(50), c=1.0), batches=(1.0, 3.0))
    found = basin.basin(probe, directions=3)
    for number in range(3):
        z = probe.direction(number)["w"].numpy()
        assert found.values[number] == pytest.approx(math.sqrt(2 * 0.1 / (2.0 * h * (z @ z))), rel=0.003)
    assert found.summary["width"] == pytest.approx(np.exp(np.log(found.values).mean()))
    assert "finding" not in found.summary


def test_a_basin_outside_its_bounds_or_that_diverges_is_a_finding():
    for h in (0.0, 1e9):
        found = basin.basin(probe_of(Quadratic(np.ones(5), h * np.eye(5), c=1.0)), directions=2).summary
        assert found["finding"] == "2 of 2 widths lie outside 0.001 … 10"

    class Cliff(Quadratic):
        def forward(self, batch):
            return super().forward(batch) + torch.log(1.5 - self.w.max()) * 0

    assert basin.basin(probe_of(Cliff(np.ones(50), 0 * np.eye(50))), directions=2).summary["width"] < 0.5


# Landscapes.


def test_barriers_of_a_double_well():
    class Well(nn.Module):
        def __init__(self, w):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([w], dtype=torch.float64))

        def forward(self, batch):
            return ((self.w.square() - 1).square() + 0.1 * self.w).sum()

    others = {"right": {"w": torch.tensor([1.0])}, "left too": {"w": torch.tensor([-1.0])}}
    found = landscape.barriers(probe_of(Well(-1.0)), others)
    pairs = {tuple(entry["between"]): entry for entry in found.summary}
    assert set(pairs) == {("model", "right"), ("model", "left too"), ("right", "left too")}
    assert pairs["model", "right"]["barrier"] == pytest.approx(1.0)
    assert pairs["right", "left too"]["barrier"] == pytest.approx(1.0)
    assert pairs["model", "left too"]["barrier"] == pytest.approx(0.0, abs=1e-7)
    assert pairs["model", "right"]["loss"][0] == pytest.approx(-0.1)
    assert found.values.shape == (3, 11, 1)


def test_the_ends_of_a_path_are_the_models_to_the_bit():
    torch.manual_seed(0)
    model, other = nn.Linear(9, 9), nn.Linear(9, 9)
    probe = Perturbable(model, lambda m, x: (m(x).square().mean(), 1.0), [torch.randn(5, 9)], rms(model))
    path = landscape.barriers(probe, {"other": dict(other.named_parameters())}).values[0]
    there = Perturbable(other, probe.loss, probe.batches, rms(model))
    assert (path[0] == probe.center_losses()).all()
    assert (path[-1] == there.center_losses()).all()


def test_the_plane_goes_through_its_corners_and_keeps_distances():
    base, third = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 3.0, 2.0])
    model = Quadratic([4.0, 4.0, 2.0], np.diag([1.0, 2.0, 5.0]))
    found = landscape.plane(probe_of(model), {"w": base}, {"run": {"w": third}}, size=9)
    corners = {name: np.array(point) for name, point in found.summary["corners"].items()}
    assert np.linalg.norm(corners["model"]) == pytest.approx(5.0)
    assert np.linalg.norm(corners["run"] - corners["model"]) == pytest.approx(math.sqrt(17))
    frame = np.stack([corners["model"], corners["run"]], axis=1)
    steps = np.stack([[3.0, 4.0, 0.0], [-1.0, 3.0, 0.0]], axis=1)
    for j, y in enumerate(found.summary["y"]):
        for i, x in enumerate(found.summary["x"]):
            w = base.numpy() + steps @ np.linalg.solve(frame, [x, y])
            assert found.summary["loss"][j][i] == pytest.approx(0.5 * w @ np.diag([1.0, 2.0, 5.0]) @ w)
    assert min(found.summary["x"]) < 0 < 5 < max(found.summary["x"])


def test_models_on_a_line_span_no_plane():
    probe = probe_of(Quadratic([1.0, 1.0], np.eye(2)))
    for third in ([2.0, 2.0], [0.0, 0.0], [1.0, 1.0]):
        with pytest.raises(BadInput, match="three models on a line span no plane: base, model and run"):
            landscape.plane(probe, {"w": torch.zeros(2)}, {"run": {"w": torch.tensor(third)}}, size=3)


def test_the_surface_has_directions_with_the_models_filters_and_leaves_vectors():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3))
    with torch.no_grad():
        model[0].weight[1] = 0
    kernel, vectors, kernels = model[0].weight.detach().clone(), [model[0].bias, model[1].weight], []

    def watch(module, args, out):
        kernels.append(module.weight.detach() - kernel)
        assert module.bias is vectors[0]
        assert model[1].weight is vectors[1]

    probe = Perturbable(model, lambda m, x: (m(x).mean(), 1.0), [torch.ones(1, 2, 2, 2)], rms(model))
    assert probe.is_swappable
    probe.center_losses()
    model[0].register_forward_hook(watch)
    found = landscape.surface(probe, size=3)
    assert found.values.shape == (3, 3, 1)
    assert not kernels[4].any()  # the middle
    right, up = kernels[5], kernels[7]
    torch.testing.assert_close(kernels[8], right + up)
    torch.testing.assert_close(kernels[0], -right - up)
    for step in (right, up):
        torch.testing.assert_close(step.flatten(1).norm(dim=1), kernel.flatten(1).norm(dim=1))
        assert not step[1].any()  # a filter of norm zero stays


def test_agreement_of_task_vectors():
    base = {"w": torch.tensor([1.0, 1.0, 1.0, 1.0])}
    steps = {"a": [1.0, 0.0, 2.0, 0.0], "b": [1.0, 1.0, -1.0, 0.0], "still": [0.0] * 4}
    found = agreement({name: {"w": base["w"] + torch.tensor(step)} for name, step in steps.items()}, base)
    assert found["labels"] == ["a", "b", "still"]
    assert found["cosines"][0][1] == found["cosines"][1][0] == pytest.approx(-1 / math.sqrt(15))
    assert found["sign_agreement"][0][1] == 0.5
    assert found["cosines"][0][0] == pytest.approx(1.0)
    assert found["cosines"][0][2] is None


# Batch normalisation.


def normalised():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4), nn.BatchNorm1d(4))


def test_batch_norm_is_reestimated_over_the_given_batches_and_nothing_else_changes():
    model, batches = normalised(), [torch.randn(8, 3) + 5 for _ in range(3)]
    weights = {name: p.clone() for name, p in model.named_parameters()}
    model[2].eval()
    assert reestimate_batch_norm(model, loss, batches) == 2
    hidden = [model[0](x).detach() for x in batches]
    torch.testing.assert_close(model[1].running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([h.var(0) for h in hidden]).mean(0))
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())
    assert [m.training for m in model] == [True, True, False, True, True]
    assert model[1].momentum == 0.1
    assert reestimate_batch_norm(nn.Linear(2, 2), loss, batches) == 0


def test_batch_norm_is_as_it_was_after_an_exception():
    model = normalised()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(KeyError):
        reestimate_batch_norm(model, lambda m, b: m(b) if b is not None else {}["x"], [torch.randn(8, 3), None])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training


# What each costs.

BATCHES = 3
COSTS = {
    # metric: options, forward passes a batch, backward passes a batch
    "loss": ({}, 1, 0),
    "gradient-norm": ({}, 1, 1),
    "noise-floor": ({}, 2, 0),
    "gaussian": ({}, 2 * 3 * 16, 0),
    "adaptive": ({}, 2 * 3 * 16, 0),
    "basin": ({}, 12 * 8, 0),
    "curve": ({}, 6, 0),  # of seven; α = 1 is the model itself
    "barriers": ({}, 3 * 11, 0),
    "plane": ({}, 441, 0),
    "surface": ({}, 441, 0),
    "worst-case": ({"norms": ("l2",)}, 20 * 3 * 2, 20 * 3 * 2),
}


@pytest.mark.parametrize("name", COSTS)
def test_costs_are_those_of_the_docstrings(name):
    forwards, backwards = 0, 0

    class Counting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            nonlocal backwards
            backwards += 1
            return gradient

    def counted(model, batch):
        nonlocal forwards
        forwards += 1
        return Counting.apply(model(batch)), 1.0

    model = Quadratic(np.full(2, 2.0), np.eye(2))
    probe = Perturbable(model, counted, [1.0] * BATCHES, {"w": 1.0})
    assert probe.is_swappable
    assert forwards == 2  # once a model
    if name not in ("loss", "gradient-norm", "noise-floor"):
        probe.center_losses()
    forwards = 0
    given = {"base": {"w": torch.zeros(2)}, "others": {"a": {"w": torch.tensor([1.0, 3.0])}, "b": {"w": torch.ones(2)}}}
    options, forward, backward = COSTS[name]
    METRICS[name].function(probe, **{need: given[need] for need in METRICS[name].needs}, **options)
    assert (forwards, backwards) == (forward * BATCHES, backward * BATCHES)
    pairs = 3 if name == "barriers" else 1  # a metric declares its cost for one pair
    assert pairs * METRICS[name].passes(options, BATCHES) == forwards + 2 * backwards
