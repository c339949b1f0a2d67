"""The registry of merge methods. The signature of a registered function is the schema of the method's parameters."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.fields import FieldInfo
from torch import Tensor

from emomerge.errors import BadInput
from emomerge.merging.settings import EACH_RUN, EACH_TENSOR, setting_of

DEFAULT_METHOD = "tall-mask"

Merged = Tensor | tuple[Tensor, Tensor]
"""The merge of one tensor: τ_m (*shape), or τ_m and the mask of each run (runs, *shape) of bool."""

Method = TypeVar("Method", bound=Callable[..., Merged])

Finite = Annotated[float, Field(allow_inf_nan=False)]

INPUTS = {
    "function": {"deltas", "weights", "base", "name", "offset", "shape"},
    "first_pass": {"vectors"},
    "tensor_pass": {"rows", "weights", "base", "name", "shape"},
    "native": {"stored", "figures", "weights"},
    "localize": {"deltas", "weights", "base", "name", "shape"},
}
"""The inputs that the engine can pass to each kind of function."""

BOUNDS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}


class Schema(BaseModel):
    """The parameters common to all methods; each method's own are added."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, alias_generator=lambda name: name.rstrip("_"))

    scale: Annotated[
        setting_of(Finite, or_word=Literal["auto"]) | None,  # type: ignore[valid-type]
        Field(description="factor on the merged task vector; 1 by default; auto: chosen by held-out loss"),
    ] = None


WEIGHTS: Any = Annotated[
    list[setting_of(Finite)] | Literal["equal", "auto"] | None,  # type: ignore[misc]
    Field(description="one weight per run; equal by default; auto: a softmax of the runs' held-out losses"),
]


class PerTensorParameter(NamedTuple):
    """A parameter that may differ from tensor to tensor."""

    default: float
    each_run: bool
    """Whether it may also differ from run to run."""


@dataclass(frozen=True)
class RunFiles:
    """Mark a parameter as names of files or folders, one per run: `Annotated[tuple[str, ...], RunFiles(find)]`.

    Args:
        find: the default for a run, given the run's source; None if it has none.
    """

    find: Callable[[str], Path | None]


@dataclass(frozen=True)
class Pass:
    """A function that computes further arguments of a method, with their names; made by `provides`."""

    function: Callable[..., dict[str, Any]]
    provides: frozenset[str]

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Call the function. Raises TypeError if the names it returns are not the declared ones."""
        found = self.function(*args, **kwargs)
        if found.keys() != self.provides:
            declared = ", ".join(sorted(self.provides))
            raise TypeError(f"{self.function.__name__} provides {', '.join(sorted(found))}, but declares {declared}")
        return found


def provides(*names: str) -> Callable[[Callable[..., dict[str, Any]]], Pass]:
    """Declare the arguments that a pass of a merge method returns."""
    return lambda function: Pass(function, frozenset(names))


@dataclass(frozen=True)
class Parameter:
    """A parameter of a method, described for its users."""

    name: str
    type: str
    default: Any
    description: str


@dataclass(frozen=True)
class MergeMethod:
    """A registered merge method; see `merge_method` for the fields that are not described here."""

    name: str
    function: Callable[..., Merged]
    source: str
    elementwise: bool
    relative_weights: bool
    tuned: bool
    incremental: bool
    needs_loss: bool
    exact_runs: int | None
    first_pass: Pass | None
    tensor_pass: Pass | None
    native: Callable[..., tuple[Tensor, bool] | None] | None
    localize: Callable[..., tuple[Tensor, Tensor]] | None
    advice: Callable[[dict[str, Any]], list[str]] | None
    schema: type[Schema]
    per_tensor: Mapping[str, PerTensorParameter]
    """The parameters that may differ from tensor to tensor."""
    run_files: Mapping[str, RunFiles]
    """The parameters that name files of the runs."""

    @property
    def formula(self) -> str:
        """The first line of the function's docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    @property
    def family(self) -> str:
        """The module that the method is defined in."""
        return self.function.__module__.rpartition(".")[2]

    @property
    def takes_weights(self) -> bool:
        """Whether the runs can be weighted."""
        return "weights" in self.schema.model_fields

    @property
    def parameters(self) -> list[Parameter]:
        """All parameters that a user can set, by the names that a user types; those of the method itself first."""
        accepted_by_all = self.schema.model_json_schema()["properties"]
        return [
            Parameter(name, " | ".join(dict.fromkeys(_accepted(accepted))), field.default, field.description or "")
            for field in sorted(self.schema.model_fields.values(), key=lambda field: field.alias in ("scale", "weights"))
            if (accepted := accepted_by_all[name := str(field.alias)])
        ]

    def input_files(self, params: Mapping[str, Any], runs: Iterable[str]) -> list[str]:
        """Return the files and folders that the method reads besides the base and the runs.

        Args:
            params: the method's parameters, checked.
            runs: the sources of the runs.
        """
        runs = list(runs)
        found: list[str] = []
        for key, files in self.run_files.items():
            found += params.get(key) or [str(file) for run in runs if (file := files.find(run)) is not None]
        return found


