"""What every command prints with --json, as types: the source of the published schemas (`emomerge schema COMMAND`).

Commands print plain data; `tests/cli/test_json.py` validates what each of them prints against its schema. Fields are added
freely; one that changes its name, type or meaning is named in the changelog.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter

from emomerge.merging.record import MergeRecord
from emomerge.reporting.comparison.compared import Comparison
from emomerge.results import MergeFacts, Number, Results

DIALECT = "https://json-schema.org/draft/2020-12/schema"


class Output(BaseModel):
    """Base class of all outputs: no other fields, and the docstrings of fields are their descriptions."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


# Errors ---------------------------------------------------------------------------------------------------------------


class Problem(Output):
    """Why a command failed. Parts that the message lacks are null."""

    what: str
    """The diagnosis."""
    where: str | None
    """The file, field, tensor or row that it is about."""
    expected: str | None
    found: str | None
    fix: str | None
    """What to do about it."""
    exit_status: int
    """1: a failure inside the work; 2: bad input; 130 and 143: interrupted."""


class Error(Output):
    """The last line on standard error of a command that failed with --json; its standard output is empty."""

    error: Problem


# Models ---------------------------------------------------------------------------------------------------------------


class Rounding(Output):
    """What rounding to the output's dtype lost; null where nothing moved or sums overflow."""

    unchanged: Number
    """Share of the moved weights that are written with the base's value."""
    relative_error: Number
    """Length of the rounding error, relative to the task vector's."""


class Strong(Output):
    """An adapter and its strength."""

    adapter: str
    strength: float


class Baked(Output):
    """Output of `emomerge bake`."""

    out: str
    base: str
    adapters: list[Strong]
    rounding_loss: Rounding


class Reconstructed(Output):
    """Output of `emomerge reconstruct`."""

    out: str
    run: str
    rounding_loss: Rounding


class Layer(Output):
    """How much of one layer an adapter holds."""

    rank: int
    energy: Number
    """Share of the layer's squared length."""
    share: Number
    """The layer's share of the whole task vector's squared length."""


class Truncation(Output):
    """How much of a merge an adapter holds, as shares of the task vector's squared length."""

    energy: Number
    layers: dict[str, Layer]
    saved: dict[str, Number]
    """Tensors that are held in full."""
    left_out: dict[str, Number]


class Merged(MergeRecord):
    """Output of `emomerge merge`: the content of merge.json, and where it is."""

    model_config = ConfigDict(extra="forbid")

    out: str
    diagnostics: MergeFacts
    rounding_loss: Rounding | None = None
    adapter: Truncation | None = None
    """With --as-lora."""


class Description(Output):
    """Output of `emomerge inspect PATH`. Formats of adapters add what they know, such as ranks and the trainer."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, JsonValue] = Field(init=False)

    kind: str
    """`checkpoint`, `adapter`, or a file that emomerge does not merge, such as a textual inversion."""
    source: str
    tensors: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    """Dtype → number of tensors."""
    kernels: dict[str, str]
    """Whether optimizers and merges run compiled."""
    base: str | None = None


class Distance(Output):
    """How far B is from A, over one tensor or all that differ; null where it is undefined or overflows."""

    norm: Number
    """Length of B − A."""
    relative: Number
    """That length, relative to A's."""
    cosine: Number
    sign_agreement: Number
    density: Number
    """Share of the elements that differ."""


class Changed(Distance):
    """One tensor that differs."""

    name: str


class Differences(Output):
    """Output of `emomerge inspect PATH OTHER`: B is OTHER, A is PATH."""

    here: str
    there: str
    base: str | None
    only_here: list[str]
    only_there: list[str]
    shapes: dict[str, list[list[int]]]
    """Tensor → both shapes, where they differ."""
    equal: int
    """Number of tensors that are equal."""
    changed: list[Changed]
    """Largest differences first."""
    all: Distance


# Experiments ----------------------------------------------------------------------------------------------------------


class Planned(Output):
    """One stage of an experiment."""

    stage: str
    work: str
    passes: int
    """Forward and backward passes of one batch of the runs, about."""
    done: bool
    seconds: float
    """Estimate for one worker; 0 if it is not known."""


