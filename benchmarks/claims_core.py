"""What a claim of the paper is for `claims.py`: a function that measures it, its control, and a rule that reads the verdict.

A claim is one function in a module `claims_*.py`, decorated with `claim(…)`. The function measures one unit, that is one *arm*
(a setting such as an optimizer and its preset, or the control's) with one seed, and returns figures that JSON can hold. `judge`
turns the units of a claim into a verdict, its table and the sentences that the documentation shows; nothing else writes these.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from evidence_tables import Cells, Estimate, number

Word = Literal["holds", "holds in part", "fails", "cannot be told here"]
Arm = Mapping[str, Any]
Figures = dict[str, Any]
FASHION = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Effort:
    """How much is done, and where the data are.

    Attributes:
        quick: a short form, whose figures decide nothing.
        fashion: folder with the four IDX files of FashionMNIST.
        cache: folder for what units of a claim share, such as a base.
    """

    quick: bool = False
    fashion: Path = FASHION
    cache: Path = Path("out/claims")

    def steps(self, full: int) -> int:
        """Return a number of steps: a tenth of the full one, but at least 20, for `--quick`."""
        return max(20, full // 10) if self.quick else full


@dataclass(frozen=True)
class Verdict:
    """What the units of a claim show.

    Attributes:
        word: the verdict in a word.
        text: what was found, with its figures, in full sentences.
        table: the figures; the first row is the head.
        notes: what the table's figures are, and the conditions.
    """

    word: Word
    text: str
    table: Cells
    notes: str = ""


@dataclass(frozen=True)
class Unit:
    """One arm with one seed, and its figures."""

    arm: Arm
    seed: int
    figures: Figures


class Units:
    """The measured units of a claim."""

    def __init__(self, units: Iterable[Unit]) -> None:
        self.all = list(units)

    def arms(self) -> list[Arm]:
        """Return the arms that have units, in order."""
        return [json.loads(text) for text in dict.fromkeys(arm_key(unit.arm) for unit in self.all)]

    def of(self, **parts: Any) -> list[Unit]:
        """Return the units whose arms have these parts."""
        return [unit for unit in self.all if all(unit.arm.get(name) == value for name, value in parts.items())]

    def estimate(self, figure: str, **parts: Any) -> Estimate:
        """Return the mean of a figure over the units of an arm; a figure that is None (diverged) counts as infinite."""
        found = [unit.figures[figure] for unit in self.of(**parts)]
        if not found:
            raise ValueError(f"no unit of {parts}")
        return Estimate(tuple(float("inf") if value is None else float(value) for value in found))

    def paired(self, figure: str, first: Arm, second: Arm) -> Estimate:
        """Return first − second, paired by seed."""
        a, b = ({unit.seed: unit.figures[figure] for unit in self.of(**arm)} for arm in (first, second))
        return Estimate(tuple(_number(a[seed]) - _number(b[seed]) for seed in sorted(a.keys() & b.keys())))

    def best(self, figure: str, arms: Sequence[Arm]) -> Arm:
        """Return the arm with the lowest mean of a figure, which should be one of the validation split."""
        return min(arms, key=lambda arm: self.estimate(figure, **arm).mean)

    @property
    def seeds(self) -> int:
        """The number of seeds."""
        return len({unit.seed for unit in self.all})


@dataclass(frozen=True)
class Claim:
    """A claim and what settles it.

    Attributes:
        name: its name on the command line.
        says: the claim, as near to the source's words as a sentence allows.
        source: where it is made.
        control: what it is compared with, and what would have changed the verdict.
        taught: what follows for the defaults, or why nothing does.
        arms: the settings to measure.
        measure: measures an arm with a seed.
        judge: reads the verdict from the units.
        figure: draws the units as an altair chart; None for claims that a table settles.
        seeds: number of seeds; 1 for what involves no chance.
        quick_arms: the arms of `--quick`; by default the first three.
        version: raised when a change of the code makes earlier units invalid.
    """

    name: str
    says: str
    source: str
    control: str
    taught: str
    arms: Sequence[Arm]
    measure: Callable[[Arm, int, Effort], Figures]
    judge: Callable[[Units], Verdict]
    figure: Callable[[Units], Any] | None = None
    seeds: int = 3
    quick_arms: Sequence[Arm] = ()
    version: int = 1

    def planned(self, effort: Effort) -> list[tuple[Arm, int]]:
        """Return the units to measure."""
        if effort.quick:
            return [(arm, 0) for arm in self.quick_arms or self.arms[:3]]
        return [(arm, seed) for arm in self.arms for seed in range(self.seeds)]

    def key(self, arm: Arm, seed: int) -> str:
        """Return what identifies a unit in the file of results."""
        return f"{self.version}|{seed}|{arm_key(arm)}"


CLAIMS: dict[str, Claim] = {}
"""Every claim by name, in the order of the documentation; filled by `claim` on import of the modules."""


def claim(**about: Any) -> Callable[[Callable[[Arm, int, Effort], Figures]], Callable[[Arm, int, Effort], Figures]]:
    """Register the decorated function as the measurement of a claim. Takes the other fields of `Claim`."""

    def register(measure: Callable[[Arm, int, Effort], Figures]) -> Callable[[Arm, int, Effort], Figures]:
        made = Claim(measure=measure, **about)
        if made.name in CLAIMS:
            raise ValueError(f"two claims have the name {made.name}")
        CLAIMS[made.name] = made
        return measure

    return register


def arm_key(arm: Arm) -> str:
    """Return an arm as text; equal arms have equal texts."""
    return json.dumps(arm, sort_keys=True)


def title(arm: Arm) -> str:
    """Return an arm's name in tables."""
    return ", ".join(str(value) if isinstance(value, str) else f"{name} {value}" for name, value in arm.items())


