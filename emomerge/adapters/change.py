"""The effect of an adapter on one base tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from emomerge.checkpoints.factors import Factors


@dataclass(frozen=True)
class Change:
    """The effect of an adapter on one base tensor: θ = replace(θ₀) + delta, each where given."""

    replace: Callable[[Tensor], Tensor] | None = None
    """Map the base tensor to the tensor that replaces it, in the same dtype or a wider one."""
    delta: Callable[[torch.dtype], Tensor] | None = None
    """Compute the exact Δ, in the shape of the base tensor, in the given dtype."""
    factors: Callable[[], Factors] | None = None
    """Return Δ as products of factors, where it is such: the bits of `delta` in float32."""
