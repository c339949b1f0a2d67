"""Apply the formulas of an adapter to base tensors whose layout may differ from the one that the adapter was trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from emomerge.adapters.change import Change
from emomerge.adapters.formulas import Formula
from emomerge.adapters.formulas.lora import LowRankProduct
from emomerge.adapters.images.layouts import Order, Place
from emomerge.checkpoints import Checkpoint, working_dtype
from emomerge.checkpoints.factors import Factors, Term

Shape = tuple[int, ...]


def shape_of(places: Sequence[Place], base: Checkpoint) -> Shape:
    """Return the shape of the tensor that an adapter was trained on, whose rows lie at these places."""
    shapes = [_shape(place, base) for place in places]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if shapes[0] else ()


def _shape(place: Place, base: Checkpoint) -> Shape:
    shape = base.info(place.tensor).shape
    if place.rows is not None:
        shape = (place.rows[1] - place.rows[0], *shape[1:])
    return shape[::-1] if place.order == "transposed" else shape


@dataclass(frozen=True)
class Edit:
    """What an adapter does to some rows of a base tensor.

    Args:
        key: the module in the adapter file, for messages.
        place: the rows.
        formula: the change of these rows alone; None if it depends on rows in other places.
        coupled: computes these rows from those in all places, if `formula` is None.
    """

    key: str
    place: Place
    formula: Formula | None
    coupled: Callable[[], Tensor] | None = None

    @property
    def additive(self) -> bool:
        """Whether the change does not depend on the base."""
        return self.formula is not None and self.formula.additive

    def overlaps(self, other: Edit) -> bool:
        """Return whether both change a row of one tensor."""
        mine, theirs = self.place.rows, other.place.rows
        return mine is None or theirs is None or (mine[0] < theirs[1] and theirs[0] < mine[1])

    def delta(self, shape: Shape, dtype: torch.dtype) -> Tensor:
        """Return Δ of the rows, as the base stores them; `shape` is the one that the adapter was trained on."""
        assert self.formula is not None
        return arranged(self.formula.delta(shape, dtype), self.place.order)

    def term(self) -> Term:
        """Return Δ of the rows as a product, if the formula is one."""
        term = self.formula.term() if self.formula is not None else None
        assert term is not None
        start = self.place.rows[0] if self.place.rows is not None else 0
        if self.place.order == "transposed":
            return term._replace(a=term.b.mT, b=term.a.mT, start=start)
        return term._replace(b=arranged(term.b, self.place.order), start=start)

    def apply(self, rows: Tensor) -> Tensor:
        """Return the changed rows, as the base stores them."""
        if self.formula is None:
            assert self.coupled is not None
            return self.coupled()
        return arranged(self.formula.apply(arranged(rows, self.place.order)), self.place.order)


def arranged(tensor: Tensor, order: Order) -> Tensor:
    """Return a tensor in the other arrangement; each of them is its own inverse."""
    if order == "transposed":
        return tensor.mT
    if order == "halves swapped":
        first, second = tensor.chunk(2)
        return torch.cat((second, first))
    return tensor


def edits_of(formula: Formula, places: Sequence[Place], base: Checkpoint, *, key: str) -> list[Edit]:
    """Return the change of each place by a formula over all of them."""
    if len(places) == 1:
        return [Edit(key, places[0], formula)]
    edits = []
    begin = 0
    for place in places:
        rows = slice(begin, begin + _shape(place, base)[0])
        part = formula.take(rows)
        edits.append(Edit(key, place, part, partial(_coupled, formula, tuple(places), base, rows, place.order)))
        begin = rows.stop
    return edits


def _coupled(formula: Formula, places: tuple[Place, ...], base: Checkpoint, rows: slice, order: Order) -> Tensor:
    whole = torch.cat([arranged(_rows(base[place.tensor], place), place.order) for place in places])
    return arranged(formula.apply(whole)[rows], order)


def _rows(tensor: Tensor, place: Place) -> Tensor:
    return tensor if place.rows is None else tensor[place.rows[0] : place.rows[1]]


def change_of(edits: Sequence[Edit], base: Checkpoint) -> Change:
    """Return the effect of edits of one base tensor that do not overlap."""
    shape = base.info(edits[0].place.tensor).shape
    whole = len(edits) == 1 and edits[0].place.rows is None
    if not all(edit.additive for edit in edits):
        return Change(replace=partial(_replace, tuple(edits), whole))
    shapes = [_shape(edit.place, base) for edit in edits]
    factors = None
    if all(isinstance(edit.formula, LowRankProduct) for edit in edits) and len(shape) > 1:
        factors = partial(_factors, shape, edits)
    if whole:
        return Change(delta=partial(edits[0].delta, shapes[0]), factors=factors)

    def delta(dtype: torch.dtype) -> Tensor:
        total = torch.zeros(shape, dtype=dtype)
        for edit, part in zip(edits, shapes, strict=True):
            _rows(total, edit.place).copy_(edit.delta(part, dtype))
        return total

    return Change(delta=delta, factors=factors)


def _factors(shape: Shape, edits: Sequence[Edit]) -> Factors:
    return Factors(shape, tuple(edit.term() for edit in edits))


def _replace(edits: Sequence[Edit], whole: bool, tensor: Tensor) -> Tensor:
    if whole:
        return edits[0].apply(tensor)
    changed = tensor.to(working_dtype(tensor.dtype), copy=True)
    for edit in edits:
        rows = _rows(changed, edit.place)
        rows.copy_(edit.apply(_rows(tensor, edit.place)))
    return changed
