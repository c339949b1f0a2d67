"""The Hessian as metrics: its spectrum and trace, its diagonal blocks, and its restriction to task vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
from torch import Tensor

from emomerge.probing import report
from emomerge.probing.hessian.hutchinson import trace
from emomerge.probing.hessian.product import Method
from emomerge.probing.hessian.span import in_span
from emomerge.probing.hessian.spectrum import blockwise, density, lanczos
from emomerge.probing.perturb import LazyTensors, Perturbable, Weights
from emomerge.probing.registry import BACKWARD, Measurement, metric


@metric(
    "hessian",
    preset="standard",
    options=lambda probe: {"steps": probe.lanczos_steps, "probes": probe.trace_probes},
    parts=16,  # what its intervals are resampled over
    split="whole",
    cost=lambda options, batches: BACKWARD * (options["steps"] + options["probes"] + 7) * batches,
    report=report.hessian,
)
def spectrum_and_trace(
    probe: Perturbable,
    steps: int = 30,
    probes: int = 32,
    hvp: Method = "finite-difference",
    on_probe: Callable[[int], None] = lambda number: None,
) -> Measurement:
    """Measure λmax, λmin, the spectral density, and the trace with its parts by module. Costs of `lanczos` and `trace`.

    Returns:
        values (1 + probes, batches): those of λmax (see `Extreme.units`), then one estimate of the trace per probe vector. They
        pair models over batches, not over groups of rows.
    """
    run = lanczos(probe, steps, hvp=hvp)
    found = trace(probe, probes, lanczos=run, hvp=hvp, on_probe=on_probe)
    summary = {**run.summary(), "trace": found.summary(), "density": density([run])}
    values = np.vstack([run.largest.units, found.values])
    return Measurement(values, summary, found.weight, {"λmax": values[:1], "trace": values[1:]})


@metric("layers", split="whole", cost=lambda options, batches: BACKWARD * (options["steps"] + 3) * batches)
def layers(probe: Perturbable, steps: int = 30, tolerance: float = 0.05, hvp: Method = "finite-difference") -> Measurement:
    """Measure λmax of each module's diagonal block. On request only: it costs a Lanczos run per module.

    Returns:
        values (modules, batches).
    """
    found = blockwise(probe, steps, tolerance=tolerance, hvp=hvp)
    return Measurement(
        np.array([run.largest.units for run in found.values()]), {name: run.summary() for name, run in found.items()}
    )


@metric(
    "span",
    preset="standard",
    base=True,
    others="runs",
    models="merge",
    cost=lambda options, batches: 4 * BACKWARD * batches,
    report=report.span,
)
def span(probe: Perturbable, base: Weights, others: Mapping[str, Weights], hvp: Method = "finite-difference") -> Measurement:
    """Measure the exact Hessian in the span of the other models' task vectors. Cost: that of `in_span`.

    Returns:
        values (batches, rank, rank).
    """
    directions = [LazyTensors(probe.parameters, partial(_task_vector, base, weights)) for weights in others.values()]
    found = in_span(probe, directions, hvp=hvp)
    summary = found.summary()
    return Measurement(found.units, {**summary, "along": dict(zip(others, summary["along"] or [], strict=False))})


def _task_vector(base: Weights, weights: Weights, name: str) -> Tensor:
    return weights[name] - base[name]
