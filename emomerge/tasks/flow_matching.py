"""Flow matching (Lipman et al. 2023; Liu et al. 2022): images from noise, by a class-conditional diffusion transformer."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from emomerge import recipe
from emomerge.checkpoints import working_dtype
from emomerge.errors import BadInput
from emomerge.numerics.seeds import generator_of
from emomerge.tasks.base import Batch, Images, RowFigures, Split, TaskData
from emomerge.tasks.images import ImageTask, LabelledImages
from emomerge.tasks.pretrained import load_complete

_CLASSES, _DRAWS = 10, 8
"""Classes in the report, and images of each."""
_GRAY = 128
"""Pixel value between images."""


class FlowMatching(LabelledImages):
    """Section `task` of a recipe whose network learns the velocity of x_t = (1 − t)·x₀ + t·ε for images x₀ of a class."""

    networks: ClassVar = {"dit": ("transform",)}

    kind: Literal["flow-matching"]
    time: Literal["logit-normal", "uniform"] = "logit-normal"
    """Distribution of t."""
    label_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of training rows whose class is withheld; needed for guidance."""
    sampler: Literal["heun", "euler"] = "heun"
    sampling_steps: int = Field(20, ge=1)
    """Steps from noise to image, for the report."""
    guidance: float = Field(1.0, ge=0)
    """Classifier-free guidance: samples follow v₀ + guidance·(v − v₀), with the velocity v given the class and v₀ without
    it; 1 turns guidance off."""

    @model_validator(mode="after")
    def _guidance_needs_dropout(self) -> Self:
        if self.guidance != 1 and not self.label_dropout:
            raise ValueError("`guidance` needs `label_dropout`, which trains the model without a class")
        return self


class Point(NamedTuple):
    """A point on the path from image to noise, for each row."""

    time: Tensor
    """(rows,) in [0, 1]; 0 is the image."""
    noise: Tensor
    """(rows, channels, side, side)."""
    classes: Tensor
    """(rows,); the number after the last class withholds the class."""


