"""Rounding to a narrower floating dtype: to nearest even, or stochastically."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from emomerge.numerics.seeds import generator_of
from emomerge.numerics.sums import PIECE

Rounding = Literal["nearest", "stochastic"]


def round_to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `tensor` rounded once, to nearest even. torch converts float64 to 16 bits through fp32, rounding twice."""
    if tensor.dtype == torch.float64 and dtype.is_floating_point and dtype.itemsize < 4:
        near = tensor.float()
        # Round to odd: an inexact fp32 value gets its last bit set, so that it cannot be a tie in the second rounding.
        away = torch.where(tensor > near, torch.inf, -torch.inf).to(near.dtype)
        even = near.view(torch.int32) % 2 == 0
        tensor = torch.where((near != tensor) & even, torch.nextafter(near, away), near)
    return tensor.to(dtype)


def round_at_random(tensor: Tensor, dtype: torch.dtype, *, name: str, seed: int) -> Tensor:
    """Apply `stochastic_round` with draws that depend only on the seed and the name.

    A `dtype` that is not a narrower 16-bit float is rounded to nearest. Draws are made on the CPU, so that the result does
    not depend on the device.
    """
    if dtype not in (torch.bfloat16, torch.float16) or tensor.dtype not in (torch.float32, torch.float64):
        return round_to(tensor, dtype)
    generator = generator_of(seed, name)
    pieces = tensor.cpu().flatten().split(PIECE)
    return torch.cat([stochastic_round(piece.float(), dtype, generator) for piece in pieces]).view(tensor.shape)


def stochastic_round(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round each element up or down at random to a neighbour in `dtype`, so that the expected value is exact.

    An element that lies a fraction s of the way from its lower to its upper neighbour is rounded up with probability s; a value
    that `dtype` can represent is unchanged. For steps that are small against the spacing of the weights (Gupta et al. 2015).

    Args:
        x: float32 values, any shape.
        dtype: bfloat16 or float16.
        generator: on x's device.

    Returns:
        A tensor of `dtype`; values beyond its largest are rounded to nearest, to that value or to infinity.
    """
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(x)
    spacing = torch.ldexp(torch.ones_like(x), exponent - 1).clamp_(min=info.smallest_normal).mul_(info.eps)
    scaled = x / spacing
    lower = scaled.floor()
    draw = torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    rounded = (lower + (draw < scaled - lower)).mul_(spacing)
    return torch.where(x.abs() <= info.max, rounded, x).to(dtype)
