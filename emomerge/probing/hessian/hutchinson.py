"""The trace of the Hessian: Hutchinson's estimator, and Hutch++ on the subspace of a Lanczos run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from emomerge.probing import sharpness
from emomerge.probing.hessian.product import Array, Curvature, Method, curvature
from emomerge.probing.hessian.spectrum import Lanczos, by_module
from emomerge.probing.hessian.vectors import project_out
from emomerge.probing.perturb import Perturbable


@dataclass(frozen=True)
class Trace:
    """Estimates of tr H, one for each probe vector and batch."""

    values: Array
    """(probes, batches): the weighted mean over batches is one estimate of tr H."""
    tensors: Mapping[str, Array]
    """Parameter name → its part of the trace, (probes,)."""
    weight: Array
    """Weights of the batches, summing to one."""
    disagreement: float | None
    """Relative difference between the random part of the first estimate at ε and at ε/2; None for `autograd`."""

    def modules(self) -> dict[str, dict[str, Any]]:
        """Return mean, standard error and number of estimates of each module's part of the trace."""
        grouped = by_module([*self.tensors]).items()
        parts = {module: np.stack([self.tensors[name] for name in names], axis=1) for module, names in grouped}
        return {module: sharpness.summary(part, np.ones(part.shape[1]), 0.0) for module, part in parts.items()}

    def summary(self) -> dict[str, Any]:
        """Return mean, standard error and number of estimates of the trace, and its parts by module."""
        whole = sharpness.summary(self.values, self.weight, 0.0)
        return {**whole, "disagreement": self.disagreement, "modules": self.modules()}


def trace(
    probe: Perturbable,
    probes: int = 32,
    *,
    lanczos: Lanczos | None = None,
    hvp: Method = "finite-difference",
    on_probe: Callable[[int], None] = lambda number: None,
) -> Trace:
    """Estimate tr H by zᵀHz over random signs z (Hutchinson 1989), or tr QᵀHQ + zᵀ(I−P)H(I−P)z, P = QQᵀ, given a Lanczos run.

    The second is Hutch++ (Meyer et al. 2021) with the Krylov space as its sketch: the run knows the outliers, which cause most
    of the estimate's variance, exactly and at no further cost. All models share z; the part of each tensor comes from the
    same products. One ledger row per z.

    Differences are one-sided: their error is odd in z and the signs are random, so that it does not bias the mean, and its
    variance is part of the standard error. Central differences would allow half as many probes at the same cost.

    Cost: `probes` + 2 gradients of all batches; `autograd`: `probes` products.
    Memory: a gradient for every batch, and Q.

    Args:
        probe: the model.
        probes: number of z.
        lanczos: a run over the same model and all its parameters.
        hvp: how Hessian-vector products are computed.
        on_probe: called with the index of each z that is done.
    """
    metric = f"trace {hvp}{f' beyond {lanczos.name}' if lanczos else ''}"
    keys = [probe.ledger_key(metric, 0.0, number, 0) for number in range(probes)]
    done = all(probe.ledger.get(**key) for key in keys)
    basis = lanczos.basis() if lanczos and not done else []  # before the weights move: it may have to be computed again
    rows = []
    with curvature(probe, hvp) as matrix:
        for number, key in enumerate(keys):
            rows.append(probe.ledger.ask(partial(_estimate, matrix, basis, number), **key))
            on_probe(number)
    known = lanczos.trace_units if lanczos else 0.0
    return Trace(
        values=np.array([row["units"] for row in rows]) + np.array(known),
        tensors={
            name: np.array([row["tensors"][i] for row in rows]) + (lanczos.trace_tensors[name] if lanczos else 0.0)
            for i, name in enumerate(matrix.parameters)
        },
        weight=np.array(rows[0]["weight"]),
        disagreement=rows[0]["disagreement"],
    )


def _estimate(matrix: Curvature, basis: list[Tensor], number: int) -> dict[str, Any]:
    """Return zᵀ(I−P)H_b(I−P)z for every batch b, its parts by tensor, and for the first z the disagreement of ε and ε/2."""
    signs = matrix.draw("trace", number).sign_()
    rest = signs.clone()
    project_out(rest, basis)
    product, units = matrix.product(rest, [rest], one_sided=True)
    disagreement = None
    if number == 0 and matrix.hvp != "autograd":
        matrix.step /= 2
        finer = matrix.product(rest, [rest], one_sided=True)[1][:, 0] @ matrix.weights
        matrix.step *= 2
        disagreement = abs(float(finer - units[:, 0] @ matrix.weights)) / (abs(float(finer)) or math.inf)
    project_out(product, basis)
    return {
        "units": units[:, 0].tolist(), "tensors": matrix.sums(signs, product).tolist(),
        "weight": matrix.weights.tolist(), "disagreement": disagreement,
    }  # fmt: skip
