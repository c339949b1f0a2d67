"""The verdict: does the merge lie in a better and flatter minimum than its parts? Proven, refuted, or not shown.

Differences are paired over what the models share (directions and groups of rows) and resampled by a hierarchical bootstrap:
training seed, then direction, then rows (specification of the probe, "Verdict"). An interval that holds 0 decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
DRAWS = 2000


@dataclass(frozen=True)
class Evidence:
    """One comparison of the merge with one rival; negative estimates favour the merge.

    `estimate` is None where it does not exist (a divergence, a mean sharpness that is not positive), `low` and `high` are None
    where the interval is open to that side.
    """

    against: str
    what: str
    scale: str
    """`difference` (nats) or `log-ratio`."""
    estimate: float | None
    low: float | None
    high: float | None

    @property
    def sign(self) -> int:
        """−1 where the whole 95 % interval favours the merge, +1 where it favours the rival, else 0."""
        if self.high is not None and self.high < 0:
            return -1
        return 1 if self.low is not None and self.low > 0 else 0


def sharpness_ratio(merge: Sequence[Array], rival: Sequence[Array], weight: Array, *, against: str, what: str) -> Evidence:
    """log(mean sharpness of the merge / of the rival).

    Args:
        merge, rival: one (directions, units) array for each training seed, over the same directions and units (groups of rows).
        weight: (units,).
        against: the rival's name.
        what: the figure's name.
    """
    pairs = list(zip(merge, rival, strict=True))

    def log_ratio(rng: np.random.Generator | None) -> float:
        ours, theirs = 0.0, 0.0
        for a, b in _resample(pairs, rng):
            d, k = _indices(a.shape[0], rng), _indices(a.shape[1], rng)
            ours += float(np.average(a[np.ix_(d, k)].mean(0), weights=weight[k]))
            theirs += float(np.average(b[np.ix_(d, k)].mean(0), weights=weight[k]))
        if ours > 0 and theirs > 0:
            return float(np.log(ours / theirs))
        # A mean that is not positive has no logarithm, but it has its place: below or above every ratio.
        return -np.inf if ours <= 0 < theirs else np.inf if theirs <= 0 < ours else np.nan

    return Evidence(against, what, "log-ratio", *_interval(log_ratio))


def loss_difference(merge: Sequence[Array], rival: Sequence[Array], weight: Array, *, against: str, what: str) -> Evidence:
    """Mean loss of the merge minus the rival's, in nats; one (batches,) array for each training seed."""
    pairs = list(zip(merge, rival, strict=True))

    def difference(rng: np.random.Generator | None) -> float:
        found = []
        for a, b in _resample(pairs, rng):
            k = _indices(len(a), rng)
            found.append(float(np.average(a[k] - b[k], weights=weight[k])))
        return float(np.mean(found))

    return Evidence(against, what, "difference", *_interval(difference))


def _resample(pairs: list[tuple[Array, Array]], rng: np.random.Generator | None) -> list[tuple[Array, Array]]:
    return [pairs[i] for i in _indices(len(pairs), rng)]


def _indices(count: int, rng: np.random.Generator | None) -> NDArray[np.int64]:
    return np.arange(count) if rng is None else rng.integers(0, count, count)


def _interval(
    statistic: Callable[[np.random.Generator | None], float],
) -> tuple[float | None, float | None, float | None]:
    """Estimate and 95 % percentile interval; a draw without a value (NaN) counts against both ends."""
    rng = np.random.default_rng(20240229)
    estimate = statistic(None)
    draws = np.array([statistic(rng) for _ in range(DRAWS)])
    low = np.quantile(np.where(np.isnan(draws), -np.inf, draws), 0.025, method="inverted_cdf")
    high = np.quantile(np.where(np.isnan(draws), np.inf, draws), 0.975, method="inverted_cdf")
    found = [float(value) if np.isfinite(value) else None for value in (estimate, low, high)]
    return found[0], found[1], found[2]


