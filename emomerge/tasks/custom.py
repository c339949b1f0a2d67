"""Custom tasks: a function of the user returns model, data and loss.

    # autoencoder.py, beside the recipe
    def make(width=32):
        images = torch.rand(500, 64)
        return {
            "model": nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 64)),
            "train": {"x": images[:400]},
            "validation": {"x": images[400:450]},
            "test": {"x": images[450:]},
            "loss": lambda model, batch: (model(batch["x"]) - batch["x"]).square().mean(dim=1),
        }

    # the recipe
    task: {kind: custom, function: "autoencoder.py:make", options: {width: 16}}

The mapping holds:

- `model`: a module whose weights are drawn from torch's default generator, which is seeded with `base.seed`. Only its tensors
  are saved, by name as safetensors, so equal options must give equal shapes.
- `train`, `validation`, `test`: name -> tensor (rows, ...), all of a split with the same number of rows.
- `loss`: (model, batch) -> the loss of each row (rows,), or a pair of that and each row's weight (rows,), such as its number
  of tokens. A batch holds some rows of a split. The loss may draw random numbers from the default generator while
  `model.training` is true; otherwise it must depend on weights and batch alone. Runs can be trained as one if it calls the
  model once, with tensors that have a row for each row of the batch.
- optional: `classes` (names of labels), `unit` (of the loss, for reports), and `samples` (model -> picture, uint8 (height,
  width, 1 or 3), for the report).

The function is called in every process that needs it and may run any code: trust a recipe that names one as you would trust a
program.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from emomerge import recipe
from emomerge.errors import BadInput
from emomerge.numerics.seeds import cpu_seed
from emomerge.tasks.base import Batch, Images, RowFigures, Split, Task, TaskData

_SPLITS = ("train", "validation", "test")


class Custom(recipe.TaskSection):
    """Section `task` of a recipe with a function of the user; see `emomerge.tasks.custom`."""

    networks: ClassVar = {"custom": ("options",)}
    needs_base = False

    kind: Literal["custom"]
    function: str = Field(pattern=r"^.+:[A-Za-z_]\w*$")
    """`package.module:function`, or `file.py:function` with a file in the current folder or beside the recipe. It is run:
    trust it."""
    options: dict[str, Any] = Field({})
    """Keyword arguments of the function."""

    def for_base(self, prepare: recipe.Prepare) -> Self:
        """Return the task with the options that the base is trained with."""
        return self.model_copy(update={"options": self.options | prepare.options})

    def external_sources(self, prepare: recipe.Prepare | None) -> list[str]:
        """Return the function's file or module, and the options that are names of files."""
        options = [*self.options.values(), *(prepare.options.values() if prepare else ())]
        files = [value for value in options if isinstance(value, str) and Path(value).expanduser().is_file()]
        return [self.function.rpartition(":")[0], *files]

    def located(self, place: recipe.Place) -> Self:
        """Return the section with the function's file and the options that name files located."""
        file, _, name = self.function.rpartition(":")
        function = f"{place(file)}:{name}" if file.endswith(".py") else self.function
        options = recipe.located_files(self.options, place)
        return self.model_copy(update={"function": function, "options": options})


