"""Truncate a merge to a LoRA adapter: every matrix of its task vector to its leading singular triples.

    τ ≈ BA,  B = U·√Σ (rows, r),  A = √Σ·Vᵀ (r, columns),  α = r

No matrix of rank r is closer to τ (Eckart and Young 1936). The triples of large matrices come from a random sketch (Halko,
Martinsson and Tropp 2011). A truncation captures the share ‖BA‖²/‖τ‖² of the energy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from emomerge.adapters.low_rank import LowRank, Target
from emomerge.adapters.naming import BaseNames
from emomerge.adapters.peft.writer import PeftAdapter, Task, head_of, target_of, task_of
from emomerge.checkpoints import Checkpoint
from emomerge.checkpoints.reader import lasting_name
from emomerge.errors import BadInput
from emomerge.numerics.seeds import seed_of
from emomerge.numerics.sums import exact_sum, sum_of_row_norms
from emomerge.numerics.threads import one_thread

SMALL = 512
"""Matrices with at most this many rows or columns are decomposed exactly."""
SKETCH = 32
"""Columns of the first sketch if the rank is not known."""
OVERSAMPLING = 16
"""Columns of a sketch in addition to the rank."""
POWER_ITERATIONS = 8
"""Number of power iterations of a sketch."""


@dataclass(frozen=True)
class Layer:
    """The truncated task vector of one matrix."""

    name: str
    """Name of the tensor in the base."""
    factors: LowRank
    energy: float
    """‖τ‖²."""
    captured: float
    """‖BA‖²."""

    @property
    def rank(self) -> int:
        """r."""
        return self.factors.rank


@dataclass(frozen=True)
class Saved:
    """A tensor of a head, which the adapter holds in full, as PEFT's `modules_to_save`."""

    live: str
    """Its name in an instantiated model."""
    tensor: Tensor
    """θ."""
    energy: float
    """‖τ‖²."""


@dataclass(frozen=True)
class Truncation:
    """A merge as low-rank factors; made by `truncate`."""

    layers: tuple[Layer, ...]
    left_out: Mapping[str, float]
    """Energy of each tensor that moved but is not in the adapter."""
    source: str
    """Name of the base as recorded in the adapter."""
    modules: frozenset[str]
    """All modules of the base that have a weight."""
    heads: tuple[str, ...]
    """Modules that are held in full."""
    saved: Mapping[str, Saved]
    """Their tensors, by the base's names."""
    task: Task
    """The task type of the base."""

    @property
    def energy(self) -> float:
        """‖τ‖² of all tensors, including those that are left out."""
        whole = (saved.energy for saved in self.saved.values())
        return exact_sum([*(layer.energy for layer in self.layers), *self.left_out.values(), *whole])

    def figures(self) -> dict[str, Any]:
        """Return the shares of ‖τ‖², ready for JSON.

        `energy` is the total share captured; `layers` give each layer's rank, the captured share of its own energy and its
        share of the total; `saved` (held in full) and `left_out` are shares of the total.
        """
        total = self.energy
        saved = {name: each.energy / total for name, each in self.saved.items()}
        return {
            "energy": exact_sum([*(layer.captured / total for layer in self.layers), *saved.values()]),
            "layers": {
                layer.name: {
                    "rank": layer.rank, "energy": layer.captured / layer.energy, "share": layer.energy / total,
                }
                for layer in self.layers
            },
            "saved": saved,
            "left_out": {name: energy / total for name, energy in self.left_out.items()},
        }  # fmt: skip

    def adapter(self) -> PeftAdapter:
        """Return the adapter that holds these layers and heads."""
        head_tensors = tuple((saved.live, saved.tensor) for saved in self.saved.values())
        factors = tuple(layer.factors for layer in self.layers)
        return PeftAdapter(factors, self.source, self.modules, self.heads, head_tensors, self.task)


