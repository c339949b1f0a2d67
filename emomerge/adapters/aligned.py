"""A run in the names and the layout of its base, and each tensor once.

Files of one model differ in how they store it: with or without the prefix of a model with a head, a tied tensor once or under
two names, experts stacked or one at a time, in the names of another version of transformers. The base decides; the tensors of
a run are found by asking which part of the live model each of them is.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from emomerge.adapters.naming import BaseNames, usual_partner
from emomerge.checkpoints import Checkpoint, Layout, Piece, TensorInfo
from emomerge.checkpoints.companions import note
from emomerge.checkpoints.names import MAYBE_TIED, unwrapped
from emomerge.errors import BadInput

_RECOMPUTED = re.compile(r"(.+\.)?(rotary_emb\.inv_freq|attn(ention)?\.(masked_)?bias|embeddings\.position_ids)")
"""Buffers that earlier versions of transformers saved and that models compute themselves: rotary frequencies, causal masks."""
_SAMPLE = 64
"""Number of elements of two tensors that are compared before transformers is asked whether they are tied."""


class Read(NamedTuple):
    """How a tensor is read from a checkpoint that stores it under another name or in another layout."""

    names: tuple[str, ...]
    """The tensors that it is read from."""
    cut: Piece | None = None
    """The part of the only one of these."""
    stack: tuple[Piece, ...] = ()
    """The part that each of these becomes of the whole."""
    shape: tuple[int, ...] = ()
    """The shape of the whole."""


class Relaid(Checkpoint):
    """The tensors of a checkpoint under the names and in the layout of another.

    Args:
        checkpoint: the checkpoint.
        reads: how each tensor is read from it.
        base: what to read the tensors of `kept` from.
        kept: names of tensors that the checkpoint lacks.
    """

    def __init__(
        self, checkpoint: Checkpoint, reads: Mapping[str, Read], *, base: Checkpoint | None = None, kept: Iterable[str] = ()
    ) -> None:
        self._checkpoint, self._reads, self._base, self._kept = checkpoint, reads, base, frozenset(kept)
        self._names = tuple(sorted({*reads, *self._kept}))
        self.source, self.folder, self.paths = checkpoint.source, checkpoint.folder, checkpoint.paths
        self.file = checkpoint.file

    @property
    def tokenizers_from(self) -> tuple[Path, ...]:
        """The folders of the checkpoint."""
        return self._checkpoint.tokenizers_from

    def names(self) -> tuple[str, ...]:
        """Return all tensor names, sorted."""
        return self._names

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype of one tensor."""
        if self._base is not None and name in self._kept:
            return self._base.info(name)
        read = self._reads[name]
        stored = self._checkpoint.info(read.names[0])
        return TensorInfo(stored.dtype, read.shape if read.stack else read.cut.shape if read.cut else stored.shape)

    def __getitem__(self, name: str) -> Tensor:
        if self._base is not None and name in self._kept:
            return self._base[name]
        read = self._reads[name]
        if read.stack:
            whole = torch.empty(read.shape, dtype=self.info(name).dtype)
            for part, piece in zip(read.names, read.stack, strict=True):
                piece.of(whole).copy_(self._checkpoint[part])
            return whole
        tensor = self._checkpoint[read.names[0]]
        return tensor if read.cut is None else read.cut.of(tensor)


def distinct(base: Checkpoint) -> Checkpoint:
    """Return a checkpoint without the further names of tensors that its model ties and its file stores more than once.

    Names that the configuration ties but that hold different values are different tensors, as they are to transformers.
    """
    if isinstance(base, Relaid):
        return base
    hidden: set[str] = set()
    if suspects := [*_equal_groups(base)]:
        ties = _Ties(BaseNames(base))
        for names in suspects:
            hidden |= _further_names(base, names, ties)
    return Relaid(base, {name: Read((name,)) for name in base.names() if name not in hidden}) if hidden else base


def _further_names(base: Checkpoint, names: Sequence[str], ties: _Ties) -> set[str]:
    """Return all but one name of each tensor of which several of these are names, with equal values."""
    tied: dict[Piece | str, list[str]] = defaultdict(list)
    for name in names:
        if (owner := ties.owner(name)) is not None:
            tied[owner].append(name)
    firsts = {min(same, key=ties.is_alias): same for same in tied.values()}
    return {name for first, same in firsts.items() for name in same if name != first and _equal(base[first], base[name])}