METHODS: dict[str, MergeMethod] = {}
"""Every merge method by its name."""


def merge_method(
    name: str,
    *,
    source: str,
    elementwise: bool = False,
    relative_weights: bool = True,
    tuned: bool = False,
    incremental: bool = False,
    needs_loss: bool = False,
    exact_runs: int | None = None,
    first_pass: Pass | None = None,
    tensor_pass: Pass | None = None,
    native: Callable[..., tuple[Tensor, bool] | None] | None = None,
    localize: Callable[..., tuple[Tensor, Tensor]] | None = None,
    advice: Callable[[dict[str, Any]], list[str]] | None = None,
) -> Callable[[Method], Method]:
    """Register a function that merges one tensor as a merge method.

    The first line of the function's docstring is the method's formula. Its arguments are matched by name with the inputs
    `deltas` (runs, *shape), `weights` (runs,), `base` (θ₀, *shape, in the dtype of the deltas), the tensor's `name` and
    `shape`, and `offset` (the index in the flat tensor of the first element passed); with the arguments that the passes
    provide; and with the parameters. The parameters, which users can set, are the keyword-only arguments that have a
    default, in the function and in its passes. Values are validated against their annotations, which may include a
    one-line description: `Annotated[float, Field(gt=0, description="…")]`. A parameter annotated `PerTensor` or `PerRun`
    is passed as the number for the tensor, or as a tuple with one number per run.

    Args:
        name: the method's name in recipes and on the command line.
        source: the publication.
        elementwise: whether elements are merged independently; the function then gets flat pieces (runs, n) of a tensor.
        relative_weights: rescale weights to a mean of 1; otherwise they are passed as given.
        tuned: choose weights and scale by held-out loss, if available, unless they are given.
        incremental: whether the parameters mean the same for any number of runs and the method makes no choices, so that
            a merge can be extended by further runs.
        needs_loss: whether the method cannot work without a held-out loss.
        exact_runs: the required number of runs, if the method is restricted to one.
        first_pass: called once, before everything else, with all task vectors (`vectors: TaskVectors`) and parameters. A
            `PerTensor` or `PerRun` parameter of the method is passed as a mapping from tensor names to numbers if the
            pass has no default for it. Plain values that it provides are reported in the diagnostics.
        tensor_pass: called for each tensor before the function, with any of `rows` (the flat τ_t, a list of (n,)),
            `shape`, `weights`, `base` (n,), `name`, parameters and arguments that the first pass provides.
        native: compiled version of the function for a whole tensor. It takes any of `stored`
            (`merging.native.StoredTensor`), `figures`, to which it adds, `weights` and the parameters, and returns τ_m and
            whether the method masks; or None to fall back to the function.
        localize: returns the reference R (n,) and the masks (runs, n) for the flat `deltas` (runs, n) of one tensor; for
            methods that can restore each run from R and its mask.
        advice: returns warnings for the user, given the finished diagnostics.

    Raises:
        TypeError: one of the functions takes an argument that nothing provides.
    """

    def register(function: Method) -> Method:
        fields = _parameters(first_pass) | _parameters(tensor_pass) | _parameters(function)
        provided = {*fields}
        _check_arguments(name, "first_pass", first_pass, provided)
        provided |= first_pass.provides if first_pass else set()
        _check_arguments(name, "tensor_pass", tensor_pass, provided)
        _check_arguments(name, "native", native, provided)
        provided |= tensor_pass.provides if tensor_pass else set()
        _check_arguments(name, "localize", localize, provided)
        _check_arguments(name, "function", function, provided)
        per_tensor: dict[str, PerTensorParameter] = {}
        run_files: dict[str, RunFiles] = {}
        for key, (hint, default) in fields.items():
            metadata, description = getattr(hint, "__metadata__", ()), _description(hint)
            for mark in metadata:
                if isinstance(mark, RunFiles):
                    run_files[key] = mark
            if EACH_RUN in metadata or EACH_TENSOR in metadata:
                per_tensor[key] = PerTensorParameter(default, EACH_RUN in metadata)
                number = get_args(get_args(hint)[0])[0] if EACH_RUN in metadata else hint
                hint = setting_of(number, each_run=EACH_RUN in metadata)
            fields[key] = (Annotated[hint, Field(description=description)], default)
        if "weights" in inspect.signature(function).parameters:
            fields["weights"] = (WEIGHTS, None)
        METHODS[name] = MergeMethod(
            name,
            function,
            source,
            elementwise,
            relative_weights,
            tuned,
            incremental,
            needs_loss,
            exact_runs,
            first_pass,
            tensor_pass,
            native,
            localize,
            advice,
            create_model(f"{name} parameters", __base__=Schema, **fields),
            per_tensor,
            run_files,
        )
        return function

    return register


