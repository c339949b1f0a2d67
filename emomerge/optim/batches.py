"""Grouping of tensors: many small ones go through a rule in one call, a large one block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from emomerge.optim import native

State = dict[str, Tensor]
Tensors = list[Tensor] | tuple[Tensor, ...]
Lists = dict[str, Tensors]
_dtype, _in_host_memory = attrgetter("dtype"), attrgetter("is_cpu")


@dataclass
class Batch:
    """Weights of one device, dtype and sharding; gradients and state are lists in the same order."""

    w: Tensors
    g: Tensors
    state: Lists
    native: bool
    """Whether compiled kernels can process them."""

    def parts(self, limit: int) -> Iterator[Batch]:
        """Yield batches of at most `limit` elements, or of a single larger tensor."""
        start, total = 0, 0
        for index, w in enumerate(self.w):
            if index > start and total + w.numel() > limit:
                yield self._slice(start, index)
                start, total = index, 0
            total += w.numel()
        yield self._slice(start, len(self.w))

    def blocks(self, limit: int) -> Iterator[Batch]:
        """Yield the batch itself, or blocks of its single large tensor. State of another shape goes with every block, uncut."""
        w = self.w[0]
        if len(self.w) > 1 or w.numel() <= limit:
            yield self
            return
        alike = [name for name, (t, *_) in self.state.items() if t.shape == w.shape]
        rest = {name: ts for name, ts in self.state.items() if name not in alike}
        for views in blocks(w, self.g[0], *(self.state[name][0] for name in alike), limit=limit):
            w_part, g_part, *parts = ([view] for view in views)
            yield Batch(w_part, g_part, rest | dict(zip(alike, parts, strict=True)), self.native)

    def local(self) -> Batch:
        """Return the shards of this rank as views, or the batch itself if its tensors are not DTensors."""
        if sharding(self.w[0]) is None:
            return self
        state: Lists = {name: [local(t) for t in ts] for name, ts in self.state.items()}
        return Batch([local(t) for t in self.w], [local(t) for t in self.g], state, self.native)

    def _slice(self, start: int, stop: int) -> Batch:
        state = {name: ts[start:stop] for name, ts in self.state.items()}
        return Batch(self.w[start:stop], self.g[start:stop], state, self.native)


class Sorter:
    """Groups the tensors of a step by kind and reuses the result while the tensors stay the same."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []
        self._looks: list[list[Any]] = []
        self._kinds: dict[Any, list[int]] = {}

    def batches(self, params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[State]) -> list[Batch]:
        """Return one batch for each kind of tensor. All arguments have one item for each parameter."""
        kinds = by_kind(params, grads, states) if torch.compiler.is_compiling() else self._sorted(params, grads, states)
        return [
            Batch(
                w=[params[index] for index in members],
                g=[grads[index] for index in members],
                state={name: [states[index][name] for index in members] for name in states[members[0]]},
                native=kind[0],
            )
            for kind, members in kinds.items()
        ]

    def _sorted(self, params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[State]) -> dict[Any, list[int]]:
        """Return `by_kind`, from the last step if nothing has changed."""
        kept = [*params, *(t for state in states for t in state.values())]
        kinds = (type, _dtype, _in_host_memory, Tensor.is_contiguous)
        looks = [list(map(kind, tensors)) for tensors in (params, grads) for kind in kinds]
        if looks != self._looks or len(kept) != len(self._kept) or not all(map(is_, kept, self._kept)):
            self._kept, self._looks, self._kinds = kept, looks, by_kind(params, grads, states)
        return self._kinds


def by_kind(params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[State]) -> dict[Any, list[int]]:
    """Return the indices of parameters that share native support, device, dtypes, sharding and names of the state."""
    kinds: dict[Any, list[int]] = {}
    for index, (p, g, state) in enumerate(zip(params, grads, states, strict=True)):
        fits = native.fits(p, g, *state.values())
        kind = (fits, p.dtype, *state) if fits else (fits, p.dtype, g.dtype, p.device, sharding(p), *state)
        kinds.setdefault(kind, []).append(index)
    return kinds


def blocks(*tensors: Tensor, limit: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield matching views that together cover tensors of one shape, in any memory layout."""
    first = tensors[0]
    if first.numel() <= limit:
        yield tensors
        return
    rows = limit // first[0].numel()
    if rows:
        yield from zip(*(torch.split(t, rows) for t in tensors), strict=True)
    else:
        for parts in zip(*(t.unbind() for t in tensors), strict=True):
            yield from blocks(*parts, limit=limit)


def block_size(device: torch.device) -> int:
    """Return the number of elements in a block.

    On the CPU a block fits the cache and stays below the size at which torch splits a sum among threads, so that results do
    not depend on the number of threads; on other devices it is large enough to keep them busy.
    """
    return 2**15 - 1 if device.type == "cpu" else 2**24


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of arithmetic and state: float64 for float64, otherwise float32."""
    return torch.promote_types(dtype, torch.float32)


def wide_zeros(w: Tensor) -> Tensor:
    """Return zeros in the shape and layout of w, in the dtype of arithmetic and state."""
    return torch.zeros_like(w, dtype=wide(w.dtype))


def to_wide(tensors: Tensors) -> Tensors:
    """Return the tensors in the dtype of arithmetic: copies of half-precision tensors, otherwise the same list."""
    dtype = wide(tensors[0].dtype)
    return tensors if tensors[0].dtype == dtype else [t.to(dtype) for t in tensors]


def local(t: Tensor) -> Tensor:
    """Return the shard of a DTensor on this rank as a view; any other tensor unchanged."""
    return t.to_local() if hasattr(t, "to_local") else t


def sharding(t: Tensor) -> Any:
    """Return the mesh and placements of a DTensor, None for any other tensor."""
    return (getattr(t, "device_mesh"), getattr(t, "placements")) if hasattr(t, "to_local") else None  # noqa: B009


def exact(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def sum_over_shards(sums: Tensor, like: Tensor) -> Tensor:
    """Sum in place over the ranks that hold shards of `like`; does nothing for an ordinary tensor."""
    if (layout := sharding(like)) is not None:
        mesh, placements = layout
        for dimension, placement in enumerate(placements):
            if placement.is_shard():
                torch.distributed.all_reduce(sums, group=mesh.get_group(dimension))
    return sums


def reduced(t: Tensor) -> Tensor:
    """Complete a DTensor of partial sums over the ranks; return any other tensor unchanged."""
    if sharding(t) is None:
        return t
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(t, DTensor)
    return t.redistribute(placements=[Replicate() if place.is_partial() else place for place in t.placements])
