"""The verdict: does the merge lie in a better and flatter minimum than its parts? Proven, refuted, or not shown.

Differences are paired over what the models share (directions and groups of rows) and resampled by a hierarchical bootstrap:
training seed, then direction, then rows (specification of the probe, "Verdict"). An interval that holds 0 decides nothing.
A bootstrap of a few seeds is too sure of itself, so that its intervals are widened as Student's are (Hesterberg 2015).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from emomerge.results import Claim, Evidence, Verdict

Array = NDArray[np.float64]
ClaimName: TypeAlias = Literal["better", "flatter"]
DRAWS = 2000
HESSIAN = ("λmax", "trace")
"""Figures of the Hessian that are evidence, by the names of their series."""
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""97.5 % quantiles of Student's t for 1 … 10 degrees of freedom."""
NORMAL = 1.960


def sharpness_ratio(merge: Sequence[Array], rival: Sequence[Array], weight: Array, *, against: str, what: str) -> Evidence:
    """Return log(mean sharpness of the merge / of the rival) as evidence.

    Args:
        merge, rival: one (directions, units) array for each training seed, over the same directions and units (groups of rows).
        weight: (units,).
        against: the rival's name.
        what: the figure's name.
    """

    def log_ratio(ours: Array, theirs: Array) -> Array:
        # A mean that is not positive has no logarithm, but it has its place: below or above every ratio.
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.log(np.maximum(ours, 0) / np.maximum(theirs, 0))
        return np.where((ours > 0) | (theirs > 0), ratio, np.nan)

    estimate, low, high = _interval(log_ratio, merge, rival, weight)
    return Evidence(against=against, what=what, scale="log-ratio", estimate=estimate, low=low, high=high)


def loss_difference(merge: Sequence[Array], rival: Sequence[Array], weight: Array, *, against: str, what: str) -> Evidence:
    """Return the difference in mean loss, merge minus rival, as evidence; one (batches,) array for each training seed."""
    ours, theirs = ([loss[None] for loss in losses] for losses in (merge, rival))
    estimate, low, high = _interval(np.subtract, ours, theirs, weight)
    return Evidence(against=against, what=what, scale="difference", estimate=estimate, low=low, high=high)


def _interval(
    statistic: Callable[[Array, Array], Array], merge: Sequence[Array], rival: Sequence[Array], weight: Array
) -> tuple[float | None, float | None, float | None]:
    """Return estimate and 95 % interval of a statistic of two means; a draw without a value (NaN) counts against both ends.

    Args:
        statistic: (means of the merge, means of the rival), elementwise.
        merge, rival: one (directions, units) array for each training seed.
        weight: (units,).
    """
    whole = [np.array([np.average(a.mean(0), weights=weight) for a in model]).mean() for model in (merge, rival)]
    estimate = float(statistic(*np.array(whole)[:, None])[0])
    draws = statistic(*_resampled(list(zip(merge, rival, strict=True)), weight))
    low = np.quantile(np.where(np.isnan(draws), -np.inf, draws), 0.025, method="inverted_cdf")
    high = np.quantile(np.where(np.isnan(draws), np.inf, draws), 0.975, method="inverted_cdf")
    if np.isfinite(estimate):
        wide = _widening([len(merge), *merge[0].shape])
        low, high = estimate + wide * (low - estimate), estimate + wide * (high - estimate)
    found = [float(value) if np.isfinite(value) else None for value in (estimate, low, high)]
    return found[0], found[1], found[2]


def _resampled(pairs: Sequence[tuple[Array, Array]], weight: Array) -> Array:
    """Return weighted means of both models over DRAWS hierarchical resamples (seeds, directions, units), (2, draws)."""
    rng = np.random.default_rng(20240229)
    seeds, means = rng.integers(0, len(pairs), (DRAWS, len(pairs))), np.zeros((2, DRAWS))
    for slot in seeds.T:
        for seed, pair in enumerate(pairs):
            drawn = slot == seed
            directions, units = pair[0].shape
            times = rng.multinomial(directions, np.full(directions, 1 / directions), drawn.sum()) / directions
            weights = rng.multinomial(units, np.full(units, 1 / units), drawn.sum()) * weight
            weights /= weights.sum(axis=1, keepdims=True)
            for model, values in enumerate(pair):
                means[model, drawn] += (times @ values * weights).sum(axis=1) / len(pairs)
    return means


def _widening(counts: Sequence[int]) -> float:
    """Return the factor by which the percentile interval of a mean of n is too narrow: √(n/(n−1)) · t/z.

    n is the number of seeds, the level that varies most, or with one seed that of directions or units, whichever is less.
    """
    n = min([count for count in counts[:1] if count > 1] or [count for count in counts if count > 1], default=1)
    if n == 1:
        return 1.0
    z, v = NORMAL, n - 1
    t = STUDENT[v - 1] if v <= len(STUDENT) else z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    return math.sqrt(n / v) * t / z


