"""The results of an experiment: the content of results.json as frozen types, written by `experiment` and read by `reporting`.

A number that is not finite is None: JSON has no other way to say it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError

from emomerge.errors import BadInput

SCHEMA_VERSION = 2
"""Raised whenever a field changes its name, type or meaning. Results of another version are refused, never guessed at."""

Split: TypeAlias = Literal["train", "validation", "test"]
Role: TypeAlias = Literal["base", "run", "merge", "control"]
View: TypeAlias = Literal["table", "details", "card", "terminal"]


def _finite_or_none(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number: TypeAlias = Annotated[float | None, BeforeValidator(_finite_or_none)]
"""A float; None where it is not finite."""


class Part(BaseModel):
    """Base class of everything in results.json: immutable, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Estimate(Part):
    """A figure of one artefact, as a rule a mean over random directions or rows."""

    mean: Number
    """None: the measurement diverged."""
    stderr: Number = None
    """Standard error of the mean; None: unknown, or the figure is exact."""
    n: int | None = None
    """Number of samples, as a rule directions."""
    finding: str | None = None
    """A remark on this measurement, such as where it diverged."""
    facts: dict[str, Number] = {}
    """Further numbers, such as the norm of the perturbation after rounding."""


class Column(Part):
    """How a figure is reported: one column of the tables, filled from `ArtefactRow.estimates`."""

    key: str
    """Of `ArtefactRow.estimates`; unique."""
    title: str
    meaning: str
    """One sentence, without a full stop."""
    better: Literal["lower", "higher"] | None = None
    """Which runs and merges compete for the best value; None: nobody does."""
    views: tuple[View, ...] = ("table", "card", "terminal")
    """Where it is shown: the page's table of figures or that of secondary measures, model cards, the terminal."""
    family: str = ""
    """Shared by the columns of one measure at several radii; the terminal shows the middle radius."""
    radius: float | None = None
    percent: bool = False
    """Print a share as a percentage."""
    digits: int = 3
    """Significant digits of the column's median; all cells share its decimal places."""
    decimals: int | None = None
    """Decimal places, if they are fixed."""


class Density(Part):
    """The spectral density of a Hessian as a curve."""

    at: tuple[Number, ...]
    """Eigenvalues, ascending."""
    density: tuple[Number, ...]


class Subspace(Part):
    """The Hessian within the span of the runs' task vectors, computed without sampling. None where it diverged."""

    rank: int
    eigenvalues: tuple[Number, ...] | None
    """Descending."""
    trace: Number
    along: dict[str, Number]
    """Run → curvature along its task vector."""
    asymmetry: Number = None
    """‖H − Hᵀ‖/‖H‖ before symmetrisation."""
    disagreement: Number = None
    """Of finite differences at two step sizes, relative."""


class Hessian(Part):
    """What is known of an artefact's Hessian beside the figures λmax, λmin and trace."""

    density: Density | None = None
    layers: dict[str, Number] = {}
    """Module → its part of the trace, in the model's order."""
    step: Number = None
    """Step size of the finite differences."""
    disagreement: Number = None
    """Of finite differences at two step sizes, relative."""
    subspace: Subspace | None = None


class ArtefactRow(Part):
    """An artefact (base, run, merge or control) and all its figures."""

    name: str
    role: Role
    path: str | None = None
    optimizer: str | None = None
    seed: int | None = None
    control: str | None = None
    """Kind of a control, a key of `emomerge.controls.CONTROLS`."""
    of: str | None = None
    """Name of the artefact that a control is matched to."""
    sha256: str | dict[str, str] | None = None
    """Of the weights, or of each file of weights."""
    seconds: float | None = None
    """Wall time it took to make."""
    method: str | None = None
    """Merge method."""
    estimates: dict[str, Estimate] = {}
    """`Column.key` → figure; a figure that was not measured has no entry."""
    hessian: Hessian | None = None
    details: dict[str, JsonValue] = {}
    """Metric → summary, for metrics that have no figure of their own in the report."""

    def mean(self, key: str) -> float | None:
        """Return the mean of a figure; None if it was not measured or diverged."""
        found = self.estimates.get(key)
        return None if found is None else found.mean

    def loss(self, split: Split) -> float | None:
        """Return the mean loss on a split."""
        return self.mean(f"{split}_loss")

    def accuracy(self, split: Split) -> float | None:
        """Return the accuracy on a split, between 0 and 1."""
        return self.mean(f"{split}_accuracy")


