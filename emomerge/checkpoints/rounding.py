"""Rounding to a narrower floating dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def stochastic_round(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round each element up or down at random to a neighbour in `dtype`, so that the mean is exact.

    An element at a share s of the way from its lower neighbour to its upper one goes up with probability s; what `dtype` can
    hold stays as it is. For steps that are small against the spacing of the weights (Gupta et al. 2015).

    Args:
        x: float32 values, any shape.
        dtype: bfloat16 or float16.
        generator: on x's device.

    Returns:
        A tensor of `dtype`; values beyond its largest are rounded as usual, to that or to infinity.
    """
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(x)
    spacing = torch.ldexp(torch.ones_like(x), exponent - 1).clamp_(min=info.smallest_normal).mul_(info.eps)
    scaled = x / spacing
    lower = scaled.floor()
    draw = torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    rounded = (lower + (draw < scaled - lower)).mul_(spacing)
    return torch.where(x.abs() <= info.max, rounded, x).to(dtype)
