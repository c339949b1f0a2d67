"""Truncate a merge of image models, or a full fine-tune, to a LoRA in the names of sd-scripts or diffusers; see `lora`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from emomerge.adapters.images.writer import Factors, ImageAdapter, ImageFormat, Written, modules_of
from emomerge.checkpoints import Checkpoint
from emomerge.errors import BadInput
from emomerge.merging.lora import low_rank
from emomerge.numerics.sums import exact_sum, sum_of_row_norms


@dataclass(frozen=True)
class ImageTruncation:
    """A merge as low-rank factors of an image model's layers."""

    adapter: ImageAdapter
    layers: Mapping[str, tuple[int, float, float]]
    """Module → rank, ‖τ‖², ‖BA‖²."""
    left_out: Mapping[str, float]
    """Energy of each tensor that moved but is not in the adapter."""

    def figures(self) -> dict[str, Any]:
        """Return the shares of ‖τ‖², ready for JSON, as `Truncation.figures` does."""
        total = exact_sum([*(energy for _, energy, _ in self.layers.values()), *self.left_out.values()])
        return {
            "energy": exact_sum([captured for _, _, captured in self.layers.values()]) / total,
            "layers": {
                key: {"rank": rank, "energy": captured / energy, "share": energy / total}
                for key, (rank, energy, captured) in self.layers.items()
            },
            "saved": {},
            "left_out": {name: energy / total for name, energy in self.left_out.items()},
        }


def truncate_images(
    merged: Checkpoint, base: Checkpoint, *, style: ImageFormat, rank: int | Literal["auto"], energy: float = 0.99,
    max_rank: int = 256, allow_partial: bool = False, progress: Callable[[str, int], None] | None = None,
) -> ImageTruncation:  # fmt: skip
    """Compute the adapter nearest to θ − θ₀, module by module; see `merging.lora.truncate` for the arguments.

    Raises:
        BadInput: no layer moved, or a tensor moved that such an adapter cannot hold.
    """
    if rank != "auto" and rank < 1:
        raise BadInput("a rank is at least 1", found=rank)
    modules, family = modules_of(base, style)
    held = {place.tensor for module in modules for place in module.places}
    left_out = {name: _energy(delta) for name in base if name not in held and (delta := _delta(merged, base, name)) is not None}
    if left_out and not allow_partial:
        what, name = "a tensor that moved fits into no adapter", next(iter(left_out))
        found = f"{len(left_out)} such tensors"
        raise BadInput(what, where=name, found=found, fix="--allow-partial leaves such tensors out, and lists them")
    factors, layers = [], {}
    for module in sorted(modules, key=lambda module: module.places):  # pieces of one tensor together
        tau = _weight(merged, base, module)
        if tau is not None:
            matrix = tau.flatten(1)
            limit = max_rank if rank == "auto" else rank
            a, b = low_rank(matrix, limit, energy=energy if rank == "auto" else None, name=module.key)
            kernel = tuple(tau.shape[2:])
            factors.append(Factors(module.key, a.reshape(len(a), *tau.shape[1:]), b.reshape(*b.shape, *(1,) * len(kernel))))
            layers[module.key] = (len(a), _energy(tau), sum_of_row_norms(a, 4))
        if progress is not None:
            progress(module.key, 0)
    if not factors:
        raise BadInput("no matrix moved: there is nothing for an adapter to hold", where=merged.source)
    metadata = base.file.metadata if base.file is not None else {}
    return ImageTruncation(ImageAdapter(factors, style, family, metadata), layers, left_out)


def _weight(merged: Checkpoint, base: Checkpoint, module: Written) -> Tensor | None:
    """Return τ of a module; None if it did not move."""
    deltas = {}
    for place in module.places:
        delta = merged.delta(place.tensor, base)
        if delta is None:
            if len(module.places) == 1:
                return None
            delta = base[place.tensor].float().zero_()
        deltas[place.tensor] = delta
    tau = module.weight(deltas)
    return tau if tau.any() else None


def _delta(merged: Checkpoint, base: Checkpoint, name: str) -> Tensor | None:
    delta = merged.delta(name, base) if base.info(name).dtype.is_floating_point else None
    return delta if delta is not None and delta.any() else None


def _energy(tau: Tensor) -> float:
    rows = tau.reshape(len(tau), -1) if tau.ndim else tau.reshape(1, 1)
    return sum_of_row_norms(rows, 2)