def truncate(
    merged: Checkpoint,
    base: Checkpoint,
    *,
    rank: int | Literal["auto"],
    energy: float = 0.99,
    max_rank: int = 256,
    allow_partial: bool = False,
    progress: Callable[[str, int], None] | None = None,
) -> Truncation:
    """Compute the adapter nearest to θ − θ₀, matrix by matrix.

    Embeddings count as matrices unless they are tied to a head. If the base has no `config.json`, every 2-D `….weight` is
    taken for that of a Linear. If it has one, a layer directly below the model's root whose bias moved, such as a new
    classifier, is held in full, and so is every module that PEFT saves in full for the model's task type.

    Args:
        merged: θ.
        base: θ₀.
        rank: rank of every matrix, or "auto": for each matrix the smallest rank that captures `energy`.
        energy: share of each matrix's ‖τ‖² to capture.
        max_rank: upper limit of "auto".
        allow_partial: leave out tensors that no LoRA can hold (biases, norms, convolutions, …) instead of refusing.
        progress: called with the name and size in bytes of each finished tensor.

    Raises:
        BadInput: no matrix moved, or a tensor moved that no LoRA can hold.
    """
    if rank != "auto" and rank < 1:
        raise BadInput("a rank is at least 1", found=rank)
    if not 0 < energy <= 1:
        raise BadInput("an energy is a share of ‖τ‖²", expected="above 0, up to 1", found=energy)
    names = BaseNames(base)
    targets = {name: target_of(base, names, name) for name in base}
    unfit = {
        name: _energy(delta)
        for name, target in targets.items()
        if isinstance(target, str) and (delta := merged.delta(name, base)) is not None and delta.any()
    }
    modules = frozenset(names.live_name(name).removesuffix(".weight") for name in base if name.endswith(".weight"))
    task = task_of(names)
    heads = tuple(sorted({*task.heads, *(module for name in unfit if (module := head_of(names, name)) is not None)}))
    saved = {
        name: Saved(live, merged[name], _energy(delta) if (delta := merged.delta(name, base)) is not None else 0.0)
        for name in base
        if _is_held(live := names.live_name(name), heads)
    }
    left_out = {name: energy for name, energy in unfit.items() if name not in saved}
    if left_out and not allow_partial:
        what, name = "a tensor that moved fits into no adapter", next(iter(left_out))
        raise BadInput(what, where=name, found=targets[name], fix="--allow-partial leaves such tensors out, and lists them")
    layers = []
    for name, target in targets.items():
        if name not in saved and isinstance(target, Target) and (delta := merged.delta(name, base)) is not None and delta.any():
            limit = max_rank if rank == "auto" else rank
            a, b = low_rank(delta, limit, energy=energy if rank == "auto" else None, name=name)
            layers.append(Layer(name, LowRank(target, a, b), _energy(delta), _captured(a)))
        if progress is not None:
            progress(name, base.info(name).nbytes)
    if not layers:
        raise BadInput("no matrix moved: there is nothing for an adapter to hold", where=merged.source)
    return Truncation(tuple(layers), left_out, lasting_name(base.source), modules, heads, saved, task)


def _is_held(tensor: str, heads: tuple[str, ...]) -> bool:
    """Return whether a tensor is inside a module that `modules_to_save` names, to PEFT any whose path ends in the name."""
    parts = tensor.split(".")[:-1]
    return any(".".join(parts[:end]).endswith(heads) for end in range(1, len(parts) + 1)) if heads else False


def low_rank(tau: Tensor, rank: int, *, energy: float | None = None, name: str) -> tuple[Tensor, Tensor]:
    """Return A (r, columns) and B (rows, r); BA is the truncation of τ (rows, columns).

    Args:
        tau: the matrix.
        rank: r, or with `energy` its upper limit.
        energy: the share of ‖τ‖² for which r is to be the smallest, if any.
        name: name of the tensor, which seeds the random sketch.
    """
    full = min(tau.shape)
    rank = min(rank, full)
    with one_thread():
        u, s, v = _triples(tau, rank, energy, name)
        if energy is not None:
            shares = s.double().square().cumsum(0) / _energy(tau)
            rank = min(rank, 1 + int((shares < energy).count_nonzero()))
        root = s[:rank].sqrt()
        return (v[:, :rank] * root).mT, u[:, :rank] * root


def _triples(tau: Tensor, rank: int, energy: float | None, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the k leading singular triples that the rank or the energy needs: U (rows, k), S (k,), V (columns, k)."""
    size = rank if energy is None else min(SKETCH, rank)
    while min(tau.shape) > SMALL and 4 * size < min(tau.shape):
        u, s, v = _sketched(tau, size + OVERSAMPLING, name)
        if size == rank or float(s[:size].double().square().sum()) >= (energy or 0) * _energy(tau):
            return u[:, :size], s[:size], v[:, :size]
        size = min(2 * size, rank)
    u, s, vh = torch.linalg.svd(tau, full_matrices=False)
    return u, s, vh.mT


def _sketched(tau: Tensor, columns: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    with torch.random.fork_rng([tau.device] if tau.device.type != "cpu" else []):
        torch.manual_seed(seed_of(name))
        found: tuple[Tensor, Tensor, Tensor] = torch.svd_lowrank(tau, q=columns, niter=POWER_ITERATIONS)
    return found


def _energy(tau: Tensor) -> float:
    """Return ‖τ‖² in float64."""
    rows = tau.reshape(len(tau), -1) if tau.ndim else tau.reshape(1, 1)
    return sum_of_row_norms(rows, 2)


def _captured(a: Tensor) -> float:
    """Return ‖BA‖² from A = √Σ·Vᵀ alone: its rows are orthogonal and have the squared norms σ."""
    return sum_of_row_norms(a, 4)
