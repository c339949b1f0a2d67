import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

import emomerge
from emomerge.errors import BadInput
from emomerge.probing import METRICS, PRESETS, Ledger, Perturbable, preset_metrics, rms, sharpness
from emomerge.probing.basics import distance, gradient_norm, mean_score, noise_floor, scores
from emomerge.probing.landscape import ALPHAS, alpha_curve


class Quadratic(nn.Module):
    """L(w) = ½ Σ h_i (w_i − c_i)², with a batch scaling h."""

    def __init__(self, w, h, c=0.0):
        super().__init__()
        self.w = nn.Parameter(torch.as_tensor(w, dtype=torch.float64))
        self.h, self.c = torch.as_tensor(h, dtype=torch.float64), c

    def forward(self, batch):
        return 0.5 * batch * (self.h * (self.w - self.c).square()).sum()


def loss(model, batch):
    return model(batch), 1.0


def probe_of(model, reference=None, **options):
    return Perturbable(model, loss, [torch.tensor(1.0), torch.tensor(3.0)], reference or rms(model), **options)


def network_loss(model, batch):
    """Token-weighted: two groups, weighing 1 and 3."""
    inputs, labels = batch
    rows = nn.functional.cross_entropy(model(inputs), labels, reduction="none")
    return torch.stack([rows[:1].mean(), rows[1:].mean()]), [1.0, 3.0]


