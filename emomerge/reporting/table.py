"""The figures of every artefact as columns, once for the page, the model card and the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emomerge.reporting.text import UNKNOWN, decimals, finite, fixed, percent, unit


@dataclass(frozen=True)
class Column:
    """One figure of all artefacts, in their order."""

    key: str
    title: str
    meaning: str
    values: tuple[float | None, ...]
    """For sorting; infinite where a measurement diverged."""
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
    for key, entry in (artefact.get("sharpness") or {}).items():
        if radius is not None and math.isclose(float(key), radius):
            return entry if isinstance(entry, Mapping) else None
    return None


def columns(results: Mapping[str, Any]) -> list[Column]:
    """Every figure that at least one artefact has."""
    rows = artefacts(results)
    found = [
        _losses(rows, "test", unit(results)),
        *([_perplexities(rows, "test")] if _is_language(results) else []),
        _accuracies(rows, "test"),
        *(_sharpness(rows, radius) for radius in radii(results)),
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
    return [column for column in found if any(cell != UNKNOWN for cell in column.cells)]


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
    entries = [sharpness_at(a, radius) for a in rows]
    means = [finite(e.get("mean")) if e else None for e in entries]
    places = decimals(means)
    values, cells = [], []
    for entry, mean in zip(entries, means, strict=True):
        values.append(math.inf if entry is not None and mean is None else mean)
        error = finite(entry.get("stderr")) if entry and mean is not None else None
        text = fixed(mean, places) if error is None else f"{fixed(mean, places)} ± {fixed(error, places)}"
        cells.append("diverged" if entry is not None and mean is None else text)
    plain = [fixed(mean, places) for mean in means]
    return Column(
        f"sharpness_{radius:g}",
        f"sharpness σ={radius:g}",
        f"mean rise of the loss under Gaussian noise of {radius:g} times the RMS of the base's tensor, ± standard error",
        tuple(values),
        tuple(cells),
        _best(rows, means, plain, min),
    )


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
