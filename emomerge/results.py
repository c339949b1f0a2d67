"""The results of an experiment: the content of results.json as frozen types, written by `experiment` and read by `reporting`.

Non-finite numbers are stored as None, because JSON cannot represent them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError, model_validator

from emomerge.errors import BadInput, shown_lines
from emomerge.files import JsonObject, explain, parse_json, read_text

SCHEMA_VERSION = 2
"""Incremented when a field changes its name, type or meaning. Results of other versions are rejected."""
TRUNK = "trunk"
"""Name of the trunk among the rounds that a merge is made of."""

Split: TypeAlias = Literal["train", "validation", "test"]
Role: TypeAlias = Literal["base", "run", "merge", "control"]
View: TypeAlias = Literal["table", "details", "card", "terminal"]


def _finite_or_none(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number: TypeAlias = Annotated[float | None, BeforeValidator(_finite_or_none)]
"""A float; None if it is not finite."""


Shown: TypeAlias = Annotated[str, AfterValidator(shown_lines)]
"""A text that is shown: without escape sequences, which would reach terminals, cards, pages and the library of the figures."""


def _require_shape(table: Sequence[Sequence[object]], rows: int, columns: int) -> None:
    if [len(row) for row in table] != [columns] * rows:
        raise ValueError(f"Rows and columns should be {rows} × {columns}")


class Part(BaseModel):
    """Base class of everything in results.json: immutable, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Estimate(Part):
    """A figure of one artefact, usually a mean over random directions or rows."""

    mean: Number
    """None if the measurement diverged."""
    stderr: Number = None
    """Standard error of the mean; None if it is unknown or the figure is exact."""
    n: int | None = None
    """Number of samples, usually directions."""
    finding: Shown | None = None
    """A remark on this measurement, such as where it diverged."""
    facts: dict[Shown, Number] = {}
    """Further numbers, such as the norm of the perturbation after rounding."""


class Column(Part):
    """A column of the tables, filled from `ArtefactRow.estimates`."""

    key: Shown
    """Key in `ArtefactRow.estimates`; unique."""
    title: Shown
    meaning: Shown
    """One sentence, without a full stop."""
    better: Literal["lower", "higher"] | None = None
    """Which values are better, for marking the best run or merge; None if no value is."""
    views: tuple[View, ...] = ("table", "card", "terminal")
    """Where it is shown: the page's main table or its table of secondary measures, model cards, the terminal."""
    family: Shown = ""
    """Name shared by the columns of a measure at several radii; the terminal shows the middle radius."""
    radius: float | None = None
    percent: bool = False
    """Whether to print the value as a percentage."""
    digits: int = 3
    """Significant digits of the column's median, which set the decimal places of all cells."""
    decimals: int | None = None
    """Fixed number of decimal places, if any."""


class Density(Part):
    """The spectral density of a Hessian as a curve."""

    at: tuple[Number, ...]
    """Eigenvalues, ascending."""
    density: tuple[Number, ...]


class Subspace(Part):
    """The Hessian restricted to the span of the runs' task vectors, computed without sampling. None if it diverged."""

    rank: int
    eigenvalues: tuple[Number, ...] | None
    """Descending."""
    trace: Number
    along: dict[Shown, Number]
    """Run → curvature along its task vector."""
    asymmetry: Number = None
    """‖H − Hᵀ‖/‖H‖ before symmetrisation."""
    disagreement: Number = None
    """Relative disagreement of finite differences at two step sizes."""


class Hessian(Part):
    """Facts about the Hessian of an artefact beyond the figures λmax, λmin and trace."""

    density: Density | None = None
    layers: dict[Shown, Number] = {}
    """Module → its part of the trace, in the model's order."""
    step: Number = None
    """Step size of the finite differences."""
    disagreement: Number = None
    """Relative disagreement of finite differences at two step sizes."""
    subspace: Subspace | None = None


class ArtefactRow(Part):
    """An artefact (base, run, merge or control) and all its figures."""

    name: Shown
    role: Role
    path: Shown | None = None
    optimizer: Shown | None = None
    seed: int | None = None
    control: Shown | None = None
    """Kind of control, a key of `emomerge.controls.CONTROLS`."""
    of: Shown | None = None
    """Name of the artefact that a control is matched to."""
    sha256: Shown | dict[Shown, Shown] | None = None
    """SHA-256 of the weights, or of each file of weights."""
    seconds: float | None = None
    """Wall time of training or merging."""
    method: Shown | None = None
    """Merge method."""
    estimates: dict[Shown, Estimate] = {}
    """`Column.key` → figure; figures that were not measured are absent."""
    hessian: Hessian | None = None
    details: dict[Shown, JsonValue] = {}
    """Metric → summary, for metrics without a figure in the report."""

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

    @model_validator(mode="after")
    def _rectangle(self) -> Self:
        _require_shape(self.loss, len(self.y), len(self.x))
        return self


