"""How the built-in metrics are reported: (summary, name of the model) → columns, estimates and payloads of results.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from emomerge.probing.registry import Report, middle_of
from emomerge.results import Column, Estimate, View

Summary: TypeAlias = Mapping[str, Any]
BALLS = {"l2": "ℓ2", "adaptive l2": "ℓ2 adaptive", "linf": "ℓ∞", "adaptive linf": "ℓ∞ adaptive"}
"""Ball in the summary of `worst-case` → its printed name."""
MODEL = "model"
"""Label of the probed model in summaries over several models."""


def gaussian(summary: Mapping[str, Summary], model: str) -> Report:
    """Report the average-case sharpness at every radius."""
    figures = [
        (
            Column(
                key=f"sharpness_{radius:g}",
                title=f"sharpness σ={radius:g}",
                meaning=f"mean rise of the loss under Gaussian noise of {radius:g} times the RMS of the base's tensor, "
                "± standard error",
                better="lower", family="sharpness", radius=radius,
            ),
            _average(entry),
        )
        for radius, entry in _by_radius(summary)
    ]  # fmt: skip
    return Report(figures)


def adaptive(summary: Mapping[str, Summary], model: str) -> Report:
    """Report the adaptive average-case sharpness at every radius; it is secondary: the main table shows the middle radius."""
    middle = _middle(summary)
    figures = [
        (
            Column(
                key=f"adaptive_{radius:g}",
                title=f"adaptive σ={radius:g}",
                meaning=f"mean rise of the loss under Gaussian noise of {radius:g} times each weight's own size, ± standard "
                "error; small weights look flat by it, so it is secondary",
                better="lower", family="adaptive", radius=radius, views=_secondary(radius, middle),
            ),
            _average(entry),
        )
        for radius, entry in _by_radius(summary)
    ]  # fmt: skip
    return Report(figures)


def worst_case(summary: Mapping[str, Mapping[str, Summary]], model: str) -> Report:
    """Report, in every ball at every radius, the worst case beyond the slope's part, and the slope's part."""
    figures: list[tuple[Column, Estimate]] = []
    for name, of_radius in summary.items():
        ball, middle = BALLS[name], _middle(of_radius)
        for radius, entry in _by_radius(of_radius):
            rise = Column(
                key=f"worst_{ball}_{radius:g}",
                title=f"worst case {ball} ρ={radius:g}",
                meaning=f"highest rise of the loss found within ρ = {radius:g} of the weights ({ball} ball) beyond the slope's "
                "part ρ‖g‖, ± standard error",
                better="lower", family=f"worst case {ball}", radius=radius, views=_secondary(radius, middle),
            )  # fmt: skip
            slope = Column(
                key=f"slope_{ball}_{radius:g}",
                title=f"slope {ball} ρ={radius:g}",
                meaning=f"ρ‖g‖, the slope's part of the rise within the {ball} ball of ρ = {radius:g}",
                family=f"slope {ball}", radius=radius, views=("details",),
            )  # fmt: skip
            figures += [
                (rise, Estimate(mean=entry["excess"], finding=entry.get("finding"), facts={"rise": entry["rise"]})),
                (slope, Estimate(mean=entry["gradient"])),
            ]
    return Report(figures)


def hessian(summary: Summary, model: str) -> Report:
    """Report λmax, the trace and λmin; the density and the trace's parts by module."""
    columns = (
        Column(
            key="lambda_max", title="λmax", better="lower", views=("table", "terminal"),
            meaning="largest eigenvalue of the Hessian: the curvature of the steepest direction",
        ),
        Column(
            key="trace", title="trace", better="lower", views=("table", "terminal"),
            meaning="sum of the Hessian's eigenvalues: the curvature of all directions together, ± standard error",
        ),
        Column(
            key="lambda_min", title="λmin", views=("details",),
            meaning="smallest eigenvalue of the Hessian; clearly below 0 the point is no minimum",
        ),
    )  # fmt: skip
    trace, density = summary["trace"], summary["density"]
    estimates = (Estimate(mean=summary["largest"]), _average(trace), Estimate(mean=summary["smallest"]))
    payload = {
        "density": density and {"at": density["eigenvalue"], "density": density["density"]},
        "layers": {module: part["mean"] for module, part in trace["modules"].items()},
        "step": summary["step"], "disagreement": summary["disagreement"],
    }  # fmt: skip
    return Report(list(zip(columns, estimates, strict=True)), row={"hessian": payload})


def span(summary: Summary, model: str) -> Report:
    """Report λmax in the span of the runs' task vectors, and the Hessian there."""
    column = Column(
        key="lambda_span", title="λmax in span τ", views=("details",),
        meaning="largest eigenvalue of the Hessian within the span of the runs' task vectors, computed without sampling",
    )  # fmt: skip
    known = [value for value in summary["eigenvalues"] or () if value is not None]
    return Report([(column, Estimate(mean=max(known, default=None)))], row={"hessian": {"subspace": summary}})


def basin(summary: Summary, model: str) -> Report:
    """Report the basin's width and its standard error, to first order from that of its logarithm."""
    column = Column(
        key="basin", title="basin width", better="higher", views=("table", "terminal"),
        meaning="largest σ of Gaussian noise, in RMS of the base's tensor, that raises the loss by at most 0.1; "
        "larger is flatter",
    )  # fmt: skip
    width, error = summary["width"], summary["log_stderr"]
    stderr = None if error is None else width * error
    return Report([(column, Estimate(mean=width, stderr=stderr, n=summary["n"], finding=summary.get("finding")))])


def curve(summary: Summary, model: str) -> Report:
    """Report a curve."""
    return Report(results={"curves": {model: summary}})


def surface(summary: Summary, model: str) -> Report:
    """Report a surface."""
    return Report(results={"surfaces": {model: summary}})


def plane(summary: Summary, model: str) -> Report:
    """Report a plane, its corners under the models' own names."""
    points = [{"name": model if name == MODEL else name, "x": x, "y": y} for name, (x, y) in summary["corners"].items()]
    return Report(results={"plane": {**{axis: summary[axis] for axis in ("x", "y", "loss")}, "points": points}})


def barriers(summary: Sequence[Summary], model: str) -> Report:
    """Report barriers as a symmetric matrix under the models' own names, the probed model first."""
    names = list(dict.fromkeys(name for entry in summary for name in entry["between"]))
    matrix: list[list[float | None]] = [[0.0] * len(names) for _ in names]
    for entry in summary:
        i, j = (names.index(name) for name in entry["between"])
        matrix[i][j] = matrix[j][i] = entry["barrier"]
    return Report(results={"barriers": {"names": [model if n == MODEL else n for n in names], "matrix": matrix}})


def _average(entry: Summary) -> Estimate:
    facts = {f"realised_{name}": value for name, value in entry.get("realised", {}).items()}
    return Estimate(mean=entry["mean"], stderr=entry["stderr"], n=entry["n"], finding=entry.get("finding"), facts=facts)


def _by_radius(summary: Mapping[str, Summary]) -> Iterable[tuple[float, Summary]]:
    return sorted(((float(radius), entry) for radius, entry in summary.items()), key=lambda pair: pair[0])


def _middle(summary: Mapping[str, Summary]) -> float:
    return middle_of([*map(float, summary)])


def _secondary(radius: float, middle: float) -> tuple[View, ...]:
    return ("table", "details") if radius == middle else ("details",)
