"""Translate mergekit's YAML to a merge of this package, or name the field that is not supported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from emomerge.adapters import open_dense
from emomerge.errors import BadInput
from emomerge.files import read_yaml
from emomerge.merging.registry import check_params
from emomerge.merging.settings import layer_count, resolve


class MergekitMerge(NamedTuple):
    """The arguments of `merge` that a configuration describes, and the dtype to write."""

    base: str
    runs: tuple[str, ...]
    method: str
    params: dict[str, Any]
    dtype: str


class Translation(NamedTuple):
    """How a mergekit method translates. Keys are mergekit's names, values those of this package."""

    method: str
    points: Literal["others", "all", "base-optional"] = "others"
    """The models to merge: all but the base; all; or one of these, depending on whether a base is given (sets `origin`)."""
    fixed: Mapping[str, Any] = {}
    each_model: Mapping[str, tuple[str, float | None]] = {}
    """Per-model numbers, with mergekit's default; None if a number is required."""
    shared: Mapping[str, tuple[str, float | None]] = {}
    """Numbers for all models, with mergekit's default."""
    plain: Mapping[str, Mapping[Any, Mapping[str, Any]]] = {}
    """Flags: value → parameters of this package. The first value is the default; later flags override earlier ones."""
    copied: tuple[str, ...] = ()
    """Values with the same name and meaning in both."""


Numbers = dict[str, tuple[str, float | None]]
_WEIGHT: Numbers = {"weight": ("weights", None)}
_DENSE = {**_WEIGHT, "density": ("density", 1.0)}
_SCALE: Numbers = {"lambda": ("scale", 1.0)}
_INT8: dict[str, Any] = {"int8_mask": {False: {}, True: {}}}  # changes memory, not the result
_SUM: dict[Any, Any] = {False: {"aggregate": "sum"}, True: {"aggregate": "mean"}}
_MEAN: dict[Any, Any] = {True: {"aggregate": "mean"}, False: {"aggregate": "sum"}}
_L1: dict[Any, Any] = {True: {"rescale": "l1"}, False: {"rescale": "none"}}
_NO_L1: dict[Any, Any] = {False: {"rescale": "none"}, True: {"rescale": "l1"}}
_ELECT = {"elect": "weighted"}
_EPSILON = {**_DENSE, "epsilon": ("epsilon", 0.15)}
_GAMMA = {**_DENSE, "gamma": ("gamma", 0.01)}

TRANSLATIONS = {
    "linear": Translation("mean", "all", {}, _WEIGHT, {}, {"normalize": {True: {}, False: {"method": "task-arithmetic"}}}),
    "slerp": Translation("slerp", "all", {"origin": "zero"}, {}, {"t": ("t", None)}),
    "nuslerp": Translation(
        "nuslerp", "base-optional", {}, _WEIGHT, {},
        {"nuslerp_row_wise": {False: {"along": "row"}, True: {"along": "column"}},
         "nuslerp_flatten": {True: {"along": "tensor"}, False: {}}},
    ),
    "task_arithmetic": Translation(
        "task-arithmetic", "others", {}, _WEIGHT, _SCALE,
        {"normalize": {False: {}, True: {"method": "mean"}}, "rescale": {False: {}, True: {}}, **_INT8},
    ),
    "ties": Translation("ties", "others", {"preset": "mergekit"}, _DENSE, _SCALE,
                    {"normalize": _MEAN, "rescale": {False: {}}, **_INT8}),
    "dare_linear": Translation("dare-linear", "others", {}, _DENSE, _SCALE, {"normalize": _SUM, "rescale": _L1, **_INT8}),
    "dare_ties": Translation("dare-ties", "others", _ELECT, _DENSE, _SCALE, {"normalize": _SUM, "rescale": _L1, **_INT8}),
    "della": Translation("della", "others", _ELECT, _EPSILON, _SCALE, {"normalize": _MEAN, "rescale": _L1, **_INT8}),
    "della_linear": Translation("della-linear", "others", {}, _EPSILON, _SCALE, {"normalize": _SUM, "rescale": _L1, **_INT8}),
    "breadcrumbs": Translation("breadcrumbs", "others", {}, _GAMMA, _SCALE, {"normalize": _SUM, "rescale": _NO_L1, **_INT8}),
    "breadcrumbs_ties": Translation("breadcrumbs-ties", "others", _ELECT, _GAMMA, _SCALE,
                                {"normalize": _SUM, "rescale": _NO_L1, **_INT8}),
    "model_stock": Translation("model-stock", plain={"filter_wise": {False: {}, True: {"filter_wise": True}}}),
    "sce": Translation("sce", shared={"select_topk": ("density", 1.0)}, plain=_INT8),
    "karcher": Translation("karcher", "all", {"origin": "zero", "max_iter": 10, "tol": 1e-5}, copied=("max_iter", "tol")),
    "multislerp": Translation("multislerp", "base-optional", {}, _WEIGHT, {}, {"normalize_weights": {True: {}}}),
}  # fmt: skip
"""The supported mergekit methods."""


