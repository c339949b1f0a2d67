"""The recipe: what to do, from base to report. YAML in, one frozen object out; every error names the field.

This module knows nothing of torch, so that a recipe is read and checked in milliseconds.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from emomerge.errors import BadInput
from emomerge.optim.table import OPTIMIZERS, known_names


def _known_optimizer(name: str) -> str:
    if name not in OPTIMIZERS:
        raise ValueError(known_names(name))
    return name


OptimizerName = Annotated[str, AfterValidator(_known_optimizer)]
PresetName = Literal["v3.7", "v3.8", "v3.8-fft", "v3.9", "guarded"]
FAMILY = tuple(name for name, entry in OPTIMIZERS.items() if entry.default)


class Section(BaseModel):
    """Base of every part of a recipe: immutable, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Transform(Section):
    """A fixed shift of the images, which makes a new task of an old one."""

    rotate: Literal[0, 90, 180, 270] = 0
    """Degrees counter-clockwise."""
    invert: bool = False
    """Exchange black and white."""


class TextColumns(Section):
    """Columns by name (the first row is then a header) or by number from 0 (the file then has none)."""

    text: str | int = "text"
    label: str | int = "label"


class ImageColumns(Section):
    """Columns of a `datasets` id."""

    image: str = "image"
    label: str = "label"


class DataSection(Section):
    """What every task says of its data."""

    train: str
    """A file, a folder or a `datasets` id."""
    validation: str | None = None
    """Data for choices (weights, λ, scale, greedy soup); by default cut from `train`."""
    test: str | None = None
    """Data for the reported figures, never used for a choice; by default cut from `train`."""
    eval_fraction: float = Field(0.1, gt=0, lt=0.9)
    """The share of `train` held out; half for choices, half for the report (all for whichever is not given)."""
    limit: int | None = Field(None, ge=8)
    """Use only this many rows of `train`, drawn with the task's seed."""
    seed: int = 0
    """Seed of the split."""


class TextClassification(DataSection):
    """Sentences into classes: TSV, CSV, JSONL or a `datasets` id."""

    kind: Literal["text-classification"]
    columns: TextColumns = TextColumns()
    classes: tuple[str, ...] | dict[str, str] | None = None
    """Names of the labels in order, or class → condition on a numeric rating, such as `{bad: "< -0.5", good: "> 0.5"}`;
    rows that meet no condition are left out. By default the distinct labels, sorted."""
    max_length: int = Field(128, ge=4)
    """Tokens; longer sentences are cut."""


class LabelledImages(DataSection):
    """Images of classes: `digits` (scikit-learn), an IDX file or folder, a folder of folders, or a `datasets` id."""

    columns: ImageColumns = ImageColumns()
    transform: Transform = Transform()
    image_size: int | None = Field(None, ge=4)
    """Pixels a side; images of other sizes are resized (by default the first image's size)."""


class ImageClassification(LabelledImages):
    """Images into classes."""

    kind: Literal["image-classification"]