def judge_better(evidence: Sequence[Evidence], missing: Sequence[str]) -> dict[str, Any]:
    """`better` needs a lower held-out loss than every rival; `refuted` if one rival's is lower beyond doubt.

    Args:
        evidence: one comparison for each rival that was measured.
        missing: rivals that the verdict needs and nobody measured.
    """
    status = _status([e.sign for e in evidence], missing, "better")
    return {"status": status, "evidence": [_plain(e) for e in evidence], "note": _note(missing, "compared with")}


def judge_flatter(evidence: Sequence[Evidence], radii: int, missing: Sequence[str]) -> dict[str, Any]:
    """`flatter` needs, against every rival, a lower sharpness at a majority of radii, and nothing required left unmeasured.

    `refuted` where against some rival a majority of radii is higher beyond doubt.

    Args:
        evidence: comparisons, one for each rival and radius.
        radii: how many radii were probed; 2 of 3 (in general a majority) decide.
        missing: what the verdict needs and this probe does not measure.
    """
    needed = radii // 2 + 1
    signs = []
    for rival in dict.fromkeys(e.against for e in evidence):
        of_rival = [e.sign for e in evidence if e.against == rival]
        signs.append(-1 if of_rival.count(-1) >= needed else 1 if of_rival.count(1) >= needed else 0)
    status = _status(signs, missing, "flatter")
    return {"status": status, "evidence": [_plain(e) for e in evidence], "note": _note(missing, "measured:")}


def _status(signs: Sequence[int], missing: Sequence[str], claim: str) -> str:
    if any(sign > 0 for sign in signs):
        return "refuted"
    if signs and all(sign < 0 for sign in signs) and not missing:
        return claim
    return "not shown"


def _note(missing: Sequence[str], verb: str) -> str:
    return f"not {verb} {', '.join(missing)}" if missing else ""


def _plain(evidence: Evidence) -> dict[str, Any]:
    return {**asdict(evidence), "sign": evidence.sign}


def overall(merge: str, better: Mapping[str, Any], flatter: Mapping[str, Any], seeds: int) -> dict[str, Any]:
    """The verdict on one merge: a status, one sentence for the top of the report, and its caveats."""
    words = {
        "better": "has a lower held-out loss than every rival",
        "flatter": "lies in a flatter place than every rival",
    }
    shown = [claim for claim, found in (("better", better), ("flatter", flatter)) if found["status"] == claim]
    refuted = [claim for claim, found in (("better", better), ("flatter", flatter)) if found["status"] == "refuted"]
    clauses = [words[claim] for claim in shown]
    for claim, found in (("better", better), ("flatter", flatter)):
        if found["status"] == "refuted":
            rivals = dict.fromkeys(e["against"] for e in found["evidence"] if e["sign"] > 0)
            clauses.append(f"is not {claim} (it loses to {', '.join(rivals)})")
        elif found["status"] == "not shown":
            clauses.append(_undecided(claim, found))
    caveats = [f"“{c}”: {f['note']}" for c, f in (("better", better), ("flatter", flatter)) if f["note"]]
    if seeds < 3:
        caveats.append(
            f"{seeds} training seed{'s' if seeds > 1 else ''}: the intervals hold measurement error only, "
            "not the spread between trainings"
        )
    status = " and ".join(shown) if len(shown) == 2 or (shown and not refuted) else "refuted" if refuted else "not shown"
    return {
        "status": status,
        "sentence": f"The merge {merge} " + " and ".join(clauses) + ".",
        "merge": merge, "better": dict(better), "flatter": dict(flatter), "caveats": caveats,
    }  # fmt: skip


def _undecided(claim: str, found: Mapping[str, Any]) -> str:
    signs = [e["sign"] for e in found["evidence"]]
    if found["evidence"] and all(sign < 0 for sign in signs):
        return f"is {claim} in everything measured, which is not yet all that the claim needs"
    return f"was not shown to be {claim}"
