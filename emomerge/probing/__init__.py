"""Is it flat? Sharpness, curves and controls of a model, with every evaluation remembered, and the verdict over them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emomerge.errors import BadInput
from emomerge.probing import controls, landscape, sharpness, worst_case  # noqa: F401  (they register their metrics)
from emomerge.probing.batch_norm import reestimate_batch_norm
from emomerge.probing.hessian import metrics as _hessian  # noqa: F401
from emomerge.probing.ledger import Ledger
from emomerge.probing.perturb import Batch, LossFunction, Perturbable, Weights, rms
from emomerge.probing.registry import METRICS, PRESETS, Preset, preset_metrics


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
    """Measure a model; its weights are the same to the bit afterwards.

    Args:
        model: any module; its trainable floating parameters are perturbed. A model spread over devices stays there.
        loss: (model, batch) → mean loss of the batch, and the batch's weight (rows, or tokens); or tensors and lists of both
            for groups of rows.
        batches: what the loss is taken on; give all models of a comparison the same.
        metrics: `quick`, `standard` or `full`; names of METRICS; or names with options, {"gaussian": {"directions": 32}}.
            A preset leaves out what needs arguments that are not given.
        reference: the base whose RMS per tensor sets the size of perturbations, or those numbers; by default the model
            itself, which favours models with small weights: give the common base when models are compared. What looks at
            the way from the base (`curve`, `plane`, `distance`) needs the module.
        others: label → model that is compared with this one, by `barriers`, `plane` and `agreement`.
        seed: of the directions.
        ledger: a JSONL file to resume from, one for each loss function; None remembers nothing.
        model_hash: what the ledger files the model under; by default the SHA-256 of its weights.

    Returns:
        metric → its summary, ready for JSON.

    Raises:
        BadInput: no batches, an unknown metric, one without what it needs, or weights in a dtype that cannot hold the
            perturbation.
    """
    if not batches:
        raise BadInput("the probe needs at least one batch")
    given: dict[str, Any] = {}
    if isinstance(reference, nn.Module):
        given["base"] = _weights(reference)
    if others:
        given["others"] = {label: _weights(other) for label, other in others.items()}
    wanted = _wanted(metrics, given)
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


def _wanted(
    metrics: str | Sequence[str] | Mapping[str, Mapping[str, Any]], given: Mapping[str, Any]
) -> dict[str, Mapping[str, Any]]:
    """Metric → options."""
    if metrics in PRESETS:
        return {name: {} for name in preset_metrics(metrics) if set(METRICS[name].needs) <= given.keys()}
    if isinstance(metrics, str):
        raise BadInput("no such preset", found=metrics, expected=", ".join(PRESETS))
    wanted = dict(metrics) if isinstance(metrics, Mapping) else {name: {} for name in metrics}
    for name in wanted:
        if name not in METRICS:
            raise BadInput("no such metric", found=name, expected=", ".join(METRICS))
        if missing := set(METRICS[name].needs) - given.keys():
            wants = {"base": "reference=, the base as a module", "others": "others="}
            raise BadInput(
                "the metric needs an argument", where=name, fix=f"give {' and '.join(wants[m] for m in sorted(missing))}"
            )
    return wanted


def _require_alike(probed: Perturbable, label: str, weights: Weights) -> None:
    """Raises BadInput if another model lacks a parameter of the probed one, or has it in another shape."""
    for name, parameter in probed.parameters.items():
        if name not in weights or weights[name].shape != parameter.shape:
            raise BadInput(
                "not a model of the same architecture", where=f"{label}, parameter {name}", expected=tuple(parameter.shape),
                found=tuple(weights[name].shape) if name in weights else "none",
            )  # fmt: skip


def _weights(model: nn.Module | Weights) -> Weights:
    return {name: p.detach() for name, p in model.named_parameters()} if isinstance(model, nn.Module) else model


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


__all__ = [
    "METRICS", "PRESETS", "Batch", "Ledger", "LossFunction", "Perturbable", "preset_metrics", "probe",
    "reestimate_batch_norm", "rms",
]  # fmt: skip
