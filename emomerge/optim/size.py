"""The size of the weights, which gives the rate its scale in the preset `auto`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from emomerge.optim.batches import block_size, blocks, exact, local, sum_over_shards

FALLBACK = 0.01
"""The size of parameters among which there is nothing to measure: none has two dimensions, or all are zero."""


@torch.no_grad()
def weight_size(params: Iterable[Tensor]) -> Tensor:
    """Return the mean over all elements of RMS(W)/√min(fan_out, fan_in), each tensor counting with its own value.

    A step of η times a sign matrix changes the spectral norm of W by at most the fraction η/(RMS(W)/√min(fan_out, fan_in)), up
    to a factor of about 2 (Yang, Simon and Bernstein 2023). fan_out is the first dimension, fan_in the product of the others.

    Parameters that are not trained, have fewer than two dimensions (biases, gains of norms) or are all zero (the factor B of a
    new LoRA adapter) do not count.

    Args:
        params: the parameters; any shapes, devices and dtypes, DTensors included.

    Returns:
        A 0-d float64 tensor (float32 on MPS) on the device of the first parameter; FALLBACK if nothing counts.
    """
    matrices = [p.detach() for p in params if p.requires_grad and p.dim() > 1 and p.numel()]
    if not matrices:
        return torch.tensor(FALLBACK, dtype=torch.float64)
    device = matrices[0].device
    total = elements = torch.zeros((), dtype=exact(device), device=device)
    for p in matrices:
        mean_square = (_square_sum(p) / p.numel()).to(device)
        total = total + p.numel() * (mean_square / min(len(p), p.numel() // len(p))).sqrt()
        elements = elements + p.numel() * (mean_square > 0)
    return torch.where(elements > 0, total / elements.clamp(min=1), FALLBACK)


def _square_sum(p: Tensor) -> Tensor:
    """Return Σ W² over all shards, independent of the number of threads."""
    sums = [block.to(exact(p.device)).square().sum() for (block,) in blocks(local(p), limit=block_size(p.device))]
    return sum_over_shards(torch.stack(sums).sum(), p) if sums else torch.zeros((), dtype=exact(p.device), device=p.device)
