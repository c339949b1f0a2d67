"""Image classification, by a classifier of transformers or one of the small networks of `base.prepare`."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import nn

from emomerge import recipe
from emomerge.errors import BadInput
from emomerge.tasks.base import TaskData
from emomerge.tasks.images import ImageTask, LabelledImages
from emomerge.tasks.pretrained import load_classifier


class ImageClassification(LabelledImages):
    """Section `task` of a recipe that classifies images."""

    networks: ClassVar = {"mlp": ("transform",), "cnn": ("transform",), "vit": ("transform",)}

    kind: Literal["image-classification"]


class ImageClassificationTask(ImageTask):
    """Cross-entropy of an image classifier of transformers, or of one of the small networks of `base.prepare`."""

    section_class = ImageClassification
    auto_class = "AutoModelForImageClassification"

    def new_model(self, base: recipe.Base, data: TaskData) -> nn.Module:
        """Return an image classifier on the base, or a new small network; see `Task.new_model`."""
        if base.prepare is None:
            model: nn.Module = load_classifier(self.loader, base, data.classes)
            self._check_takes(model, data, base)
            return model

        from emomerge.tasks import models

        _, channels, size, _ = data.train.batch([0])["pixel_values"].shape
        return models.build(base.prepare, channels=channels, image_size=size, classes=data.classes)

    def _check_takes(self, model: nn.Module, data: TaskData, base: recipe.Base) -> None:
        try:
            with torch.no_grad():
                self.logits(model, data.train.batch([0]))
        except (ValueError, RuntimeError) as error:
            shape = "×".join(map(str, data.train.batch([0])["pixel_values"].shape[1:]))
            raise BadInput(f"the base does not take images of {shape}", where=base.model, found=error) from None
