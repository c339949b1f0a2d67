"""The figures of every artefact as columns, once for the page, the model card and the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from emomerge.reporting.text import UNKNOWN, decimals, finite, fixed, percent, unit

Entry: TypeAlias = Mapping[str, Any] | None
"""A measurement `{mean, stderr, n}`, if it was taken."""
LAMBDA_MIN = "smallest eigenvalue of the Hessian; clearly below 0 the point is no minimum"
LAMBDA_SPAN = "largest eigenvalue of the Hessian within the span of the runs' task vectors, computed without sampling"


@dataclass(frozen=True)
class Column:
    """One figure of all artefacts, in their order."""

    key: str
    title: str
    meaning: str
    values: tuple[float | None, ...]
    """For sorting; worse than any where a measurement diverged."""
    cells: tuple[str, ...]
    best: frozenset[int] = frozenset()
    """Rows that hold the best value among runs and merges, as far as the printed digits tell."""


def artefacts(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The artefacts of some results: base, runs, merges, controls, else as they come."""
    rank = {"base": 0, "run": 1, "merge": 2, "control": 3}
    return sorted(results.get("artefacts") or [], key=lambda a: rank.get(str(a.get("role")), 4))


def radii(results: Mapping[str, Any]) -> list[float]:
    """The probe's radii, ascending; those that artefacts hold if the probe's description is missing."""
    listed = (results.get("probe") or {}).get("radii")
    if not listed:
        listed = {float(r) for a in artefacts(results) for r in a.get("sharpness") or {}}
    return sorted(float(r) for r in listed)