class Point(Part):
    """The position of a named model on a plane."""

    name: Shown
    x: float
    y: float


class Plane(Surface):
    """The loss over the plane through three models; axes are in units of distance between weights."""

    points: tuple[Point, ...]


class Matrix(Part):
    """A symmetric matrix with a figure for every pair of models."""

    names: tuple[Shown, ...]
    matrix: tuple[tuple[Number, ...], ...]

    @model_validator(mode="after")
    def _square(self) -> Self:
        _require_shape(self.matrix, len(self.names), len(self.names))
        return self


class Cosines(Matrix):
    """Cosines between task vectors, and for the coordinates that both move the share with equal signs."""

    sign_agreement: tuple[tuple[Number, ...], ...] = ()

    @model_validator(mode="after")
    def _signs_square(self) -> Self:
        if self.sign_agreement:
            _require_shape(self.sign_agreement, len(self.names), len(self.names))
        return self


class Trace(Part):
    """The training trace of a run, one entry per step."""

    optimizer: Shown
    seed: int
    step: tuple[int, ...]
    loss: tuple[Number, ...]
    rate: tuple[Number, ...]
    """Learning rate."""
    sigma: tuple[Number, ...] = ()
    trust: tuple[Number, ...] = ()


class Samples(Part):
    """Samples generated by models: texts that continue prompts, or pictures."""

    about: Shown
    prompts: tuple[Shown, ...] = ()
    texts: dict[Shown, tuple[Shown, ...]] = {}
    """Artefact → one text per prompt."""
    images: dict[Shown, Shown] = {}
    """Artefact → PNG in base64."""


class Evidence(Part):
    """One comparison of the merge with one rival; negative estimates favour the merge."""

    against: Shown
    what: Shown
    scale: Literal["difference", "log-ratio"]
    """`difference` of losses, in the task's unit; `log-ratio` of sharpness or curvature."""
    estimate: Number
    """None if undefined, because of divergence or a mean sharpness that is not positive."""
    low: Number
    """Bounds of the 95 % interval; None if it is unbounded on this side."""
    high: Number

    @property
    def sign(self) -> int:
        """−1 if the whole interval favours the merge, +1 if it favours the rival, 0 if undecided."""
        if self.high is not None and self.high < 0:
            return -1
        return 1 if self.low is not None and self.low > 0 else 0


class Claim(Part):
    """`better` or `flatter`, over all rivals."""

    status: Literal["better", "flatter", "refuted", "not shown"]
    evidence: tuple[Evidence, ...] = ()
    note: Shown = ""
    """Comparisons that the claim needs but that were not measured."""


class Verdict(Part):
    """The verdict on whether the merge lies in a better and flatter minimum than its rivals."""

    status: Literal["better and flatter", "better", "flatter", "refuted", "not shown"]
    sentence: Shown
    merge: Shown
    """Name of the merge of the first training seed."""
    best_single: tuple[Shown, ...]
    """The best run of each training seed."""
    better: Claim
    flatter: Claim
    caveats: tuple[Shown, ...] = ()


class Selected(Part):
    """The model to use, or what to do instead."""

    name: Shown
    path: Shown | None
    validation_loss: float
    sentence: Shown
    kind: Literal["model", "control", "nothing"] = "model"
    """A run or merge; a control that is better than each of them; or nothing that is better than the base, which is named."""
    command: Shown = ""
    """Command that writes a control that is in no folder."""


class MergeFacts(Part):
    """Diagnostics of a merge; see `emomerge.merging.Merge.diagnostics`."""

    method: Shown
    of: Literal["runs", "rounds"] = "runs"
    """What was merged: finished runs, or the means of the runs after some rounds."""
    runs: tuple[Shown, ...]
    """The names of the models that were merged."""
    params: dict[Shown, JsonValue] = {}
    elements: int | None = None
    lambda_crit: Number = None
    moved_density: Number = None
    kept_density: Number = None
    kept_energy: Number = None
    cosine_to_mean: Number = None
    merged_norm: Number = None
    mean_norm: Number = None
    run_norms: dict[Shown, Number] = {}
    cosines: tuple[tuple[Number, ...], ...] = ()
    sign_agreement: tuple[tuple[Number, ...], ...] = ()
    mask_density: dict[Shown, Number] = {}
    run_losses: dict[Shown, Number] = {}
    scale_losses: dict[Shown, Number] = {}
    warnings: tuple[Shown, ...] = ()


class Rows(Part):
    """Rows of each split."""

    train: int
    validation: int
    test: int


class Data(Part):
    """The data of the task."""

    summary: Shown
    rows: Rows
    classes: tuple[Shown, ...] = ()
    unit: Shown = "nats"
    """Unit of losses."""


