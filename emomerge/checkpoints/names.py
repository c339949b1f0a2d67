"""The names and the layout on disk of a live model's tensors.

transformers renames and splits tensors between memory and disk: a ViT's `vit.encoder.layer.0.attention.attention.query.weight`
is `vit.layers.0.attention.q_proj.weight` in the module, and the experts of a Qwen3-MoE, each a tensor of its own on disk, are
stacked in `mlp.experts.gate_up_proj`. Checkpoints have the names on disk.
"""

from __future__ import annotations

import math
import re
import sys
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from emomerge.checkpoints.checkpoint import Checkpoint, MemoryCheckpoint
from emomerge.errors import BadInput

MAYBE_TIED = re.compile(
    r"(bbox|class)_embed\.|^(?!.*\.\d+\.).*(embed|shared|head|decoder|predictions|proj_out|output|\bw[tp]e\b)"
)
"""Matches the names of tensors that some model of transformers ties to others, and few more."""
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Components that torch.compile, FSDP and activation checkpointing add to names."""


class Piece(NamedTuple):
    """A tensor on disk as a view of one in memory; in elements, as in `Tensor.as_strided`."""

    live: str
    """Name of the tensor in memory."""
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def whole(cls, live: str, shape: tuple[int, ...]) -> Piece:
        """Return the piece that is all of a tensor."""
        return cls(live, 0, shape, torch.empty(shape, device="meta").stride())

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def extent(self) -> int:
        """Number of elements in memory from the first of this piece to its last."""
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True)) if self.numel else 0

    def is_whole(self, shape: tuple[int, ...]) -> bool:
        """Return whether this is all of a tensor of that shape, in the same order."""
        return self == Piece.whole(self.live, shape)

    def of(self, tensor: Tensor) -> Tensor:
        """Return this piece of the tensor in memory, a view if that is contiguous."""
        if self.is_whole(tuple(tensor.shape)):
            return tensor
        tensor = tensor.contiguous()
        return tensor.as_strided(self.shape, self.stride, tensor.storage_offset() + self.offset)


class Layout:
    """How a model's tensors are stored, from the model itself; one without data (device "meta") suffices.

    Attributes:
        shapes: shape of each tensor of `model.state_dict()`.
        pieces: the tensors on disk, by name. Those that a change other than of name, split or transposition turns into tensors
            in memory are missing; transformers also loads the names in memory.
        ties: the other names of a tensor with several → the one it is saved under.
    """

    def __init__(self, model: nn.Module) -> None:
        state = model.state_dict()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self.pieces = _pieces(model, state)
        groups = _aliases(model, state)
        self.ties = {alias: first for first, *others in groups for alias in others}
        self._model = model

    def find(self, name: str) -> Piece | None:
        """Return the part of a live tensor that a checkpoint stores under `name`; None if the model has none.

        Args:
            name: a name on disk or in memory, by any version of transformers, with or without the prefix that distinguishes
                a bare model from one with a head.
        """
        if name in self.pieces:
            return self.pieces[name]
        if name in self.shapes:
            return Piece.whole(name, self.shapes[name])
        renamed = self._renamed(name)
        if renamed is not None:
            return Piece.whole(renamed, self.shapes[renamed])
        found = variants(name, self.pieces, self._pieces_by_tail)
        if len(found) == 1:
            return self.pieces[found[0]]
        found = variants(name, self.shapes, self._shapes_by_tail)
        return Piece.whole(found[0], self.shapes[found[0]]) if len(found) == 1 else None

    def is_whole(self, piece: Piece) -> bool:
        """Return whether a piece is all of its tensor in memory."""
        return piece.is_whole(self.shapes[piece.live])

    def on_disk(self, live: str) -> list[tuple[str, Piece]]:
        """Return the tensors on disk that together hold a tensor in memory, by name."""
        return self._on_disk.get(live, [(live, Piece.whole(live, self.shapes[live]))])

    def _renamed(self, name: str) -> str | None:
        """Return the name to which transformers' loading renames `name`, if that is a whole tensor of the model."""
        if self._conversions is None:
            return None
        from transformers.core_model_loading import rename_source_key

        renamings, converters, prefix = self._conversions
        renamed, joined = rename_source_key(name, renamings, converters, prefix, self.shapes)
        return renamed if joined is None and renamed in self.shapes else None

    @cached_property
    def _conversions(self) -> tuple[list[Any], list[Any], str] | None:
        if not _is_of_transformers(self._model):
            return None
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, WeightRenaming
        except ImportError:  # versions before 5 rename nothing
            return None
        found = get_model_conversion_mapping(self._model)
        kinds = ([each for each in found if isinstance(each, kind)] for kind in (WeightRenaming, WeightConverter))
        return *kinds, self._model.base_model_prefix  # type: ignore[return-value]

    @cached_property
    def _on_disk(self) -> dict[str, list[tuple[str, Piece]]]:
        found: dict[str, list[tuple[str, Piece]]] = defaultdict(list)
        for name, piece in self.pieces.items():
            found[piece.live].append((name, piece))
        return dict(found)

    @cached_property
    def _pieces_by_tail(self) -> dict[str, list[str]]:
        return index_by_tail(self.pieces)

    @cached_property
    def _shapes_by_tail(self) -> dict[str, list[str]]:
        return index_by_tail(self.shapes)


