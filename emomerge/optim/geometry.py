"""W-Ref geometry, the space axis (paper, chapter 6): how much of a gradient lies along the weights."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from emomerge.errors import BadInput
from emomerge.optim import native
from emomerge.optim.base import EmoOptimizer, Group
from emomerge.optim.batches import Tensors, block_size, blocks, exact, local, sum_over_shards, wide

Geometry = Literal["exact", "l1"]


def geom_relation(W: Tensor, G: Tensor, eps: float = 1e-8) -> Tensor:
    """ρ = |⟨W, G⟩| / (‖W‖·‖G‖ + eps), the orthogonality index of weights and gradient (paper 6.1, 6.5).

    Reads W and G once and allocates no tensor of their size. Half precision accumulates in fp32. Of sharded tensors
    (DTensor) every rank gets the ρ of the whole.

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
    return geom_relations([W.detach()], [G.detach()], eps)[0]


def geom_relations(w: Tensors, g: Tensors, eps: float) -> Tensor:
    """ρ of each pair of tensors, shape (pairs,). All of one device, dtype and sharding."""
    dtype = wide(w[0].dtype)
    if all(native.fits(*pair) for pair in zip(w, g, strict=True)):
        rho = torch.empty(len(w), dtype=torch.float64)
        native.run("geom_relation", [[t.numel() for t in w]], [w, g, rho.unbind()], [eps])
        return rho.to(dtype)
    sums = torch.stack([_products(local(a), local(b)) for a, b in zip(w, g, strict=True)])
    inner, ww, gg = sum_over_shards(sums, w[0]).unbind(1)
    return (inner.abs() / (ww.sqrt() * gg.sqrt() + eps)).clamp(max=1)


def _products(w: Tensor, g: Tensor) -> Tensor:
    """⟨W, G⟩, ‖W‖² and ‖G‖²."""
    dtype = wide(w.dtype)
    if w.is_cuda and w.is_contiguous() and g.is_contiguous() and find_spec("triton"):
        from emomerge.optim.triton_geometry import products

        return products(w, g)
    sums = []
    for a, b in blocks(w, g, limit=block_size(w.device)):
        a, b = a.to(dtype), b.to(dtype)
        sums.append(torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()]))
    return torch.stack(sums).sum(0)


class WRefOptimizer(EmoOptimizer):
    """An emo optimizer with a space axis.

    Args:
        geometry: `exact` measures ρ of every tensor; `l1` approximates it by the change of Σ|W| (paper 6.4).
        options: as in `EmoOptimizer`.
    """

    def __init__(self, params: ParamsT, lr: float = 1.0, *, geometry: Geometry = "exact", **options: Any) -> None:
        super().__init__(params, lr, **options)
        self.add_default("geometry", geometry)
        self._check_options(self.defaults)

    def add_param_group(self, param_group: Group) -> None:
        """Train more parameters from now on; Σ|W| starts anew, so that their weights do not pass for growth."""
        super().add_param_group(param_group)
        self.param_groups[0]["l1"] = 0.0

    def _check_options(self, group: Group) -> None:
        super()._check_options(group)
        geometry = group.get("geometry", "exact")
        if geometry not in ("exact", "l1"):
            raise BadInput("unknown geometry", expected="exact | l1", found=repr(geometry))
        if geometry == "l1" and self.capturable:
            raise BadInput("`capturable` keeps the host out of the step, where l1 decides", fix="use geometry='exact'")

    def survey(self) -> list[Tensor]:
        """Σ|W| over all parameters of all groups, if a group needs it."""
        if all(group["geometry"] == "exact" for group in self.param_groups):
            return []
        return [self.measure_l1()]

    def measure_l1(self) -> Tensor:
        """Σ|W| over all parameters of all groups, a 0-d float64 tensor."""
        device = self._device()
        total = torch.zeros((), dtype=exact(device), device=device)
        for group in self.param_groups:
            for p in group["params"]:
                part = local(p.detach())
                norms = [
                    torch.linalg.vector_norm(block, 1, dtype=exact(p.device))
                    for (block,) in blocks(part, limit=block_size(p.device))
                ]
                total += sum_over_shards(torch.stack(norms).sum(), p).to(device)
        return total
