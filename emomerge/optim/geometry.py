"""W-Ref geometry, the space axis (paper, chapter 6): how much of a gradient is parallel to the weights."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from emomerge.errors import BadInput
from emomerge.optim import native
from emomerge.optim.batches import Tensors, block_size, blocks, local, sum_over_shards, wide


def geom_relation(W: Tensor, G: Tensor, eps: float = 1e-8) -> Tensor:
    """Return ρ = |⟨W, G⟩| / (‖W‖·‖G‖ + eps), the orthogonality index of weights and gradient (paper 6.1, 6.5).

    Reads W and G once and allocates no tensor of their size. Half precision is accumulated in fp32. For sharded tensors
    (DTensor) every rank gets the ρ of the whole tensor.

    Args:
        W: weights, any shape.
        G: gradient of the same shape.
        eps: keeps the ratio defined where W or G is zero.

    Returns:
        A 0-d tensor on W's device, in [0, 1]: 0 if the gradient is orthogonal to the weights, 1 if it is parallel.

    Raises:
        BadInput: the shapes differ.
    """
    if W.shape != G.shape:
        raise BadInput("weights and gradient differ in shape", expected=tuple(W.shape), found=tuple(G.shape))
    return geom_relations([W.detach()], [G.detach()], eps)[0]


def geom_relations(w: Tensors, g: Tensors, eps: float) -> Tensor:
    """Return ρ of each pair of tensors, shape (pairs,). All must share device, dtype and sharding."""
    dtype = wide(w[0].dtype)
    if all(native.fits(*pair) for pair in zip(w, g, strict=True)):
        rho = torch.empty(len(w), dtype=torch.float64)
        native.run("geom_relation", [[t.numel() for t in w]], [w, g, rho.unbind()], [eps])
        return rho.to(dtype)
    sums = torch.stack([_products(local(a), local(b)) for a, b in zip(w, g, strict=True)])
    inner, ww, gg = sum_over_shards(sums, w[0]).unbind(1)
    return (inner.abs() / (ww.sqrt() * gg.sqrt() + eps)).clamp(max=1)


def _products(w: Tensor, g: Tensor) -> Tensor:
    """Return ⟨W, G⟩, ‖W‖² and ‖G‖², shape (3,)."""
    dtype = wide(w.dtype)
    if w.is_cuda and w.is_contiguous() and g.is_contiguous() and find_spec("triton"):
        from emomerge.optim.triton_geometry import products

        return products(w, g)
    sums = []
    for a, b in blocks(w, g, limit=block_size(w.device)):
        a, b = a.to(dtype), b.to(dtype)
        sums.append(torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()]))
    return torch.stack(sums).sum(0)
