import json
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from emomerge.errors import BadInput
from emomerge.probing import METRICS, Ledger, Perturbable, hessian, probe, rms, verdict
from emomerge.probing.hessian.product import AGREEMENT, STEP, curvature
from emomerge.probing.hessian.vectors import combine, dots, project_out

BOTH = pytest.mark.parametrize("hvp", ["finite-difference", "autograd"])
EXACT = {"finite-difference": 1e-6, "autograd": 1e-10}
"""Relative error on a quadratic in float64."""


class Quadratic(nn.Module):
    """½·scale·wᵀHw + gᵀw in two tensors, the batch being (scale, weight)."""

    def __init__(self, matrix, where=1.0, dtype=torch.float64):
        super().__init__()
        self.matrix = torch.as_tensor(matrix, dtype=dtype)
        n = len(self.matrix)
        self.first, self.second = nn.Module(), nn.Module()
        self.first.weight = nn.Parameter(torch.full((n // 2,), where, dtype=dtype))
        self.second.weight = nn.Parameter(torch.full((n - n // 2,), where, dtype=dtype))

    def forward(self, scale):
        w = torch.cat([self.first.weight, self.second.weight])
        return 0.5 * scale * (w @ self.matrix @ w) + w.sum()


def scaled_loss(model, batch):
    scale, weight = batch
    return model(scale), weight


def quadratic(matrix, batches=((1.0, 1.0), (3.0, 3.0)), **options):
    """A probe whose Hessian is 2.5·matrix: batches of scale 1 and 3 weigh 1 and 3."""
    model = options.pop("model", None) or Quadratic(matrix, **options.pop("init", {}))
    return Perturbable(model, scaled_loss, list(batches), rms(model), **options)


def symmetric(values, seed=0):
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))
    return q @ np.diag(values) @ q.T


SPECTRUM = np.concatenate([[-3.0, -1.0], np.linspace(0.0, 1.0, 33), [5.0, 8.0, 13.0, 21.0, 34.0]])


@BOTH
def test_quadratic_ends_and_quadrature(hvp):
    probe = quadratic(symmetric(SPECTRUM))
    run = hessian.lanczos(probe, 40, hvp=hvp)
    assert run.largest.value == pytest.approx(2.5 * 34, rel=EXACT[hvp])
    assert run.smallest.value == pytest.approx(2.5 * -3, rel=EXACT[hvp])
    assert run.largest.residual < 85 * EXACT[hvp]
    np.testing.assert_allclose(run.largest.units, [34.0, 102.0], rtol=1e-5)
    np.testing.assert_allclose(run.weight, [0.25, 0.75])
    # Gauss's quadrature is exact for polynomials of a degree below twice the steps.
    short = hessian.lanczos(probe, 5, hvp=hvp)
    with curvature(probe) as matrix:
        start = matrix.draw("lanczos", 0).numpy()
    start = start / np.linalg.norm(start)
    nodes, weights = short.quadrature()
    for power in range(10):
        moment = start @ np.linalg.matrix_power(2.5 * symmetric(SPECTRUM), power) @ start
        assert weights @ nodes**power == pytest.approx(moment, rel=1e-5)


def test_density_moments():
    probe = quadratic(symmetric(SPECTRUM))
    found = hessian.density([hessian.lanczos(probe, 15, number=number) for number in range(40)], points=2001)
    nodes, weights = np.array(found["nodes"]), np.array(found["weights"])
    assert weights.sum() == pytest.approx(1)
    assert weights @ nodes == pytest.approx(2.5 * SPECTRUM.mean(), rel=0.2)
    assert weights @ nodes**2 == pytest.approx(2.5**2 * (SPECTRUM**2).mean(), rel=0.2)
    assert np.trapezoid(found["density"], found["eigenvalue"]) == pytest.approx(1, abs=1e-3)
    assert weights[nodes > 2.5 * 4].sum() == pytest.approx(5 / 40, rel=0.3)  # the five outliers' share


@BOTH
def test_trace_with_and_without_a_subspace(hvp):
    probe = quadratic(symmetric(SPECTRUM))
    plain = hessian.trace(probe, 64, hvp=hvp).summary()
    run = hessian.lanczos(probe, 9, hvp=hvp)
    deflated = hessian.trace(probe, 64, lanczos=run, hvp=hvp).summary()
    for found in (plain, deflated):
        assert abs(found["mean"] - 2.5 * SPECTRUM.sum()) < 3.5 * found["stderr"]
        assert found["n"] == 64
    assert deflated["stderr"] < plain["stderr"] / 5  # the subspace holds the outliers
    whole = hessian.trace(probe, 3, lanczos=hessian.lanczos(probe, 40, hvp=hvp), hvp=hvp).summary()
    assert whole["mean"] == pytest.approx(2.5 * SPECTRUM.sum(), rel=1e-6)  # nothing is left to chance


@BOTH
@pytest.mark.parametrize("steps", [None, 6])
def test_parts_of_the_trace_by_module(hvp, steps):
    matrix = symmetric(SPECTRUM)
    probe = quadratic(matrix)
    run = steps and hessian.lanczos(probe, steps, hvp=hvp)
    found = hessian.trace(probe, 200, lanczos=run, hvp=hvp)
    parts = found.modules()
    for name, part in (("first", matrix[:20, :20]), ("second", matrix[20:, 20:])):
        assert abs(parts[name]["mean"] - 2.5 * np.trace(part)) < 3.5 * parts[name]["stderr"]
    assert parts["first"]["mean"] + parts["second"]["mean"] == pytest.approx(found.summary()["mean"], rel=1e-9)


def test_blockwise_ends():
    matrix = symmetric(SPECTRUM)
    found = hessian.blockwise(quadratic(matrix), 20, tolerance=1e-9)
    assert found["first"].largest.value == pytest.approx(2.5 * np.linalg.eigvalsh(matrix[:20, :20])[-1], rel=1e-6)
    assert found["second"].largest.value == pytest.approx(2.5 * np.linalg.eigvalsh(matrix[20:, 20:])[-1], rel=1e-6)
    assert found["first"].smallest is None


@pytest.mark.parametrize(("ends", "most"), [("largest", 6), ("both", 9)])  # by the residual alone 6 and 9
def test_lanczos_stops_when_residual_and_gap_bound_the_error(ends, most):
    run = hessian.lanczos(quadratic(symmetric(SPECTRUM)), 40, tolerance=0.005, ends=ends)
    assert len(run.alpha) < most
    assert abs(run.largest.value - 85) <= min(run.largest.residual, 0.005 * 85)
    if ends == "both":
        assert abs(run.smallest.value + 7.5) <= min(run.smallest.residual, 0.005 * 85)


def test_lanczos_does_not_take_the_crowd_at_zero_for_an_end():
    values = np.concatenate([[-0.6], np.zeros(300), [21.0, 34.0]])
    run = hessian.lanczos(quadratic(symmetric(values)), 40, tolerance=0.005)
    assert run.smallest.value == pytest.approx(2.5 * -0.6, abs=0.005 * 85)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.0, 1.0, 3.0]), min_size=2, max_size=9), st.integers(0, 5))
