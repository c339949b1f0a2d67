"""Probing: sharpness, loss landscapes and basic figures of a model, a ledger of all evaluations, and the verdict on them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emomerge.errors import BadInput
from emomerge.probing.batch_norm import reestimate_batch_norm
from emomerge.probing.ledger import Ledger
from emomerge.probing.perturb import Batch, LossFunction, Perturbable, Weights, rms
from emomerge.probing.registry import METRICS, PRESETS, Preset, find, preset_metrics

# These modules register their metrics when they are imported. Reports show columns in the order of registration.
# isort: off
from emomerge.probing import sharpness as sharpness
from emomerge.probing import worst_case as worst_case
from emomerge.probing.hessian import metrics as _hessian  # noqa: F401
from emomerge.probing import basin as basin
from emomerge.probing import landscape as landscape
from emomerge.probing import basics as basics
# isort: on


def probe(
    model: nn.Module,
    loss: LossFunction,
    batches: Sequence[Batch],
    metrics: Preset | Sequence[str] | Mapping[str, Mapping[str, Any]] = "quick",
    *,
    reference: nn.Module | Mapping[str, float] | None = None,
    others: Mapping[str, nn.Module | Weights] | None = None,
    seed: int = 0,
    ledger: str | Path | None = None,
    model_hash: str | None = None,
) -> dict[str, Any]:
    """Measure a model. Afterwards its weights are the same to the bit.

    Args:
        model: any module; its trainable floating-point parameters are perturbed. A model spread over devices stays there.
        loss: (model, batch) → mean loss and weight (number of rows or tokens) of the batch; or a tensor and a list of both,
            one entry for each group of rows.
        batches: the data the loss is evaluated on; use the same for all models of a comparison.
        metrics: `quick`, `standard` or `full`; names of METRICS; or names with options, {"gaussian": {"directions": 32}}.
            A preset leaves out metrics whose arguments are not given.
        reference: the base, or its RMS per tensor, which sets the size of perturbations. By default the model itself, which
            favours models with small weights: give the common base to compare models. Metrics that look at the path from the
            base (`curve`, `plane`, `distance`) need the module.
        others: label → model to compare this one with (`barriers`, `plane`, `span`, `agreement`).
        seed: seed of the directions.
        ledger: a JSONL file to resume from, one per loss function; None remembers nothing.
        model_hash: identifies the model in the ledger; by default the SHA-256 of its weights.

    Returns:
        metric → summary, ready for JSON.

    Raises:
        BadInput: no batches, an unknown metric, a metric whose arguments are missing, or weights in a dtype that cannot hold
            the perturbation.
    """
    if not batches:
        raise BadInput("the probe needs at least one batch")
    given: dict[str, Any] = {}
    if isinstance(reference, nn.Module):
        given["base"] = _weights(reference)
    if others:
        given["others"] = {label: _weights(other) for label, other in others.items()}
    wanted = _options_by_metric(metrics, given)
    scale = reference if isinstance(reference, Mapping) else rms(model if reference is None else reference)
    probed = Perturbable(
        model, loss, batches, scale, seed=seed, ledger=Ledger(None if ledger is None else Path(ledger)),
        model_hash=model_hash or "", data_hash="" if ledger is None else _hash([batches, sorted(scale.items()), seed]),
    )  # fmt: skip
    probed.model_hash = model_hash or probed.sha256()
    for label, weights in {**given.get("others", {}), **({"reference": given["base"]} if "base" in given else {})}.items():
        _require_alike(probed, label, weights)
    return {
        name: METRICS[name].function(probed, **{need: given[need] for need in METRICS[name].needs}, **options).summary
        for name, options in wanted.items()
    }


def _options_by_metric(
    metrics: str | Sequence[str] | Mapping[str, Mapping[str, Any]], given: Mapping[str, Any]
) -> dict[str, Mapping[str, Any]]:
    if metrics in PRESETS:
        return {name: {} for name in preset_metrics(metrics) if METRICS[name].needs <= given.keys()}
    if isinstance(metrics, str):
        raise BadInput("no such preset", found=metrics, expected=", ".join(PRESETS))
    wanted = dict(metrics) if isinstance(metrics, Mapping) else {name: {} for name in metrics}
    for name in wanted:
        if missing := find(name, "metrics").needs - given.keys():
            wants = {"base": "reference=, the base as a module", "others": "others="}
            raise BadInput(
                "the metric needs an argument", where=name, fix=f"give {' and '.join(wants[m] for m in sorted(missing))}"
            )
    return wanted


def _require_alike(probed: Perturbable, label: str, weights: Weights) -> None:
    """Raise BadInput if another model lacks a parameter of the probed one, or has it in another shape."""
    for name, parameter in probed.parameters.items():
        if name not in weights or weights[name].shape != parameter.shape:
            raise BadInput(
                "not a model of the same architecture", where=f"{label}, parameter {name}", expected=tuple(parameter.shape),
                found=tuple(weights[name].shape) if name in weights else "none",
            )  # fmt: skip


def _weights(model: nn.Module | Weights) -> Weights:
    return {name: p.detach() for name, p in model.named_parameters()} if isinstance(model, nn.Module) else model


def _hash(value: Any) -> str:
    """Return the SHA-256 of tensors, numbers, strings, and containers of them: it identifies batches in a ledger."""
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
            "with a ledger, batches may hold tensors, numbers and strings only",
            found=type(value).__name__,
            fix="leave the ledger out",
        )
    return hashlib.sha256("/".join([type(value).__name__, *parts]).encode()).hexdigest()


__all__ = [
    "METRICS", "PRESETS", "Batch", "Ledger", "LossFunction", "Perturbable", "preset_metrics", "probe",
    "reestimate_batch_norm", "rms",
]  # fmt: skip
