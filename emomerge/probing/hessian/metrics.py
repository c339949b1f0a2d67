"""The Hessian among the probe's metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
from torch import Tensor

from emomerge.probing.hessian.hutchinson import trace
from emomerge.probing.hessian.product import Method
from emomerge.probing.hessian.span import in_span
from emomerge.probing.hessian.spectrum import blockwise, density, lanczos
from emomerge.probing.perturb import Lazy, Perturbable, Weights
from emomerge.probing.registry import Measurement, metric


@metric("hessian", preset="standard")
def spectrum_and_trace(
    probe: Perturbable,
    steps: int = 30,
    probes: int = 32,
    hvp: Method = "finite-difference",
    on_probe: Callable[[int], None] = lambda number: None,
) -> Measurement:
    """λmax, λmin, spectral density, and the trace with its parts by module. Costs of `lanczos` and `trace`.

    Returns:
        values (1 + probes, batches): λmax's, then one estimate of the trace for each probe vector; see `Extreme.units`. They
        pair models over batches, not over groups of rows.
    """
    run = lanczos(probe, steps, hvp=hvp)
    found = trace(probe, probes, lanczos=run, hvp=hvp, on_probe=on_probe)
    summary = {**run.summary(), "trace": found.summary(), "density": density([run])}
    return Measurement(np.vstack([run.largest.units, found.values]), summary)


@metric("layers", preset="full")
def layers(probe: Perturbable, steps: int = 30, tolerance: float = 0.05, hvp: Method = "finite-difference") -> Measurement:
    """λmax of each module's diagonal block. Costs of `blockwise`.

    Returns:
        values (modules, batches).
    """
    found = blockwise(probe, steps, tolerance=tolerance, hvp=hvp)
    return Measurement(
        np.array([run.largest.units for run in found.values()]), {name: run.summary() for name, run in found.items()}
    )


@metric("span", preset="standard", needs=("base", "others"))
def span(probe: Perturbable, base: Weights, others: Mapping[str, Weights], hvp: Method = "finite-difference") -> Measurement:
    """The exact Hessian in the span of the other models' task vectors. Costs of `in_span`.

    Returns:
        values (batches, rank, rank).
    """
    directions = [Lazy(probe.parameters, partial(_task_vector, base, weights)) for weights in others.values()]
    found = in_span(probe, directions, hvp=hvp)
    summary = found.summary()
    return Measurement(found.units, {**summary, "along": dict(zip(others, summary["along"] or [], strict=False))})


def _task_vector(base: Weights, weights: Weights, name: str) -> Tensor:
    return weights[name] - base[name]