class Reference(NamedTuple):
    """A model: a folder or Hub id, with or without an adapter."""

    path: str
    lora: str | None = None


def _reference(value: Any) -> Reference:
    """Parse `path`, `path+adapter` or `{model: {path: …}, lora: {path: …}}`."""
    parts = [value]
    if isinstance(value, Mapping) and set(value) <= {"model", "lora"}:
        parts = [part for key in ("model", "lora") if (part := value.get(key)) is not None]
        parts = [part["path"] if isinstance(part, Mapping) and set(part) == {"path"} else part for part in parts]
    elif isinstance(value, str):
        parts = value.split("+")
    if not 1 <= len(parts) <= 2 or not all(isinstance(part, str) and part and "@" not in part for part in parts):
        raise ValueError("path or path+adapter")
    return Reference(*parts)


Given = Mapping[str, Any]
"""Parameters as written in the file."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Model(_Part):
    """One of the models, or of the sources of a slice."""

    model: Annotated[Reference, BeforeValidator(_reference)]
    parameters: dict[str, Any] = {}
    layer_range: tuple[int, int] | None = None


class Slice(_Part):
    """A range of layers of the models; only ranges over all layers are supported."""

    sources: list[Model] = Field(min_length=1)
    parameters: dict[str, Any] = {}


class Tokenizer(_Part):
    """The tokenizer to write."""

    source: Literal["base"]


class Config(_Part):
    """The supported part of a configuration."""

    merge_method: str
    base_model: Annotated[Reference, BeforeValidator(_reference)] | None = None
    models: list[Model] = []
    slices: list[Slice] = Field([], max_length=1)
    parameters: dict[str, Any] = {}
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    out_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    tokenizer_source: Literal["base"] | None = None
    tokenizer: Tokenizer | None = None
    chat_template: Literal["auto"] | None = None

    def sources(self) -> list[tuple[str, Model]]:
        """Return the models, each with the name of its field."""
        if bool(self.models) == bool(self.slices):
            raise BadInput("either models or slices must be given", where="models")
        field, models = ("models", self.models) if self.models else ("slices.0.sources", self.slices[0].sources)
        return [(f"{field}.{i}", model) for i, model in enumerate(models)]

    def shared(self) -> list[tuple[str, Given]]:
        """Return the sets of parameters for all models, with their field names; the first that has a value takes precedence."""
        slices = [(f"slices.{i}.parameters", part.parameters) for i, part in enumerate(self.slices)]
        return [*slices, ("parameters", self.parameters)]


def read_config(path: str | Path) -> MergekitMerge:
    """Read the merge that a configuration describes. Reads the headers of its base.

    `dtype` and `out_dtype` set the dtype to write; the arithmetic is always in float32.

    Raises:
        BadInput: the file is not a mergekit configuration, or a field of it is not supported; `where` is the field.
    """
    config = _load(Path(path))
    if config.merge_method not in TRANSLATIONS:
        raise BadInput(
            "unsupported mergekit method",
            where="merge_method",
            found=config.merge_method,
            expected=", ".join(TRANSLATIONS),
        )
    translation = TRANSLATIONS[config.merge_method]
    base, sources = _base_and_points(config, translation)
    method, params = _parameters(config, translation, sources)
    if translation.points == "base-optional":
        params["origin"] = "zero" if config.base_model is None else "base"
    params = check_params(method, params)
    names = open_dense(base).names()
    _check_layers(config, layer_count(names))
    if translation.method == "mean" and method == "task-arithmetic":
        _check_weights_sum_to_one(params["weights"], names)
    runs = tuple(model.model.lora or model.model.path for _, model in sources)
    return MergekitMerge(base, runs, method, params, config.out_dtype or config.dtype or "base")


def _load(path: Path) -> Config:
    given = read_yaml(path, what="the configuration cannot be read")
    try:
        return Config.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or path
    if first["type"] == "extra_forbidden":
        raise BadInput("unsupported mergekit field", where=where, found=repr(first["input"]))
    message = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    raise BadInput("unsupported mergekit value", where=where, expected=message, found=repr(first["input"]))


def _base_and_points(config: Config, translation: Translation) -> tuple[str, list[tuple[str, Model]]]:
    """Return θ₀ and the models to merge; for methods without a base, the first model serves as θ₀."""
    sources = config.sources()
    if config.base_model is None:
        if translation.points == "others" or translation.method == "slerp":
            raise BadInput("this method needs a base", where="base_model", found="nothing")
        base = sources[0][1].model.path
    else:
        base, lora = config.base_model
        if lora is not None:
            raise BadInput("a base with an adapter", where="base_model", found=lora, fix="bake it first")
        itself = [source for source in sources if source[1].model == config.base_model]
        others = [source for source in sources if source[1].model != config.base_model]
        if translation.points == "all":
            itself = itself or [("base_model", Model.model_validate({"model": base}))]
            sources = [*itself, *others]
        else:
            sources = others
    for field, source in sources:
        if source.model.lora is not None and source.model.path != base:
            what, found = "an adapter of another model than the base", source.model.path
            raise BadInput(what, where=f"{field}.model", expected=base, found=found, fix="bake it first")
    if not sources:
        raise BadInput("nothing to merge with the base", where="models")
    return base, sources


def _parameters(config: Config, translation: Translation, sources: Sequence[tuple[str, Model]]) -> tuple[str, dict[str, Any]]:
    """Translate per-model and shared parameters; return the method and its parameters."""
    shared = config.shared()
    own = [(f"{field}.parameters", model.parameters) for field, model in config.sources()]
    each = {*translation.each_model, *(["density"] if config.merge_method == "task_arithmetic" else [])}  # accepted but unused
    _refuse_unknown(own, each)
    _refuse_unknown(shared, {*each, *translation.shared, *translation.plain, *translation.copied})
    everywhere = [given for _, given in shared]
    params = dict(translation.fixed)
    for theirs, (ours, default) in translation.shared.items():
        params[ours] = _combined(theirs, everywhere, default, "parameters")
    for theirs, (ours, default) in translation.each_model.items():
        settings = [_combined(theirs, [m.parameters, *everywhere], default, f"{f}.parameters") for f, m in sources]
        params[ours] = settings if ours == "weights" else _by_run(settings)
    meant: dict[str, Any] = {}
    for theirs, meanings in translation.plain.items():
        meant |= _meaning(theirs, meanings, shared)
    method = meant.pop("method", translation.method)
    params |= meant | {key: given[key] for key in translation.copied for given in everywhere if key in given}
    return method, params


def _meaning(theirs: str, meanings: Mapping[Any, Given], shared: Sequence[tuple[str, Given]]) -> Given:
    """Return the parameters that the value of a flag translates to."""
    where, value = next(((w, given[theirs]) for w, given in shared if theirs in given), ("", next(iter(meanings))))
    if not isinstance(value, bool) or value not in meanings:
        expected = " or ".join(str(each).lower() for each in meanings)
        raise BadInput("unsupported mergekit value", where=f"{where}.{theirs}", expected=expected, found=repr(value))
    return meanings[value]


def _combined(parameter: str, places: Sequence[Given], default: float | None, where: str) -> Any:
    """Combine settings given in several places: the first one that has a value takes precedence, the default comes last."""
    settings = [given[parameter] for given in places if parameter in given] + ([] if default is None else [default])
    if not settings:
        raise BadInput("a number is missing", where=f"{where}.{parameter}")
    entries: list[Any] = []
    for setting in settings:
        if isinstance(setting, Mapping) or _has_entries(setting):
            entries += [setting] if isinstance(setting, Mapping) else setting
        else:
            return [*entries, {"value": setting}] if entries else setting
    return entries


def _by_run(settings: Sequence[Any]) -> Any:
    """Combine the settings of all runs into one."""
    if all(setting == settings[0] for setting in settings):
        return settings[0]
    by_run = [setting if _has_entries(setting) else [{"value": setting}] for setting in settings]
    return [{**entry, "run": run} for run, entries in enumerate(by_run, start=1) for entry in entries]


def _has_entries(setting: Any) -> bool:
    return isinstance(setting, list) and any(isinstance(item, Mapping) for item in setting)


def _check_layers(config: Config, layers: int) -> None:
    for field, source in config.sources():
        if source.layer_range not in ((None,) if config.models else ((0, layers),)):
            what, expected = "layers cannot be rearranged", f"[0, {layers}]: all of them"
            raise BadInput(what, where=f"{field}.layer_range", expected=expected, found=source.layer_range)


def _check_weights_sum_to_one(weights: Sequence[Any], names: Sequence[str]) -> None:
    by_run = [resolve(weight, names, what="weight") for weight in weights]
    for name in names:
        total = sum(run[name][0] for run in by_run)
        if abs(total - 1) > 1e-6:
            found = f"false, and weights of sum {total:g} for {name}"
            raise BadInput("a sum of models that is not an average", where="parameters.normalize", expected="true", found=found)


def _refuse_unknown(places: Sequence[tuple[str, Given]], known: set[str]) -> None:
    for where, given in places:
        for key in given:
            if key not in known:
                expected = ", ".join(sorted(known)) or "no parameters"
                raise BadInput("unsupported mergekit parameter", where=f"{where}.{key}", expected=expected)