def find_method(name: str) -> MergeMethod:
    """Return the method of that name. Raises BadInput, which suggests the closest match, if there is none."""
    if name not in METHODS:
        raise BadInput("unknown merge method", where=name, fix=_suggestion(name, sorted(METHODS)))
    return METHODS[name]


def check_params(method: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Check the parameters of a method and fill in defaults; the keys returned are the keyword arguments of `merge`.

    Args:
        method: the method's name.
        params: the method's own parameters, `scale`, and `weights` if the method has them, as written in recipes or calls
            (`lambda` or `lambda_`).

    Raises:
        BadInput: unknown method or parameter (the error suggests the closest match), or a value that is not allowed.
    """
    schema = find_method(method).schema
    try:
        return schema.model_validate(dict(params)).model_dump()
    except ValidationError as error:
        problems = error.errors(include_url=False)
        known = sorted(field.alias or name for name, field in schema.model_fields.items())
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    written = str(first["loc"][0])
    key = written.rstrip("_")
    where = f"`{key}` of {method}"
    if first["type"] == "extra_forbidden":
        raise BadInput("unknown merge parameter", where=where, fix=_suggestion(key, known))
    messages = [problem["msg"] for problem in problems if problem["loc"][0] == written]
    expected = " or ".join(dict.fromkeys(message.removeprefix("Input should be ") for message in messages))
    raise BadInput("invalid merge parameter", where=where, expected=expected, found=repr(params.get(written)))


def select(function: Callable[..., Any], available: Mapping[str, Any]) -> dict[str, Any]:
    """Select the available arguments that a function takes, by name."""
    return {name: available[name] for name in arguments_of(function) if name in available}


def arguments_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Return the arguments of a function or of a pass."""
    return inspect.signature(function.function if isinstance(function, Pass) else function).parameters


def _parameters(function: Callable[..., Any] | None) -> dict[str, Any]:
    """Return annotation and default of every parameter that users can set."""
    if function is None:
        return {}
    hints = get_type_hints(function.function if isinstance(function, Pass) else function, include_extras=True)
    return {
        name: (hints.get(name, Any), parameter.default)
        for name, parameter in arguments_of(function).items()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not parameter.empty
    }


def _check_arguments(method: str, kind: str, function: Callable[..., Any] | None, provided: set[str]) -> None:
    """Raise TypeError for an argument that is not an input, has no default, and is not provided by a pass."""
    for name, argument in (arguments_of(function) if function else {}).items():
        if argument.default is argument.empty and name not in INPUTS[kind] | provided:
            raise TypeError(
                f"merge method {method!r}: the argument `{name}` of its {kind.replace('_', ' ')} is not an input "
                f"({', '.join(sorted(INPUTS[kind]))}), has no default, and is not provided by a pass"
            )


def _description(hint: Any) -> str | None:
    """Return the first description in an annotation or in the types it is composed of."""
    own = (mark.description for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, FieldInfo))
    return next(filter(None, (*own, *map(_description, get_args(hint)))), None)


def _accepted(schema: Mapping[str, Any]) -> Iterator[str]:
    """Yield descriptions of the values that a JSON schema accepts."""
    for alternative in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        yield from _accepted(alternative)
    yield from schema.get("enum", [schema["const"]] if "const" in schema else [])
    kind = schema.get("type")
    if kind in ("number", "integer"):
        bounds = [f"{sign} {schema[key]}" for key, sign in BOUNDS.items() if key in schema]
        yield " ".join([kind, ", ".join(bounds)]).strip()
    elif kind in ("boolean", "array"):
        yield {"boolean": "true | false", "array": "list"}[kind]


def _suggestion(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean `{near[0]}`?" if near else f"known: {', '.join(known)}"
