"""How the figures of a full probe were taken, and what they cannot say: only of what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from emomerge.reporting.figure import Results
from emomerge.reporting.table import adaptive_radii, artefacts, hessian, worst_case_radii
from emomerge.reporting.text import finite, short


def measures(results: Results) -> dict[str, str]:
    """Measure → how it was taken, of those beyond the average sharpness."""
    balls = worst_case_radii(results)
    told = {
        "Adaptive": _adaptive(results),
        "Worst case": "the highest loss that gradient ascent finds in a ball around the weights, each batch by itself; its "
        "slope ρ‖g‖, which says nothing of flatness, is split off. Radii ρ: "
        + "; ".join(f"{ball} {_listed(every)}" for ball, every in balls.items())
        if balls
        else "",
        "Basin": _basin(results),
        "Hessian": _hessian(results),
        "Landscape": _landscape(results),
    }
    return {name: text for name, text in told.items() if text}


def cautions(results: Results) -> list[str]:
    """What those measures cannot say."""
    found = []
    if worst_case_radii(results):
        found.append("A worst case is the highest loss that the ascent found: the true one may be higher.")
    if any(map(hessian, artefacts(results))):
        found.append(
            "The Hessian describes the loss right at the weights; what lies further off is for sharpness at several radii."
        )
    if results.get("plane") or results.get("surfaces"):
        found.append("A map of the loss shows two directions of very many: an illustration, no evidence.")
    return found


def _adaptive(results: Results) -> str:
    radii = adaptive_radii(results)
    count = _count(a.get("adaptive", {}).values() for a in artefacts(results) if a.get("adaptive"))
    across = f"in {count} directions; " if count else ""
    return (
        f"as sharpness, with δ of σ = {_listed(radii)} times each weight's own size, {across}small weights look flat by it, so "
        "it decides nothing"
        if radii
        else ""
    )


def _basin(results: Results) -> str:
    entries = [a["basin"] for a in artefacts(results) if a.get("basin")]
    count = _count([entries])
    across = f", by bisection along each of {count} directions" if count else ""
    return f"the largest σ of Gaussian noise that raises the loss by at most 0.1{across}" if entries else ""


def _hessian(results: Results) -> str:
    found = [hessian(a) for a in artefacts(results) if hessian(a)]
    if not found:
        return ""
    probes = _count([[h["trace"] for h in found if h.get("trace")]])
    parts = {
        "lambda_max": "ends of the spectrum by Lanczos' method",
        "density": "its density by stochastic Lanczos quadrature, smoothed",
        "trace": "trace by random probe vectors" + (f" ({probes})" if probes else "") + " that all artefacts share",
        "layers": "its parts by layer from the same vectors",
        "subspace": "and without sampling in the span of the runs' task vectors",
    }
    told = [text for key, text in parts.items() if any(h.get(key) is not None for h in found)]
    return f"of the loss on the same rows as sharpness: {'; '.join(told)}" if told else ""


def _landscape(results: Results) -> str:
    parts = []
    if results.get("barriers"):
        parts.append("barriers on the straight lines between weights")
    maps = {"the plane": [results.get("plane") or {}], "surfaces": list((results.get("surfaces") or {}).values())}
    for name, held in maps.items():
        sizes = {f"{len(m.get('x') or [])} × {len(m.get('y') or [])}" for m in held if m}
        if sizes:
            parts.append(f"{name} at {' or '.join(sorted(sizes))} points")
    return "; ".join(parts)


def _count(groups: Iterable[Iterable[Mapping[str, Any]]]) -> str:
    """How many samples the measurements are of, if all are of equally many."""
    counts = {finite(entry.get("n")) for group in groups for entry in group}
    return short(counts.pop()) if len(counts) == 1 and None not in counts else ""


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