class Outline(Output):
    """Output of `emomerge run --dry-run`."""

    recipe: str
    out: str
    batch_size: int
    stages: list[Planned]
    seconds: float | None
    """Estimate for all that is not done."""
    memory: int | None
    """Bytes, about."""
    disk: int | None
    """Bytes that the finished folder takes, about."""
    workers: int | None


class Worker(Output):
    """The process that trains a run."""

    host: str
    pid: int
    heartbeat: float
    """Seconds since its last sign of life."""


class RunState(Output):
    """One run and its last step."""

    name: str
    state: str
    """`waiting`, `running`, `stopped`, `failed` or `done`."""
    steps: int
    step: int
    loss: Number
    rate: Number
    error: str | None
    worker: Worker | None
    round: int | None = None
    rounds: int | None = None


class Status(Output):
    """Output of `emomerge status` and `emomerge train-all`."""

    folder: str
    busy: bool
    """Whether a process works in the folder."""
    runs: list[RunState]
    stages: dict[str, bool]
    """Stage → whether it is done."""


class Reported(Output):
    """Output of `emomerge report FOLDER`."""

    out: str
    """The page."""
    name: str
    verdict: str | None
    """The sentence on whether the merge is better and flatter."""
    selected: str | None
    """The sentence on which model to use."""
    advice: list[str]
    """What would make the findings firmer."""


# The rest -------------------------------------------------------------------------------------------------------------


class Initialised(Output):
    """Output of `emomerge init`."""

    out: str
    """The recipe."""
    files: list[str]
    """All files written."""
    task: str | None = None
    """With --from: the task that the data were taken for."""
    rows: int | None = None
    facts: list[str] = []
    """With --from: what was seen in the data."""


class Parameter(Output):
    """A parameter of a merge method."""

    name: str
    type: str
    default: JsonValue
    description: str


class Method(Output):
    """A merge method: output of `emomerge methods NAME`; without NAME a list of these."""

    name: str
    family: str
    formula: str
    source: str
    runs: int | None
    """The number of runs that it takes; null for any."""
    held_out_loss: Literal["required", "optional"]
    chooses_weights_and_scale: bool
    incremental: bool
    """Whether `merge --extend` gives what merging all runs at once gives."""
    saves_masks: bool
    parameters: list[Parameter]


class Commands(Output):
    """Output of `emomerge train-commands`."""

    train: list[list[str]]
    """One command line per run, split into words."""
    merge: list[str]


class File(Output):
    """A file of a repository."""

    name: str
    bytes: int


class Pushed(Output):
    """Output of `emomerge push`."""

    repo: str
    revision: str | None
    private: bool
    """Whether --private was given."""
    dry_run: bool
    url: str | None
    """The repository; null if nothing was uploaded."""
    commit: str | None
    files: list[File]
    card: str
    """The model card."""


class Schema(BaseModel):
    """Output of `emomerge schema NAME`: a JSON schema, draft 2020-12."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, JsonValue] = Field(init=False)

    dialect: Literal["https://json-schema.org/draft/2020-12/schema"] = Field(alias="$schema")


class SchemaFile(Output):
    """Output of `emomerge schema NAME -o FILE`."""

    out: str
    of: str


OUTPUTS: Mapping[str, Any] = MappingProxyType(
    {
        "bake": Baked,
        "init": Initialised,
        "inspect": Description | Differences,
        "merge": Merged,
        "methods": Method | list[Method],
        "probe": Results,
        "push": Pushed,
        "reconstruct": Reconstructed,
        "report": Reported | Comparison,
        "run": Results | Outline,
        "schema": Schema | SchemaFile,
        "status": Status,
        "train-all": Status,
        "train-commands": Commands,
    }
)
"""Command → the type of what it prints with --json."""


def output_schema(command: str) -> dict[str, Any]:
    """Return the JSON schema of what a command prints with --json; of `error`, what a failed one prints."""
    kind = Error if command == "error" else OUTPUTS[command]
    return {"$schema": DIALECT, **TypeAdapter(kind).json_schema(mode="serialization")}
