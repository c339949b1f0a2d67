"""Text on how the figures beyond the average sharpness were measured, and on their limits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from emomerge.reporting.table import measured, radii
from emomerge.reporting.text import short
from emomerge.results import ArtefactRow, Estimate, Results, Surface

WORST_CASE = "worst case "
"""Prefix of the families of worst-case figures, followed by the name of the ball."""


def measures(results: Results) -> dict[str, str]:
    """Return the description of each measure that was taken."""
    balls = worst_case_radii(results)
    texts = {
        "Adaptive": _adaptive(results),
        "Worst case": "the highest loss that gradient ascent finds in a ball around the weights, for each batch separately; "
        "the slope ρ‖g‖, which is unrelated to flatness, is reported separately. Radii ρ: "
        + "; ".join(f"{ball} {_listed(every)}" for ball, every in balls.items())
        if balls
        else "",
        "Basin": _basin(results),
        "Hessian": _hessian(results),
        "Landscape": _landscape(results),
    }
    return {name: text for name, text in texts.items() if text}


def cautions(results: Results) -> list[str]:
    """Return the limits of those measures."""
    found = []
    if worst_case_radii(results):
        found.append("A worst case is the highest loss that the ascent found: the true one may be higher.")
    if any(map(_has_hessian, results.artefacts)):
        found.append(
            "The Hessian describes the loss only at the weights; sharpness at several radii covers their surroundings."
        )
    if results.plane or results.surfaces:
        found.append("A map of the loss shows only two of very many directions: an illustration, not evidence.")
    return found


def worst_case_radii(results: Results) -> dict[str, list[float]]:
    """Return ball → radii of the worst case, ascending."""
    families = dict.fromkeys(c.family for c in measured(results) if c.family.startswith(WORST_CASE))
    return {family.removeprefix(WORST_CASE): radii(results, family) for family in families}


def _has_hessian(row: ArtefactRow) -> bool:
    return row.hessian is not None or "lambda_max" in row.estimates


def _adaptive(results: Results) -> str:
    every = radii(results, "adaptive")
    count = _count(_estimates(results, [f"adaptive_{radius:g}" for radius in every]))
    across = f"in {count} directions; " if count else ""
    return (
        f"as sharpness, with δ of σ = {_listed(every)} times each weight's own size, {across}small weights look flat by it, so "
        "it decides nothing"
        if every
        else ""
    )


def _basin(results: Results) -> str:
    entries = _estimates(results, ["basin"])
    count = _count(entries)
    across = f", by bisection along each of {count} directions" if count else ""
    return f"the largest σ of Gaussian noise that raises the loss by at most 0.1{across}" if entries else ""


def _hessian(results: Results) -> str:
    found = [row.hessian for row in results.artefacts if row.hessian]
    probes = _count(_estimates(results, ["trace"]))
    parts = {
        "ends of the spectrum by Lanczos' method": any(row.mean("lambda_max") is not None for row in results.artefacts),
        "its density by stochastic Lanczos quadrature, smoothed": any(h.density for h in found),
        "trace by random probe vectors" + (f" ({probes})" if probes else "") + " that all artefacts share": bool(
            _estimates(results, ["trace"])
        ),
        "its parts by layer from the same vectors": any(h.layers for h in found),
        "and without sampling in the span of the runs' task vectors": any(h.subspace for h in found),
    }
    texts = [text for text, present in parts.items() if present]
    return f"of the loss on the same rows as sharpness: {'; '.join(texts)}" if texts else ""


def _landscape(results: Results) -> str:
    parts = ["barriers on the straight lines between weights"] if results.barriers else []
    maps: dict[str, list[Surface]] = {
        "the plane": [results.plane] if results.plane else [],
        "surfaces": list(results.surfaces.values()),
    }
    for name, held in maps.items():
        if sizes := {f"{len(surface.x)} × {len(surface.y)}" for surface in held}:
            parts.append(f"{name} at {' or '.join(sorted(sizes))} points")
    return "; ".join(parts)


def _estimates(results: Results, keys: Sequence[str]) -> list[Estimate]:
    return [row.estimates[key] for row in results.artefacts for key in keys if key in row.estimates]


def _count(estimates: Iterable[Estimate]) -> str:
    """Return the number of samples per figure, if it is the same for all."""
    counts = {estimate.n for estimate in estimates}
    return short(counts.pop()) if len(counts) == 1 and None not in counts else ""


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
