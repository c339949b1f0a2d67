"""The loss along lines and over planes through models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from emomerge.errors import BadInput
from emomerge.numerics.hashing import hash_tensors
from emomerge.numerics.sums import inner
from emomerge.probing import report
from emomerge.probing.perturb import LazyTensors, Perturbable, Weights
from emomerge.probing.registry import Array, Measurement, metric
from emomerge.probing.report import MODEL

ALPHAS: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


@metric(
    "curve",
    preset="quick",
    base=True,
    roles=("run", "merge"),
    split="whole",
    cost=lambda options, batches: sum(alpha != 1 for alpha in options["alphas"]) * batches,
    report=report.curve,
)
def alpha_curve(probe: Perturbable, base: Weights, alphas: Sequence[float] = ALPHAS) -> Measurement:
    """Measure the loss at θ₀ + α·τ, from the base (α = 0) to the model (α = 1) and beyond.

    Cost: a forward pass per batch and α. α = 1 is the model itself, and α = 0 is evaluated once for all models of a ledger.

    Args:
        probe: the model θ = θ₀ + τ.
        base: parameter name → tensor of the base θ₀, on the model's device.
        alphas: values of α.

    Returns:
        values (alphas, units), in nats; the summary: `alpha` and the mean `loss`.
    """
    backwards = LazyTensors(
        probe.parameters,
        lambda name: _single(base[name]) - _single(probe.center[name]),
        lambda name, out: torch.sub(_single(base[name]), _single(probe.center[name]), out=out),
    )
    metric = f"curve {_hash(probe, base)}"
    buffers = hash_tensors(sorted(probe.model.named_buffers()))  # those of the model, such as statistics of batch norm
    center_losses = probe.center_losses()
    with probe.weight_setter() as set_weights:

        def losses(alpha: float) -> Array:
            if alpha == 1:
                return center_losses
            if alpha == 0:
                start = {name: base[name].to(center.dtype) for name, center in probe.parameters.items()}
                return probe.losses_at(set_weights, f"{metric} {buffers}", 0.0, None, start, model="")
            return probe.losses_at(set_weights, metric, alpha, None, probe.along(backwards, 1 - alpha))

        values = np.array([losses(alpha) for alpha in alphas])
    return Measurement(values, {"alpha": list(alphas), "loss": _plain(values @ probe.unit_weights())})


@metric(
    "barriers",
    preset="standard",
    others="runs",
    models="merge",
    cost=lambda options, batches: options["points"] * batches,
    report=report.barriers,
)
def barriers(probe: Perturbable, others: Mapping[str, Weights], points: int = 11) -> Measurement:
    """Measure the loss barrier of every pair of models: max over t of L((1−t)a + t·b) − (1−t)L(a) − t·L(b).

    Cost: points · batches forward passes per pair; the probed model is one of the models.

    Args:
        probe: the model, labelled "model".
        others: label → parameter name → tensor, on the model's device.
        points: number of points from one model to the other, both included.

    Returns:
        values (pairs, points, units), in nats; the summary: one entry a pair, `between`, `t`, `loss`, `barrier`.
    """
    hashes = {MODEL: "model", **{label: _hash(probe, tensors) for label, tensors in others.items()}}
    grid, weight = np.linspace(0, 1, points).tolist(), probe.unit_weights()
    values, entries = [], []
    with probe.weight_setter() as set_weights:
        models = {MODEL: probe.center, **others}
        for a, b in combinations(models, 2):
            of_pair = [
                probe.losses_at(set_weights, f"barrier {hashes[a]} {hashes[b]}", t, None, _mix(probe, {a: 1 - t, b: t}, models))
                for t in grid
            ]
            loss = np.array(of_pair) @ weight
            chord = (1 - np.array(grid)) * loss[0] + np.array(grid) * loss[-1]
            highest = float((loss - chord).max())
            finding = {} if math.isfinite(highest) else {"finding": "diverged between them"}
            entries.append({"between": [a, b], "t": grid, "loss": _plain(loss), "barrier": _plain([highest])[0], **finding})
            values.append(of_pair)
    return Measurement(np.array(values), entries)


@metric(
    "plane",
    preset="full",
    base=True,
    others="best",
    models="merge",
    cost=lambda options, batches: options["size"] ** 2 * batches,
    report=report.plane,
)
def plane(
    probe: Perturbable, base: Weights, others: Mapping[str, Weights], size: int = 21, margin: float = 0.25
) -> Measurement:
    """Measure the loss on the plane through the base, the model and the first of the others.

    The base is at (0, 0), the model on the x axis; distances on the plane are distances between weights. Cost: size² · batches
    forward passes.

    Args:
        probe: the model, usually a merge.
        base: parameter name → tensor, on the model's device.
        others: label → the same; the first is the third corner, usually the best single run.
        size: number of points along each axis.
        margin: how far the plane extends beyond its corners, as a fraction of their extent.

    Returns:
        values (size, size, units), rows along y, in nats; the summary: `x`, `y`, the mean `loss` and the `corners`.

    Raises:
        BadInput: the three models lie on a line.
    """
    label, third = next(iter(others.items()))
    length, along, square = 0.0, 0.0, 0.0
    for name, center in probe.center.items():
        first, second = (_single(weights) - _single(base[name]) for weights in (center, third[name]))
        length, along, square = length + inner(first, first), along + inner(first, second), square + inner(second, second)
    a = math.sqrt(length)
    b = along / a if a else 0.0
    c = math.sqrt(max(square - b * b, 0.0))
    if not a or c <= 1e-6 * math.sqrt(square):
        raise BadInput("three models on a line span no plane", where=f"base, model and {label}")
    x, y = (_axis(corners, size, margin) for corners in ((0.0, a, b), (0.0, 0.0, c)))
    metric = f"plane {_hash(probe, base)} {_hash(probe, third)}"
    values = np.empty((size, size, len(probe.unit_weights())))
    with probe.weight_setter() as set_weights:
        models = {"base": base, MODEL: probe.center, label: third}
        for j, i in np.ndindex(size, size):
            to_third = y[j] / c
            to_model = (x[i] - b * to_third) / a
            shares = {"base": 1 - to_model - to_third, MODEL: to_model, label: to_third}
            values[j, i] = probe.losses_at(set_weights, f"{metric} {y[j]!r}", x[i], None, _mix(probe, shares, models))
    corners = {"base": [0.0, 0.0], MODEL: [a, 0.0], label: [b, c]}
    return Measurement(
        values, {"x": x, "y": y, "loss": [_plain(row) for row in values @ probe.unit_weights()], "corners": corners}
    )


@metric(
    "surface",
    preset="full",
    models="pair",
    cost=lambda options, batches: options["size"] ** 2 * batches,
    report=report.surface,
)
def surface(probe: Perturbable, size: int = 21, reach: float = 1.0) -> Measurement:
    """Measure the loss along two filter-normalised Gaussian directions (Li et al. 2018), from −`reach` to `reach`.

    Each filter of a direction (a slice along the first dimension: an output neuron or channel) has the norm of the model's
    filter; vectors (biases, scales of normalisation layers) are not moved. For pictures only: as a measure it would reward
    small weights. Cost: size² · batches forward passes.

    Returns:
        values (size, size, units), rows along the second direction, in nats; the summary: `x`, `y` and the mean `loss`.
    """
    grid: list[float] = np.linspace(-reach, reach, size).tolist()
    values = np.empty((size, size, len(probe.unit_weights())))
    with probe.weight_setter() as set_weights:
        directions = [_filter_normalised(probe, number) for number in (0, 1)]
        for j, i in np.ndindex(size, size):
            there = _between(probe, directions, (grid[i], grid[j]))
            values[j, i] = probe.losses_at(set_weights, f"surface {grid[j]!r}", grid[i], None, there)
    return Measurement(values, {"x": grid, "y": grid, "loss": [_plain(row) for row in values @ probe.unit_weights()]})


def _filter_normalised(probe: Perturbable, number: int) -> LazyTensors:
    drawn = probe.direction(number)

    def compute(name: str) -> Tensor:
        center, noise = probe.center[name], drawn[name]
        sizes, drawn_sizes = (x.flatten(1).norm(dim=1) for x in (center, noise))
        return noise.mul((sizes / drawn_sizes).view(-1, *[1] * (noise.ndim - 1)))

    return LazyTensors([name for name in drawn if probe.center[name].ndim > 1], compute)


def _between(probe: Perturbable, directions: Sequence[Weights], factors: Sequence[float]) -> LazyTensors:
    def compute(name: str) -> Tensor:
        total = _single(probe.center[name])
        for direction, factor in zip(directions, factors, strict=True):
            total = total + factor * direction[name]
        return total.to(probe.center[name].dtype)

    return LazyTensors(directions[0], compute)


def _mix(probe: Perturbable, shares: Mapping[str, float], models: Mapping[str, Weights]) -> LazyTensors:
    """Return Σ share · model; to the bit a model itself if its share is 1 and all others are 0."""
    used = {label: share for label, share in shares.items() if share}

    def compute(name: str) -> Tensor:
        terms = [share * _single(models[label][name]) for label, share in used.items()]
        return torch.stack(terms).sum(dim=0).to(probe.center[name].dtype)

    return LazyTensors(probe.parameters, compute)


def _single(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 or its own wider dtype, so that half precision is rounded to once, at the end."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _axis(corners: Sequence[float], size: int, margin: float) -> list[float]:
    low, high = min(corners), max(corners)
    room = margin * (high - low)
    points: list[float] = np.linspace(low - room, high + room, size).tolist()
    return points


def _hash(probe: Perturbable, tensors: Weights) -> str:
    """Return the ledger's identifier of other weights."""
    return hash_tensors((name, tensors[name]) for name in sorted(probe.parameters))


def _plain(values: Array | Sequence[float]) -> list[float | None]:
    return [float(value) if math.isfinite(value) else None for value in values]
