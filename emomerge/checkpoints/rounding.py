"""Rounding to a narrower floating dtype, and what it takes from a small displacement."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from emomerge.checkpoints.checkpoint import Checkpoint
from emomerge.numerics.seeds import generator_of
from emomerge.numerics.sums import PIECE, squared_row_lengths

Rounding = Literal["nearest", "stochastic"]


def round_to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Round once, to nearest even. torch takes float64 to 16 bits through fp32, which would round twice."""
    if tensor.dtype == torch.float64 and dtype.is_floating_point and dtype.itemsize < 4:
        near = tensor.float()
        # Round to odd: an inexact fp32 value gets its last bit set, so that it can be no tie of the second rounding.
        away = torch.where(tensor > near, torch.inf, -torch.inf).to(near.dtype)
        even = near.view(torch.int32) % 2 == 0
        tensor = torch.where((near != tensor) & even, torch.nextafter(near, away), near)
    return tensor.to(dtype)


def round_at_random(tensor: Tensor, dtype: torch.dtype, *, name: str, seed: int) -> Tensor:
    """`stochastic_round` by draws that depend on seed and name alone; to nearest where `dtype` is no narrower 16-bit float.

    Draws are made on the CPU, so that the bits are those of no device in particular.
    """
    if dtype not in (torch.bfloat16, torch.float16) or tensor.dtype not in (torch.float32, torch.float64):
        return round_to(tensor, dtype)
    generator = generator_of(seed, name)
    pieces = tensor.cpu().flatten().split(PIECE)
    return torch.cat([stochastic_round(piece.float(), dtype, generator) for piece in pieces]).view(tensor.shape)


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


class RoundingLoss:
    """What rounding takes from θ = θ₀ + τ, summed over the tensors that move.

    Args:
        base: θ₀.
    """

    def __init__(self, base: Checkpoint) -> None:
        self.base = base
        self._moved = self._unchanged = 0
        self._squared_errors: list[float] = []
        self._squared_lengths: list[float] = []

    def add(self, theta0: Tensor, tau: Tensor, rounded: Tensor) -> None:
        """A tensor: θ₀ as stored, τ in the dtype of the arithmetic, and what is written for θ₀ + τ; of one shape."""
        pieces = (tensor.flatten().split(PIECE) for tensor in (theta0, tau, rounded.to(tau.device)))
        for old, step, new in zip(*pieces, strict=True):
            change = new.to(step.dtype) - old.to(step.dtype)
            moved = int(step.count_nonzero())
            if old.dtype == new.dtype:  # what does not move is written as it is
                self._unchanged += moved - int(change.count_nonzero())
            else:
                self._unchanged += int(((new == round_to(old, new.dtype)) & (step != 0)).count_nonzero())
            self._moved += moved
            self._squared_errors += squared_row_lengths(change.sub_(step))
            self._squared_lengths += squared_row_lengths(step)

    def add_sums(self, moved: int, unchanged: int, squared_errors: list[float], squared_lengths: list[float]) -> None:
        """The same of a tensor for which it is summed up already, part by part."""
        self._moved += moved
        self._unchanged += unchanged
        self._squared_errors += squared_errors
        self._squared_lengths += squared_lengths

    def join(self, other: RoundingLoss) -> None:
        """Add what another one has summed up."""
        self.add_sums(other._moved, other._unchanged, other._squared_errors, other._squared_lengths)

    def figures(self) -> dict[str, float | None]:
        """Ready for JSON; None where nothing moved.

        - `unchanged`: of the weights with τ ≠ 0, the share that is written as the base's weight would be.
        - `relative_error`: ‖round(θ₀ + τ) − θ₀ − τ‖ / ‖τ‖.
        """
        length = math.sqrt(math.fsum(self._squared_lengths))
        return {
            "unchanged": self._unchanged / self._moved if self._moved else None,
            "relative_error": math.sqrt(math.fsum(self._squared_errors)) / length if length else None,
        }
