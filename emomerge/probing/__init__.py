"""Is it flat? Sharpness, curves and controls of a model, with every evaluation remembered, and the verdict over them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emomerge.errors import BadInput
from emomerge.probing import controls, sharpness
from emomerge.probing.ledger import Ledger
from emomerge.probing.perturb import Batch, LossFunction, Perturbable, rms

METRICS = ("loss", "gradient-norm", "noise-floor", "gaussian")


def probe(
    model: nn.Module,
    loss: LossFunction,
    batches: Sequence[Batch],
    metrics: Sequence[str] = METRICS,
    *,
    reference: nn.Module | Mapping[str, float] | None = None,
    radii: Sequence[float] = (0.01, 0.03, 0.1),
    directions: int = 16,
    seed: int = 0,
    ledger: str | Path | None = None,
    model_hash: str | None = None,
) -> dict[str, Any]:
    """Measure a model; its weights are the same to the bit afterwards.

    Args:
        model: any module; its trainable floating parameters are perturbed.
        loss: (model, batch) → mean loss of the batch, and the batch's weight.
        batches: what the loss is taken on; give all models of a comparison the same.
        metrics: of METRICS.
        reference: the base whose RMS per tensor sets the size of perturbations, or those numbers; by default the model
            itself, which favours models with small weights: give the common base when models are compared.
        radii: perturbation sizes, as fractions of that RMS.
        directions: Gaussian directions, each taken both ways.
        seed: of the directions.
        ledger: a JSONL file to resume from, one for each loss function; None remembers nothing.
        model_hash: what the ledger files the model under; by default the SHA-256 of its weights.

    Returns:
        `loss`, `gradient_norm`, `noise_floor`, and `gaussian`: radius → mean, standard error, number of directions.

    Raises:
        BadInput: no batches, an unknown metric, or weights in a dtype that cannot hold the perturbation.
    """
    for metric in metrics:
        if metric not in METRICS:
            raise BadInput("no such metric", found=metric, expected=", ".join(METRICS))
    if not batches:
        raise BadInput("the probe needs at least one batch")
    scale = reference if isinstance(reference, Mapping) else rms(model if reference is None else reference)
    probed = Perturbable(
        model, loss, batches, scale, seed=seed, ledger=Ledger(None if ledger is None else Path(ledger)),
        model_hash=model_hash or "", data_hash="" if ledger is None else _hash([batches, sorted(scale.items()), seed]),
    )  # fmt: skip
    probed.model_hash = model_hash or probed.sha256()
    weight, found = sharpness.weights(probed), {}
    if "loss" in metrics:
        found["loss"] = float(sharpness.center(probed) @ weight)
    if "gradient-norm" in metrics:
        found["gradient_norm"] = controls.gradient_norm(probed)
    if "noise-floor" in metrics:
        found["noise_floor"] = controls.noise_floor(probed)
    result: dict[str, Any] = dict(found)
    if "gaussian" in metrics:
        values = sharpness.gaussian(probed, radii, directions)
        result["gaussian"] = {f"{r:g}": sharpness.summary(v, weight) for r, v in zip(radii, values, strict=True)}
    return result


def _hash(value: Any) -> str:
    """SHA-256 of tensors, numbers, texts, and containers of them: a ledger must not mistake one batch for another."""
    if isinstance(value, Tensor):
        array = value.detach().cpu().contiguous()
        parts = [
            str(array.dtype),
            str(tuple(array.shape)),
            hashlib.sha256(array.flatten().view(torch.uint8).numpy().tobytes()).hexdigest(),
        ]
    elif isinstance(value, Mapping):
        parts = [f"{key}={_hash(item)}" for key, item in value.items()]
    elif isinstance(value, (list, tuple)):
        parts = [_hash(item) for item in value]
    elif value is None or isinstance(value, (str, int, float, bool)):
        parts = [repr(value)]
    else:
        raise BadInput(
            "with a ledger, batches hold tensors, numbers and texts",
            found=type(value).__name__,
            fix="leave the ledger out",
        )
    return hashlib.sha256("/".join([type(value).__name__, *parts]).encode()).hexdigest()


__all__ = ["METRICS", "Batch", "Ledger", "LossFunction", "Perturbable", "probe", "rms"]
