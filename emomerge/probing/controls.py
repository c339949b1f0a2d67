"""What stands beside every sharpness figure: gradient norm, distance, and how well an evaluation repeats itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from emomerge.numerics.sums import inner, square_sum
from emomerge.probing.ledger import Ledger
from emomerge.probing.perturb import Batch, Perturbable, Weights
from emomerge.probing.registry import Array, Measurement, metric
from emomerge.probing.sharpness import center, key, weights

Score = Callable[[nn.Module, Batch], Mapping[str, float]]
"""(model, batch) → figures of the batch: `weight` (rows), mean `loss`, and whatever else the task knows (accuracy, entropy)."""


def scores(
    model: nn.Module,
    batches: Sequence[Batch],
    score: Score,
    *,
    ledger: Ledger,
    model_hash: str,
    data_hash: str,
    split: str,
) -> dict[str, NDArray[np.float64]]:
    """Figures of every batch of a split, by name, each (batches,); one ledger row a batch, so that a kill loses one batch."""
    training = model.training
    model.eval()
    rows = []
    for index, batch in enumerate(batches):

        def evaluate(batch: Batch = batch) -> Mapping[str, float]:
            with torch.inference_mode():
                return score(model, batch)

        rows.append(
            ledger.ask(
                evaluate,
                model=model_hash,
                data=data_hash,
                metric=f"scores of {split}",
                radius=0.0,
                direction=None,
                batch=index,
            )
        )
    model.train(training)
    names = [name for name in rows[0] if isinstance(rows[0][name], float)]
    return {name: np.array([row[name] for row in rows]) for name in names if name != "radius"}


def mean_score(figures: Mapping[str, NDArray[np.float64]], name: str) -> float:
    """The weighted mean of one figure over batches."""
    return float(np.average(figures[name], weights=figures["weight"]))


@metric("loss", preset="quick")
def loss(probe: Perturbable) -> Measurement:
    """The weighted mean loss at the model itself; values (units,). Cost: one forward pass a batch."""
    values = center(probe)
    mean = float(values @ weights(probe))
    return Measurement(values, mean if math.isfinite(mean) else None)


def gradient_norm(probe: Perturbable) -> float:
    """‖∇L‖₂ over all perturbed parameters, L the weighted mean over the probe's batches. One forward and backward a batch."""

    def evaluate() -> dict[str, float]:
        parameters = list(probe.parameters.values())
        total: list[Tensor] = [torch.zeros_like(p) for p in parameters]
        weight_sum = 0.0
        with probe.evaluating():
            for batch in probe.batches:
                loss, weight = probe.loss(probe.model, batch)
                weight_of = torch.as_tensor(weight, dtype=loss.dtype, device=loss.device)
                gradients = torch.autograd.grad((loss * weight_of).sum(), parameters, allow_unused=True)
                for sum_, gradient in zip(total, gradients, strict=True):
                    if gradient is not None:
                        sum_.add_(gradient)
                weight_sum += float(weight_of.sum())
        return {"norm": math.sqrt(sum(square_sum(g) for g in total)) / weight_sum}

    return float(probe.ledger.ask(evaluate, **key(probe, "gradient norm", 0.0, None, 0))["norm"])


def noise_floor(probe: Perturbable) -> float:
    """Largest difference between two evaluations of one batch at one point: figures below it mean nothing."""

    def evaluate() -> dict[str, Any]:
        with probe.evaluating():
            pairs = [(probe.evaluate(i)[0], probe.evaluate(i)[0]) for i in range(len(probe.batches))]
        return {"difference": max(abs(a - b) for first, second in pairs for a, b in zip(first, second, strict=True))}

    return float(probe.ledger.ask(evaluate, **key(probe, "noise floor", 0.0, None, 0))["difference"])


def distance(model: nn.Module, base: Mapping[str, Tensor]) -> float:
    """‖θ − θ₀‖₂ over all parameters."""
    return math.sqrt(sum(square_sum(p.detach() - base[n]) for n, p in model.named_parameters()))


def agreement(models: Mapping[str, Weights], base: Weights) -> dict[str, Any]:
    """cos(τ_i, τ_j), and the share of coordinates both move that they move alike. No forward pass.

    Args:
        models: label → parameter name → tensor; τ is what is between it and the base.
        base: parameter name → tensor.

    Returns:
        `labels`, and two symmetric matrices `cosines` and `sign_agreement`; None where there is nothing to compare.
    """
    count = len(models)
    products, alike, shared = (np.zeros((count, count)) for _ in range(3))
    for name in next(iter(models.values())):
        start = base[name].detach()
        deltas = [model[name].detach() - start for model in models.values()]
        for i, j in combinations_with_replacement(range(count), 2):
            sign = deltas[i].sign() * deltas[j].sign()
            products[i, j] += inner(deltas[i], deltas[j])
            alike[i, j] += int((sign > 0).sum())
            shared[i, j] += int((sign != 0).sum())

    def matrix(parts: Array, wholes: Array) -> list[list[float | None]]:
        pairs = [[(min(i, j), max(i, j)) for j in range(count)] for i in range(count)]
        return [[float(parts[pair] / wholes[pair]) if wholes[pair] else None for pair in row] for row in pairs]

    norms = np.sqrt(np.diag(products))
    return {
        "labels": list(models),
        "cosines": matrix(products, np.outer(norms, norms)),
        "sign_agreement": matrix(alike, shared),
    }


@metric("gradient-norm", preset="quick")
def _gradient_norm(probe: Perturbable) -> Measurement:
    norm = gradient_norm(probe)
    return Measurement(np.array(norm), norm if math.isfinite(norm) else None)


@metric("noise-floor", preset="quick")
def _noise_floor(probe: Perturbable) -> Measurement:
    floor = noise_floor(probe)
    return Measurement(np.array(floor), floor if math.isfinite(floor) else None)


@metric("distance", preset="quick", needs=("base",))
def _distance(probe: Perturbable, base: Weights) -> Measurement:
    found = distance(probe.model, base)
    return Measurement(np.array(found), found)


@metric("agreement", preset="quick", needs=("base", "others"))
def _agreement(probe: Perturbable, base: Weights, others: Mapping[str, Weights]) -> Measurement:
    found = agreement({"model": probe.center, **others}, base)
    return Measurement(np.array(found["cosines"], dtype=np.float64), found)