class FlowMatchingTask(ImageTask):
    """Mean squared error of the velocity ε − x₀ at x_t = (1 − t)·x₀ + t·ε.

    In training, t and ε are drawn from the default generator. In evaluation they depend on the row's number and the task's
    seed alone, so that validation and probe evaluate one fixed function of the weights.
    """

    section_class = FlowMatching
    section: FlowMatching
    auto_class = "AutoModel"
    unit = "mean squared error"

    def __init__(self, section: FlowMatching) -> None:
        super().__init__(section)
        self._classes: tuple[str, ...] = ()

    def load_data(self, base: recipe.Base) -> TaskData:
        """Load images as for classification, and number the rows; see `Task.load_data`."""
        data = super().load_data(base)
        self._classes = data.classes
        parts = (data.train, data.validation, data.test)
        train, validation, test = (Split(p.batch(range(len(p))) | {"row": torch.arange(len(p))}) for p in parts)
        return TaskData(train, validation, test, data.classes, data.summary)

    def new_model(self, base: recipe.Base, data: TaskData) -> nn.Module:
        """Return a saved DiT, or a new small one; see `Task.new_model`."""
        from emomerge.tasks import models

        _, channels, size, _ = data.train.batch([0])["pixel_values"].shape
        if base.prepare is not None:
            return models.build_dit(base.prepare, channels=channels, image_size=size, classes=data.classes)
        model = load_complete(self.loader, base)
        if not isinstance(model, models.DitForFlowMatching):
            found = type(model).__name__
            raise BadInput("the base is not a flow of emomerge", where=base.model, expected="emomerge_dit", found=found)
        if model.config.num_labels != len(data.classes):
            raise BadInput(
                "the base has other classes", where=base.model, expected=model.config.num_labels, found=len(data.classes)
            )
        return model

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean squared error over rows and pixels: a scalar, float32 even under autocast."""
        return self.row_figures(model, batch).loss.mean()

    def row_figures(self, model: nn.Module, batch: Batch) -> RowFigures:
        """Return the mean squared error over the pixels of each row."""
        at, images = self._drawn(batch) if model.training else self._fixed(batch), batch["pixel_values"]
        t = at.time.view(-1, 1, 1, 1)
        velocity = model(pixel_values=(1 - t) * images + t * at.noise, time=at.time, classes=at.classes).velocity
        error = (velocity.to(working_dtype(velocity.dtype)) - (at.noise - images)).square().mean(dim=(1, 2, 3))
        return RowFigures(error, torch.ones_like(error))

    def _drawn(self, batch: Batch) -> Point:
        images, labels = batch["pixel_values"], batch["labels"]
        normal = torch.randn(len(images), device=images.device)
        withheld = torch.rand(len(images), device=images.device) < self.section.label_dropout
        classes = labels.masked_fill(withheld, len(self._classes))
        return Point(self._time(normal), torch.randn_like(images), classes)

    def _fixed(self, batch: Batch) -> Point:
        images = batch["pixel_values"]
        drawn = []
        for row in batch["row"].tolist():
            generator = generator_of("flow", self.section.seed, row)
            drawn.append(torch.randn(1 + images[0].numel(), generator=generator))
        normal = torch.stack(drawn).to(images.device)
        return Point(self._time(normal[:, 0]), normal[:, 1:].view_as(images), batch["labels"])

    def _time(self, normal: Tensor) -> Tensor:
        """Map standard normals to t: by the logistic function (Esser et al. 2024), or to uniform by their CDF."""
        return torch.special.ndtr(normal) if self.section.time == "uniform" else normal.sigmoid()

    @torch.inference_mode()
    def sample(self, model: nn.Module, classes: Tensor, noise: Tensor) -> Tensor:
        """Generate images of these classes: integrate dx/dt = v(x, t, class) from t = 1, where x is the noise, to t = 0.

        Args:
            model: in eval mode.
            classes: (rows,).
            noise: (rows, channels, side, side).

        Returns:
            normalized images (rows, channels, side, side).
        """
        x, steps = noise, self.section.sampling_steps
        for step in range(steps, 0, -1):
            here, there = step / steps, (step - 1) / steps
            slope = self._velocity(model, x, here, classes)
            ahead = x + (there - here) * slope
            if self.section.sampler == "heun" and there > 0:
                slope = (slope + self._velocity(model, ahead, there, classes)) / 2
            x = x + (there - here) * slope
        return x

    def _velocity(self, model: nn.Module, x: Tensor, time: float, classes: Tensor) -> Tensor:
        times = torch.full((len(x),), time, device=x.device)
        with_class: Tensor = model(pixel_values=x, time=times, classes=classes).velocity
        if self.section.guidance == 1:
            return with_class
        no_class = torch.full_like(classes, len(self._classes))
        without: Tensor = model(pixel_values=x, time=times, classes=no_class).velocity
        return torch.lerp(without, with_class, self.section.guidance)

    def samples(self, model: nn.Module) -> Images:
        """Return a grid of images with one row per class, from noise that is the same for all models."""
        shown = range(min(len(self._classes), _CLASSES))
        weights: Tensor = next(model.parameters())
        config: Any = model.config
        shape = (len(shown) * _DRAWS, config.num_channels, config.image_size, config.image_size)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(self.section.seed)).to(weights.device)
        classes = torch.arange(len(shown), device=weights.device).repeat_interleave(_DRAWS)
        pixels = F.pad(self.input.pixels(self.sample(model.eval(), classes, noise)), (1, 1, 1, 1), value=_GRAY)
        grid = pixels.unflatten(0, (len(shown), _DRAWS)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
        section = self.section
        about = f"One row a class ({', '.join(self._classes[c] for c in shown)}), {_DRAWS} draws from the same noise; "
        guided = f", guidance {section.guidance:g}" if section.guidance != 1 else ""
        return Images(grid.contiguous(), f"{about}{section.sampler}, {section.sampling_steps} steps{guided}.")
