"""The verdict where the answer is known: a model against itself, a shrunken task vector, a planted flat basin."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from emomerge.probing import Perturbable, rms, sharpness, verdict
from emomerge.probing.perturb import normals

RADII = (0.01, 0.03, 0.1)
WIDTH, UNITS, PROBES = 24, 8, 12
PLACES = ((0, range(3)), (1, range(3)), (1, range(3, 6)))
"""Well and training seeds of three groups."""


class Wells(nn.Module):
    """Two wells of equal depth and equal distance from the origin, one four times as curved; units differ in scale."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(torch.as_tensor(w, dtype=torch.float64))
        self.flat, self.sharp = torch.eye(WIDTH, dtype=torch.float64)[:2]

    def forward(self, batch):
        wells = torch.stack([h * (self.w - c).square().sum() for h, c in ((1.0, self.flat), (4.0, self.sharp))])
        return (1 + batch) * wells.min() + 0.1 * batch


def figures(model, reference, loss=lambda model, batch: (model(batch), 1.0), batches=tuple(u / UNITS for u in range(UNITS))):
    probe = Perturbable(model, loss, batches, reference)
    found = dict(zip(RADII, sharpness.gaussian(probe, RADII, PROBES).values, strict=True))
    return {**found, "trace": np.array([[curvature(probe, batch, k) for batch in batches] for k in range(PROBES)])}


def curvature(probe, batch, number):
    """vᵀHv for a seeded v."""
    parameters = list(probe.parameters.values())
    v = [normals(0, number, name, p) for name, p in probe.parameters.items()]
    gradients = torch.autograd.grad(probe.loss(probe.model, batch)[0], parameters, create_graph=True)
    product = torch.autograd.grad(sum((g * x).sum() for g, x in zip(gradients, v, strict=True)), parameters)
    return float(sum((h * x).sum() for h, x in zip(product, v, strict=True)))


def judge(ours, rivals):
    return judge_seeds([ours], {rival: [theirs] for rival, theirs in rivals.items()})


def judge_seeds(ours, rivals):
    evidence = [
        verdict.sharpness_ratio(
            [f[what] for f in ours], [f[what] for f in theirs], np.ones(UNITS), against=rival, what=str(what)
        )
        for rival, theirs in rivals.items()
        for what in ours[0]
    ]
    return verdict.judge_flatter(evidence, len(RADII), [])


def near(well, seed):
    generator = torch.Generator().manual_seed(seed)
    return Wells(
        torch.eye(WIDTH, dtype=torch.float64)[well] + 0.05 * torch.randn(WIDTH, generator=generator, dtype=torch.float64)
    )


def test_a_planted_flat_basin_is_found_and_the_sharp_one_is_refuted():
    flat, *sharp = (figures(near(*place), {"w": 0.3}) for place in ((0, 1), (1, 2), (1, 3), (1, 4)))
    rivals = ("best single run", "distance-matched", "loss-matched")
    assert judge(flat, dict(zip(rivals, sharp, strict=True))).status == "flatter"
    assert judge(sharp[0], dict.fromkeys(rivals, flat)).status == "refuted"
    assert judge(sharp[0], dict.fromkeys(rivals, sharp[1])).status == "not shown"


def test_a_planted_flat_basin_is_found_over_three_training_seeds_and_none_where_there_is_none():
    flat, sharp, others = ([figures(near(well, 10 * well + s), {"w": 0.3}) for s in seeds] for well, seeds in PLACES)
    assert judge_seeds(flat, {"best single run": sharp, "loss-matched": others}).status == "flatter"
    assert judge_seeds(sharp, {"best single run": others}).status == "not shown"


def test_a_model_against_itself_gives_exactly_zero():
    once, again = (figures(near(0, 1), {"w": 0.3}) for _ in range(2))
    found = judge(once, {"itself": again})
    assert found.status == "not shown"
    assert all((e.estimate, e.low, e.high) == (0.0, 0.0, 0.0) for e in found.evidence)


@pytest.mark.parametrize("seed", range(3))
def test_a_task_vector_shrunk_by_half_is_never_called_flatter(seed):
    """It is flatter than the run it came from, and exactly as flat as that run at its own distance."""
    torch.manual_seed(seed)
    inputs, labels = torch.randn(UNITS, 16, 6), torch.randint(3, (UNITS, 16))
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    run = copy.deepcopy(base)
    optimizer = torch.optim.SGD(run.parameters(), lr=1.0)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(run(inputs.flatten(0, 1)), labels.flatten()).backward()
        optimizer.step()

    def scaled(factor):
        model, start = copy.deepcopy(run), dict(base.named_parameters())
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(start[name] + factor * (p - start[name]))
        return model

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1]), 1.0

    batches = list(zip(inputs, labels, strict=True))
    whole, shrunk, matched = (figures(scaled(factor), rms(base), loss, batches) for factor in (1.0, 0.5, 0.5))
    alone = judge(shrunk, {"best single run": whole})
    controlled = judge(shrunk, {"best single run": whole, "distance-matched": matched})
    assert alone.status == "flatter"  # what a naive probe says
    assert controlled.status == "not shown"