def middle_radius(results: Mapping[str, Any]) -> float | None:
    """The radius that single-figure views show."""
    every = radii(results)
    return every[len(every) // 2] if every else None


def sharpness_at(artefact: Mapping[str, Any], radius: float | None) -> Mapping[str, Any] | None:
    """The measurement `{mean, stderr, n}` at a radius, if there is one."""
    return at_radius(artefact.get("sharpness"), radius)


def at_radius(measured: Mapping[str, Any] | None, radius: float | None) -> Entry:
    """The measurement at a radius, of `{radius: measurement}`."""
    for key, entry in (measured or {}).items():
        if radius is not None and math.isclose(float(key), radius):
            return entry if isinstance(entry, Mapping) else None
    return None


def hessian(artefact: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is known of an artefact's Hessian."""
    return artefact.get("hessian") or {}


def worst_case_radii(results: Mapping[str, Any]) -> dict[str, list[float]]:
    """Ball → the radii at which some artefact's worst case was looked for, ascending."""
    found: dict[str, set[float]] = {}
    for artefact in artefacts(results):
        for ball, of_radius in (artefact.get("worst_case") or {}).items():
            found.setdefault(str(ball), set()).update(map(float, of_radius or {}))
    return {ball: sorted(values) for ball, values in found.items() if values}


def adaptive_radii(results: Mapping[str, Any]) -> list[float]:
    """The radii of the adaptive average, ascending."""
    return sorted({float(r) for a in artefacts(results) for r in a.get("adaptive") or {}})


def columns(results: Mapping[str, Any]) -> list[Column]:
    """Every figure that at least one artefact has; of measures that are secondary one radius, see `details`."""
    rows = artefacts(results)
    found = [
        _losses(rows, "test", unit(results)),
        *([_perplexities(rows, "test")] if _is_language(results) else []),
        _accuracies(rows, "test"),
        *(_sharpness(rows, radius) for radius in radii(results)),
        *_curvatures(rows),
        _basin(rows),
        *(_adaptive(rows, radius) for radius in _middle(adaptive_radii(results))),
        *(_worst_case(rows, b, r) for b, every in worst_case_radii(results).items() for r in _middle(every)),
        _plain(rows, "distance", "distance", "‖θ − θ₀‖, the length of the task vector"),
        *(c for split in ("validation", "train") for c in (_losses(rows, split, unit(results)), _accuracies(rows, split))),
        _plain(
            rows,
            "cosine_to_mean",
            "cos to mean",
            "cosine between the task vector and the mean of the runs' task vectors",
            places=3,
        ),
        _plain(rows, "entropy", "entropy", "mean entropy of the predictions (nats); confident models look flatter"),
        _plain(rows, "grad_norm", "‖∇L‖", "norm of the gradient at the artefact"),
    ]
    return _known(found)


def details(results: Mapping[str, Any]) -> list[Column]:
    """The secondary measures in full: every radius, the slope beside the worst case, the Hessian's other figures."""
    rows = artefacts(results)
    found = [
        *(_adaptive(rows, radius) for radius in adaptive_radii(results)),
        *(
            make(rows, ball, radius)
            for ball, every in worst_case_radii(results).items()
            for radius in every
            for make in (_worst_case, _slope)
        ),
        _single(rows, [_figure(a, "lambda_min") for a in rows], "lambda_min", "λmin", LAMBDA_MIN),
        _single(rows, [_span(a) for a in rows], "lambda_span", "λmax in span τ", LAMBDA_SPAN),
    ]
    return _known(found)


def _known(found: Sequence[Column]) -> list[Column]:
    return [column for column in found if any(cell != UNKNOWN for cell in column.cells)]


def _middle(values: Sequence[float]) -> Sequence[float]:
    return values[len(values) // 2 :][:1]


def _losses(rows: Sequence[Mapping[str, Any]], split: str, in_unit: str) -> Column:
    values = tuple(finite(a.get(f"{split}_loss")) for a in rows)
    places = decimals(values, 4)
    cells = tuple(fixed(v, places) for v in values)
    return Column(
        f"{split}_loss",
        f"{split} loss",
        f"mean loss on the {split} rows ({in_unit})",
        values,
        cells,
        _best(rows, values, cells, min),
    )


def _is_language(results: Mapping[str, Any]) -> bool:
    return ((results.get("recipe") or {}).get("task") or {}).get("kind") == "causal-lm"


def _perplexities(rows: Sequence[Mapping[str, Any]], split: str) -> Column:
    losses = [finite(a.get(f"{split}_loss")) for a in rows]
    values = tuple(None if loss is None else math.exp(min(loss, 700.0)) for loss in losses)
    cells = tuple(fixed(v, decimals(values)) for v in values)
    meaning = f"exp of the {split} loss: among so many equally likely tokens the next one is as hard to guess"
    return Column(f"{split}_perplexity", "perplexity", meaning, values, cells, _best(rows, values, cells, min))


def _accuracies(rows: Sequence[Mapping[str, Any]], split: str) -> Column:
    values = tuple(finite(a.get(f"{split}_accuracy")) for a in rows)
    cells = tuple(percent(v) for v in values)
    return Column(
        f"{split}_accuracy", f"{split} acc.", f"accuracy on the {split} rows", values, cells, _best(rows, values, cells, max)
    )


def _sharpness(rows: Sequence[Mapping[str, Any]], radius: float) -> Column:
    meaning = f"mean rise of the loss under Gaussian noise of {radius:g} times the RMS of the base's tensor, ± standard error"
    entries = [sharpness_at(a, radius) for a in rows]
    return _estimates(rows, entries, f"sharpness_{radius:g}", f"sharpness σ={radius:g}", meaning)


def _adaptive(rows: Sequence[Mapping[str, Any]], radius: float) -> Column:
    meaning = (
        f"mean rise of the loss under Gaussian noise of {radius:g} times each weight's own size, ± standard error; small "
        "weights look flat by it, so it is secondary"
    )
    entries = [at_radius(a.get("adaptive"), radius) for a in rows]
    return _estimates(rows, entries, f"adaptive_{radius:g}", f"adaptive σ={radius:g}", meaning)


def _worst_case(rows: Sequence[Mapping[str, Any]], ball: str, radius: float) -> Column:
    meaning = (
        f"highest rise of the loss found within ρ = {radius:g} of the weights ({ball} ball) beyond the slope's part ρ‖g‖, "
        "± standard error"
    )
    entries = [at_radius((a.get("worst_case") or {}).get(ball), radius) for a in rows]
    return _estimates(rows, entries, f"worst_{ball}_{radius:g}", f"worst case {ball} ρ={radius:g}", meaning)


def _slope(rows: Sequence[Mapping[str, Any]], ball: str, radius: float) -> Column:
    """The gradient's part of a worst case, which nobody wins by: it says how far a point is from a minimum."""
    entries = [at_radius((a.get("worst_case") or {}).get(ball), radius) for a in rows]
    slopes = [None if e is None else {"mean": e.get("gradient")} for e in entries]
    meaning = f"ρ‖g‖, the slope's part of the rise within the {ball} ball of ρ = {radius:g}"
    return _single(rows, slopes, f"slope_{ball}_{radius:g}", f"slope {ball} ρ={radius:g}", meaning)


def _curvatures(rows: Sequence[Mapping[str, Any]]) -> tuple[Column, Column]:
    """λmax and trace of the Hessian."""
    largest = "largest eigenvalue of the Hessian: the curvature of the steepest direction"
    trace = "sum of the Hessian's eigenvalues: the curvature of all directions together, ± standard error"
    return (
        _estimates(rows, [_figure(a, "lambda_max") for a in rows], "lambda_max", "λmax", largest),
        _estimates(rows, [hessian(a).get("trace") for a in rows], "trace", "trace", trace),
    )


def _basin(rows: Sequence[Mapping[str, Any]]) -> Column:
    meaning = "largest σ of Gaussian noise, in RMS of the base's tensor, that raises the loss by at most 0.1; larger is flatter"
    return _estimates(rows, [a.get("basin") for a in rows], "basin", "basin width", meaning, choose=max)


def _figure(artefact: Mapping[str, Any], key: str) -> Entry:
    """A figure of the Hessian as a measurement without error; None where it was not asked for."""
    found = hessian(artefact)
    return {"mean": found[key]} if key in found else None


def _span(artefact: Mapping[str, Any]) -> Entry:
    found = hessian(artefact).get("subspace")
    if found is None:
        return None
    values = [finite(value) for value in found.get("eigenvalues") or []]
    known = [value for value in values if value is not None]
    return {"mean": max(known) if known and len(known) == len(values) else None}


def _single(rows: Sequence[Mapping[str, Any]], entries: Sequence[Entry], key: str, title: str, meaning: str) -> Column:
    """A column without a winner."""
    return replace(_estimates(rows, entries, key, title, meaning), best=frozenset())


def _estimates(
    rows: Sequence[Mapping[str, Any]], entries: Sequence[Entry], key: str, title: str, meaning: str, choose: Any = min
) -> Column:
    """Measurements `{mean, stderr}`, one for each row; without a finite mean they diverged, None was not taken.

    What else a measurement found is told with the column's meaning.
    """
    means = [finite(e.get("mean")) if e else None for e in entries]
    worst = math.inf if choose is min else -math.inf
    places = decimals(means)
    values, cells = [], []
    for entry, mean in zip(entries, means, strict=True):
        values.append(worst if entry is not None and mean is None else mean)
        error = finite(entry.get("stderr")) if entry and mean is not None else None
        text = fixed(mean, places) if error is None else f"{fixed(mean, places)} ± {fixed(error, places)}"
        cells.append("diverged" if entry is not None and mean is None else text)
    plain = [fixed(mean, places) for mean in means]
    findings = [
        f"{row.get('name')}: {entry['finding']}"
        for row, entry, mean in zip(rows, entries, means, strict=True)
        if entry and mean is not None and entry.get("finding")
    ]
    told = "; ".join([meaning, *findings])
    return Column(key, title, told, tuple(values), tuple(cells), _best(rows, means, plain, choose))


def _plain(rows: Sequence[Mapping[str, Any]], key: str, title: str, meaning: str, places: int | None = None) -> Column:
    values = tuple(finite(a.get(key)) for a in rows)
    places = decimals(values) if places is None else places
    return Column(key, title, meaning, values, tuple(fixed(v, places) for v in values))


def _best(
    rows: Sequence[Mapping[str, Any]], values: Sequence[float | None], cells: Sequence[str], choose: Any
) -> frozenset[int]:
    """Only runs and merges compete: the base and rescaled task vectors look flat merely because they lie near the base."""
    held = {i: v for i, v in enumerate(values) if v is not None and rows[i].get("role") in ("run", "merge")}
    if len(held) < 2:
        return frozenset()
    winner = choose(held, key=lambda i: held[i])
    return frozenset(i for i in held if cells[i] == cells[winner])
