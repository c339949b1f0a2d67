"""How the tensors of one layout of a model are stored in another: the original repository's or ComfyUI's, and diffusers'."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Literal, NamedTuple

Order = Literal["same", "halves swapped", "transposed"]
Shapes = Mapping[str, tuple[int, ...]]
"""Tensor name → shape, of one part of a base."""


class Rule(NamedTuple):
    """A tensor in the original layout, and the same rows in diffusers' layout.

    In the names, `{n}` and `{m}` stand for numbers, `{p}` for `weight` or `bias`, and `{*}` for any end of a name.

    Args:
        original: name in the original layout.
        diffusers: name in diffusers' layout; several if its rows are split there, in their order.
        order: how the values are arranged there.
    """

    original: str
    diffusers: str | tuple[str, ...]
    order: Order = "same"

    @property
    def parts(self) -> tuple[str, ...]:
        """The names in diffusers' layout."""
        return (self.diffusers,) if isinstance(self.diffusers, str) else self.diffusers


class Place(NamedTuple):
    """Rows of a base tensor that hold all of a tensor in another layout, or a part of it.

    Args:
        tensor: name in the base.
        rows: the first row and the row after the last; None for all.
        order: how the values of the other tensor are arranged here.
    """

    tensor: str
    rows: tuple[int, int] | None = None
    order: Order = "same"


Spelling = dict[str, tuple[Place, ...]]
"""Tensor name in some layout → the places of its rows, in order."""


def native(shapes: Shapes) -> Spelling:
    """Return the base's own spelling."""
    return {name: (Place(name),) for name in shapes}


def alias(shapes: Shapes, rules: Sequence[Rule]) -> Spelling:
    """Return the names of a base's tensors in the other layout, whichever of the two the base has."""
    found: Spelling = {}
    pieces: dict[tuple[Rule, str], dict[int, str]] = defaultdict(dict)
    by_start: dict[str, list[tuple[Rule, int | None]]] = defaultdict(list)
    for rule in rules:
        by_start[_start(rule.original)].append((rule, None))
        for number, part in enumerate(rule.parts):
            by_start[_start(part)].append((rule, number))
    for name in shapes:
        for rule, index in by_start[_start(name)]:
            template = rule.original if index is None else rule.parts[index]
            match = _pattern(template).fullmatch(name)
            if match is None:
                continue
            if index is None:
                found |= _split(rule, name, match.groupdict(), shapes)
            elif len(rule.parts) == 1:
                found[_fill(rule.original, match.groupdict())] = (Place(name, None, rule.order),)
            else:
                pieces[rule, _fill(rule.original, match.groupdict())][index] = name
    for (rule, whole), names in pieces.items():
        if len(names) == len(rule.parts):
            found[whole] = tuple(Place(names[number], None, rule.order) for number in range(len(names)))
    return found


def _split(rule: Rule, name: str, groups: dict[str, str], shapes: Shapes) -> Spelling:
    """Return the names in diffusers' layout of a tensor in the original one, and their rows."""
    if len(rule.parts) == 1:
        return {_fill(rule.parts[0], groups): (Place(name, None, rule.order),)}
    spelling: Spelling = {}
    begin = 0
    for part, size in zip(rule.parts, _sizes(name, len(rule.parts), shapes), strict=True):
        spelling[_fill(part, groups)] = (Place(name, (begin, begin + size), rule.order),)
        begin += size
    return spelling


def _sizes(name: str, parts: int, shapes: Shapes) -> list[int]:
    """Return the rows of q, k and v, and of what follows them in a fused projection.

    The query has as many rows as the projection has columns, and keys and values have equally many: fewer than the query if
    they are shared by several heads (Lumina 2). If an MLP's input follows, there is no such sharing.
    """
    rows = shapes[name][0]
    weight = re.sub(r"bias$", "weight", name)
    columns = shapes.get(weight, (rows, rows // parts))[1]
    if parts == 2:  # q, k and v as one, and the MLP
        return [3 * columns, rows - 3 * columns]
    if parts > 3:
        return [columns, columns, columns, rows - 3 * columns]
    if rows % 3 == 0 and (rows // 3 == columns or (rows - columns) % 2 or rows <= columns):
        return [rows // 3] * 3
    return [columns, (rows - columns) // 2, (rows - columns) // 2]


_PLACEHOLDERS = {"{n}": r"(?P<n>\d+)", "{m}": r"(?P<m>\d+)", "{p}": r"(?P<p>weight|bias)", "{*}": r"(?P<rest>.+)"}


@cache
def _pattern(template: str) -> re.Pattern[str]:
    text = re.escape(template)
    for placeholder, pattern in _PLACEHOLDERS.items():
        text = text.replace(re.escape(placeholder), pattern)
    return re.compile(text)


def _fill(template: str, groups: dict[str, str]) -> str:
    for placeholder, key in (("{n}", "n"), ("{m}", "m"), ("{p}", "p"), ("{*}", "rest")):
        if placeholder in template:
            template = template.replace(placeholder, groups[key])
    return template


def _start(name: str) -> str:
    """Return the first component of a name, which no template leaves open."""
    return name.partition(".")[0]


def each(template: str, pairs: Mapping[str, str | Sequence[str]], other: str) -> list[Rule]:
    """Return rules for the modules of a block: `template` and `other` with their `{}` replaced by each pair."""
    rules = []
    for original, parts in pairs.items():
        names = tuple(other.replace("{}", part) for part in ([parts] if isinstance(parts, str) else parts))
        rules.append(Rule(template.replace("{}", original), names))
    return rules


class Family(NamedTuple):
    """A family of denoisers that share their names.

    Args:
        name: for messages.
        marks: names, one of which every member has in the original layout, and in diffusers' layout.
        rules: the table between the layouts, given the names of a base.
        further: tables of further layouts, each in the place of the original one.
    """

    name: str
    marks: tuple[str, ...]
    rules: Callable[[Iterable[str]], list[Rule]]
    further: tuple[Callable[[Iterable[str]], list[Rule]], ...] = ()

    def has(self, names: Iterable[str]) -> bool:
        """Return whether a model belongs to this family."""
        patterns = [_pattern(mark) for mark in self.marks]
        return any(pattern.fullmatch(name) for name in names for pattern in patterns)