class _Ties:
    """The tensors of a checkpoint that are one in its model."""

    def __init__(self, names: BaseNames) -> None:
        self._config, self._layout = names.config, names.known_layout

    def owner(self, name: str) -> Piece | str | None:
        """Return what two names of one tensor have in common; None for a name that is unknown to the model."""
        if self._layout is None:
            return "embedding" if usual_partner(name, self._config) is not None else None
        return _place(self._layout, name)

    def is_alias(self, name: str) -> bool:
        """Return whether the tensor is usually saved under another name."""
        if self._layout is None:
            return usual_partner(name, self._config) != "lm_head.weight"
        piece = self._layout.find(unwrapped(name))
        return piece is not None and piece.live in self._layout.ties


def _equal_groups(base: Checkpoint) -> Iterator[list[str]]:
    """Yield the names of tensors that may be tied, by their names, shapes and first elements."""
    groups: dict[TensorInfo, list[str]] = defaultdict(list)
    for name in base.names():
        if MAYBE_TIED.search(name):
            groups[base.info(name)].append(name)
    for info, names in groups.items():
        if len(names) < 2 or not info.numel or not info.dtype.is_floating_point:
            continue
        alike: dict[bytes, list[str]] = defaultdict(list)
        for name in names:
            sample = base[name].flatten()[:_SAMPLE].cpu().contiguous()
            alike[sample.view(torch.uint8).numpy().tobytes()].append(name)
        yield from (same for same in alike.values() if len(same) > 1)


def aligned(base: Checkpoint, run: Checkpoint) -> Checkpoint:
    """Return a dense run with the names and the layout of its base.

    A head that only one of them has is left out, or taken from the base, with a note; everything else that is missing or
    left over stays so, for the caller to refuse.

    Raises:
        BadInput: the run holds two values for what is one tensor in the base.
    """
    if not _unmatched(run, base) and not _unmatched(base, run):
        return run
    names = BaseNames(base)
    layout = names.known_layout
    reads = _by_model(layout, base, run) if layout is not None else _by_prefix(base, run, _Ties(names))
    used = {name for read in reads.values() for name in read.names}
    if layout is not None:
        places = {place.live for name in reads if (place := _place(layout, name)) is not None}
        used |= {name for name in run.names() if (place := _place(layout, name)) is not None and place.live in places}
    else:
        used |= {name for name in run.names() if usual_partner(name, names.config) == "the input embedding"}
    missing = [name for name in _floating(base) if name not in reads]
    extra = [name for name in _floating(run) if name not in used]
    buffers = [name for name in missing + extra if _RECOMPUTED.fullmatch(name) and (layout is None or not _place(layout, name))]
    missing, extra = ([name for name in some if name not in buffers] for some in (missing, extra))
    if (missing or extra) and _has_other_head(names, run, reads):
        heads = [name for name in missing if _is_head(name, reads) and not _is_input(name, reads)]
        others = [name for name in extra if _is_head(name, used)]
        if heads:
            note(f"{run.source} lacks {_several(heads)}: those of the base are kept")
        if others:
            note(f"{run.source} has {_several(others)}, which the base lacks: left out")
    else:
        heads, others = [], []
    reads |= {name: Read((name,)) for name in extra if name not in others}
    return Relaid(run, reads, base=base, kept=[*heads, *(name for name in buffers if name in base)])


def _by_model(layout: Layout, base: Checkpoint, run: Checkpoint) -> dict[str, Read]:
    """Return how each tensor of the base is read from the run, by the parts of the live model that they are."""
    holders: dict[str, list[tuple[str, Piece]]] = defaultdict(list)
    for name in run.names():
        if (place := _place(layout, name)) is not None:
            holders[place.live].append((name, place))
    reads = {}
    for name in base.names():
        place = _place(layout, name)
        held = holders.get(place.live, []) if place is not None else []
        if place is None or not held:
            if name in run:
                reads[name] = Read((name,))
            continue
        same = sorted((own for own, piece in held if piece == place), key=lambda own: own != name)
        whole = [own for own, piece in held if layout.is_whole(piece) and run.info(own).shape == piece.shape]
        if same:
            reads[name] = Read((same[0] if len(same) == 1 else _current(base, name, run, same),))
        elif whole:
            reads[name] = Read((whole[0],), cut=place)
        elif layout.is_whole(place) and _covers(held, place, run):
            own_names, pieces = zip(*held, strict=True)
            reads[name] = Read(own_names, stack=pieces, shape=place.shape)
    return reads