class FlowMatching(LabelledImages):
    """Images from noise and a class: a network learns the velocity of x_t = (1 − t)·x₀ + t·ε, at t of this distribution."""

    kind: Literal["flow-matching"]
    time: Literal["logit-normal", "uniform"] = "logit-normal"
    label_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of training rows whose class is withheld, which guidance needs."""
    sampler: Literal["heun", "euler"] = "heun"
    sampling_steps: int = Field(20, ge=1)
    """From noise to image, for the report."""
    guidance: float = Field(1.0, ge=0)
    """Classifier-free: how far samples go from the velocity without a class to that with it; 1 is without guidance."""

    @model_validator(mode="after")
    def _guided(self) -> FlowMatching:
        if self.guidance != 1 and not self.label_dropout:
            raise ValueError("`guidance` needs `label_dropout`, which teaches the model to do without a class")
        return self


class LanguageColumns(Section):
    """Columns of one of three forms: plain text, prompt and completion, or chat messages."""

    text: str | int | None = None
    """Learnt whole; `text` where no column is named."""
    prompt: str | int | None = None
    """Read, and not learnt."""
    completion: str | int | None = None
    messages: str | None = None
    """A list of `{role, content}`, written by the tokenizer's chat template; only the assistant's turns are learnt."""

    @model_validator(mode="after")
    def _one_form(self) -> LanguageColumns:
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("`prompt` and `completion` come together")
        if sum(column is not None for column in (self.text, self.prompt, self.messages)) > 1:
            raise ValueError("give `text`, or `prompt` and `completion`, or `messages`")
        return self


class CausalLanguageModel(DataSection):
    """The next token: TSV, CSV, JSONL, plain text (a folder's files are its documents, a file's paragraphs are), a `datasets`
    id, or `python-docs` and `python-code`, which come with Python."""

    kind: Literal["causal-lm"]
    columns: LanguageColumns = LanguageColumns()
    max_length: int = Field(256, ge=4)
    """Tokens a row. Longer plain text goes on in another row; longer prompts and chats are cut."""
    packing: Literal["none", "separate", "joined"] = "none"
    """How documents share rows. `none`: one a row. `separate`: several, each with positions of its own and blind to the
    others (the base is asked whether it can). `joined`: one stream, an end token between, attention across it."""


class Custom(Section):
    """Model, data and loss from a function; see `emomerge.tasks.custom`."""

    kind: Literal["custom"]
    function: str = Field(pattern=r"^.+:[A-Za-z_]\w*$")
    """`package.module:function`, or `file.py:function` of a file here or beside the recipe. It is run: trust it."""
    options: dict[str, Any] = {}
    """What the function is called with."""


Task = Annotated[
    TextClassification | ImageClassification | CausalLanguageModel | FlowMatching | Custom, Field(discriminator="kind")
]


class Prepare(Section):
    """A small base that is trained first, for demonstrations; plain AdamW with cosine decay."""

    model: Literal["mlp", "cnn", "vit", "llama", "dit", "custom"]
    transform: Transform = Transform()
    """The shift of images under which the base learns; the runs learn under the task's own."""
    train: str | None = None
    """The text that the base learns, and its tokenizer with it (default: the task's own)."""
    vocabulary: int = Field(1024, ge=258)
    """Tokens of that tokenizer, a byte-level BPE."""
    options: dict[str, Any] = {}
    """Options of a custom task's function that differ while the base learns."""
    hidden: int = Field(64, ge=4)
    layers: int = Field(3, ge=1)
    patch_size: int = Field(2, ge=1)
    steps: int = Field(300, ge=1)
    batch_size: int = Field(64, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    seed: int = 0

    @model_validator(mode="after")
    def _of_use(self) -> Prepare:
        """What another model would need is a mistake here."""
        images = ("mlp", "cnn", "vit", "dit")
        needs = {"transform": images, "train": ("llama",), "vocabulary": ("llama",), "options": ("custom",)}
        for field, models in needs.items():
            if self.model not in models and getattr(self, field) != Prepare.model_fields[field].default:
                raise ValueError(f"`{field}` is of no use to {self.model}")
        return self


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


Adapter = Annotated[Lora | Full, Field(discriminator="kind")]


class Ema(Section):
    """Exponential moving average of a run's weights, without bias towards where it begins."""

    kind: Literal["ema"]
    decay: float = Field(0.99, gt=0, lt=1)
    use: Literal["average", "last"] = "average"
    """Which weights are merged, probed and loaded; both are kept."""


class Lawa(Section):
    """Plain mean of a run's last weights, one term a step."""

    kind: Literal["lawa"]
    last: float = Field(0.5, gt=0, le=1)
    """The share of the steps, at their end, that is averaged."""
    use: Literal["average", "last"] = "average"


def _by_kind(value: Any) -> Any:
    """`ema` for `{kind: ema}`, and `none`."""
    return None if value == "none" else {"kind": value} if isinstance(value, str) else value


class Outer(Section):
    """Nesterov's momentum on the step from one round's start to the mean of its runs (DiLoCo, Douillard et al. 2023)."""

    momentum: float = Field(0.5, ge=0, lt=1)
    """DiLoCo's 0.9 is for hundreds of long rounds; with 30 short ones it overshoots (`benchmarks/rounds.py`)."""
    lr: float = Field(1.0, gt=0)


Rate = Annotated[float, Field(gt=0)]


class Runs(Section):
    """The shallow runs: what is equal in all of them."""

    optimizers: tuple[OptimizerName, ...] = Field(FAMILY, min_length=1)
    steps: int = Field(300, ge=1)
    batch_size: int = Field(16, ge=1)
    accumulation: int = Field(1, ge=1)
    """Micro-batches a step; each has `batch_size` rows."""
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    data_order: Literal["same", "different"] = "same"
    preset: PresetName = "guarded"
    lr: Annotated[
        Annotated[Rate, Tag("number")] | Annotated[dict[OptimizerName, Rate], Tag("by-optimizer")],
        Discriminator(lambda value: "by-optimizer" if isinstance(value, Mapping) else "number"),
    ] = 1.0
    """emoScope, a multiplier of emoPulse; 1.0 needs no tuning. One number, or optimizer → number (1.0 for those not named)."""
    weight_decay: float = Field(0.01, ge=0)
    geometry: Literal["exact", "l1"] = "exact"
    use_shadow: bool = False
    max_grad_norm: float | None = Field(None, gt=0)
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the forward pass under autocast; weights, pulse and merge stay in float32."""
    checkpoint_every: int = Field(100, ge=1)
    """Steps between the points a killed run resumes from."""
    average: Annotated[Annotated[Ema | Lawa, Field(discriminator="kind")] | None, BeforeValidator(_by_kind)] = None
    """`none`, `ema` or `lawa`: an average of the weights inside each run, in the last round."""
    early_stop: bool = False
    """A run ends, or waits for the next round, once its optimizer's `should_stop` is true. Controls use their whole budget."""
    cooldown: float = Field(0.0, ge=0, le=1)
    """emoPulse falls linearly to 0 over this last share of the steps."""
    rounds: int = Field(1, ge=1)
    """The steps are split into so many rounds; each starts all runs from the mean of the round before."""
    outer: Outer | None = None
    sharding: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: every process has the whole model, or (FSDP2) its part of each layer."""
    log_with: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where every step is logged besides `metrics.jsonl`."""
    parallel: Literal["auto", "stacked", "sequential"] = "auto"
    """`stacked` trains all adapters in one pass over the shared base, equal to `sequential` up to rounding; `auto` stacks where
    it can, fits into memory and saves time."""

    @model_validator(mode="after")
    def _coherent(self) -> Runs:
        for field, values in (("optimizers", self.optimizers), ("seeds", self.seeds)):
            if len(set(values)) != len(values):
                raise ValueError(f"`{field}` names something twice")
        if self.rounds > self.steps:
            raise ValueError(f"`rounds` is {self.rounds} for {self.steps} steps; a round needs a step")
        if self.outer is not None and self.rounds == 1:
            raise ValueError("`outer` acts between rounds; give `rounds`")
        return self

    def lr_of(self, optimizer: str) -> float:
        """emoScope of one optimizer."""
        return self.lr.get(optimizer, 1.0) if isinstance(self.lr, dict) else self.lr


class Merge(BaseModel):
    """One merge: the method, a name for its folder, and the method's own parameters (checked by the method).

    Most numbers among these may also be a list over the layers, or a list of `{filter, run, value}`.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    method: str
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    dtype: Literal["base", "float32", "bfloat16", "float16"] = "base"

    @property
    def label(self) -> str:
        """The name of the merge's folder."""
        return self.name or self.method

    @property
    def params(self) -> dict[str, Any]:
        """The method's own parameters, as written."""
        return dict(self.model_extra or {})


class Probe(Section):
    """How flatness is measured."""

    preset: Literal["quick", "standard", "full"] = "standard"
    """quick: losses, Gaussian sharpness, α-curves. standard: also adaptive sharpness, the Hessian, basins, barriers. full: also
    worst-case sharpness, a plane, surfaces. What goes beyond `quick` is taken of the merge, its rivals and the base."""
    data: Literal["train", "test"] = "train"
    """Which split's loss surface is probed."""
    batches: int = Field(4, ge=1)
    batch_size: int = Field(128, ge=1)
    directions: int = Field(16, ge=2)
    radii: tuple[float, ...] = Field((0.01, 0.03, 0.1), min_length=1)
    """σ as a fraction of the RMS of the base's tensor."""
    adaptive_radii: tuple[float, ...] = Field((0.05, 0.1, 0.2), min_length=1)
    """σ as a fraction of every weight's own size."""
    lanczos_steps: int = Field(30, ge=2)
    trace_probes: int = Field(32, ge=2)
    """Random vectors of the Hessian's trace."""
    seed: int = 0


PREPARED: Mapping[str, tuple[str, ...]] = {
    "image-classification": ("mlp", "cnn", "vit"),
    "causal-lm": ("llama",),
    "flow-matching": ("dit",),
    "custom": ("custom",),
}
"""Kind of task → what `base.prepare` builds for it."""

Control = Literal["best-single", "distance-matched", "loss-matched", "long-run", "adamw-long-run", "adamw-average", "swa"]
"""What the merge must beat: the best single run (always); it rescaled to the merge's length; the long run where its training
loss was the merge's; its optimizer trained for as many steps as all runs together; AdamW with cosine decay for as many; the
average of as many AdamW runs in different orders; the average of the long run's second half (SWA, Izmailov et al. 2018)."""


class Rival(Section):
    """How the controls are trained that are not of the family."""

    learning_rates: tuple[float, ...] = Field((3e-4, 1e-3, 3e-3), min_length=1)
    """Peak rates of AdamW. Every one is trained for as many steps as all runs together; the lowest validation loss counts."""
    weight_decay: float = Field(0.01, ge=0)
    snapshots: int = Field(12, ge=2)
    """Points of the long run that are kept, evenly spaced, for `loss-matched` and `swa`."""


class Recipe(Section):
    """Everything `emomerge run` does, in one object."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    base: Base = Base()
    """May be left out where a custom task's function brings a model that has learnt already."""
    task: Task
    adapter: Adapter = Lora(kind="lora")
    runs: Runs = Runs()
    merge: tuple[Merge, ...] = Field(
        (Merge(method="tall-mask"), Merge(method="ties"), Merge(method="mean"), Merge(method="greedy-soup")),
        min_length=1,
    )
    """The first one is what the verdict judges."""
    controls: tuple[Control, ...] = ("best-single", "distance-matched", "loss-matched", "long-run", "adamw-long-run")
    rival: Rival = Rival()
    probe: Probe = Probe()
    select: Literal["best", "none"] = "best"
    """`best` names the artefact with the lowest validation loss, be it a merge or a single run."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps …"""

    @model_validator(mode="after")
    def _coherent(self) -> Recipe:
        labels = [merge.label for merge in self.merge]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"`merge` has two entries called {label!r}; give one of them a `name`")
            if label == "base" or label.removeprefix("long-").partition("-")[0] in (*OPTIMIZERS, "adamw"):
                raise ValueError(f"`merge` has an entry called {label!r}, which is the name of the base or of a run")
        needed = {"loss-matched", "swa"} & set(self.controls)
        if needed and "long-run" not in self.controls:
            raise ValueError(f"the control `{min(needed)}` is made of the long run; add `long-run` to `controls`")
        if self.base.model is None and self.base.prepare is None and not isinstance(self.task, Custom):
            raise ValueError("`base` is empty: give either `model` (a folder or Hub id) or `prepare`")
        if self.base.prepare is not None and self.base.prepare.model not in PREPARED.get(self.task.kind, ()):
            kinds = PREPARED.get(self.task.kind)
            fix = f"`base.prepare.model` is one of {', '.join(kinds)} there" if kinds else "give `base.model`"
            raise ValueError(f"`base.prepare` builds no {self.base.prepare.model} for the task {self.task.kind}; {fix}")
        return self

    @property
    def base_task(self) -> Task:
        """What a prepared base learns: the task without its shift."""
        prepare = self.base.prepare
        assert prepare is not None
        if isinstance(self.task, Custom):
            return self.task.model_copy(update={"options": self.task.options | prepare.options})
        if isinstance(self.task, LabelledImages):
            return self.task.model_copy(update={"transform": prepare.transform})
        if prepare.train is None:
            return self.task
        return self.task.model_copy(update={"train": prepare.train, "validation": None, "test": None, "limit": None})


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply `key.sub=value` overrides (values are YAML).

    Raises:
        BadInput: the file is missing or is no YAML mapping, or a field is wrong; unknown keys suggest the nearest known one.
    """
    file = Path(path)
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput("no such recipe", where=file, fix="start from one with `emomerge init`") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput("the recipe cannot be read", where=file, found=error) from None
    except yaml.YAMLError as error:
        raise BadInput("the recipe is not YAML", where=file, found=error) from None
    if not isinstance(data, dict):
        raise BadInput("a recipe is a mapping of keys", where=file, found=type(data).__name__)
    for override in overrides:
        _apply(data, override)
    _find_beside(data, file.parent)
    return parse_recipe(data, source=str(file))


def _find_beside(data: dict[str, Any], folder: Path) -> None:
    """Let a custom task's file be found beside the recipe."""
    task = data.get("task")
    if isinstance(task, dict) and isinstance(task.get("function"), str):
        place, sign, name = task["function"].rpartition(":")
        if place.endswith(".py") and (folder / place).is_file():
            task["function"] = f"{folder / place}{sign}{name}"