class Curve(Part):
    """The loss along θ₀ + α·τ."""

    alpha: tuple[float, ...]
    loss: tuple[Number, ...]


class Surface(Part):
    """The loss over a rectangle of weights: x (columns,), y (rows,), loss (rows, columns)."""

    x: tuple[float, ...]
    y: tuple[float, ...]
    loss: tuple[tuple[Number, ...], ...]


class Point(Part):
    """A named model on a plane."""

    name: str
    x: float
    y: float


class Plane(Surface):
    """The loss over the plane through three models; the axes are distances between weights."""

    points: tuple[Point, ...]


class Matrix(Part):
    """A figure of every pair of models, symmetric."""

    names: tuple[str, ...]
    matrix: tuple[tuple[Number, ...], ...]


class Cosines(Matrix):
    """Cosines between task vectors, and the share of coordinates that both move and move alike."""

    sign_agreement: tuple[tuple[Number, ...], ...] = ()


class Trace(Part):
    """The steps of a training run, one entry each."""

    optimizer: str
    seed: int
    step: tuple[int, ...]
    loss: tuple[Number, ...]
    rate: tuple[Number, ...]
    """Learning rate."""
    sigma: tuple[Number, ...] = ()
    trust: tuple[Number, ...] = ()


class Samples(Part):
    """What models generate: texts after prompts, or pictures."""

    about: str
    prompts: tuple[str, ...] = ()
    texts: dict[str, tuple[str, ...]] = {}
    """Artefact → one text for each prompt."""
    images: dict[str, str] = {}
    """Artefact → PNG, base64."""


class Evidence(Part):
    """One comparison of the merge with one rival; negative estimates favour the merge."""

    against: str
    what: str
    scale: Literal["difference", "log-ratio"]
    """`difference`: of losses, in the task's unit; `log-ratio`: of sharpness or curvature."""
    estimate: Number
    """None: it does not exist, because of a divergence or a mean sharpness that is not positive."""
    low: Number
    """Of the 95 % interval; None: open to this side."""
    high: Number

    @property
    def sign(self) -> int:
        """−1: the whole interval favours the merge; +1: it favours the rival; 0: undecided."""
        if self.high is not None and self.high < 0:
            return -1
        return 1 if self.low is not None and self.low > 0 else 0


class Claim(Part):
    """`better` or `flatter`, over all rivals."""

    status: Literal["better", "flatter", "refuted", "not shown"]
    evidence: tuple[Evidence, ...] = ()
    note: str = ""
    """What the claim needs and nobody measured."""


class Verdict(Part):
    """Whether the merge lies in a better and flatter minimum than its rivals."""

    status: Literal["better and flatter", "better", "flatter", "refuted", "not shown"]
    sentence: str
    merge: str
    """Name of the artefact, of the first training seed."""
    best_single: tuple[str, ...]
    """The best run of each training seed."""
    better: Claim
    flatter: Claim
    caveats: tuple[str, ...] = ()


class Selected(Part):
    """The run or merge to use."""

    name: str
    path: str | None
    validation_loss: float
    sentence: str


class MergeFacts(Part):
    """Diagnostics of a merge; see `emomerge.merging.Merge.diagnostics`."""

    method: str
    runs: tuple[str, ...]
    params: dict[str, JsonValue] = {}
    elements: int | None = None
    lambda_crit: Number = None
    moved_density: Number = None
    kept_density: Number = None
    kept_energy: Number = None
    cosine_to_mean: Number = None
    merged_norm: Number = None
    mean_norm: Number = None
    run_norms: dict[str, Number] = {}
    cosines: tuple[tuple[Number, ...], ...] = ()
    sign_agreement: tuple[tuple[Number, ...], ...] = ()
    mask_density: dict[str, Number] = {}
    run_losses: dict[str, Number] = {}
    scale_losses: dict[str, Number] = {}
    warnings: tuple[str, ...] = ()


