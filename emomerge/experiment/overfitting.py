"""Where trunks and long runs overfit, by the validation loss of their snapshots."""

from __future__ import annotations

import math
from collections.abc import Sequence

from emomerge.experiment.measure import Measurer
from emomerge.experiment.points import end_of, snapshot_of
from emomerge.merging.vectors import finite_or_inf
from emomerge.training import RunSpec

OVERFITTED = 0.25
"""A run has plainly overfitted where its validation loss is above the lowest by such a share of it …"""
MEMORIZED = 0.75
"""… and its training loss is below the lowest validation loss by such a share. Where the rate was only too high for a while, a
run may recover."""
LATELY = 12
"""Its training loss is the mean since the last snapshot, over at most a twelfth of its steps."""
PATIENCE = 2
"""At so many snapshots in a row a long run must have overfitted; a trunk, the steps of whose snapshots double, at one."""


def snapshot_loss(measurer: Measurer, spec: RunSpec, step: int) -> float:
    """Return the validation loss of a snapshot; infinity if it is not a number."""
    return finite_or_inf(measurer.loss(snapshot_of(measurer.context, spec, step), "validation"))


def overfits(measurer: Measurer, spec: RunSpec, step: int) -> bool:
    """Return whether a trunk or a long run has plainly overfitted at the step of a snapshot."""
    steps = [earlier for earlier in spec.snapshots if earlier <= step]
    losses = [snapshot_loss(measurer, spec, earlier) for earlier in steps]
    since = max([step - math.ceil(spec.steps / LATELY), *steps[:-1]])
    trained = [row["loss"] for row in measurer.context.run_dir(spec).metrics() if since < row["step"] <= step]
    return has_risen(losses, 1 if spec.is_trunk else PATIENCE) and has_memorized(sum(trained) / len(trained), losses)


def keep_best(measurer: Measurer, spec: RunSpec) -> None:
    """Remove the snapshots of a finished run, except the one with the lowest validation loss if it is lower than at the end."""
    run = measurer.context.run_dir(spec)
    losses = {spec.steps: finite_or_inf(measurer.loss(end_of(measurer.context, spec), "validation"))}  # first in case of ties
    losses |= {step: snapshot_loss(measurer, spec, step) for step in spec.snapshots if run.snapshot(step).is_dir()}
    best = min(losses, key=losses.__getitem__)
    run.remove_snapshots([step for step in spec.snapshots if step != best])


def has_risen(losses: Sequence[float], patience: int = 1) -> bool:
    """Return whether the last `patience` of some validation losses are above the lowest by more than noise: by OVERFITTED."""
    lowest = min(losses)
    return min(losses[-patience:]) > lowest + OVERFITTED * abs(lowest)


def has_memorized(training: float, losses: Sequence[float]) -> bool:
    """Return whether a training loss is below the lowest validation loss by MEMORIZED."""
    lowest = min(losses)
    return training < lowest - MEMORIZED * abs(lowest)
