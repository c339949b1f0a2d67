"""The diagnostics against their formulas, written out."""

import json

import pytest
import torch
from torch.nn.functional import cosine_similarity

from emomerge.checkpoints import MemoryCheckpoint
from emomerge.merging import merge, reference

SHAPES = {"a": (70, 90), "b": (33,), "c": ()}
NAMES = ["p", "q", "r"]
D = 70 * 90 + 33 + 1


@pytest.fixture
def flat():
    """Correlated task vectors, of which q leaves a third of all weights alone."""
    generator = torch.Generator().manual_seed(0)
    taus = torch.randn(D, generator=generator) + torch.randn(3, D, generator=generator)
    taus[1, torch.rand(D, generator=generator) < 1 / 3] = 0
    return taus


@pytest.fixture
def build(exact_run, flat):
    base = MemoryCheckpoint({name: torch.zeros(shape) for name, shape in SHAPES.items()})
    parts = flat.split([70 * 90, 33, 1], dim=1)
    taus = [{n: part[t].view(s) for (n, s), part in zip(SHAPES.items(), parts, strict=True)} for t in range(3)]
    return lambda **arguments: merge(base, [exact_run(base, tau) for tau in taus], names=NAMES, **arguments)


def test_the_figures_of_the_runs(build, flat):
    report = build(method="mean").diagnostics()
    x, mean = flat.double(), flat.double().mean(0)
    assert report["runs"] == NAMES
    assert report["elements"] == D
    assert report["lambda_crit"] == 0.5
    assert report["run_norms"] == pytest.approx(dict(zip(NAMES, x.norm(dim=1).tolist(), strict=True)), rel=1e-12)
    assert report["mean_norm"] == pytest.approx(mean.norm().item(), rel=1e-6)
    assert report["moved_density"] == flat.any(0).sum().item() / D
    for i in range(3):
        for j in range(3):
            both = (flat[i] != 0) & (flat[j] != 0)
            agree = (flat[i].sign() == flat[j].sign())[both].double().mean().item()
            assert report["sign_agreement"][i][j] == pytest.approx(agree, rel=1e-14)
            cosine = cosine_similarity(x[i], x[j], dim=0).item()
            assert report["cosines"][i][j] == pytest.approx(cosine, rel=1e-12)
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_the_figures_of_tall_mask(build, flat):
    report = build(method="tall-mask", reference="sum", lambda_=0.4, k=2, scale=0.3).diagnostics()
    s = reference.total(flat)
    tau = reference.tall_mask(flat, s, [0.4] * 3, 2)
    mean = (s / 3).double()
    kept = tau != 0
    assert report["kept_density"] == kept.sum().item() / D
    assert report["kept_energy"] == pytest.approx(((kept * mean**2).sum() / (mean**2).sum()).item(), rel=1e-12)
    assert report["cosine_to_mean"] == pytest.approx(cosine_similarity(tau.double(), mean, dim=0).item(), rel=1e-12)
    assert report["merged_norm"] == pytest.approx(tau.double().norm().item(), rel=1e-12)
    masks = flat.abs() > 0.4 * (s - flat).abs()
    assert report["mask_density"] == {n: m.sum().item() / D for n, m in zip(NAMES, masks, strict=True)}
    assert report["params"] == {
        "lambda": 0.4, "lambdas": [0.4] * 3, "k": 2, "votes": 2, "reference": "sum", "weights": [1 / 3] * 3,
        "scale": 0.3,
    }  # fmt: skip


def test_the_figures_of_ties(build, flat):
    report = build(method="ties", density=0.3).diagnostics()
    kept = reference.trim(flat, 0.3) != 0
    assert report["mask_density"] == {n: m.sum().item() / D for n, m in zip(NAMES, kept, strict=True)}
    assert report["kept_density"] == kept.any(0).sum().item() / D
    assert report["warnings"] == []


def test_reading_tensors_first_or_twice_changes_nothing(build):
    fresh, read = build(method="tall-mask"), build(method="tall-mask")
    for name in ("c", "b", "a", "b"):
        read[name]
    assert read.diagnostics() == fresh.diagnostics() == fresh.diagnostics()


@pytest.mark.parametrize(("lambda_", "removed"), [(0.4, True), (0.25, True), (0.2, False)])
def test_the_sum_removes_what_all_runs_agree_on_above_lambda_crit(exact_run, lambda_, removed):
    """Five equal runs: |τ| > λ·|5τ − τ| needs λ < 1/4."""
    base, tau = MemoryCheckpoint({"w": torch.zeros(8)}), torch.tensor([1.0, -2.0] * 4)
    merged = merge(base, [exact_run(base, {"w": tau})] * 5, reference="sum", lambda_=lambda_)
    assert torch.equal(merged["w"], torch.zeros(8) if removed else 5 * tau)
    report = merged.diagnostics()
    assert report["lambda_crit"] == 0.25
    assert report["kept_energy"] == (0 if removed else 1)
    assert len(report["warnings"]) == (2 if removed else 0)
    for warning in report["warnings"]:
        assert "λ_crit = 1/(N−1) = 0.25" in warning
        assert f"λ {lambda_:g}" in warning
        assert "reference: mean" in warning


def test_the_mean_keeps_what_all_runs_agree_on(exact_run):
    base, tau = MemoryCheckpoint({"w": torch.zeros(8)}), torch.tensor([1.0, -2.0] * 4)
    merged = merge(base, [exact_run(base, {"w": tau})] * 5)
    assert torch.equal(merged["w"], tau)
    assert merged.diagnostics()["warnings"] == []


def test_ties_that_trims_nothing_says_so(exact_run):
    """Runs that move a tenth of all weights have a global threshold of zero at density 0.2."""
    base = MemoryCheckpoint({"frozen": torch.zeros(90), "w": torch.zeros(10)})
    runs = [exact_run(base, {"frozen": None, "w": torch.randn(10) + i}) for i in range(3)]
    (warning,) = merge(base, runs, method="ties").diagnostics()["warnings"]
    assert "trim: touched" in warning
    assert merge(base, runs, method="ties", trim="touched").diagnostics()["warnings"] == []