def _covers(held: Sequence[tuple[str, Piece]], whole: Piece, run: Checkpoint) -> bool:
    """Return whether tensors of a run, in the shapes that the model gives them, make up the whole."""
    return sum(piece.numel for _, piece in held) == whole.numel and all(run.info(own).shape == p.shape for own, p in held)


def _current(base: Checkpoint, name: str, run: Checkpoint, same: Sequence[str]) -> str:
    """Return which of several names of one tensor holds the run's value: those that still have the base's are stale."""
    values = [run[own] for own in same]
    if all(_equal(values[0], value) for value in values):
        return same[0]
    origin = base[name]
    moved = [own for own, value in zip(same, values, strict=True) if not _equal(value, origin.to(value.dtype))]
    if not all(_equal(run[moved[0]], run[own]) for own in moved):
        raise BadInput(
            "a run holds two values for a tensor that the base ties",
            where=run.source,
            expected=f"one value of {name}",
            found=" and ".join(moved),
            fix="merge into a base that stores both, with tie_word_embeddings set to false in its configuration",
        )
    stale = [own for own in same if own not in moved]
    note(f"{run.source} ties {moved[0]} and {stale[0]}, of which the second still has the base's value: the first is used")
    return moved[0]


def _by_prefix(base: Checkpoint, run: Checkpoint, ties: _Ties) -> dict[str, Read]:
    """Return how each tensor of the base is read from the run, by names that are equal up to one leading component."""
    plain = {unwrapped(name): name for name in run.names()}
    ours = set(base.names())
    heads = {name.partition(".")[0] for name in plain if not name[0].isdigit()}
    ways: list[dict[str, str]] = [plain]
    ways += [{name.removeprefix(f"{head}."): own for name, own in plain.items()} for head in sorted(heads)]
    tops = {name.partition(".")[0] for name in ours if not name[0].isdigit()}
    ways += [{f"{top}.{name}": own for name, own in plain.items()} for top in sorted(tops)]
    best = max(ways, key=lambda way: len(ours & way.keys()))
    found = plain | {name: own for name, own in best.items() if name in ours}
    reads = {name: Read((found[name],)) for name in base.names() if name in found}
    by_owner = {owner: name for name in found if (owner := ties.owner(name)) is not None}
    for name in ours - reads.keys():  # a tied tensor under its other name
        owner = ties.owner(name)
        if owner in by_owner and run.info(found[by_owner[owner]]).shape == base.info(name).shape:
            reads[name] = Read((found[by_owner[owner]],))
    return reads


def _place(layout: Layout, name: str) -> Piece | None:
    """Return the part of the live model that a tensor is, under the first of the tied names; None if it is none."""
    piece = None if "/" in name else layout.find(unwrapped(name))
    return None if piece is None else piece._replace(live=layout.ties.get(piece.live, piece.live))


def _has_other_head(names: BaseNames, run: Checkpoint, reads: Mapping[str, Read]) -> bool:
    """Return whether run and base are models of different classes around one trunk."""
    pairs = [(name, own) for name, read in reads.items() for own in read.names[:1] if own != name]
    prefixed = any(own.endswith(f".{name}") or name.endswith(f".{own}") for name, own in pairs)
    ours, theirs = (config.get("architectures") for config in (names.config, BaseNames(run).config))
    return prefixed or (bool(ours) and bool(theirs) and ours != theirs)


def _is_head(name: str, trunk: Iterable[str]) -> bool:
    """Return whether a tensor is in a module beside those of the trunk, at the top or one level below."""

    starts = {_start(each) for each in trunk}
    return _start(name)[:1] not in {each[:1] for each in starts} or _start(name) not in starts


def _is_input(name: str, trunk: Iterable[str]) -> bool:
    """Return whether a module beside those of the trunk is its embedding; the tower of another modality has one within."""
    start = _start(name)
    apart = start[:1] not in {_start(each)[:1] for each in trunk}
    return "embed" in (start[0] if apart else start[-1])


def _start(name: str) -> tuple[str, ...]:
    """Return the module at the top that a tensor is in, and the one below it."""
    return tuple(part for part in name.split(".")[:2] if not part.isdigit()) or ("",)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors hold the same bytes, NaN included."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(*(tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other)))


def _unmatched(checkpoint: Checkpoint, other: Checkpoint) -> bool:
    return any(name not in other for name in _floating(checkpoint))


def _floating(checkpoint: Checkpoint) -> list[str]:
    return [name for name in checkpoint.names() if checkpoint.info(name).dtype.is_floating_point]


def _several(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