@pytest.fixture
def network():
    """A model, its base, two others, and batches."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    models = [copy.deepcopy(base) for _ in range(3)]
    with torch.no_grad():
        for model in models:
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    batches = [(torch.randn(4, 3), torch.tensor([0, 1, 1, 0])) for _ in range(2)]
    return models[0], base, {"a": models[1], "b": models[2]}, batches


FEW = {
    "loss": {},
    "gradient-norm": {},
    "noise-floor": {},
    "gaussian": {"radii": (0.1,), "directions": 2},
    "adaptive": {"radii": (0.1,), "directions": 2},
    "basin": {"directions": 2, "bisections": 3},
    "curve": {"alphas": (0, 1)},
    "barriers": {"points": 2},
    "plane": {"size": 2},
    "surface": {"size": 2},
    "worst-case": {"steps": 3, "norms": ("l2",), "radii": {"l2": (0.5, 1.0)}},
}
"""Metric → options that make it quick."""


H = np.linspace(0.1, 4.0, 500)


def test_gaussian_of_a_quadratic_is_half_the_second_order_term_exactly():
    model = Quadratic(np.full(500, 2.0), H)
    probe = probe_of(model)
    found = sharpness.gaussian(probe, [0.01, 0.1], directions=3).values
    for r, radius in enumerate((0.01, 0.1)):
        for d in range(3):
            z = probe.direction(d)["w"].numpy()
            for b, scale in enumerate((1.0, 3.0)):
                assert found[r, d, b] == pytest.approx(0.5 * scale * radius**2 * (H * z**2).sum(), rel=1e-9)


def test_its_mean_estimates_the_trace():
    model = Quadratic(np.full(500, 2.0), H)
    found = sharpness.gaussian(probe_of(model), [0.05], directions=200).values[0]
    expected = 0.5 * 0.05**2 * 2.0**2 * H.sum()
    figures = sharpness.summary(found, np.array([1.0, 0.0]), 0.05)
    assert abs(figures["mean"] - expected) < 4 * figures["stderr"]
    assert figures["n"] == 200


def test_away_from_the_minimum_the_first_order_term_cancels():
    here = sharpness.gaussian(probe_of(Quadratic(np.full(500, 2.0), H), {"w": 1.0}), [0.1], 4).values
    away = sharpness.gaussian(probe_of(Quadratic(np.full(500, 2.0), H, c=50.0), {"w": 1.0}), [0.1], 4).values
    np.testing.assert_allclose(here, away, rtol=1e-6)


def test_one_ball_for_all_models_does_not_reward_large_weights():
    small, large = Quadratic(np.full(500, 0.1), H), Quadratic(np.full(500, 10.0), H)
    shared = {"w": 1.0}
    np.testing.assert_allclose(
        sharpness.gaussian(probe_of(small, shared), [0.1], 4).values,
        sharpness.gaussian(probe_of(large, shared), [0.1], 4).values,
        rtol=1e-6,
    )


def test_a_divergence_is_reported_and_never_imputed():
    class Cliff(Quadratic):
        def forward(self, batch):
            return super().forward(batch) if self.w.max() < 2.2 else torch.tensor(float("inf"))

    found = sharpness.gaussian(probe_of(Cliff(np.full(50, 2.0), 1.0)), [0.001, 0.2], 4).values
    weight = np.array([0.5, 0.5])
    assert sharpness.summary(found[0], weight, 0.001)["mean"] is not None
    finding = "diverged at radius 0.2 in 4 of 4 directions"
    assert sharpness.summary(found[1], weight, 0.2) == {"mean": None, "stderr": None, "n": 4, "finding": finding}


def test_the_base_is_evaluated_once_for_the_curves_of_all_models():
    ledger, calls, base = Ledger(), [], {"w": torch.full((3,), 0.25, dtype=torch.float64)}

    def counted(model, batch):
        calls.append(model.w.tolist())
        return loss(model, batch)

    ends = []
    for number, w in enumerate(([1.0, 2.0, 3.0], [4.0, 5.0, 7.0])):
        model = Quadratic(w, 1.0, c=0.5)
        probe = Perturbable(model, counted, [1.0, 3.0], rms(model), model_hash=str(number), ledger=ledger)
        ends.append(alpha_curve(probe, base, (0, 0.5, 1)).values[[0, -1]])
        np.testing.assert_array_equal(ends[-1][1], probe.center_losses())
    assert calls.count([0.25] * 3) == 2  # batches
    np.testing.assert_array_equal(ends[0][0], ends[1][0])
    assert not np.array_equal(ends[0][1], ends[1][1])


def test_alpha_curve_of_a_quadratic():
    base = {"w": torch.zeros(3, dtype=torch.float64)}
    model = Quadratic([1.0, 2.0, 3.0], 1.0, c=0.5)
    probe = probe_of(model)
    expected = [0.5 * 2.0 * sum((a * w - 0.5) ** 2 for w in (1, 2, 3)) for a in ALPHAS]  # batches weigh (1 + 3) / 2
    np.testing.assert_allclose(alpha_curve(probe, base).summary["loss"], expected, rtol=1e-12)
    assert distance(model, base) == pytest.approx(14**0.5)


def test_gradient_norm_and_noise_floor():
    probe = probe_of(Quadratic([3.0, 4.0], 1.0))
    assert gradient_norm(probe) == pytest.approx(2.0 * 5.0)
    assert noise_floor(probe) == 0.0
    assert probe.model.w.grad is None


def test_scores_are_weighted_remembered_and_evaluated_together():
    calls, ledger, model = [], Ledger(), nn.Linear(1, 1)

    def score(batches):
        assert not model.training and torch.is_inference_mode_enabled()
        calls.append(list(batches))
        return [{"loss": 1.0 + 2 * batch, "weight": 3.0 - batch} for batch in batches]

    def of(count, together):
        key = {"ledger": ledger, "model_hash": "m", "data_hash": "d", "split": "test"}
        return scores(model, count, score, together=together, **key)

    assert of(2, 1)["loss"].tolist() == [1, 3] and calls == [[0], [1]]
    found = of(3, 3)  # two are known
    assert calls[2:] == [[2]] and model.training
    assert mean_score(found, "loss") == pytest.approx((3 * 1 + 2 * 3 + 1 * 5) / 6)
    of(3, 2)
    assert len(calls) == 3


def test_a_probe_cut_short_anywhere_ends_with_the_same_figures(tmp_path):
    def run(ledger):
        model = Quadratic(np.full(20, 2.0), 1.0)
        return sharpness.gaussian(probe_of(model, ledger=ledger), [0.01, 0.1], 3).values

    whole = tmp_path / "whole.jsonl"
    expected = run(Ledger(whole))
    lines = whole.read_bytes().splitlines(keepends=True)
    assert len(lines) == 2 + 2 + 2 * 3 * 2  # center, what the dtype resolves, evaluations
    for cut in range(0, whole.stat().st_size, 97):
        part = tmp_path / "part.jsonl"
        part.write_bytes(whole.read_bytes()[:cut])
        assert np.array_equal(run(Ledger(part)), expected)
        assert sorted(part.read_bytes().splitlines()) == sorted(whole.read_bytes().splitlines())


def test_the_public_probe(tmp_path):
    model, base = Quadratic([1.0, -2.0], 1.0), {"w": 1.0}
    batches = [torch.tensor(1.0)]
    wanted = {"loss": {}, "gaussian": {"radii": (0.1,), "directions": 4}}
    found = emomerge.probe(model, loss, batches, wanted, reference=base, ledger=tmp_path / "l.jsonl")
    assert found["loss"] == pytest.approx(2.5)
    assert set(found) == set(wanted)
    rows = [json.loads(line) for line in (tmp_path / "l.jsonl").read_text().splitlines()]
    # Another batch, seed or ball must not be taken for one in the ledger.
    for change in ({"batches": [torch.tensor(2.0)]}, {"seed": 1}, {"reference": {"w": 2.0}}):
        options = {"batches": batches, "reference": base, "seed": 0} | change
        other = emomerge.probe(model, loss, metrics=wanted, **options, ledger=tmp_path / "l.jsonl")
        assert other["gaussian"] != found["gaussian"]
    assert len((tmp_path / "l.jsonl").read_text().splitlines()) == 4 * len(rows)


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_by_name_restores_the_weights_and_is_json(name, network):
    model, base, others, batches = network
    before, mode = {k: v.clone() for k, v in model.state_dict().items()}, model.training
    found = emomerge.probe(model, network_loss, batches, {name: FEW.get(name, {})}, reference=base, others=others)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model.training is mode


def test_presets_grow_and_leave_out_what_they_lack(network):
    model, base, _, batches = network
    quick, standard, full = (set(preset_metrics(preset)) for preset in PRESETS)
    assert quick < standard < full == set(METRICS) - {"layers"}  # on request only
    assert {"loss", "noise-floor", "distance", "gaussian", "curve"} <= quick
    assert {"gradient-norm", "adaptive", "basin", "barriers"} <= standard - quick
    assert {"worst-case", "plane", "surface"} <= full - standard
    bare = {"loss", "noise-floor", "gaussian"}
    assert set(emomerge.probe(model, network_loss, batches)) == bare
    assert set(emomerge.probe(model, network_loss, batches, reference=base)) == bare | {"distance", "curve"}


def test_a_probe_of_everything_cut_at_any_row_ends_with_the_same_json(tmp_path, network):
    model, base, others, batches = network

    def run(path):
        found = emomerge.probe(model, network_loss, batches, FEW, reference=base, others=others, ledger=path, model_hash="m")
        return json.dumps(found)

    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    expected = run(whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    assert len({json.loads(line)["metric"] for line in lines}) > len(FEW)
    for cut in range(len(lines)):
        part.write_bytes(b"".join(lines[:cut]))
        assert run(part) == expected
        assert part.read_bytes() == whole.read_bytes()


def test_the_public_probe_refuses(tmp_path):
    model = Quadratic([1.0], 1.0)
    with pytest.raises(BadInput, match="no such metric: metrics; expected gaussian, .*; found flatness"):
        emomerge.probe(model, loss, [torch.tensor(1.0)], ["flatness"])
    with pytest.raises(BadInput, match="no such preset; expected quick, standard, full; found all"):
        emomerge.probe(model, loss, [torch.tensor(1.0)], "all")
    with pytest.raises(BadInput, match="needs an argument: plane; give reference=, the base as a module and others="):
        emomerge.probe(model, loss, [torch.tensor(1.0)], ["plane"])
    with pytest.raises(BadInput, match=r"same architecture: wide, parameter w; expected \(1,\); found \(2,\)"):
        emomerge.probe(model, loss, [torch.tensor(1.0)], ["loss"], others={"wide": Quadratic([1.0, 2.0], 1.0)})
    with pytest.raises(BadInput, match=r"same architecture: reference, parameter w; expected \(1,\); found none"):
        emomerge.probe(model, loss, [torch.tensor(1.0)], ["loss"], reference=nn.Linear(1, 1))
    with pytest.raises(BadInput, match="at least one batch"):
        emomerge.probe(model, loss, [])
    with pytest.raises(BadInput, match="with a ledger"):
        emomerge.probe(model, loss, [object()], ledger=tmp_path / "l.jsonl")