def test_repeated_and_vanishing_eigenvalues(values, seed):
    probe = quadratic(symmetric(np.array(values), seed), seed=seed)
    run = hessian.lanczos(probe, 30)
    assert run.largest.value == pytest.approx(2.5 * max(values), abs=1e-5)
    assert run.smallest.value == pytest.approx(2.5 * min(values), abs=1e-5)
    assert hessian.trace(probe, 2, lanczos=run).summary()["mean"] == pytest.approx(2.5 * sum(values), abs=1e-4) or len(
        run.alpha
    ) < len(values)


class Linear(nn.Module):
    """Softmax regression, (3 classes, 4 inputs)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 12).sin().view(3, 4))

    def forward(self, x):
        return x @ self.weight.T


@BOTH
def test_softmax_regression_in_float32(hvp):
    x, y = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
    model = Linear()
    batches = [(x[:7], y[:7]), (x[7:], y[7:])]
    probe = Perturbable(model, lambda m, b: (F.cross_entropy(m(b[0]), b[1]), len(b[1])), batches, rms(model))
    p, x64 = model(x).softmax(1).detach().double(), x.double()
    blocks = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    expected = torch.einsum("nij,na,nb->iajb", blocks, x64, x64).reshape(12, 12).numpy() / 30
    run = hessian.lanczos(probe, 12, hvp=hvp)
    assert run.largest.value == pytest.approx(np.linalg.eigvalsh(expected)[-1], rel=1e-3)
    assert run.smallest.value == pytest.approx(0, abs=1e-3)
    trace = hessian.trace(probe, 2, lanczos=run, hvp=hvp).summary()["mean"]
    assert trace == pytest.approx(np.trace(expected), rel=2e-3)


class Factors(nn.Module):
    """½(abx − y)²: a function of ab alone."""

    def __init__(self, a, b):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(float(a), dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor(float(b), dtype=torch.float64))

    def forward(self, x, y):
        return 0.5 * (self.a * self.b * x - y) ** 2


@BOTH
@pytest.mark.parametrize(("a", "b"), [(1.0, 0.5), (10.0, 0.05), (0.0, 0.0)])
def test_deep_linear_and_zero_weights(a, b, hvp):
    x, y = 2.0, 3.0
    model = Factors(a, b)
    probe = Perturbable(model, lambda m, batch: (m(*batch), 1.0), [(x, y)], rms(model))
    off = 2 * a * b * x * x - x * y
    expected = np.linalg.eigvalsh([[b * b * x * x, off], [off, a * a * x * x]])
    run = hessian.lanczos(probe, hvp=hvp)
    assert [run.smallest.value, run.largest.value] == pytest.approx(expected, rel=1e-5, abs=1e-4)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).mean(1)


def attention_probe():
    model, generator = Attention(), torch.Generator().manual_seed(1)
    x, y = torch.randn(6, 8, 16, generator=generator), torch.arange(6) % 3
    return Perturbable(model, lambda m, b: (F.cross_entropy(m(b[0]), b[1]), len(b[1])), [(x, y)], rms(model))


def test_fused_attention():
    probe = attention_probe()
    loss, _ = probe.loss(probe.model, probe.batches[0])
    gradients = torch.autograd.grad(loss, [*probe.parameters.values()], create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.grad(sum(g.sum() for g in gradients), [*probe.parameters.values()])
    differences, exact = hessian.lanczos(probe, 12), hessian.lanczos(probe, 12, hvp="autograd")
    assert differences.largest.value == pytest.approx(exact.largest.value, rel=0.002)
    assert differences.smallest.value == pytest.approx(exact.smallest.value, rel=0.02)
    one, two = (hessian.trace(probe, 8, hvp=hvp).summary()["mean"] for hvp in ("finite-difference", "autograd"))
    assert one == pytest.approx(two, rel=0.01)


def test_no_double_backward_is_bad_input():
    model, target = nn.Linear(2, 1, bias=False), torch.tensor([[0, -1]])
    probe = Perturbable(model, lambda m, b: (F.multilabel_margin_loss(m.weight, target), 1.0), [None], rms(model))
    before = probe.sha256()
    with pytest.raises(BadInput, match=r"no double backward.*finite differences"):
        hessian.lanczos(probe, 3, hvp="autograd")
    assert probe.sha256() == before


class Small(nn.Module):
    """Tied, frozen, unused and normalised parts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.unused = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(2, 2)
        self.second.weight = self.first.weight
        self.second.bias.requires_grad_(False)
        self.norm, self.dropout = nn.BatchNorm1d(3), nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.norm(self.second(torch.tanh(self.first(x))).tanh()))


