"""W-Ref geometry, the space axis (paper, chapter 6): how much of a gradient lies along the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from emomerge.errors import BadInput
from emomerge.optim.base import EmoOptimizer

Geometry = Literal["exact", "l1"]


def geom_relation(W: Tensor, G: Tensor, eps: float = 1e-8) -> Tensor:
    """ρ = |⟨W, G⟩| / (‖W‖·‖G‖ + eps), the orthogonality index of weights and gradient (paper 6.1, 6.5).

    Reads W and G once, block by block, and allocates no tensor of their size. Half precision accumulates in fp32.

    Args:
        W: weights, any shape.
        G: gradient of the same shape.
        eps: keeps the ratio defined where W or G is zero.

    Returns:
        A 0-d tensor on W's device in [0, 1]: 0 where G is orthogonal to W, all of it news; 1 where it is parallel.

    Raises:
        BadInput: the shapes differ.
    """
    if W.shape != G.shape:
        raise BadInput("weights and gradient differ in shape", expected=tuple(W.shape), found=tuple(G.shape))
    dtype = torch.promote_types(W.dtype, torch.float32)
    sums = []
    for w, g in _blocks(W.detach(), G.detach()):
        w, g = w.to(dtype), g.to(dtype)
        sums.append(torch.stack([(w * g).sum(), (w * w).sum(), (g * g).sum()]))
    inner, ww, gg = torch.stack(sums).sum(0)
    rho: Tensor = inner.abs() / (ww.sqrt() * gg.sqrt() + eps)
    return rho.clamp(max=1)


class WRefOptimizer(EmoOptimizer):
    """An emo optimizer with a space axis.

    Args:
        geometry: `exact` measures ρ of every tensor; `l1` approximates it by the change of Σ|W| (paper 6.4).
        options: as in `EmoOptimizer`.
    """

    def __init__(self, params: ParamsT, lr: float = 1.0, *, geometry: Geometry = "exact", **options: Any) -> None:
        if geometry not in ("exact", "l1"):
            raise BadInput("unknown geometry", expected="exact | l1", found=repr(geometry))
        super().__init__(params, lr, **options)
        self.add_default("geometry", geometry)
        self.param_groups[0].setdefault("l1", 0.0)  # Σ|W| that the last step left; 0 before the first

    def measure_l1(self) -> float:
        """Σ|W| over all parameters of all groups. One host sync."""
        norms = [
            torch.linalg.vector_norm(w, 1, dtype=torch.promote_types(w.dtype, torch.float32)).to(self._device())
            for group in self.param_groups
            for p in group["params"]
            for (w,) in _blocks(p.detach())
        ]
        return math.fsum(torch.stack(norms).tolist())


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching views of tensors of one shape that together cover them. Any layout will do.

    On the CPU a block fits the cache and stays below the size at which torch divides a sum among threads, so that
    results do not depend on their number; elsewhere it is large enough to keep the device busy.
    """
    first = tensors[0]
    limit = 2**14 if first.device.type == "cpu" else 2**22
    if first.numel() <= limit:
        yield tensors
        return
    rows = limit // first[0].numel()
    if rows:
        yield from zip(*(torch.split(t, rows) for t in tensors), strict=True)
    else:
        for parts in zip(*(t.unbind() for t in tensors), strict=True):
            yield from _blocks(*parts)