class CustomTask(Task):
    """A model, data and a loss from a function; see the module's docstring for its contract."""

    section_class = Custom
    section: Custom
    unit = "own units"

    def __init__(self, section: Custom) -> None:
        super().__init__(section)
        self._made: Mapping[str, Any] = {}

    def load_data(self, base: recipe.Base) -> TaskData:
        """Call the function and check its result; see `Task.load_data`."""
        made = self._parts(base.seed)
        self.unit = str(made.get("unit", self.unit))
        train, validation, test = (self._split(name, made[name]) for name in _SPLITS)
        summary = f"{len(train):,} rows to train, {len(validation):,} to validate, {len(test):,} to test"
        return TaskData(train, validation, test, tuple(map(str, made.get("classes", ()))), summary)

    def new_model(self, base: recipe.Base, data: TaskData) -> nn.Module:
        """Return the function's model, with the weights of `base.model` if it is given; see `Task.new_model`."""
        self._parts(base.seed)
        return super().new_model(base, data)

    def build(self) -> nn.Module:
        """Return a copy of the function's model."""
        model: nn.Module = copy.deepcopy(self._parts()["model"])
        return model

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the weighted mean of the rows' losses: a scalar."""
        rows = self.row_figures(model, batch)
        return (rows.loss * rows.weight).sum() / rows.weight.sum()

    def row_figures(self, model: nn.Module, batch: Batch) -> RowFigures:
        """Return loss and weight of each row, from the function's `loss`."""
        found = self._parts()["loss"](model, batch)
        loss, weight = found if isinstance(found, tuple) else (found, None)
        weight = torch.ones_like(loss) if weight is None else weight
        rows = len(next(iter(batch.values())))
        for figure in (loss, weight):
            if not isinstance(figure, Tensor) or figure.shape != (rows,):
                self._refuse("`loss` does not return one value per row", f"({rows},)", getattr(figure, "shape", figure))
        return RowFigures(loss, weight.to(loss.dtype))

    def samples(self, model: nn.Module) -> Images | None:
        """Return the picture that the function's `samples` draws."""
        draw = self._parts().get("samples")
        if draw is None:
            return None
        with cpu_seed(0), torch.inference_mode():
            picture = draw(model.eval())
        if not isinstance(picture, Tensor) or picture.dtype != torch.uint8 or picture.dim() != 3:
            self._refuse(
                "`samples` does not return a picture", "uint8 (height, width, 1 or 3)", getattr(picture, "shape", picture)
            )
        return Images(picture.cpu(), f"As {self.section.function} draws them.")

    def _split(self, name: str, fields: Any) -> Split:
        if not isinstance(fields, Mapping) or not fields or not all(isinstance(f, Tensor) and f.dim() for f in fields.values()):
            self._refuse(f"`{name}` holds no data", "name -> tensor (rows, ...)", type(fields).__name__)
        rows = {len(field) for field in fields.values()}
        if len(rows) > 1 or not min(rows):
            self._refuse(f"`{name}` has empty fields, or fields of different numbers of rows", "equal rows", sorted(rows))
        return Split({key: field.detach().cpu() for key, field in fields.items()})

    def _parts(self, seed: int = 0) -> Mapping[str, Any]:
        """Return the function's mapping; it is called once per task, under the seed of the base's weights."""
        if not self._made:
            function = _function(self.section.function)
            with cpu_seed(seed):
                try:
                    made = function(**self.section.options)
                except BadInput:
                    raise
                except Exception as error:  # whatever the user's code raises
                    raise BadInput("the task's function fails", where=self.section.function, found=_named(error)) from error
            self._check(made)
            self._made = made
        return self._made

    def _check(self, made: Any) -> None:
        wanted = {"model", "loss", *_SPLITS}
        if not isinstance(made, Mapping) or wanted - set(made):
            found = sorted(map(str, made)) if isinstance(made, Mapping) else type(made).__name__
            self._refuse("the task's function returns the wrong thing", f"a mapping with {', '.join(sorted(wanted))}", found)
        if not isinstance(made["model"], nn.Module) or not callable(made["loss"]):
            found = f"{type(made['model']).__name__} and {type(made['loss']).__name__}"
            self._refuse("the task's function returns the wrong thing", "`model` a torch module, `loss` a function", found)

    def _refuse(self, what: str, expected: object, found: object) -> None:
        raise BadInput(what, where=self.section.function, expected=expected, found=found)


def _function(name: str) -> Callable[..., Any]:
    """Import `package.module:function` or `file.py:function`. Raises BadInput if there is none."""
    place, _, own = name.rpartition(":")
    try:
        module = _module_of_file(Path(place).expanduser()) if place.endswith(".py") else importlib.import_module(place)
    except BadInput:
        raise
    except Exception as error:  # whatever the user's code raises, or a missing module
        raise BadInput("the task's function cannot be imported", where=name, found=_named(error)) from error
    function = getattr(module, own, None)
    if not callable(function):
        near = difflib.get_close_matches(own, [n for n in vars(module) if callable(getattr(module, n))], n=1)
        raise BadInput("no such function", where=name, fix=f"did you mean {near[0]!r}?" if near else None)
    found: Callable[..., Any] = function
    return found


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise BadInput("no such file", where=path, expected="a Python file in the current folder or beside the recipe")
    spec = importlib.util.spec_from_file_location(f"emomerge_task_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