class Rows(Part):
    """Rows of each split."""

    train: int
    validation: int
    test: int


class Data(Part):
    """The data of the task."""

    summary: str
    rows: Rows
    classes: tuple[str, ...] = ()
    unit: str = "nats"
    """Of losses."""


class ProbeFacts(Part):
    """How flatness was measured: the recipe's `probe` section and what came of it."""

    preset: str
    data: Literal["train", "test"]
    batches: int
    batch_size: int
    directions: int
    radii: tuple[float, ...]
    adaptive_radii: tuple[float, ...] = ()
    lanczos_steps: int | None = None
    trace_probes: int | None = None
    seed: int = 0
    metrics: tuple[str, ...] = ()
    """Metrics beyond those of the preset."""
    options: dict[str, JsonValue] = {}
    """Metric → options that the recipe gives it."""
    rows: int | None = None
    """Rows that the probe saw."""
    noise_floor: Number = None
    """The largest difference between repeated evaluations."""


class Results(Part):
    """Everything that one experiment found. What was not measured is None or empty."""

    schema_version: int = Field(SCHEMA_VERSION, ge=SCHEMA_VERSION, le=SCHEMA_VERSION)
    name: str
    created: str | None = None
    """ISO 8601."""
    command: str = ""
    recipe: dict[str, JsonValue] = {}
    recipe_yaml: str = ""
    versions: dict[str, str] = {}
    device: str | None = None
    data: Data | None = None
    columns: tuple[Column, ...] = ()
    """In the order of the tables."""
    artefacts: tuple[ArtefactRow, ...] = ()
    probe: ProbeFacts | None = None
    curves: dict[str, Curve] = {}
    barriers: Matrix | None = None
    plane: Plane | None = None
    surfaces: dict[str, Surface] = {}
    verdict: Verdict | None = None
    selected: Selected | None = None
    samples: Samples | None = None
    traces: dict[str, Trace] = {}
    cosines: Cosines | None = None
    merges: dict[str, MergeFacts] = {}
    seconds: dict[str, float] = {}
    """Stage → wall time."""

    def to_json(self) -> str:
        """Return results.json; what is absent is left out."""
        plain = {"schema_version": self.schema_version, **self.model_dump(mode="json", exclude_defaults=True)}
        return json.dumps(plain, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: object) -> Self:
        """Parse results.json.

        Args:
            text: its content.
            where: named in errors, as a rule the file.

        Raises:
            BadInput: it is damaged, or of another schema version.
        """
        again = "run the recipe again; its evaluations are remembered"
        try:
            plain = json.loads(text)
            if not isinstance(plain, dict):
                raise BadInput("the results cannot be read", where=where, expected="a mapping", fix=again)
            if (version := plain.get("schema_version")) != SCHEMA_VERSION:
                raise BadInput(
                    "the results have the schema of another version of emomerge", where=where,
                    expected=f"schema_version {SCHEMA_VERSION}", found=version or "none", fix=again,
                )  # fmt: skip
            return cls.model_validate(plain)
        except json.JSONDecodeError as error:
            raise BadInput("the results cannot be read", where=where, found=error, fix=again) from None
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise BadInput("the results cannot be read", where=f"{where}, {field}", found=first["msg"], fix=again) from None


def load_results(folder: Path) -> Results:
    """Return the results in an output folder.

    Raises:
        BadInput: there are none, they are damaged, or they are of another schema version.
    """
    file = folder / "results.json"
    try:
        text = file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput("no results here", where=file, fix="run the recipe to its end first") from None
    except UnicodeDecodeError as error:
        raise BadInput("the results cannot be read", where=file, found=error, fix="run the recipe again") from None
    return Results.from_json(text, file)


def sort_rows(rows: Sequence[ArtefactRow]) -> list[ArtefactRow]:
    """Return rows in the order of reports: base, runs, merges, controls."""
    rank: Mapping[Role, int] = {"base": 0, "run": 1, "merge": 2, "control": 3}
    return sorted(rows, key=lambda row: rank[row.role])
