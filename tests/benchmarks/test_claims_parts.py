"""What the claims about training compute with: areas under curves, rounding to few bits, waves, test loss at a point."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    importlib.import_module("claims").load_claims()
    return importlib.import_module(request.param)


@pytest.mark.parametrize("module", ["claims_overfitting"], indirect=True)
def test_the_area_under_the_curve_is_the_chance_that_a_true_case_scores_higher(module: Any) -> None:
    scores, labels = [0.3, 0.1, 0.3, 0.9, 0.2], [True, False, False, True, False]
    chances = [(a > b) + (a == b) / 2 for a, t in zip(scores, labels, strict=True) if t
               for b, f in zip(scores, labels, strict=True) if not f]  # fmt: skip
    assert module.auc(scores, labels) == pytest.approx(sum(chances) / len(chances))
    assert module.auc([1.0, 2.0], [True, True]) is None


@pytest.mark.parametrize("module", ["claims_overfitting"], indirect=True)
def test_the_test_loss_at_a_training_loss_lies_between_the_points_around_it(module: Any) -> None:
    curve = [[0, 4.0, 0, 2.0], [10, 1.0, 0, 1.0], [20, 0.25, 0, 3.0]]
    assert module.at_train_loss(curve, 2.0) == pytest.approx(1.5)
    assert module.at_train_loss(curve, 1.0) == pytest.approx(1.0)
    assert module.at_train_loss(curve, 0.5) == pytest.approx(2.0)
    assert module.at_train_loss(curve, 0.1) == 3.0
    assert module.at_train_loss(curve, 9.0) == 2.0


@pytest.mark.parametrize("module", ["claims_precision"], indirect=True)
def test_values_of_k_bits_have_that_many_levels_and_the_gradient_passes_through(module: Any) -> None:
    values = torch.randn(4000, generator=torch.Generator().manual_seed(3))
    counts = {bits: len(module.quantized(values, bits).unique()) for bits in (1, 2, 4)}
    assert counts == {1: 2, 2: 3, 4: 15}
    errors = [float((module.quantized(values, bits) - values).square().mean()) for bits in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-2
    model = module.Quantized(torch.nn.Sequential(torch.nn.Linear(5, 3)), 1)
    model(torch.ones(2, 5)).sum().backward()
    assert torch.equal(model.network[0].weight.grad, torch.full((3, 5), 2.0))


@pytest.mark.parametrize("module", ["claims_wave"], indirect=True)
def test_the_measured_wave_is_the_one_of_the_homogeneous_medium_and_differentiable(module: Any) -> None:
    slowness = torch.ones(module.CELLS, dtype=torch.float64, requires_grad=True)
    found = module.measured(slowness, (1.0, 2.0))
    # u'' + k²u = δ has the solution exp(ik|x − x₀|)/(2ik), so that k·|u| = 1/2 at both ends, up to the grid
    assert found.detach().abs() == pytest.approx(0.5, rel=0.1)
    assert torch.autograd.gradcheck(lambda s: torch.view_as_real(module.measured(s, (1.5,))), slowness)
    media = [module.medium(seed) for seed in range(3)]
    assert all(float((m - 1).abs().max()) > 0.02 and abs(float(m[0]) - 1) < 0.02 for m in media)


@pytest.mark.parametrize("module", ["claims_grokking"], indirect=True)
def test_every_pair_is_in_one_split_and_its_sum_is_right(module: Any) -> None:
    splits = module.pairs(4)
    x, y = (torch.cat(part) for part in zip(*splits, strict=True))
    assert len(x.unique(dim=0)) == module.PRIME**2
    first, second = x[:, : module.PRIME].argmax(1), x[:, module.PRIME :].argmax(1)
    assert torch.equal((first + second) % module.PRIME, y)
    assert math.isclose(len(splits[0][1]) / len(y), module.SHARE, abs_tol=1e-2)
