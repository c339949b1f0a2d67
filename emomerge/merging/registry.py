"""The table of merge methods: a decorator whose target's signature is the method's configuration schema."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from torch import Tensor

from emomerge.errors import BadInput
from emomerge.merging.settings import EACH_RUN, EACH_TENSOR, setting_of

Merged = Tensor | tuple[Tensor, Tensor]
"""What a method makes of one tensor: τ_m (*shape), or τ_m and each run's mask (runs, *shape) of bool."""

Pass = Callable[..., dict[str, Any]]
"""What returns further keyword arguments for a method's function."""

Method = TypeVar("Method", bound=Callable[..., Merged])

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Schema(BaseModel):
    """What every method understands; each method's own parameters are added to it."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, alias_generator=lambda name: name.rstrip("_"))

    scale: setting_of(Finite, or_word=Literal["auto"]) | None = None  # type: ignore[valid-type]


class Setting(NamedTuple):
    """How a parameter that may differ from tensor to tensor is resolved."""

    default: float
    each_run: bool


@dataclass(frozen=True)
class MergeMethod:
    """A registered merge method."""

    name: str
    function: Callable[..., Merged]
    source: str
    elementwise: bool
    relative_weights: bool
    tuned: bool
    first_pass: Pass | None
    tensor_pass: Pass | None
    native: Callable[..., tuple[Tensor, bool] | None] | None
    advice: Callable[[dict[str, Any]], list[str]] | None
    schema: type[Schema]
    settings: Mapping[str, Setting]
    """The parameters that may differ from tensor to tensor."""

    @property
    def description(self) -> str:
        """The formula, in one line."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    @property
    def takes_weights(self) -> bool:
        """Whether the runs can be weighted."""
        return "weights" in inspect.signature(self.function).parameters


METHODS: dict[str, MergeMethod] = {}
"""Every merge method by its name."""


def merge_method(
    name: str,
    *,
    source: str,
    elementwise: bool = False,
    relative_weights: bool = True,
    tuned: bool = False,
    first_pass: Pass | None = None,
    tensor_pass: Pass | None = None,
    native: Callable[..., tuple[Tensor, bool] | None] | None = None,
    advice: Callable[[dict[str, Any]], list[str]] | None = None,
) -> Callable[[Method], Method]:
    """Register a function on one tensor as a merge method.

    The function takes what it names of `deltas` (runs, *shape), `weights` (runs,), `base` (*shape, θ₀ in the deltas'
    dtype), the tensor's `name`, and `offset`, the place in the flat tensor of the first element given. A user can set its
    keyword-only parameters that have a default, and those of its passes; those without one the passes return. Of a
    parameter annotated `PerTensor` or `PerRun` it is given this tensor's number, or a tuple of each run's.

    Args:
        name: what the user types.
        source: the publication.
        elementwise: the function treats every element alike, so that it may be given flat pieces (runs, n) of a tensor.
        relative_weights: weights are rescaled to a mean of 1; otherwise they are used as given.
        tuned: where a held-out loss is at hand it chooses weights and scale, unless they are given.
        first_pass: a function of all the task vectors (`TaskVectors`) and of parameters, which runs once before all
            else. What it returns that is plain appears in the diagnostics. Parameters annotated `PerTensor` or `PerRun`
            elsewhere it may take, without a default, as the numbers of every tensor by its name.
        tensor_pass: a function of one tensor, which runs before the function is given that tensor. It takes what it names
            of `rows` (the flat τ_t, a list of (n,)), `shape`, `weights`, `base` (n,), `name`, and parameters.
        native: the same as the function for a whole tensor, compiled: of a `source` (`merging.native.Source`), `figures`, which
            it adds up, `weights`, and parameters it makes τ_m and whether the method masks, or None where it cannot.
        advice: warnings that the finished diagnostics call for.
    """

    def register(function: Method) -> Method:
        fields = _parameters(first_pass) | _parameters(tensor_pass) | _parameters(function)
        settings = {}
        for key, (hint, default) in fields.items():
            kinds = {EACH_RUN, EACH_TENSOR} & set(getattr(hint, "__metadata__", ()))
            if kinds:
                settings[key] = Setting(default, EACH_RUN in kinds)
                number = get_args(get_args(hint)[0])[0] if EACH_RUN in kinds else hint
                fields[key] = (setting_of(number, each_run=EACH_RUN in kinds), default)
        if "weights" in inspect.signature(function).parameters:
            fields["weights"] = (list[setting_of(Finite)] | Literal["equal", "auto"] | None, None)  # type: ignore[misc]
        schema = create_model(f"{name} parameters", __base__=Schema, **fields)
        METHODS[name] = MergeMethod(
            name,
            function,
            source,
            elementwise,
            relative_weights,
            tuned,
            first_pass,
            tensor_pass,
            native,
            advice,
            schema,
            settings,
        )
        return function

    return register


def find_method(name: str) -> MergeMethod:
    """The method of that name. Raises BadInput that suggests the nearest known one."""
    if name not in METHODS:
        raise BadInput("unknown merge method", where=name, fix=_suggestion(name, sorted(METHODS)))
    return METHODS[name]


def check_params(method: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters of a method, by the keyword that `merge` takes, checked and with defaults filled in.

    Args:
        method: the method's name.
        params: the method's own parameters, `scale`, and `weights` where the method has them, as a recipe or a caller
            writes them (`lambda` or `lambda_`).

    Raises:
        BadInput: an unknown method or parameter (suggests the nearest known one), or an impossible value.
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
    raise BadInput("merge parameter not usable", where=where, expected=expected, found=repr(params.get(written)))


def select(function: Callable[..., Any], available: Mapping[str, Any]) -> dict[str, Any]:
    """Of the available arguments those that a function names."""
    return {name: available[name] for name in inspect.signature(function).parameters if name in available}


def _parameters(function: Callable[..., Any] | None) -> dict[str, Any]:
    """Annotation and default of every parameter a user can set."""
    if function is None:
        return {}
    hints = get_type_hints(function, include_extras=True)
    return {
        name: (hints[name], parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not parameter.empty
    }


def _suggestion(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean `{near[0]}`?" if near else f"known: {', '.join(known)}"
