"""The basic figures reported beside every sharpness: losses, gradient norm, distance, noise floor, agreement."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from emomerge.numerics.sums import inner, square_sum
from emomerge.probing.ledger import Ledger
from emomerge.probing.perturb import Perturbable, Weights
from emomerge.probing.registry import BACKWARD, Array, Measurement, metric

Score = Callable[[Sequence[int]], Sequence[Mapping[str, float]]]
"""numbers of batches → figures of each: `weight` (number of rows), mean `loss`, and others of the task (accuracy, entropy)."""


def scores(
    model: nn.Module,
    batches: int,
    score: Score,
    *,
    ledger: Ledger,
    model_hash: str,
    data_hash: str,
    split: str,
    together: int = 1,
) -> dict[str, NDArray[np.float64]]:
    """Return the figures of every batch of a split, by name, each (batches,). One ledger row per batch.

    Args:
        model: put into eval mode meanwhile.
        batches: number of batches.
        score: evaluates some of them; called with gradients off.
        ledger, model_hash, data_hash, split: where the figures are remembered, and under which key.
        together: number of batches evaluated by one call of `score`.
    """
    key = {"model": model_hash, "data": data_hash, "metric": f"scores of {split}", "radius": 0.0, "direction": None}
    training, rows = model.training, []
    model.eval()
    with torch.inference_mode():
        for first in range(0, batches, together):
            keys = [{**key, "batch": number} for number in range(first, min(first + together, batches))]
            rows += ledger.ask_all(partial(_score_from, score, first), keys)
    model.train(training)
    names = [name for name in rows[0] if isinstance(rows[0][name], float)]
    return {name: np.array([row[name] for row in rows]) for name in names if name != "radius"}


def _score_from(score: Score, first: int, missing: Sequence[int]) -> Sequence[Mapping[str, float]]:
    return score([first + number for number in missing])


def mean_score(figures: Mapping[str, NDArray[np.float64]], name: str) -> float:
    """Return the weighted mean of a figure over batches."""
    return float(np.average(figures[name], weights=figures["weight"]))


@metric("loss", preset="quick", roles=(), cost=lambda options, batches: batches)
def loss(probe: Perturbable) -> Measurement:
    """Measure the weighted mean loss; values (units,). Cost: one forward pass per batch."""
    values = probe.center_losses()
    mean = float(values @ probe.unit_weights())
    return Measurement(values, mean if math.isfinite(mean) else None, probe.unit_weights())


def gradient_norm(probe: Perturbable) -> float:
    """Return ‖∇L‖₂ over all perturbed parameters. Cost: a forward and a backward pass per batch."""

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
                probe.on_passes(BACKWARD)
                weight_sum += float(weight_of.sum())
        return {"norm": math.sqrt(sum(square_sum(g) for g in total)) / weight_sum}

    return float(probe.ledger.ask(evaluate, **probe.ledger_key("gradient norm", 0.0, None, 0))["norm"])


def noise_floor(probe: Perturbable) -> float:
    """Return the largest difference between two evaluations of the same batch: smaller figures mean nothing."""

    def evaluate() -> dict[str, Any]:
        with probe.evaluating():
            pairs = [(probe.evaluate(i)[0], probe.evaluate(i)[0]) for i in range(len(probe.batches))]
        return {"difference": max(abs(a - b) for first, second in pairs for a, b in zip(first, second, strict=True))}

    return float(probe.ledger.ask(evaluate, **probe.ledger_key("noise floor", 0.0, None, 0))["difference"])


def distance(model: nn.Module, base: Mapping[str, Tensor]) -> float:
    """Return ‖θ − θ₀‖₂ over all parameters."""
    return math.sqrt(sum(square_sum(p.detach() - base[n]) for n, p in model.named_parameters()))


def agreement(models: Mapping[str, Weights], base: Weights) -> dict[str, Any]:
    """Return cos(τ_i, τ_j), and the share of the coordinates moved by both that move in the same direction. No forward pass.

    Args:
        models: label → parameter name → tensor; τ is its difference from the base.
        base: parameter name → tensor.

    Returns:
        `labels`, and two symmetric matrices `cosines` and `sign_agreement`; None if there is nothing to compare.
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


@metric("gradient-norm", preset="standard", roles=(), cost=lambda options, batches: BACKWARD * batches)
def _gradient_norm(probe: Perturbable) -> Measurement:
    norm = gradient_norm(probe)
    return Measurement(np.array(norm), norm if math.isfinite(norm) else None)


@metric("noise-floor", preset="quick", roles=(), cost=lambda options, batches: 2 * batches)
def _noise_floor(probe: Perturbable) -> Measurement:
    floor = noise_floor(probe)
    return Measurement(np.array(floor), floor if math.isfinite(floor) else None)


@metric("distance", preset="quick", roles=(), base=True)
def _distance(probe: Perturbable, base: Weights) -> Measurement:
    found = distance(probe.model, base)
    return Measurement(np.array(found), found)


@metric("agreement", preset="quick", roles=(), base=True, others="runs", models="merge")
def _agreement(probe: Perturbable, base: Weights, others: Mapping[str, Weights]) -> Measurement:
    found = agreement({"model": probe.center, **others}, base)
    return Measurement(np.array(found["cosines"], dtype=np.float64), found)
