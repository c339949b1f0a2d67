"""How often is a model called flatter where nothing is flatter? Runs of one optimizer that differ in their seed alone.

    python benchmarks/probe_calibration.py            # 100 trials each, about seven minutes on one core

A trial draws training seeds for a “merge” (here a run like all others), its best single rival, and a third group whose
checkpoints match its training loss; the rival is matched in distance as well. Measured are the Gaussian sharpness at three
radii and the trace of the Hessian, judged as `emomerge run` judges. Nothing is to be found, so that at most 5 % may be
called flatter. Network: 64-16-10, digits of scikit-learn; 150 steps of EmoSens from one base.
"""

from __future__ import annotations

import argparse
import copy
from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from emomerge.optim import EmoSens
from emomerge.probing import Perturbable, rms, sharpness, verdict
from emomerge.probing.perturb import normals

RUNS, STEPS, SNAPSHOT, BATCHES, PROBES = 24, 150, 10, 12, 16
RADII = (0.01, 0.03, 0.1)

pixels, classes = load_digits(return_X_y=True)
INPUTS, LABELS = torch.tensor(pixels / 8 - 1, dtype=torch.float32), torch.tensor(classes)
PROBED = [(INPUTS[i::BATCHES][:64], LABELS[i::BATCHES][:64]) for i in range(BATCHES)]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, float]:
    return nn.functional.cross_entropy(model(batch[0]), batch[1]), float(len(batch[1]))


def base_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(10):
        optimizer.zero_grad()
        loss(model, (INPUTS, LABELS))[0].backward()
        optimizer.step()
    return model


BASE = base_model()
START = {name: p.detach().clone() for name, p in BASE.named_parameters()}
Vector = dict[str, Tensor]


@cache
def run(seed: int) -> list[Vector]:
    """Task vectors along one run."""
    model, order = copy.deepcopy(BASE), torch.Generator().manual_seed(seed)
    optimizer, found = EmoSens(model.parameters(), preset="guarded"), []
    for step in range(STEPS):
        rows = torch.randint(len(INPUTS), (64,), generator=order)
        value = loss(model, (INPUTS[rows], LABELS[rows]))[0]
        optimizer.observe(value)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if (step + 1) % SNAPSHOT == 0:
            found.append({name: p.detach() - START[name] for name, p in model.named_parameters()})
    return found


def length(vector: Vector) -> float:
    return float(torch.cat([x.flatten() for x in vector.values()]).double().norm())


def perturbable(vector: Vector) -> Perturbable:
    model = copy.deepcopy(BASE)
    model.load_state_dict({name: START[name] + x for name, x in vector.items()})
    return Perturbable(model, loss, PROBED, rms(BASE))


def train_loss(vector: Vector) -> float:
    probe = perturbable(vector)
    return float(probe.center_losses() @ probe.unit_weights())


@cache
def snapshot_loss(seed: int, index: int) -> float:
    return train_loss(run(seed)[index])


def figures(vector: Vector) -> dict[str, verdict.Array]:
    """(directions, units) of each radius and of the trace."""
    probe = perturbable(vector)
    values = sharpness.gaussian(probe, RADII, PROBES).values
    found = {f"gaussian σ={radius:g}": value for radius, value in zip(RADII, values, strict=True)}
    return {**found, "trace": np.array([[curvature(probe, batch, k) for batch in PROBED] for k in range(PROBES)])}


def curvature(probe: Perturbable, batch: tuple[Tensor, Tensor], number: int) -> float:
    """vᵀHv for a seeded v of standard normals."""
    parameters = probe.parameters
    v = {name: normals(0, number, name, p) for name, p in parameters.items()}
    gradients = torch.autograd.grad(loss(probe.model, batch)[0], list(parameters.values()), create_graph=True)
    slope = sum((g * v[name]).sum() for name, g in zip(parameters, gradients, strict=True))
    product = torch.autograd.grad(slope, list(parameters.values()))
    return float(sum((h * v[name]).sum() for name, h in zip(parameters, product, strict=True)))


@cache
def of_run(seed: int, index: int = -1) -> dict[str, verdict.Array]:
    return figures(run(seed)[index])


@cache
def of_matched(seed: int, merge: int) -> dict[str, verdict.Array]:
    vector = run(seed)[-1]
    factor = length(run(merge)[-1]) / length(vector)
    return figures({name: factor * x for name, x in vector.items()})


def loss_matched(seed: int, merge: int) -> dict[str, verdict.Array]:
    wanted = snapshot_loss(merge, STEPS // SNAPSHOT - 1)
    return of_run(seed, min(range(STEPS // SNAPSHOT), key=lambda i: abs(snapshot_loss(seed, i) - wanted)))


def trial(merges: list[int], rivals: list[int], others: list[int]) -> str:
    ours = [of_run(seed) for seed in merges]
    theirs = {
        "best single run": [of_run(seed) for seed in rivals],
        "distance-matched": [of_matched(seed, merge) for seed, merge in zip(rivals, merges, strict=True)],
        "loss-matched": [loss_matched(seed, merge) for seed, merge in zip(others, merges, strict=True)],
    }
    weight = np.array([float(len(batch[1])) for batch in PROBED])
    evidence = [
        verdict.sharpness_ratio([a[what] for a in ours], [b[what] for b in group], weight, against=rival, what=what)
        for rival, group in theirs.items()
        for what in ours[0]
    ]
    status: str = verdict.judge_flatter(evidence, len(RADII), []).status
    return status


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    trials = parser.parse_args().trials
    for seeds in (1, 3):
        rng, found = np.random.default_rng(seeds), []
        for _ in range(trials):
            drawn = rng.choice(RUNS, 3 * seeds, replace=False).tolist()
            found.append(trial(drawn[:seeds], drawn[seeds : 2 * seeds], drawn[2 * seeds :]))
        counts = {status: found.count(status) for status in ("flatter", "refuted", "not shown")}
        print(f"{seeds} training seed{'s' if seeds > 1 else ''} a group, {trials} trials:", counts, flush=True)


if __name__ == "__main__":
    main()
