"""Buffers that are no weights: running statistics of batch norm, and counters.

No merge method applies to them. A dropped or negated activation statistic is wrong on its own, and a counter has no task
vector, so both follow a fixed rule, whatever the method and its scale:

- running statistics become the mean of the runs', weighted by the runs' weights where these are positive. A mean of
  variances is never negative.
- counters, such as `num_batches_tracked`, take the largest value of the base and the runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from emomerge.checkpoints import Checkpoint, TensorInfo
from emomerge.numerics.sums import run_sum

VARIANCE = "running_var"
_STATISTICS = frozenset({"running_mean", VARIANCE})
"""The buffers of torch's batch and instance norm, and of transformers' frozen ones."""


def is_statistic(name: str) -> bool:
    """Return whether a tensor holds running statistics of activations."""
    return name.rpartition(".")[2] in _STATISTICS


def is_counter(info: TensorInfo) -> bool:
    """Return whether a tensor is a counter: a single integer, such as torch's `num_batches_tracked`."""
    return info.numel == 1 and not (info.dtype.is_floating_point or info.dtype.is_complex or info.dtype == torch.bool)


def mean_statistic(name: str, rows: Sequence[Tensor], base: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the delta of a running statistic: the weighted mean of the runs', which leaves no variance negative.

    Args:
        name: name of the tensor.
        rows: each run's delta (n,).
        base: the base's statistic (n,).
        weights: weights of the runs; negative ones count as zero, and if none is positive all are equal.
    """
    positive = rows[0].new_tensor([max(weight, 0.0) for weight in weights])
    if not positive.any():
        positive = torch.ones_like(positive)
    mean = run_sum(torch.stack(list(rows)) * (positive / positive.sum()).unsqueeze(1))
    return torch.maximum(mean, -base.to(mean)) if name.endswith(VARIANCE) else mean


def largest(name: str, base: Tensor, runs: Sequence[Checkpoint]) -> Tensor:
    """Return the largest value of a counter in the base and in the runs that have it."""
    found = [run[name] for run in runs if name in run and is_counter(run.info(name))]
    most = max([base, *found], key=Tensor.item)
    return most if most is base else most.to(base.dtype).view(base.shape)


def notes(statistics: Sequence[str], counters: Sequence[str]) -> list[str]:
    """Return what to tell about the buffers that differ between the base and the runs, by their names."""
    found: Mapping[str, Sequence[str]] = {
        "running statistics are the mean of the runs', not those of the merged weights; re-estimate them on training data "
        "(--recipe RECIPE --reestimate)": statistics,
        "counters take their largest value": counters,
    }
    return [f"{what}: {_several(names)}" for what, names in found.items() if names]


def _several(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
