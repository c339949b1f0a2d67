"""The sections of a recipe and what their fields mean; a task's own section lives beside its task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    model_serializer,
    model_validator,
)

from emomerge.controls import CONTROLS
from emomerge.optim.table import OPTIMIZERS
from emomerge.recipe.validation import by_kind, name_in, one_of, unknown_key, unknown_name, wrong_value
from emomerge.tasks.table import TASKS, task_class

OptimizerName = Annotated[str, name_in(OPTIMIZERS), Field(json_schema_extra={"enum": list(OPTIMIZERS)})]
PresetName = Literal["v3.7", "v3.8", "v3.8-fft", "v3.9", "guarded", "auto"]
Place = Callable[[str], str]
"""A name that may be a relative path → the path, or the name itself if there is no such file."""
Find = Callable[[str], tuple[str, str] | None]
"""A name that may be a relative path → the path and the name for hashes; None if there is no such file."""
FAMILY = tuple(name for name, entry in OPTIMIZERS.items() if entry.default)
"""The optimizers that are trained if a recipe names none."""


class Section(BaseModel):
    """Base class of every part of a recipe: immutable, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            for key in value:
                if key not in cls.model_fields:
                    raise unknown_key(key, cls.model_fields)
        return value


class Transform(Section):
    """A fixed transformation of the images, which turns a task into a new one."""

    rotate: Literal[0, 90, 180, 270] = 0
    """Degrees counter-clockwise."""
    invert: bool = False
    """Swap black and white."""


class TaskSection(Section):
    """Base class of the section `task`: the task's settings, and what else in the recipe follows from them.

    A subclass declares `kind` as a `Literal` and adds the task's fields.
    """

    networks: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """The small networks that `base.prepare.model` may name for this task, each with those of the fields `transform`,
    `train`, `vocabulary` and `options` of `base.prepare` that it uses."""
    needs_base: ClassVar[bool] = True
    """Whether the recipe must have a `base`."""

    if TYPE_CHECKING:
        kind: str

    def for_base(self, prepare: Prepare) -> Self:
        """Return the task that a prepared base is trained on; by default the same."""
        return self

    def external_sources(self, prepare: Prepare | None) -> list[str]:
        """Return the files, folders and ids that the data come from; runs are repeated when the content of one changes.

        Args:
            prepare: the recipe's `base.prepare`.
        """
        return []

    def located(self, place: Place) -> Self:
        """Return the section with `place` applied to every value that may be a relative path; by default it has none."""
        return self


class DataSection(TaskSection):
    """Fields of tasks that read their data from files or from `datasets`."""

    bundled: ClassVar[frozenset[str]] = frozenset()
    """Data sets of these names are no files."""

    train: str
    """A file, a folder or a `datasets` id."""
    validation: str | None = None
    """Data for choices (weights, λ, scale, greedy soup); by default split off `train`."""
    test: str | None = None
    """Data for reported results, never used for a choice; by default split off `train`."""
    eval_fraction: float = Field(0.1, gt=0, lt=0.9)
    """Share of `train` that is held out: half for choices, half for the report (or all of it for the only one of the two
    that has no data of its own)."""
    limit: int | None = Field(None, ge=8)
    """Use only this many rows of `train`, drawn with the task's seed."""
    seed: int = 0
    """Seed of the split."""

    def external_sources(self, prepare: Prepare | None) -> list[str]:
        """Return the given data sources."""
        return [source for source in (self.train, self.validation, self.test) if source is not None]

    def located(self, place: Place) -> Self:
        """Return the section with its data located."""
        given = {name: source for name in ("train", "validation", "test") if (source := getattr(self, name)) is not None}
        return self.model_copy(update={name: place(source) for name, source in given.items() if source not in self.bundled})