def unwrapped(name: str) -> str:
    """Return a name without the components that torch's wrappers of modules add."""
    return ".".join(part for part in name.removeprefix("module.").split(".") if part not in _WRAPPERS)


def variants(name: str, names: Container[str], by_tail: Mapping[str, list[str]]) -> list[str]:
    """Return `name` if it is among `names`, else those of `names` that differ by one leading component such as `bert.`."""
    if name in names:
        return [name]
    head, _, tail = name.partition(".")
    shorter = [tail] if tail and not head.isdigit() and tail in names else []
    return shorter + by_tail.get(name, [])


def index_by_tail(names: Iterable[str]) -> dict[str, list[str]]:
    """Index names by the rest after their first component; a number, as in a sequence of layers, is not a prefix."""
    index: dict[str, list[str]] = defaultdict(list)
    for name in names:
        head, _, tail = name.partition(".")
        if tail and not head.isdigit():
            index[tail].append(name)
    return dict(index)


class _AsViews(TorchDispatchMode):
    """Copies inside this block are views, so that strides tell where each element comes from."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return torch.ops.aten.alias(args[0]) if func is torch.ops.aten.clone.default else func(*args, **(kwargs or {}))


def _is_of_transformers(model: nn.Module) -> bool:
    transformers = sys.modules.get("transformers")  # imported already if the model is one of its own
    return transformers is not None and hasattr(model, "config") and isinstance(model, transformers.PreTrainedModel)


def _pieces(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Piece]:
    """Return name on disk → piece of a tensor in memory, for every tensor that is stored in pieces of its own."""
    same = {name: Piece.whole(name, tuple(tensor.shape)) for name, tensor in state.items()}
    if not _is_of_transformers(model):
        return same
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # versions before 5 rename nothing
        return same

    # Stand-ins without data: a result that is a view of one of them is a piece of it.
    stand_ins = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in state.items()}
    owners = {tensor.untyped_storage()._cdata: name for name, tensor in stand_ins.items()}
    with _AsViews():  # type: ignore[no-untyped-call]
        on_disk = revert_weight_conversion(model, dict(stand_ins))
    found: dict[str, Piece] = {}
    covered: dict[str, int] = defaultdict(int)
    for name, tensor in on_disk.items():
        live = owners.get(tensor.untyped_storage()._cdata)
        if live is not None:
            found[name] = Piece(live, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
            covered[live] += tensor.numel()
    complete = {name for name, tensor in state.items() if covered.get(name) == tensor.numel()}
    return {name: piece for name, piece in found.items() if piece.live in complete} | {
        name: piece for name, piece in same.items() if name not in complete
    }


def disk_names(model: nn.Module) -> dict[str, str]:
    """Return name in the module → name on disk, for every tensor of `model.state_dict()` that is one tensor on disk.

    The names are the same for a model that is not of transformers.
    """
    layout = Layout(model)
    return {piece.live: name for name, piece in layout.pieces.items() if piece.is_whole(layout.shapes[piece.live])}


def on_disk(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as they are stored: renamed, and split where several on disk are one in memory.

    Args:
        model: the model whose tensors they are, or have the shapes of.
        tensors: by their names in the module.
    """
    layout = Layout(model)
    return {name: piece.of(tensors[live]) for live in tensors for name, piece in layout.on_disk(live)}