def _number(value: float | None) -> float:
    return float("inf") if value is None else float(value)


def interval_text(estimate: Estimate, form: str = "+.3f") -> str:
    """Return mean and 95 % interval, such as `+0.021 (+0.013 … +0.029)`."""
    mean, interval = number(estimate.mean, form), estimate.interval
    return mean if interval is None else f"{mean} ({number(interval[0], form)} … {number(interval[1], form)})"


def counted(flags: Iterable[bool]) -> str:
    """Return how many are true, such as `4 of 5`."""
    flags = list(flags)
    return f"{sum(flags)} of {len(flags)}"


def worded(flags: Sequence[bool]) -> Word:
    """Return the verdict on a claim that consists of parts."""
    return "holds" if all(flags) else "holds in part" if any(flags) else "fails"


@dataclass
class Store:
    """The lines of a claim's results: one JSON object for each unit, appended as units finish.

    Args:
        file: the file.
    """

    file: Path
    lines: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        text = self.file.read_text(encoding="utf-8") if self.file.exists() else ""
        self.lines = {line["key"]: line for line in map(json.loads, text.splitlines())}

    def units(self, claim: Claim) -> Units:
        """Return the units of the claim as it is now; those of earlier versions or arms are left out."""
        planned = [(arm, seed, claim.key(arm, seed)) for arm in claim.arms for seed in range(claim.seeds)]
        return Units(Unit(arm, seed, self.lines[key]["figures"]) for arm, seed, key in planned if key in self.lines)

    def missing(self, claim: Claim) -> int:
        """Return how many units have not been measured."""
        return len(claim.arms) * claim.seeds - len(self.units(claim).all)

    def seconds(self, claim: Claim) -> float:
        """Return the CPU seconds that the claim's units took."""
        keys = {claim.key(arm, seed) for arm in claim.arms for seed in range(claim.seeds)}
        return sum(line["cpu"] for key, line in self.lines.items() if key in keys)

    def conditions(self, claim: Claim) -> str:
        """Return seeds, versions and machines of the claim's units in one sentence."""
        keys = {claim.key(arm, seed) for arm in claim.arms for seed in range(claim.seeds)}
        lines = [line for key, line in self.lines.items() if key in keys]
        versions = " and ".join(sorted({f"emomerge {line['emomerge']} on torch {line['torch']}" for line in lines}))
        machines = " and ".join(sorted({line["machine"]["cpu"] for line in lines}))
        seeds = f"{claim.seeds} seeds; " if claim.seeds > 1 else ""
        return f"{seeds}{versions}; {machines}, one thread"


def median(values: Iterable[float]) -> float:
    """Return the median."""
    return statistics.median(values)