class Prepare(Section):
    """A small base that is trained before the runs, for demonstrations; plain AdamW with cosine decay."""

    model: str
    """The network; which ones there are depends on the task."""
    transform: Transform = Transform()
    """Transformation of the base's training images; the runs use the task's own."""
    train: str | None = None
    """The text that the base and its tokenizer are trained on (default: the task's)."""
    vocabulary: int = Field(1024, ge=258)
    """Number of tokens of that tokenizer, a byte-level BPE."""
    options: dict[str, Any] = {}
    """Options of a custom task's function to override while the base is trained."""
    hidden: int = Field(64, ge=4)
    layers: int = Field(3, ge=1)
    patch_size: int = Field(2, ge=1)
    steps: int = Field(300, ge=1)
    batch_size: int = Field(64, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    seed: int = 0


class Base(Section):
    """The model that every run starts from."""

    model: str | None = None
    """A folder or a Hub id."""
    prepare: Prepare | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    seed: int = 0
    """Seed of a head that the base lacks (a new classifier)."""

    @model_validator(mode="after")
    def _one_of(self) -> Base:
        if self.model is not None and self.prepare is not None:
            raise ValueError("give either `model` (a folder or Hub id) or `prepare`, not both")
        return self

    def located(self, place: Place) -> Base:
        """Return the section with the model, or the files of `prepare`, located."""
        if self.model is not None:
            return self.model_copy(update={"model": place(self.model)})
        if self.prepare is None:
            return self
        options = located_files(self.prepare.options, place)
        train = None if self.prepare.train is None else place(self.prepare.train)
        return self.model_copy(update={"prepare": self.prepare.model_copy(update={"train": train, "options": options})})


def located_files(options: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """Return options of a custom task with `place` applied to those that name files."""

    def located(value: Any) -> Any:
        found = place(value) if isinstance(value, str) else value
        return found if found != value and (Path(found).is_file() or Path(value).is_file()) else value

    return {key: located(value) for key, value in options.items()}


class Lora(Section):
    """A LoRA adapter, trained by PEFT."""

    kind: Literal["lora"]
    rank: int = Field(8, ge=1)
    alpha: float = Field(16, gt=0)
    targets: str | tuple[str, ...] = "all-linear"
    dropout: float = Field(0.0, ge=0, lt=1)
    rslora: bool = False


class Full(Section):
    """Full fine-tuning: every floating parameter is trained."""

    kind: Literal["full"]


Adapter = Annotated[Lora | Full, one_of(Lora, Full)]


class Ema(Section):
    """Exponential moving average of a run's weights, corrected for the bias towards its start."""

    kind: Literal["ema"]
    decay: float = Field(0.99, gt=0, lt=1)
    use: Literal["average", "last"] = "average"
    """Which weights are merged, probed and loaded; both are saved."""


class Lawa(Section):
    """Plain mean of a run's weights over its last steps."""

    kind: Literal["lawa"]
    last: float = Field(0.5, gt=0, le=1)
    """Share of the steps, at the end of the run, that is averaged."""
    use: Literal["average", "last"] = "average"


def _average(value: Any) -> Any:
    """Expand the short forms `none` and `ema` (for `{kind: ema}`)."""
    return None if value == "none" else {"kind": value} if isinstance(value, str) else value


class Outer(Section):
    """Nesterov momentum on the step from a round's start to the mean of its runs (DiLoCo, Douillard et al. 2023)."""

    momentum: float = Field(0.5, ge=0, lt=1)
    """DiLoCo's 0.9 is for hundreds of long rounds; with 30 short ones it overshoots."""
    lr: float = Field(1.0, gt=0)


Rate = Annotated[float, Field(gt=0)]


_RATE, _RATES = TypeAdapter[float](Rate), TypeAdapter(dict[OptimizerName, Rate])


def _rates(value: Any) -> Any:
    """Validate one rate or one per optimizer, whichever is given, so that errors are about that form alone."""
    return _RATES.validate_python(value) if isinstance(value, Mapping) else _RATE.validate_python(value)


PROCEDURES: Mapping[str, Mapping[str, Any]] = {
    "rounds": {},
    "paper": {
        "data_order": "same", "preset": "v3.8", "max_grad_norm": None, "cooldown": 0.0, "trunk": 0.0, "rounds": 1,
        "outer": None,
    },
}  # fmt: skip
"""Procedure → the defaults in which it differs from those of the fields."""
ROUNDS, STEPS_PER_ROUND = 30, 10
"""The number of rounds, unless that would leave them shorter than this."""


class Runs(Section):
    """The settings that all runs share."""

    procedure: Literal["rounds", "paper"] = "rounds"
    """`rounds`: the runs branch off from a trunk, see the rows in orders of their own and meet at their mean; the defaults
    below. `paper`: they start from the base, see the same batches and meet only in the merge, at the published rate, without
    clipping or cool-down. Other fields that are given take precedence over the procedure's values."""
    optimizers: tuple[OptimizerName, ...] = Field(FAMILY, min_length=1)
    steps: int = Field(300, ge=1)
    """Steps of each run, its share of the trunk's included."""
    batch_size: int = Field(16, ge=1)
    accumulation: int = Field(1, ge=1)
    """Micro-batches per step, each of `batch_size` rows."""
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    data_order: Literal["same", "different"] = "different"
    preset: PresetName = "auto"
    lr: Annotated[dict[OptimizerName, Rate] | Rate, BeforeValidator(_rates)] = 1.0
    """emoScope, a multiplier of emoPulse: one number, or optimizer -> number (1.0 for the others). `auto` takes none."""
    weight_decay: float = Field(0.01, ge=0)
    geometry: Literal["exact", "l1"] = "exact"
    use_shadow: bool = False
    max_grad_norm: float | None = Field(1.0, gt=0)
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the forward pass under autocast; weights, pulse and merge stay in float32."""
    checkpoint_every: int = Field(100, ge=1)
    """Steps between checkpoints, from which an interrupted run resumes."""
    average: Annotated[Ema | Lawa | None, one_of(Ema, Lawa, optional=True), BeforeValidator(_average)] = None
    """`none`, `ema` or `lawa`: an average of the weights inside each run, in the last round."""
    early_stop: bool = False
    """A run ends, or waits for the next round, once its optimizer's `should_stop` is true. Controls use all their steps."""
    cooldown: float = Field(0.5, ge=0, le=1)
    """emoPulse falls linearly to 0 over this last share of the steps."""
    trunk: float = Field(0.5, ge=0, lt=1)
    """Share of all runs' steps that one run of the first optimizer takes before the others branch off from its weights (the
    seed phase of Branch-Train-Merge, Li et al. 2022). They branch off where the validation loss was lowest. A trunk that has
    plainly overfitted after a quarter or a half of its steps ends there."""
    rounds: int = Field(ROUNDS, ge=1)
    """Number of rounds that the steps after the trunk are divided into; each starts all runs from the mean of the previous one.
    By default 30, fewer if a round would have less than ten steps."""
    outer: Outer | None = Outer()
    """Momentum between rounds."""
    keep_rounds: int = Field(8, ge=0)
    """Number of evenly spaced rounds whose mean is kept for merges `of: rounds`; the last is the mean of the finished runs."""
    sharding: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: every process holds the whole model (ddp), or its part of each layer (fsdp, FSDP2)."""
    log_with: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers that log every step in addition to `metrics.jsonl`."""
    parallel: Literal["auto", "stacked", "sequential"] = "auto"
    """`stacked` trains all adapters in one pass over the shared base, equal to `sequential` up to rounding; `auto` does so if
    it is possible, fits into memory and saves time."""

    @model_validator(mode="before")
    @classmethod
    def _procedure_defaults(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        value = {**PROCEDURES.get(value.get("procedure", "rounds"), {}), **value}
        steps, trunk = value.get("steps", 300), value.get("trunk", 0.5)
        if "rounds" not in value and isinstance(steps, int) and isinstance(trunk, float | int):
            value["rounds"] = max(1, min(ROUNDS, _after_trunk(steps, trunk) // STEPS_PER_ROUND))
        if value.get("rounds") == 1:
            value.setdefault("outer", None)  # acts between rounds
        return value

    @model_validator(mode="after")
    def _coherent(self) -> Runs:
        if self.preset == "auto" and any(self.lr_of(name) != 1 for name in self.optimizers):
            raise ValueError(
                "`lr` has no effect with the preset `auto`; leave it out, or set `preset: v3.8`, which it multiplies"
            )
        for field, values in (("optimizers", self.optimizers), ("seeds", self.seeds)):
            if len(set(values)) != len(values):
                raise ValueError(f"`{field}` has a duplicate")
        if self.rounds > self.own_steps:
            steps = f"{self.own_steps} steps" + (" after the trunk" if self.trunk_steps else "")
            raise ValueError(f"`rounds` is {self.rounds} for {steps}; a round needs a step")
        if self.outer is not None and self.rounds == 1:
            raise ValueError("`outer` acts between rounds; give `rounds`")
        return self

    def lr_of(self, optimizer: str) -> float:
        """Return emoScope of an optimizer."""
        return self.lr.get(optimizer, 1.0) if isinstance(self.lr, dict) else self.lr

    @property
    def own_steps(self) -> int:
        """The steps that each run takes after the trunk."""
        return _after_trunk(self.steps, self.trunk)

    @property
    def trunk_steps(self) -> int:
        """The steps of the trunk, which are taken from all runs alike; 0 if there is none."""
        return (self.steps - self.own_steps) * len(self.optimizers)

    @property
    def kept_rounds(self) -> tuple[int, ...]:
        """The numbers of the rounds whose mean is kept, counted from 1, the last round included; 0 is the end of the trunk."""
        count = 0 if self.rounds == 1 else min(self.keep_rounds, self.rounds)
        rounds = tuple(self.rounds * k // count for k in range(1, count + 1))
        return (0, *rounds) if self.trunk_steps and rounds else rounds


def _after_trunk(steps: int, trunk: float) -> int:
    """Return the steps of a run that are left after a trunk of the given share, at least one."""
    return max(1, steps - round(trunk * steps))


class Merge(BaseModel):
    """One merge: the method, a name for its folder, and the method's parameters, which the method checks.

    Most numeric parameters may also be a list over the layers, or a list of `{filter, run, value}`.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    method: str
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    dtype: Literal["base", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"] = "base"
    of: Literal["runs", "rounds"] = "runs"
    """What is merged: the finished runs, or the means at the end of the rounds that `runs.keep_rounds` keeps."""

    @model_serializer(mode="wrap")
    def _without_default(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave `of` out at its default, so that hashes of older recipes stay the same."""
        return {name: value for name, value in handler(self).items() if name != "of" or value != "runs"}

    @property
    def label(self) -> str:
        """The name of the merge's folder."""
        return self.name or self.method

    @property
    def params(self) -> dict[str, Any]:
        """The method's parameters, as written."""
        return dict(self.model_extra or {})


class Probe(Section):
    """How flatness is measured."""

    preset: Literal["quick", "standard", "full"] = "standard"
    """quick: losses, Gaussian sharpness, α-curves. standard: also gradient norms, adaptive sharpness, the Hessian, basins,
    barriers. full: also worst-case sharpness, a plane, surfaces. What goes beyond `quick` is taken of the merge, its rivals and
    the base."""
    data: Literal["train", "test"] = "train"
    """Which split's loss surface is probed."""
    batches: int = Field(4, ge=1)
    batch_size: int = Field(128, ge=1)
    directions: int = Field(16, ge=2)
    """Random directions in which sharpness is measured of the artefacts that the verdict compares in it: the first merge, the
    best single run and the matched controls."""
    other_directions: int | None = Field(None, ge=2)
    """The same for all other artefacts, at the middle radius: so many of these directions, over which the former are on average
    as sharp as over all; by default a quarter of them and at least 3. As many as `directions` measure everything alike."""
    radii: tuple[float, ...] = Field((0.01, 0.03, 0.1), min_length=1)
    """σ as a fraction of the RMS of the base's tensor."""
    adaptive_radii: tuple[float, ...] = Field((0.05, 0.1, 0.2), min_length=1)
    """σ as a fraction of every weight's own size."""
    lanczos_steps: int = Field(30, ge=2)
    trace_probes: int = Field(32, ge=2)
    """Random vectors of the Hessian's trace."""
    seed: int = 0
    metrics: tuple[str, ...] = ()
    """Metrics to measure beyond those of the preset, by name."""
    options: dict[str, dict[str, Any]] = {}
    """Metric → its own options, such as `{basin: {directions: 16}}`; they take precedence over the fields above."""

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out later fields while they have their defaults, so that hashes of older recipes stay the same."""
        later = ("metrics", "options", "other_directions")
        return {name: value for name, value in handler(self).items() if name not in later or value}

    def few(self, directions: int) -> int:
        """Return in how many of some directions other artefacts are measured."""
        return min(directions, self.other_directions or max(3, -(-directions // 4)))


def _merges(runs: Runs) -> tuple[Merge, ...]:
    """Return the merges of a recipe that lists none; the first one is what we recommend for the procedure."""
    soup = Merge.model_validate({"method": "greedy-soup", "of": "rounds", "name": "soup-of-rounds", "scale": "auto"})
    mean, tall_mask = Merge(method="mean"), Merge(method="tall-mask")
    others = [{"method": "ties", "density": 0.2}, {"method": "greedy-soup"}, {"method": "positioning"}]
    first = (soup, mean, tall_mask) if len(runs.kept_rounds) > 1 else (tall_mask, mean)
    return (*first, *map(Merge.model_validate, others))


_CONTROLS = ("best-single", *CONTROLS)
Control = Annotated[str, name_in(_CONTROLS), Field(json_schema_extra={"enum": list(_CONTROLS)})]
"""The best single run, which every merge is compared with, or a control of the table."""


class Rival(Section):
    """How the controls are trained."""

    learning_rates: tuple[Rate, ...] = Field((3e-4, 1e-3, 3e-3), min_length=1)
    """Peak learning rates of `adamw-long-run` and `adamw-large-batch`; each is trained, the lowest validation loss counts."""
    sweep: tuple[Rate, Rate] | None = None
    """Lowest and highest peak rate of `adamw-sweep`. By default 1e-4 to 1e-2, and a tenth of that for full fine-tuning of a
    given model: guides advise about 1e-4 to 1e-3 for LoRA and 1e-5 to 1e-4 for full fine-tuning (Hu et al. 2021, Devlin et
    al. 2018), and a sweep goes beyond them."""
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Gradient clipping of AdamW, whatever `runs` says: 1.0 is the default of common trainers."""
    snapshots: int = Field(12, ge=2)
    """Number of evenly spaced points of a long run at which its weights are kept for early stopping, and for `loss-matched` and
    `swa`. Without these, only the best is left."""

    @model_validator(mode="after")
    def _ascending(self) -> Rival:
        if self.sweep is not None and self.sweep[0] > self.sweep[1]:
            raise ValueError("`sweep` is (lowest rate, highest rate)")
        return self


def _task(value: Any) -> Any:
    return by_kind(value, TASKS, lambda kind: task_class(kind).section_class)


class Recipe(Section):
    """Everything `emomerge run` does, in one object."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    base: Base = Base()
    """May be left out if the task brings its own model (custom tasks)."""
    task: Annotated[SerializeAsAny[TaskSection], BeforeValidator(_task)]
    adapter: Adapter = Lora(kind="lora")
    runs: Runs = Runs()
    merge: tuple[Merge, ...] = Field(default_factory=lambda data: _merges(data.get("runs", Runs())), min_length=1)
    """The verdict is about the first one: by default the greedy soup of the rounds, or with a single round tall-mask."""
    controls: tuple[Control, ...] = (
        "best-single", "adamw-sweep", "adamw-soup", "distance-matched", "loss-matched", "long-run", "adamw-long-run",
    )  # fmt: skip
    rival: Rival = Rival()
    probe: Probe = Probe()
    select: Literal["best", "none"] = "best"
    """`best` recommends the first merge, or a run or another merge whose validation loss is lower by more than the interval,
    unless it is no better than the base or a control is better than it."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps …"""
    _written: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def written(self) -> dict[str, str]:
        """The paths that `located` replaced, and how the recipe gives them."""
        return dict(self._written)

    def located(self, find: Find) -> Recipe:
        """Return the recipe with the relative paths that `find` finds replaced by absolute ones."""
        written: dict[str, str] = {}

        def place(value: str) -> str:
            path, name = find(value) or (value, value)
            if path != value:
                written[path] = name
            return path

        copy = self.model_copy(update={"base": self.base.located(place), "task": self.task.located(place)})
        copy._written = written
        return copy

    def as_written(self, names: Mapping[str, str] | None = None) -> Recipe:
        """Return the recipe with the paths as it gives them, or as `names` gives them: what hashes are made of."""
        known = self._written if names is None else names
        return self.located(lambda path: (known[path], path) if path in known else None)

    @model_validator(mode="after")
    def _coherent(self) -> Recipe:
        labels = [merge.label for merge in self.merge]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"`merge` has two entries called {label!r}; give one of them a `name`")
            if label == "base" or label.removeprefix("long-").partition("-")[0] in (*OPTIMIZERS, "adamw"):
                raise ValueError(f"`merge` has an entry called {label!r}, which is the name of the base or of a run")
        if self.merges_rounds and (kept := len(self.runs.kept_rounds)) < 2:
            merge = next(merge.label for merge in self.merge if merge.of == "rounds")
            raise ValueError(
                f"the merge `{merge}` is made of rounds and needs 2 or more, but {kept} are kept; set `runs.rounds` and "
                "`runs.keep_rounds` to 2 or more, or leave out `of`"
            )
        for name in self.controls:
            source = CONTROLS[name].made_from if name in CONTROLS else None
            if source is not None and source not in self.controls:
                raise ValueError(f"the control `{name}` is made from `{source}`; add `{source}` to `controls`")
        if self.base.model is None and self.base.prepare is None and self.task.needs_base:
            raise ValueError("`base` is empty: give either `model` (a folder or Hub id) or `prepare`")
        if self.base.prepare is not None:
            _check_prepare(self.base.prepare, self.task)
        return self

    @property
    def merges_rounds(self) -> bool:
        """Whether a merge is made of the kept rounds."""
        return any(merge.of == "rounds" for merge in self.merge)

    @property
    def sweep_rates(self) -> tuple[float, ...]:
        """The peak rates of the control `adamw-sweep`: as many as there are optimizers, logarithmically spaced."""
        scale = 0.1 if self.adapter.kind == "full" and self.base.model is not None else 1.0
        low, high = self.rival.sweep or (1e-4 * scale, 1e-2 * scale)
        last = len(self.runs.optimizers) - 1
        shares = [k / last for k in range(last + 1)] if last else [0.5]
        return tuple(dict.fromkeys(float(f"{low * (high / low) ** share:.3g}") for share in shares))

    @property
    def base_task(self) -> TaskSection:
        """The task that a prepared base is trained on."""
        if self.base.prepare is None:
            raise ValueError("the base is not prepared")
        return self.task.for_base(self.base.prepare)

    def external_sources(self) -> list[str]:
        """Return everything the recipe names that may be a file or folder."""
        given = self.base.prepare.train if self.base.prepare else self.base.model
        return [*([] if given is None else [given]), *self.task.external_sources(self.base.prepare)]


def _check_prepare(prepare: Prepare, task: TaskSection) -> None:
    """Check that the task has this network and that the network uses every field that is set."""
    at = ("base", "prepare")
    if not task.networks:
        raise wrong_value(f"emomerge has no small network for the task {task.kind}; give `base.model`", *at)
    if prepare.model not in task.networks:
        raise unknown_name(prepare.model, task.networks, *at, "model", task=task.kind)
    for field in _NETWORK_FIELDS:
        if field not in task.networks[prepare.model] and getattr(prepare, field) != Prepare.model_fields[field].default:
            raise wrong_value(f"`{field}` has no effect on {prepare.model}", *at)


_NETWORK_FIELDS = ("transform", "train", "vocabulary", "options")
"""Fields of `base.prepare` that only some networks use."""