def model_checkpoint(model: nn.Module, *, source: str) -> MemoryCheckpoint:
    """Return the weights of a live model by their names on disk, with persistent buffers, and tied tensors once.

    The tensors share the model's memory: write or clone them before the model changes.
    """
    state = model.state_dict()
    kept = {names[0]: state[names[0]].detach() for names in _aliases(model, state)}
    return MemoryCheckpoint(on_disk(model, kept), source=source)


def load_into(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy every tensor of a checkpoint into a live model, in place, one at a time, cast to the parameters' dtypes.

    Raises:
        BadInput: the checkpoint lacks a tensor, has one that the model lacks, or one of another shape. The model is then
            unchanged.
    """
    state, layout = model.state_dict(), Layout(model)
    pairs: list[tuple[str, Piece]] = []
    known: set[str] = set()
    missing: list[str] = []
    for aliases in _aliases(model, state):
        candidates = [
            stored for name in aliases for stored in (layout.on_disk(name), [(name, Piece.whole(name, layout.shapes[name]))])
        ]
        known.update(name for stored in candidates for name, _ in stored)
        found = next((stored for stored in candidates if all(name in checkpoint for name, _ in stored)), None)
        if found is not None:
            pairs += found
        elif not _matches(getattr(model, "_keys_to_ignore_on_load_missing", None), aliases[0]):
            missing.append(candidates[0][0][0])
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None)
    unexpected = [name for name in checkpoint.names() if name not in known and not _matches(ignored, name)]
    _refuse_difference(checkpoint, missing, unexpected)
    for name, piece in pairs:
        if checkpoint.info(name).shape != piece.shape:
            raise BadInput(
                "a tensor has another shape than the model's",
                where=f"{checkpoint.source}, {name}",
                expected=piece.shape,
                found=checkpoint.info(name).shape,
            )
    with torch.no_grad():
        for name, piece in pairs:
            _write(piece, state[piece.live], checkpoint[name])


def _write(piece: Piece, target: Tensor, values: Tensor) -> None:
    """Copy values into a piece of a tensor in memory."""
    contiguous = target if piece.is_whole(tuple(target.shape)) else target.contiguous()
    piece.of(contiguous).copy_(values)
    if contiguous is not target:
        target.copy_(contiguous)


def _aliases(model: nn.Module, state: Mapping[str, Tensor]) -> list[list[str]]:
    """Return the names of each distinct tensor, first the one it is saved under: one not tied to another by transformers."""
    declared = getattr(model, "all_tied_weights_keys", None)
    tied = set(declared) if isinstance(declared, Mapping) else set()
    groups: dict[object, list[str]] = defaultdict(list)
    owners = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name in state:
        groups[id(owners.get(name, state[name]))].append(name)
    return [sorted(names, key=lambda name: name in tied) for names in groups.values()]


def _refuse_difference(checkpoint: Checkpoint, missing: list[str], unexpected: list[str]) -> None:
    if missing or unexpected:
        parts = [
            f"{len(names)} {kind} (such as {names[0]})"
            for names, kind in ((missing, "missing"), (unexpected, "unexpected"))
            if names
        ]
        raise BadInput(
            "the checkpoint is not of this model",
            where=checkpoint.source,
            expected="the model's own tensor names",
            found=", ".join(parts),
            fix="use the checkpoint's own base",
        )


def _matches(patterns: Iterable[str] | None, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())