def parse_recipe(data: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """A recipe from plain data. Raises BadInput that names the first wrong field."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise _explain(error, source) from None


def _apply(data: dict[str, Any], override: str) -> None:
    """Put one `key.sub=value` into the plain data; list items are addressed by number."""
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise BadInput("--set wants key.sub=value", found=repr(override))
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    *parents, last = key.split(".")
    node: Any = data
    for depth, part in enumerate(parents):
        if isinstance(node, list):
            node = node[_position(part, node, override)]
        elif isinstance(node, dict):
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        else:
            raise BadInput("--set reaches into a plain value", where=".".join(parents[:depth]), found=repr(override))
    if isinstance(node, list):
        node[_position(last, node, override)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise BadInput("--set reaches into a plain value", where=".".join(parents), found=repr(override))


def _position(part: str, items: list[Any], override: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise BadInput("--set names no item of the list", where=override, expected=f"a number below {len(items)}")
    return int(part)


def _explain(error: ValidationError, source: str) -> BadInput:
    """The first problem of a validation, in one line."""
    problems = error.errors(include_url=False)
    # An unknown key often causes a missing one; it is the better explanation.
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    loc = [str(part) for part in first["loc"] if part not in _TAGS]
    field = ".".join(loc)
    where = f"`{field}` in {source}" if field else source
    if first["type"] == "extra_forbidden":
        known = sorted(_fields_at(loc[:-1], first["loc"]))
        near = difflib.get_close_matches(loc[-1], known, n=1, cutoff=0.5)
        fix = f"did you mean `{near[0]}`?" if near else f"known keys: {', '.join(known)}"
        return BadInput("unknown recipe key", where=where, fix=fix)
    if first["type"] == "missing":
        return BadInput("recipe key missing", where=where)
    message = first["msg"].removeprefix("Value error, ")
    found = None if isinstance(first["input"], (dict, list, BaseModel)) else repr(first["input"])
    return BadInput("recipe value not usable", where=where, expected=message[:1].lower() + message[1:], found=found)


_TAGS = {
    "text-classification", "image-classification", "causal-lm", "flow-matching", "custom", "lora", "full", "ema",
    "lawa", "number", "by-optimizer",
}  # fmt: skip


def _fields_at(path: list[str], raw: tuple[int | str, ...]) -> set[str]:
    """Names of the fields that may stand where an unknown key was found."""
    models: list[type[BaseModel]] = [Recipe]
    for part in path:
        if part.isdigit():
            continue
        annotations = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        models = [model for annotation in annotations for model in _models_in(annotation)]
    tags = {str(part) for part in raw} & _TAGS
    if tags:  # of a tagged union only the chosen member counts
        chosen = [m for m in models if "kind" in m.model_fields and set(get_args(m.model_fields["kind"].annotation)) & tags]
        models = chosen or models
    return {name for model in models for name in model.model_fields}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, Annotated, tuple, list):
        return [model for arg in get_args(annotation) for model in _models_in(arg)]
    return []
