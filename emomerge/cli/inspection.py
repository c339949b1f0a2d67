"""Describe a checkpoint or adapter, and compare two of them tensor by tensor."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from emomerge.adapters import artefact_of, bake, format_of, is_adapter, open_dense, open_run
from emomerge.adapters.formats import Fitting
from emomerge.adapters.unsupported import family_of, how_to_use, quantization_of
from emomerge.checkpoints import Checkpoint, open_checkpoint
from emomerge.checkpoints.atomic import size

PIECE = 2**20
"""Number of elements compared at a time."""


def describe(path: str, base: str | None = None) -> dict[str, Any]:
    """Return kind, size and dtypes of a checkpoint, adapter or run directory, and the base of an adapter.

    Args:
        path: what to describe.
        base: for an adapter, a model: how much of the adapter fits it is described, too.
    """
    place = artefact_of(path)
    form = format_of(place)
    opened = _open(path)
    unsupported = family_of(opened) if form is None else None
    quantized = quantization_of(opened) if form is None else None
    infos = [opened.info(name) for name in opened]
    dtypes = Counter(str(info.dtype).removeprefix("torch.") for info in infos)
    return {
        "kind": unsupported.name if unsupported else "adapter" if form else "checkpoint", "source": path,
        "tensors": len(infos), "parameters": sum(info.numel for info in infos),
        "bytes": sum(info.nbytes for info in infos), "dtypes": dict(dtypes),
        **(form.facts(place) if form else {}), **({"to use it": unsupported.fix} if unsupported else {}),
        **({"quantized": quantized, "to use it": how_to_use(opened, quantized)} if quantized else {}),
        **({"base": base, **_fit(path, base)} if base is not None else {}),
    }  # fmt: skip


def fits(path: str, other: str) -> bool:
    """Return whether `path` is an adapter and `other` is not, so that it may be the base."""
    return is_adapter(artefact_of(path)) and not is_adapter(artefact_of(other))


def _fit(path: str, base: str) -> dict[str, Any]:
    """Return how much of an adapter fits a base."""
    place, origin = artefact_of(path), open_dense(base)
    form: object = format_of(place)
    if isinstance(form, Fitting):
        return form.fit(place, origin)
    changed = len(bake(origin, place).touched())
    return {"tensors changed": f"{changed} of {len(origin)}"}


def _open(path: str) -> Checkpoint:
    """Open the stored tensors: for an adapter its factors, not their effect on a base."""
    place = artefact_of(path)
    if (form := format_of(place)) is not None:
        form.facts(place)  # reports a damaged configuration before missing weights
        return open_checkpoint(next(file for file in form.files(place) if file.suffix == ".safetensors"))
    return open_checkpoint(place if place.exists() else path)


def show_description(found: dict[str, Any]) -> Table:
    """Return the table that shows a description."""
    table = Table(show_header=False, box=None)
    for key, value in found.items():
        if key == "bytes":
            value = size(value)
        elif key == "kernels":
            value = "; ".join(f"{user}: {path}" for user, path in value.items())
        elif key == "dtypes":
            value = ", ".join(f"{count} × {dtype}" for dtype, count in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        table.add_row(key, f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))
    return table


def compare(path: str, other: str, *, base: str | None = None) -> dict[str, Any]:
    """Compare two models or adapters tensor by tensor.

    Args:
        path: a checkpoint, adapter or run directory, A.
        other: B, of the same kind as A; if A is a checkpoint, B may also be an adapter of it.
        base: base of both, to compare their task vectors. Without it, two adapters are compared by their factors.

    Returns:
        `only_here`, `only_there`: names; `shapes`: name → both shapes if they differ; `equal`: number of equal tensors;
        `changed`: figures of each tensor that differs, largest differences first; `all`: figures over all of these.
        Figures: `norm` = ‖B − A‖; `relative` = ‖B − A‖/‖A‖; `cosine` of A and B; `sign_agreement`: fraction with equal sign
        among elements that are nonzero in both; `density`: fraction of elements that differ. Undefined figures and those
        that overflow are None.
    """
    here, there, origin = _open_pair(path, other, base)
    shared = [name for name in here if name in there]
    found: dict[str, Any] = {
        "here": path, "there": other, "base": base,
        "only_here": [name for name in here if name not in there], "only_there": [name for name in there if name not in here],
        "shapes": {}, "equal": 0, "changed": [],
    }  # fmt: skip
    total = _Comparison()
    for name in shared:
        shapes = [list(checkpoint.info(name).shape) for checkpoint in (here, there)]
        if shapes[0] != shapes[1]:
            found["shapes"][name] = shapes
            continue
        comparison = _compare(here, there, origin, name)
        if comparison is None:
            found["equal"] += 1
        else:
            found["changed"].append({"name": name, **comparison.figures()})
            total.add(comparison)
    found["changed"].sort(key=lambda row: -math.inf if row["norm"] is None else -row["norm"])
    return {**found, "all": total.figures()}


def _open_pair(path: str, other: str, base: str | None) -> tuple[Checkpoint, Checkpoint, Checkpoint | None]:
    if base is not None:
        origin = open_dense(base)
        return open_run(origin, path), open_run(origin, other), origin
    here, adapters = _open(path), all(is_adapter(artefact_of(place)) for place in (path, other))
    return here, (_open(other) if adapters else open_run(here, other)), None


@dataclass
class _Comparison:
    """Sums over the elements of A and B, in float64."""

    elements: int = 0
    different: int = 0
    alike: int = 0
    """Elements with equal sign."""
    signed: int = 0
    """Elements that are nonzero in both."""
    difference: float = 0.0
    squares: tuple[float, float] = (0.0, 0.0)
    product: float = 0.0

    def add(self, other: _Comparison) -> None:
        """Add the sums over other elements."""
        for key in ("elements", "different", "alike", "signed", "difference", "product"):
            setattr(self, key, getattr(self, key) + getattr(other, key))
        self.squares = (self.squares[0] + other.squares[0], self.squares[1] + other.squares[1])

    def figures(self) -> dict[str, float | None]:
        """Return the figures described in `compare`."""
        here, there = map(math.sqrt, self.squares)
        norm, both = math.sqrt(self.difference), here * there
        found = {
            "norm": norm,
            "relative": norm / here if here else None,
            "cosine": max(-1.0, min(self.product / both, 1.0)) if both and math.isfinite(self.product / both) else None,
            "sign_agreement": self.alike / self.signed if self.signed else None,
            "density": self.different / self.elements if self.elements else None,
        }
        return {key: value if value is not None and math.isfinite(value) else None for key, value in found.items()}


def _compare(here: Checkpoint, there: Checkpoint, origin: Checkpoint | None, name: str) -> _Comparison | None:
    """Return the sums over one tensor; None if it is equal in both."""
    if origin is None:
        difference, a = there.delta(name, here), here[name]
    else:
        a, b = (_displacement(checkpoint, origin, name) for checkpoint in (here, there))
        difference = b.double() - a.double()
    if difference is None:
        return None
    total = _Comparison()
    for x, moved in zip(a.flatten().split(PIECE), difference.flatten().split(PIECE), strict=True):
        one, change = x.double(), moved.double()
        two = one + change
        signs = one.sign() * two.sign()
        total.add(
            _Comparison(
                len(one), int(change.count_nonzero()), int((signs > 0).sum()), int(signs.count_nonzero()),
                float(change @ change), (float(one @ one), float(two @ two)), float(one @ two),
            )
        )  # fmt: skip
    return total if total.different else None


def _displacement(checkpoint: Checkpoint, origin: Checkpoint, name: str) -> Tensor:
    """Return the task vector τ of one tensor; if the base lacks the tensor, τ is the tensor itself."""
    if name not in origin or origin.info(name).shape != checkpoint.info(name).shape:
        return checkpoint[name]
    delta = checkpoint.delta(name, origin)
    return torch.zeros_like(checkpoint[name]) if delta is None else delta


def show_comparison(found: dict[str, Any], *, top: int = 0) -> Table:
    """Return the table that shows a comparison: the first `top` tensors, or all if it is 0."""
    title = f"{found['there']} against {found['here']}" + (f", both from {found['base']}" if found["base"] else "")
    table = Table(title=f"{title}: {len(found['changed'])} tensors differ, {found['equal']} are equal")
    figures = {"norm": "‖B − A‖", "relative": "/‖A‖", "cosine": "cosine", "sign_agreement": "signs agree", "density": "differ"}
    table.add_column("tensor", overflow="fold")
    for heading in figures.values():
        table.add_column(heading, justify="right")
    shown = found["changed"][: top or None]
    rows = [{"name": "all of these", **found["all"]}, *shown] if found["changed"] else []
    for row in rows:
        numbers = [row[key] for key in figures]
        plain = [f"{number:.4g}" if number is not None else "–" for number in numbers[:3]]
        shares = [f"{number:.1%}" if number is not None else "–" for number in numbers[3:]]
        table.add_row(row["name"], *plain, *shares)
    if len(shown) < len(found["changed"]):
        table.add_row(f"… and {len(found['changed']) - len(shown)} more with smaller differences")
    for name, (here, there) in found["shapes"].items():
        table.add_row(name, f"shape {here} against {there}")
    for key, words in (("only_here", "only in the first"), ("only_there", "only in the second")):
        for name in found[key]:
            table.add_row(name, words)
    return table


def kernels() -> dict[str, str]:
    """Return which implementation the optimizers and merge methods use: compiled kernels, or torch with the reason."""
    from emomerge.merging import native as merging
    from emomerge.native import status
    from emomerge.optim import native as optim

    return {"optimizers": status(optim.KERNELS, optim.REALS[torch.float32]), "merging": status(merging.KERNELS)}
