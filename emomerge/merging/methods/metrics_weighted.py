"""Metrics-weighted averaging: the lower a run's held-out loss, the more it counts.

Yu and Choi (2025) weight checkpoints of one training run by loss, with one penalty factor that sets how strongly. They use the
training loss; here it is the loss on validation data, which the choice of all other merges is based on. The factor is the
exponent p of an inverse power, which does not depend on the unit of the loss: 0 is the plain mean, infinity the best run.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from emomerge.errors import BadInput
from emomerge.merging.registry import merge_method, provides
from emomerge.merging.vectors import TaskVectors
from emomerge.numerics.sums import weighted_sum

Penalty = Annotated[float, Field(ge=0, allow_inf_nan=False, description="exponent p; 0 is the plain mean")]


@provides("shares")
def loss_shares(vectors: TaskVectors, *, penalty: Penalty = 4.0) -> dict[str, Any]:
    """Return each run's share of (min L / L_t)^p."""
    losses = vectors.run_losses("metrics-weighted")
    lowest = min(losses)
    if lowest < 0:
        run = vectors.labels[losses.index(lowest)]
        raise BadInput("metrics-weighted needs losses of at least 0", where=run, found=f"{lowest:.4g}", fix="use greedy-soup")
    ratios = [(lowest / loss if loss > 0 else 1.0) ** penalty for loss in losses]
    return {"shares": tuple(ratio / sum(ratios) for ratio in ratios)}


@merge_method("metrics-weighted", source="after Yu and Choi 2025", elementwise=True, needs_loss=True, first_pass=loss_shares)
def metrics_weighted(deltas: Tensor, *, shares: tuple[float, ...]) -> Tensor:
    """Σ_t w_t τ_t, w_t ∝ L_t^−p, L_t the held-out loss of run t, Σ_t w_t = 1."""
    return weighted_sum(deltas, shares)
