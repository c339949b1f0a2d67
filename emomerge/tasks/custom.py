"""Anything else: a function of the user's gives model, data and loss.

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

What the mapping holds:

- `model`: a module, its weights drawn from torch's default generator, which starts from `base.seed`. It is saved and loaded as
  safetensors by the names of its tensors; nothing else of it is kept, so equal options must give equal shapes.
- `train`, `validation`, `test`: name → tensor (rows, …), equal rows in each.
- `loss`: (model, batch) → the loss of each row (rows,), or that and each row's weight (rows,), such as its tokens. A batch is
  what the data hold, of some rows. It may draw random numbers from the default generator where `model.training`; elsewhere it
  is to be a function of weights and batch alone. To train several runs as one it should call the model once, with tensors of
  the batch's rows.
- `classes` (names of labels), `unit` (what losses are counted in), `samples` (model → picture, uint8 (height, width, 1 or 3)
  for the report): may be left out.

The function is called in every process that needs it, and runs whatever it says: a recipe that names one is a program.
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
from typing import Any

import torch
from torch import Tensor, nn

from emomerge import recipe
from emomerge.adapters import open_dense
from emomerge.checkpoints import load_into, open_checkpoint
from emomerge.errors import BadInput
from emomerge.numerics.seeds import cpu_seed
from emomerge.tasks.base import Batch, Images, RowFigures, Split, Task, TaskData

_SPLITS = ("train", "validation", "test")


class CustomTask(Task):
    """A model, data and a loss from a function; see the module for its contract.

    Args:
        section: the recipe's `task`.
    """

    kind = "custom"
    unit = "own units"

    def __init__(self, section: recipe.Custom) -> None:
        self.section = section
        self._made: Mapping[str, Any] = {}

    def load_data(self, base: recipe.Base) -> TaskData:
        """Call the function and check what it gives; see `Task.load_data`."""
        made = self._parts(base.seed)
        self.unit = str(made.get("unit", self.unit))
        train, validation, test = (self._split(name, made[name]) for name in _SPLITS)
        summary = f"{len(train):,} rows to train, {len(validation):,} to validate, {len(test):,} to test"
        return TaskData(train, validation, test, tuple(map(str, made.get("classes", ()))), summary)

    def new_model(self, base: recipe.Base, data: TaskData) -> nn.Module:
        """The function's model, with the weights of `base.model` if that is given; see `Task.new_model`."""
        model = self._model(base.seed)
        if base.model is not None:
            load_into(model, open_dense(base.model))
        return model

    def save_files(self, model: nn.Module, folder: str | Path) -> None:
        """Nothing: the function rebuilds the model."""

    def save_processor(self, folder: str | Path) -> None:
        """Nothing: the function reads the data."""

    def reload_model(self, folder: str | Path, *, trust_remote_code: bool = False) -> nn.Module:
        """The function's model with saved weights; see `Task.reload_model`."""
        model = self._model(0)
        load_into(model, open_checkpoint(folder))
        return model

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Weighted mean of the rows' losses: a scalar."""
        rows = self.row_figures(model, batch)
        return (rows.loss * rows.weight).sum() / rows.weight.sum()

    def row_figures(self, model: nn.Module, batch: Batch) -> RowFigures:
        """Loss and weight of each row, as the function's `loss` gives them."""
        found = self._parts(0)["loss"](model, batch)
        loss, weight = found if isinstance(found, tuple) else (found, None)
        weight = torch.ones_like(loss) if weight is None else weight
        rows = len(next(iter(batch.values())))
        for figure in (loss, weight):
            if not isinstance(figure, Tensor) or figure.shape != (rows,):
                self._refuse("`loss` gives no figure for each row", f"({rows},)", getattr(figure, "shape", figure))
        return RowFigures(loss, weight.to(loss.dtype))

    def samples(self, model: nn.Module) -> Images | None:
        """The picture that the function's `samples` draws."""
        draw = self._parts(0).get("samples")
        if draw is None:
            return None
        with cpu_seed(0), torch.inference_mode():
            picture = draw(model.eval())
        if not isinstance(picture, Tensor) or picture.dtype != torch.uint8 or picture.dim() != 3:
            self._refuse("`samples` gives no picture", "uint8 (height, width, 1 or 3)", getattr(picture, "shape", picture))
        return Images(picture.cpu(), f"As {self.section.function} draws them.")

    def _model(self, seed: int) -> nn.Module:
        model: nn.Module = copy.deepcopy(self._parts(seed)["model"])
        return model.eval()

    def _split(self, name: str, fields: Any) -> Split:
        if not isinstance(fields, Mapping) or not fields or not all(isinstance(f, Tensor) and f.dim() for f in fields.values()):
            self._refuse(f"`{name}` holds no data", "name → tensor (rows, …)", type(fields).__name__)
        rows = {len(field) for field in fields.values()}
        if len(rows) > 1 or not min(rows):
            self._refuse(f"`{name}` has fields without rows, or of different numbers of them", "equal rows", sorted(rows))
        return Split({key: field.detach().cpu() for key, field in fields.items()})

    def _parts(self, seed: int) -> Mapping[str, Any]:
        """What the function gave: it is called once for a task, with the seed of the base's weights."""
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
            self._refuse("the task's function gives something else", f"a mapping with {', '.join(sorted(wanted))}", found)
        if not isinstance(made["model"], nn.Module) or not callable(made["loss"]):
            found = f"{type(made['model']).__name__} and {type(made['loss']).__name__}"
            self._refuse("the task's function gives something else", "`model` a torch module, `loss` a function", found)

    def _refuse(self, what: str, expected: object, found: object) -> None:
        raise BadInput(what, where=self.section.function, expected=expected, found=found)


def _function(name: str) -> Callable[..., Any]:
    """`package.module:function` or `file.py:function`. Raises BadInput where there is none."""
    place, _, own = name.rpartition(":")
    try:
        module = _module_of_file(Path(place).expanduser()) if place.endswith(".py") else importlib.import_module(place)
    except BadInput:
        raise
    except Exception as error:  # whatever the user's code raises, a missing module among it
        raise BadInput("the task's function cannot be imported", where=name, found=_named(error)) from error
    function = getattr(module, own, None)
    if not callable(function):
        near = difflib.get_close_matches(own, [n for n in vars(module) if callable(getattr(module, n))], n=1)
        raise BadInput("no such function", where=name, fix=f"did you mean {near[0]!r}?" if near else None)
    found: Callable[..., Any] = function
    return found


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise BadInput("no such file", where=path, expected="a Python file here or beside the recipe")
    spec = importlib.util.spec_from_file_location(f"emomerge_task_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
