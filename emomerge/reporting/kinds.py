"""What kinds of artefacts there are, and how figures tell them apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from emomerge.reporting.table import artefacts
from emomerge.reporting.text import finite

STAR = "M0,-1.1L.26,-.36L1.05,-.34L.42,.14L.65,.89L0,.45L-.65,.89L-.42,.14L-1.05,-.34L-.26,-.36Z"


@dataclass(frozen=True)
class Kind:
    """A role, or a kind of control."""

    shape: str
    """Vega's name of a symbol, or an SVG path."""
    area: int
    """Of the symbol, in square pixels."""
    meaning: str = ""
    """What a control is, and what it guards against."""


KINDS = {
    "base": Kind("square", 80),
    "run": Kind("circle", 80),
    "merge": Kind("diamond", 150),
    "distance-matched": Kind(
        "triangle-up",
        60,
        "a run's task vector rescaled to the merge's length: is the merge flatter, or merely nearer to the base?",
    ),
    "loss-matched": Kind(
        "triangle-down",
        60,
        "the snapshot of the long run whose training loss is nearest to the merge's: is the merge flatter, or merely less "
        "far learnt?",
    ),
    "long-run": Kind("triangle-right", 60, "the best single run's optimizer with the steps of all runs together"),
    "swa": Kind(STAR, 70, "the mean of the long run's snapshots from its second half (stochastic weight averaging)"),
    "adamw-long-run": Kind("cross", 70, "AdamW with cosine decay and the steps of all runs together"),
    "adamw-average": Kind("triangle-left", 60, "the plain mean of AdamW runs, as many and as long as the merge's own"),
    "control": Kind("triangle-up", 60),
}
"""The kinds in the order of legends and explanations; controls of no known kind are `control`."""


def kind_of(artefact: Mapping[str, Any]) -> str:
    """A key of KINDS: the kind of a control, else the role."""
    return next((str(k) for k in (artefact.get("control"), artefact.get("role")) if k in KINDS), "control")


def explained(results: Mapping[str, Any]) -> dict[str, str]:
    """Kind → what it is, of the controls among some results."""
    present = {kind_of(artefact) for artefact in artefacts(results)}
    return {name: kind.meaning for name, kind in KINDS.items() if name in present and kind.meaning}


def contestants(results: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]:
    """The merge that the verdict judges and the best single run, of the first training seed.

    Without a verdict those of the lowest validation loss; None where there is no merge, or no run.
    """
    verdict = results.get("verdict") or {}
    return (
        _named_or_best(results, "merge", verdict.get("merge")),
        _named_or_best(results, "run", next(iter(verdict.get("best_single") or []), None)),
    )


def _named_or_best(results: Mapping[str, Any], role: str, name: object) -> Mapping[str, Any] | None:
    found = [a for a in artefacts(results) if a.get("role") == role]
    named = next((a for a in found if a.get("name") == name), None)
    measured = [a for a in found if finite(a.get("validation_loss")) is not None]
    return named or min(measured, key=lambda a: float(a["validation_loss"]), default=None)
