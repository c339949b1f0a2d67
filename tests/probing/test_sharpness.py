import json

import numpy as np
import pytest
import torch
from torch import nn

import emomerge
from emomerge.errors import BadInput
from emomerge.probing import Ledger, Perturbable, rms, sharpness
from emomerge.probing.controls import distance, gradient_norm, mean_score, noise_floor, scores
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


H = np.linspace(0.1, 4.0, 500)


def test_gaussian_of_a_quadratic_is_half_the_second_order_term_exactly():
    model = Quadratic(np.full(500, 2.0), H)
    probe = probe_of(model)
    found = sharpness.gaussian(probe, [0.01, 0.1], directions=3)
    for r, radius in enumerate((0.01, 0.1)):
        for d in range(3):
            z = probe.direction(d)["w"].numpy()
            for b, scale in enumerate((1.0, 3.0)):
                assert found[r, d, b] == pytest.approx(0.5 * scale * radius**2 * (H * z**2).sum(), rel=1e-9)


def test_its_mean_estimates_the_trace():
    model = Quadratic(np.full(500, 2.0), H)
    found = sharpness.gaussian(probe_of(model), [0.05], directions=200)[0]
    expected = 0.5 * 0.05**2 * 2.0**2 * H.sum()
    figures = sharpness.summary(found, np.array([1.0, 0.0]))
    assert abs(figures["mean"] - expected) < 4 * figures["stderr"]
    assert figures["n"] == 200


def test_away_from_the_minimum_the_first_order_term_cancels():
    here = sharpness.gaussian(probe_of(Quadratic(np.full(500, 2.0), H), {"w": 1.0}), [0.1], 4)
    away = sharpness.gaussian(probe_of(Quadratic(np.full(500, 2.0), H, c=50.0), {"w": 1.0}), [0.1], 4)
    np.testing.assert_allclose(here, away, rtol=1e-6)


def test_one_ball_for_all_models_does_not_reward_large_weights():
    small, large = Quadratic(np.full(500, 0.1), H), Quadratic(np.full(500, 10.0), H)
    shared = {"w": 1.0}
    np.testing.assert_allclose(
        sharpness.gaussian(probe_of(small, shared), [0.1], 4),
        sharpness.gaussian(probe_of(large, shared), [0.1], 4),
        rtol=1e-6,
    )


def test_a_divergence_is_reported_and_never_imputed():
    class Cliff(Quadratic):
        def forward(self, batch):
            return super().forward(batch) if self.w.max() < 2.2 else torch.tensor(float("inf"))

    found = sharpness.gaussian(probe_of(Cliff(np.full(50, 2.0), 1.0)), [0.001, 0.2], 4)
    weight = np.array([0.5, 0.5])
    assert sharpness.summary(found[0], weight)["mean"] is not None
    assert sharpness.summary(found[1], weight) == {"mean": None, "stderr": None, "n": 4}


def test_alpha_curve_of_a_quadratic():
    base = {"w": torch.zeros(3, dtype=torch.float64)}
    model = Quadratic([1.0, 2.0, 3.0], 1.0, c=0.5)
    probe = probe_of(model)
    expected = [0.5 * 2.0 * sum((a * w - 0.5) ** 2 for w in (1, 2, 3)) for a in ALPHAS]  # batches weigh (1 + 3) / 2
    np.testing.assert_allclose(alpha_curve(probe, base), expected, rtol=1e-12)
    assert distance(model, base) == pytest.approx(14**0.5)


def test_gradient_norm_and_noise_floor():
    probe = probe_of(Quadratic([3.0, 4.0], 1.0))
    assert gradient_norm(probe) == pytest.approx(2.0 * 5.0)
    assert noise_floor(probe) == 0.0
    assert probe.model.w.grad is None


def test_scores_are_weighted_and_remembered():
    calls = []

    def score(model, batch):
        calls.append(batch)
        return {"loss": float(batch), "weight": float(batch)}

    ledger, model = Ledger(), nn.Linear(1, 1)
    for _ in range(2):
        found = scores(
            model,
            [torch.tensor(1.0), torch.tensor(3.0)],
            score,
            ledger=ledger,
            model_hash="m",
            data_hash="d",
            split="test",
        )
    assert mean_score(found, "loss") == pytest.approx(10 / 4)
    assert len(calls) == 2


def test_a_probe_cut_short_anywhere_ends_with_the_same_figures(tmp_path):
    def run(ledger):
        model = Quadratic(np.full(20, 2.0), 1.0)
        return sharpness.gaussian(probe_of(model, ledger=ledger), [0.01, 0.1], 3)

    whole = tmp_path / "whole.jsonl"
    expected = run(Ledger(whole))
    lines = whole.read_bytes().splitlines(keepends=True)
    assert len(lines) == 2 + 2 * 3 * 2
    for cut in range(0, whole.stat().st_size, 97):
        part = tmp_path / "part.jsonl"
        part.write_bytes(whole.read_bytes()[:cut])
        assert np.array_equal(run(Ledger(part)), expected)
        assert sorted(part.read_bytes().splitlines()) == sorted(whole.read_bytes().splitlines())


def test_the_public_probe(tmp_path):
    model, base = Quadratic([1.0, -2.0], 1.0), {"w": 1.0}
    batches = [torch.tensor(1.0)]
    found = emomerge.probe(model, loss, batches, reference=base, radii=(0.1,), directions=4, ledger=tmp_path / "l.jsonl")
    assert found["loss"] == pytest.approx(2.5)
    assert set(found) == {"loss", "gradient_norm", "noise_floor", "gaussian"}
    rows = [json.loads(line) for line in (tmp_path / "l.jsonl").read_text().splitlines()]
    # Another batch, seed or ball must not be taken for one in the ledger.
    for change in ({"batches": [torch.tensor(2.0)]}, {"seed": 1}, {"reference": {"w": 2.0}}):
        options = {"batches": batches, "reference": base, "seed": 0} | change
        other = emomerge.probe(model, loss, **options, radii=(0.1,), directions=4, ledger=tmp_path / "l.jsonl")
        assert other["gaussian"] != found["gaussian"]
    assert len((tmp_path / "l.jsonl").read_text().splitlines()) == 4 * len(rows)


def test_the_public_probe_refuses(tmp_path):
    model = Quadratic([1.0], 1.0)
    with pytest.raises(BadInput, match="no such metric; expected loss, .*; found flatness"):
        emomerge.probe(model, loss, [torch.tensor(1.0)], ["flatness"])
    with pytest.raises(BadInput, match="at least one batch"):
        emomerge.probe(model, loss, [])
    with pytest.raises(BadInput, match="with a ledger"):
        emomerge.probe(model, loss, [object()], ledger=tmp_path / "l.jsonl")