def small_probe(**options):
    model = Small().double().train()
    batches = [torch.randn(n, 3, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (4, 7)]

    def loss(model, batch):
        rows = model(batch).square().mean(1)
        return torch.stack([rows[:2].mean(), rows[2:].mean()]), [2.0, len(batch) - 2.0]  # two groups of rows

    return Perturbable(model, loss, batches, rms(model), **options)


@BOTH
def test_tied_frozen_unused_groups_and_eval_mode(hvp):
    probe = small_probe()
    names = [*probe.parameters]
    assert "second.bias" not in names and "second.weight" not in names
    state, model = {k: v.clone() for k, v in probe.model.state_dict().items()}, probe.model

    def mean_loss(*values):
        out = torch.func.functional_call(model, dict(zip(names, values, strict=True)), torch.cat(probe.batches))
        return out.square().mean()

    model.eval()
    columns = torch.autograd.functional.hessian(mean_loss, tuple(probe.parameters.values()))
    sizes = [p.numel() for p in probe.parameters.values()]
    rows = [torch.cat([c.reshape(s, -1) for c in row], dim=1) for row, s in zip(columns, sizes, strict=True)]
    expected = torch.cat(rows).detach().numpy()
    model.train()
    run = hessian.lanczos(probe, 24, hvp=hvp)
    assert run.largest.value == pytest.approx(np.linalg.eigvalsh(expected)[-1], rel=1e-5)
    assert run.smallest.value == pytest.approx(np.linalg.eigvalsh(expected)[0], rel=1e-4)
    assert hessian.trace(probe, 2, lanczos=run, hvp=hvp).summary()["mean"] == pytest.approx(np.trace(expected), rel=1e-4)
    assert hessian.blockwise(probe, 3, hvp=hvp)["unused"].largest.value == 0
    assert model.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def metrics(probe):
    directions = [{n: torch.ones_like(p) for n, p in probe.parameters.items()}]
    run = hessian.lanczos(probe, 3)
    return {
        "lanczos": run.summary(),
        "density": hessian.density([run]),
        "units": [*run.largest.units, *run.smallest.units],
        "trace": hessian.trace(probe, 2, lanczos=run).summary(),
        "hutchinson": hessian.trace(probe, 2).summary(),
        "span": hessian.in_span(probe, directions).summary(),
    }


def test_weights_are_restored_after_an_exception_anywhere():
    whole = small_probe()
    calls = []
    measured, whole.loss = whole.loss, lambda m, b: calls.append(0) or measured(m, b)
    metrics(whole)
    for failing in range(0, len(calls), 5):
        probe = small_probe()
        before, count = probe.sha256(), iter(range(len(calls)))

        def loss(model, batch, probe=probe, count=count, inner=probe.loss, failing=failing):
            if next(count) == failing:
                raise KeyError
            return inner(model, batch)

        probe.loss = loss
        with pytest.raises(KeyError):
            metrics(probe)
        assert probe.sha256() == before
        assert probe.model.training


def test_a_probe_cut_short_after_any_row_ends_with_the_same_json(tmp_path):
    whole = tmp_path / "whole.jsonl"
    expected = json.dumps(metrics(small_probe(ledger=Ledger(whole))))
    lines = whole.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 2 + 2 + 1
    for kept in range(len(lines) + 1):
        part = tmp_path / "part.jsonl"
        part.write_bytes(b"".join(lines[:kept]))
        assert json.dumps(metrics(small_probe(ledger=Ledger(part)))) == expected
        assert part.read_bytes() == whole.read_bytes()


def test_a_finished_probe_evaluates_nothing(tmp_path):
    first = small_probe(ledger=Ledger(tmp_path / "rows"))
    metrics(first)
    again = small_probe(ledger=Ledger(tmp_path / "rows"))
    again.loss = None
    metrics(again)


def test_other_settings_are_other_rows(tmp_path):
    probe = quadratic(symmetric(SPECTRUM), ledger=Ledger())
    runs = [hessian.lanczos(probe, steps, number=number) for steps in (4, 5) for number in (0, 1)]
    assert len({run.largest.value for run in runs}) == 4
    assert len({tuple(hessian.trace(probe, 1, lanczos=run).values[0]) for run in runs}) == 4


class Counted:
    """Counts losses and calls of torch.autograd.grad, per batch."""

    def __init__(self, probe, monkeypatch):
        self.forward, self.backward, self.batches = 0, 0, len(probe.batches)
        inner, grad = probe.loss, torch.autograd.grad

        def loss(model, batch):
            self.forward += 1
            return inner(model, batch)

        def counted(*args, **kwargs):
            self.backward += 1
            return grad(*args, **kwargs)

        probe.loss = loss
        monkeypatch.setattr(torch.autograd, "grad", counted)

    def of(self, work):
        self.forward = self.backward = 0
        result = work()
        assert not self.forward % self.batches and not self.backward % self.batches
        return self.forward // self.batches, self.backward // self.batches, result


def test_costs_are_as_the_docstrings_say(monkeypatch):
    probe = quadratic(symmetric(SPECTRUM))
    counted = Counted(probe, monkeypatch)
    directions = [{"first.weight": torch.randn(20)}, {"second.weight": torch.randn(20)}]

    def cost(work):
        probe.ledger = Ledger()
        return counted.of(work)[:2]

    # The products of a quadratic agree at once.
    assert cost(lambda: hessian.lanczos(probe, 7)) == (7 + 1 + 2 * 2,) * 2
    assert cost(lambda: hessian.lanczos(probe, 7, ends="largest")) == (7 + 1 + 2,) * 2
    assert cost(lambda: hessian.lanczos(probe, 7, hvp="autograd")) == (7 + 2, 2 * (7 + 2))
    assert cost(lambda: hessian.trace(probe, 5)) == (5 + 2,) * 2
    assert cost(lambda: hessian.trace(probe, 5, hvp="autograd")) == (5, 10)
    assert cost(lambda: hessian.in_span(probe, directions)) == (2 * 2 * 2,) * 2
    assert cost(lambda: hessian.in_span(probe, directions, hvp="autograd")) == (2, 4)


@BOTH
def test_hessian_in_the_span_of_directions(hvp):
    matrix = symmetric(SPECTRUM)
    probe = quadratic(matrix)
    draw = np.random.default_rng(0).normal(size=(5, 40))
    draw[3] = 2 * draw[0] - draw[1]
    draw[4] = 0
    directions = [{"first.weight": torch.tensor(d[:20]), "second.weight": torch.tensor(d[20:]), "frozen": None} for d in draw]
    found = hessian.in_span(probe, directions, hvp=hvp)
    q, _ = np.linalg.qr(draw[:3].T)
    summary = found.summary()
    assert summary["rank"] == 3
    assert summary["eigenvalues"] == pytest.approx(np.linalg.eigvalsh(2.5 * q.T @ matrix @ q)[::-1], rel=1e-5)
    assert summary["trace"] == pytest.approx(2.5 * np.trace(q.T @ matrix @ q), rel=1e-5)
    assert summary["asymmetry"] < 1e-6
    assert summary["along"][:4] == pytest.approx([2.5 * d @ matrix @ d / (d @ d) for d in draw[:4]], rel=1e-5)
    assert summary["along"][4] is None
    np.testing.assert_allclose(found.units[1], 3 * found.units[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.coordinates @ found.coordinates.T, draw @ draw.T, atol=1e-9)


def test_no_direction_at_all():
    found = hessian.in_span(quadratic(symmetric(SPECTRUM)), [{"first.weight": torch.zeros(20)}]).summary()
    assert found == {"rank": 0, "eigenvalues": [], "trace": 0, "along": [None], "asymmetry": 0, "disagreement": None}


@pytest.mark.parametrize(("dtype", "rate"), [(torch.float32, 500), (torch.float64, 50_000)])
def test_the_step_is_halved_until_the_products_agree(dtype, rate):
    model = nn.Linear(2, 1, bias=False).to(dtype)
    with torch.no_grad():
        model.weight[:] = torch.tensor([2 * np.pi / rate * (rate // 2), 0.0])  # the Hessian of −Σ cos(rate·w)/rate² is 1
    probe = Perturbable(model, lambda m, b: (-torch.cos(rate * m.weight).sum() / rate**2, 1.0), [None], rms(model))
    run = hessian.lanczos(probe)
    assert run.step == pytest.approx(STEP[dtype] / 8, rel=0.02) and run.disagreement < AGREEMENT
    assert run.largest.value == pytest.approx(1, rel=2e-3)
    with curvature(probe) as matrix:
        first = torch.tensor([1.0, 0.0], dtype=dtype)
        coarse = matrix.product(first, [first])[1]
    assert coarse < 0.99


def test_one_sided_differences_shorten_along_the_outliers():
    class Bent(nn.Module):
        """¼·xᵀx + 50·x₀² + 130·x₀³, x = w − 1."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4000))

        def forward(self):
            x = self.weight - 1
            return x.square().sum() / 4 + 50 * x[0] ** 2 + 130 * x[0] ** 3

    probe = Perturbable(model := Bent(), lambda m, b: (m(), 1.0), [None], rms(model))
    run = hessian.lanczos(probe, 6, ends="largest")
    assert run.quadrature()[0].max() == pytest.approx(100.5, rel=0.008)  # 5 % off at the ε of random vectors
    assert run.largest.value == pytest.approx(100.5, rel=1e-4)


def test_kinks_are_reported():
    x = torch.rand(2000, 64, generator=torch.Generator().manual_seed(0))
    model = nn.Linear(64, 1, bias=False)
    nn.init.constant_(model.weight, 0.5)
    probe = Perturbable(model, lambda m, b: ((m.weight - x).relu().mean(), 1.0), [None], rms(model))
    with pytest.warns(UserWarning, match="kinks"):
        run = hessian.lanczos(probe)
    assert run.disagreement > 0.01
    assert hessian.lanczos(probe, hvp="autograd").largest.value == 0  # what double backward says of any kink


def test_smooth_losses_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics(small_probe())


def test_a_divergence_is_reported_and_never_imputed():
    model = Quadratic(symmetric(SPECTRUM), where=float("nan"))
    found = metrics(quadratic(None, model=model))
    assert found["density"] is None
    assert found["lanczos"]["largest"] is None and found["lanczos"]["smallest_residual"] is None
    assert found["trace"]["mean"] is None and found["span"]["eigenvalues"] is None


def test_no_parameters_is_bad_input():
    model = nn.Linear(2, 2).requires_grad_(False)
    probe = Perturbable(model, lambda m, b: (m(b).sum(), 1.0), [torch.ones(1, 2)], {})
    with pytest.raises(BadInput, match="no parameters"):
        hessian.trace(probe)


def test_half_precision_is_bad_input():
    model = nn.Linear(2, 2).bfloat16()
    probe = Perturbable(model, lambda m, b: (m(b).sum(), 1.0), [torch.ones(1, 2).bfloat16()], rms(model))
    with pytest.raises(BadInput, match=r"do not survive this dtype: parameter weight.*found torch.bfloat16"):
        hessian.lanczos(probe)


def test_models_share_their_probes_so_that_figures_pair():
    curved, flat = (quadratic(factor * symmetric(SPECTRUM), init={"where": where}) for factor, where in ((1, 1.0), (0.9, 2.0)))
    one, two = hessian.trace(curved, 16), hessian.trace(flat, 16)
    np.testing.assert_allclose(two.values, 0.9 * one.values, rtol=1e-5)
    found = verdict.sharpness_ratio([two.values], [one.values], one.weight, against="x", what="trace")
    assert found.sign == -1 and found.estimate == pytest.approx(np.log(0.9), rel=1e-4)
    assert found.high - found.low < 1e-4  # unpaired, 16 probes could not tell
    assert abs(one.summary()["stderr"] / one.summary()["mean"]) > 0.1
    ends = [np.array([hessian.lanczos(p, 12).largest.units]) for p in (flat, curved)]
    assert verdict.sharpness_ratio([ends[0]], [ends[1]], one.weight, against="x", what="λmax").sign == -1


def test_one_sided_differences_leave_no_bias_in_the_mean():
    class Cubic(Quadratic):
        def forward(self, scale):
            return super().forward(scale) + 3e4 * torch.cat([self.first.weight, self.second.weight]).pow(3).sum() / 6

    model = Cubic(symmetric(SPECTRUM), where=0.0)
    with torch.no_grad():
        model.first.weight[0] = 1e3  # a long step
    probe = quadratic(None, model=model)
    with curvature(probe, "autograd") as matrix:
        exact = sum(matrix.product(e, [e])[1][:, 0] @ matrix.weights for e in torch.eye(40, dtype=torch.float64))
    found = hessian.trace(probe, 400).summary()
    assert abs(found["mean"] - exact) < 3.5 * found["stderr"]


def test_sums_do_not_depend_on_threads():
    rows = [torch.randn(100_003, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            vector = rows[2].clone()
            project_out(vector, [row / row.norm() for row in rows[:1]])
            found.append((dots(rows, rows[0]), combine(rows, torch.tensor([1.0, 2.0, 3.0]).double()), vector))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    np.testing.assert_allclose(found[0][0][1], rows[1].double() @ rows[0].double(), rtol=1e-12)


def test_by_name():
    model, base, other = (Quadratic(symmetric(SPECTRUM), where=where) for where in (1.0, 0.0, 2.0))
    options = {"hessian": {"probes": 4}, "layers": {}, "span": {}}
    found = probe(model, scaled_loss, [(1.0, 1.0), (3.0, 3.0)], options, reference=base, others={"other": other})
    assert found["hessian"]["largest"] == pytest.approx(2.5 * 34, rel=1e-5)
    assert found["hessian"]["trace"]["n"] == 4 and set(found["hessian"]["trace"]["modules"]) == {"first", "second"}
    ones = np.ones(40) / 40**0.5
    assert found["span"]["along"]["other"] == pytest.approx(2.5 * ones @ symmetric(SPECTRUM) @ ones, rel=1e-5)
    assert found["layers"]["second"]["largest"] < found["hessian"]["largest"]
    measured = METRICS["hessian"].function(quadratic(symmetric(SPECTRUM)), probes=4).values
    assert measured.shape == (1 + 4, 2)
    np.testing.assert_allclose(measured @ [0.25, 0.75], [found["hessian"]["largest"], *(measured[1:] @ [0.25, 0.75])])