def judge_better(evidence: Sequence[Evidence], missing: Sequence[str]) -> Claim:
    """Judge `better`: a lower held-out loss than every rival; refuted if some rival's is lower beyond doubt.

    Args:
        evidence: one comparison for each rival that was measured.
        missing: rivals that the claim needs and that were not measured.
    """
    status = _status([e.sign for e in evidence], missing, "better")
    return Claim(status=status, evidence=tuple(evidence), note=_note(missing, "compared with"))


def judge_flatter(evidence: Sequence[Evidence], radii: int, missing: Sequence[str]) -> Claim:
    """Judge `flatter`: against every rival a lower sharpness at a majority of radii *and* a lower λmax or trace.

    Refuted where against some rival sharpness is higher beyond doubt at a majority of radii, or both λmax and trace are.

    Args:
        evidence: one comparison for each rival and radius, and those of HESSIAN.
        radii: number of radii that were probed; 2 of 3 (in general a majority) decide.
        missing: what the claim needs and this probe does not measure, such as rivals.
    """
    signs = []
    for rival in dict.fromkeys(e.against for e in evidence):
        of_rival = [e for e in evidence if e.against == rival]
        gaussian = [e.sign for e in of_rival if e.what not in HESSIAN]
        hessian = [e.sign for e in of_rival if e.what in HESSIAN]
        if not hessian:
            missing = list(dict.fromkeys([*missing, "λmax and trace of the Hessian"]))
        lower = gaussian.count(-1) > radii // 2 and (not hessian or -1 in hessian)
        higher = gaussian.count(1) > radii // 2 or hessian.count(1) == len(HESSIAN)
        signs.append(1 if higher else -1 if lower else 0)
    return Claim(status=_status(signs, missing, "flatter"), evidence=tuple(evidence), note=_note(missing, "measured:"))


def _status(
    signs: Sequence[int], missing: Sequence[str], claim: ClaimName
) -> Literal["better", "flatter", "refuted", "not shown"]:
    if any(sign > 0 for sign in signs):
        return "refuted"
    if signs and all(sign < 0 for sign in signs) and not missing:
        return claim
    return "not shown"


def _note(missing: Sequence[str], verb: str) -> str:
    return f"not {verb} {', '.join(missing)}" if missing else ""


def overall(label: str, better: Claim, flatter: Claim, *, merge: str, best_single: Sequence[str]) -> Verdict:
    """Return the verdict on one merge method: a status, one sentence for the top of the report, and its caveats.

    Args:
        label: what the sentence calls the merge.
        better, flatter: the two claims.
        merge: name of the merge's artefact of the first training seed.
        best_single: names of the best single runs, one for each training seed.
    """
    claims: dict[ClaimName, Claim] = {"better": better, "flatter": flatter}
    shown = [name for name, claim in claims.items() if claim.status == name]
    clauses = [SHOWN[name] for name in shown]
    clauses += [_not_shown(name, claim) for name, claim in claims.items() if claim.status != name]
    caveats = [f"“{name}”: {claim.note}" for name, claim in claims.items() if claim.note]
    if (seeds := len(best_single)) < 3:
        caveats.append(
            f"{seeds} training seed{'s' if seeds > 1 else ''}: the intervals hold measurement error only, "
            "not the spread between trainings"
        )
    return Verdict(
        status=_overall_status(better, flatter),
        sentence=f"The merge {label} " + " and ".join(clauses) + ".",
        merge=merge, best_single=tuple(best_single), better=better, flatter=flatter, caveats=tuple(caveats),
    )  # fmt: skip


SHOWN: dict[ClaimName, str] = {
    "better": "has a lower held-out loss than every rival",
    "flatter": "lies in a flatter place than every rival",
}


def _overall_status(
    better: Claim, flatter: Claim
) -> Literal["better and flatter", "better", "flatter", "refuted", "not shown"]:
    if better.status == "better" and flatter.status == "flatter":
        return "better and flatter"
    if "refuted" in (better.status, flatter.status):
        return "refuted"
    return better.status if better.status == "better" else flatter.status


def _not_shown(name: ClaimName, claim: Claim) -> str:
    signs = [e.sign for e in claim.evidence]
    if claim.status == "refuted":
        rivals = dict.fromkeys(e.against for e in claim.evidence if e.sign > 0)
        return f"is not {name} (it loses to {', '.join(rivals)})"
    if signs and all(sign < 0 for sign in signs):
        return f"is {name} in everything measured, which is not yet all that the claim needs"
    return f"was not shown to be {name}"
