"""Kinds of artefacts and their symbols in figures."""

from __future__ import annotations

from typing import NamedTuple

from emomerge.controls import CONTROLS
from emomerge.results import ArtefactRow, Results, Role


class Symbol(NamedTuple):
    """The symbol of a kind of artefact."""

    shape: str
    """Vega's name of a symbol, or an SVG path."""
    area: int
    """Size in square pixels."""


SYMBOLS = {
    "base": Symbol("square", 80), "run": Symbol("circle", 80), "merge": Symbol("diamond", 150),
    **{kind: Symbol(control.symbol, control.area) for kind, control in CONTROLS.items()},
    "control": Symbol("triangle-up", 60),
}  # fmt: skip
"""Kind → symbol, in the order of legends; controls of an unknown kind use `control`."""


def kind_of(row: ArtefactRow) -> str:
    """Return a key of SYMBOLS: the kind of a control, or else the role."""
    return row.control if row.control is not None and row.control in CONTROLS else row.role


def explained_controls(results: Results) -> dict[str, str]:
    """Return the meaning of every kind of control among the results."""
    present = {row.control for row in results.artefacts}
    return {kind: control.meaning for kind, control in CONTROLS.items() if kind in present}


def contestants(results: Results) -> tuple[ArtefactRow | None, ArtefactRow | None]:
    """Return the merge that the verdict is about and the best single run, both of the first training seed.

    Without a verdict, return those with the lowest validation loss. None if there is no merge or no run.
    """
    verdict = results.verdict
    merge, single = (verdict.merge, next(iter(verdict.best_single), None)) if verdict else (None, None)
    return _named_or_best(results, "merge", merge), _named_or_best(results, "run", single)


def _named_or_best(results: Results, role: Role, name: str | None) -> ArtefactRow | None:
    found = [row for row in results.artefacts if row.role == role]
    losses = {row.name: loss for row in found if (loss := row.loss("validation")) is not None}
    best = min(losses, key=lambda name: losses[name], default=None)
    by_name = {row.name: row for row in found}
    return by_name.get(name or "") or by_name.get(best or "")