class HeldOut(Part):
    """The loss of every model on the test rows, batch by batch, for paired comparisons with the models of other experiments."""

    rows: Shown
    """SHA-256 of the test rows as the models read them."""
    labels: Shown | None
    """SHA-256 of the rows' labels alone; None if the task has none."""
    weights: tuple[float, ...]
    """Of the batches: rows, or what losses are means over."""
    losses: dict[Shown, tuple[Number, ...]]
    """Artefact → mean loss of every batch."""

    @model_validator(mode="after")
    def _as_many(self) -> Self:
        _require_shape(list(self.losses.values()), len(self.losses), len(self.weights))
        return self


class ProbeFacts(Part):
    """How flatness was measured: the recipe's `probe` section and related facts."""

    preset: Shown
    data: Literal["train", "test"]
    batches: int
    batch_size: int
    directions: int
    other_directions: int | None = None
    """Directions of artefacts that the verdict does not compare in sharpness; None: as many as of those."""
    other_radius: float | None = None
    """The only radius at which these were measured; None: at all of them."""
    radii: tuple[float, ...]
    adaptive_radii: tuple[float, ...] = ()
    lanczos_steps: int | None = None
    trace_probes: int | None = None
    seed: int = 0
    metrics: tuple[Shown, ...] = ()
    """Metrics beyond those of the preset."""
    options: dict[Shown, JsonValue] = {}
    """Metric → its options in the recipe."""
    rows: int | None = None
    """Number of rows that the probe used."""
    noise_floor: Number = None
    """The largest difference between repeated evaluations."""


class Results(Part):
    """All results of an experiment. Parts that were not measured are None or empty."""

    schema_version: int = Field(SCHEMA_VERSION, ge=SCHEMA_VERSION, le=SCHEMA_VERSION)
    name: Shown
    created: Shown | None = None
    """Time in ISO 8601."""
    command: Shown = ""
    recipe: dict[Shown, JsonValue] = {}
    recipe_yaml: Shown = ""
    versions: dict[Shown, Shown] = {}
    device: Shown | None = None
    data: Data | None = None
    columns: tuple[Column, ...] = ()
    """In the order of the tables."""
    artefacts: tuple[ArtefactRow, ...] = ()
    probe: ProbeFacts | None = None
    curves: dict[Shown, Curve] = {}
    barriers: Matrix | None = None
    plane: Plane | None = None
    surfaces: dict[Shown, Surface] = {}
    verdict: Verdict | None = None
    selected: Selected | None = None
    samples: Samples | None = None
    traces: dict[Shown, Trace] = {}
    cosines: Cosines | None = None
    merges: dict[Shown, MergeFacts] = {}
    held_out: HeldOut | None = None
    seconds: dict[Shown, float] = {}
    """Stage → wall time in seconds."""

    def _repr_html_(self) -> str:
        """Show the advice and the main figures in a notebook."""
        # By name, because the report is made from results and this module therefore knows nothing of it.
        html: str = import_module("emomerge.reporting.notebook").results_html(self)
        return html

    def to_json(self) -> str:
        """Return the content of results.json, without absent parts."""
        plain = {"schema_version": self.schema_version, **self.model_dump(mode="json", exclude_defaults=True)}
        return json.dumps(plain, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: object) -> Self:
        """Parse results.json.

        Args:
            text: its content.
            where: the source to name in errors, usually the file.

        Raises:
            BadInput: the text is damaged, or of another schema version.
        """
        again = "run the recipe again; its evaluations are remembered"
        what = "the results cannot be read"
        plain = parse_json(text, JsonObject, where=where, what=what, fix=again)
        if (version := plain.get("schema_version")) != SCHEMA_VERSION:
            raise BadInput(
                "the results have the schema of another version of emomerge", where=where,
                expected=f"schema_version {SCHEMA_VERSION}", found="none" if version is None else repr(version), fix=again,
            )  # fmt: skip
        try:
            return cls.model_validate(plain)
        except ValidationError as error:
            raise explain(error, what=what, where=where, fix=again) from None


def load_results(folder: str | Path) -> Results:
    """Return the results in an output folder.

    Raises:
        BadInput: there are no results, or they are damaged or of another schema version.
    """
    file = Path(folder) / "results.json"
    if not file.is_file():
        raise BadInput("no results here", where=file, fix="run the recipe to its end first")
    return Results.from_json(read_text(file), file)


def sort_rows(rows: Sequence[ArtefactRow]) -> list[ArtefactRow]:
    """Sort rows into the order of reports: base, runs, merges, controls."""
    rank: Mapping[Role, int] = {"base": 0, "run": 1, "merge": 2, "control": 3}
    return sorted(rows, key=lambda row: rank[row.role])
