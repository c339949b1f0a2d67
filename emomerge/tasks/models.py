"""The small bases of `base.prepare`: an MLP and a CNN of our own, and a small ViT and Llama of transformers.

Importing this module imports transformers and makes its Auto classes know `emomerge_mlp` and `emomerge_cnn`, so it is
imported inside functions only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput

from emomerge import recipe
from emomerge.errors import BadInput
from emomerge.tasks.pretrained import cpu_seed, name_classes


def build(prepare: recipe.Prepare, *, channels: int, image_size: int, classes: Sequence[str]) -> nn.Module:
    """A new model in fp32 and eval mode, its weights drawn with `prepare.seed`.

    Args:
        prepare: model and sizes.
        channels: channels of the images.
        image_size: pixels a side.
        classes: names of the labels in order.

    Raises:
        BadInput: the sizes do not fit each other.
    """
    sizes: dict[str, Any] = {"num_channels": channels, "image_size": image_size}
    model_class: Any
    if prepare.model == "vit":
        model_class, config = ViTForImageClassification, _vit_config(prepare, image_size, sizes)
    else:
        models: dict[str, Any] = {"mlp": MlpForImageClassification, "cnn": CnnForImageClassification}
        model_class = models[prepare.model]
        config = model_class.config_class(hidden_size=prepare.hidden, num_hidden_layers=prepare.layers, **sizes)
    name_classes(config, classes)
    with cpu_seed(prepare.seed):
        model: nn.Module = model_class(config)
    return model.eval()


def build_llama(prepare: recipe.Prepare, tokenizer: Any, *, positions: int) -> nn.Module:
    """A new Llama with heads of 32 for a tokenizer's vocabulary, in fp32 and eval mode; weights drawn with `prepare.seed`.

    Raises:
        BadInput: the hidden units do not divide into heads.
    """
    if prepare.hidden % 32:
        raise BadInput(
            "hidden units do not divide into heads of 32",
            where="base.prepare.hidden",
            expected="a multiple of 32",
            found=prepare.hidden,
        )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=prepare.hidden,
        num_hidden_layers=prepare.layers,
        num_attention_heads=prepare.hidden // 32,
        intermediate_size=3 * prepare.hidden,
        max_position_embeddings=max(512, positions),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with cpu_seed(prepare.seed):
        model: nn.Module = LlamaForCausalLM(config)
    return model.eval()


def _vit_config(prepare: recipe.Prepare, image_size: int, sizes: dict[str, Any]) -> ViTConfig:
    heads = max(1, prepare.hidden // 16)
    if prepare.hidden % heads:
        raise BadInput(
            "hidden units do not divide into heads of 16",
            where="base.prepare.hidden",
            expected="a multiple of 16",
            found=prepare.hidden,
        )
    if image_size % prepare.patch_size:
        raise BadInput(
            "images do not divide into patches",
            where="base.prepare.patch_size",
            expected=f"a divisor of the image's {image_size} pixels a side",
            found=prepare.patch_size,
        )
    return ViTConfig(
        hidden_size=prepare.hidden,
        num_hidden_layers=prepare.layers,
        num_attention_heads=heads,
        intermediate_size=2 * prepare.hidden,
        patch_size=prepare.patch_size,
        **sizes,
    )


class MlpConfig(PretrainedConfig):  # type: ignore[misc]
    """Sizes of the MLP."""

    model_type = "emomerge_mlp"

    hidden_size: int = 64
    num_hidden_layers: int = 3
    image_size: int = 28
    num_channels: int = 1


class CnnConfig(PretrainedConfig):  # type: ignore[misc]
    """Sizes of the CNN."""

    model_type = "emomerge_cnn"

    hidden_size: int = 64
    num_hidden_layers: int = 3
    image_size: int = 28
    num_channels: int = 1


class _SmallClassifier(PreTrainedModel):  # type: ignore[misc]
    """Features of an image (rows, channels, side, side) → (rows, hidden), and a linear head."""

    main_input_name = "pixel_values"
    features: nn.Sequential
    classifier: nn.Linear

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Conv2d):
            init.kaiming_normal_(module.weight, nonlinearity="relu")
            init.zeros_(module.bias)
        elif isinstance(module, nn.GroupNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **_: Any) -> ImageClassifierOutput:
        """Logits (rows, classes), and the mean cross-entropy where labels (rows,) are given."""
        logits = self.classifier(self.features(pixel_values))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


class MlpForImageClassification(_SmallClassifier):
    """Hidden layers of equal width with GELU on the flattened image."""

    config_class = MlpConfig

    def __init__(self, config: MlpConfig) -> None:
        super().__init__(config)
        width = config.num_channels * config.image_size**2
        layers: list[nn.Module] = [nn.Flatten()]
        for _ in range(config.num_hidden_layers):
            layers += [nn.Linear(width, config.hidden_size), nn.GELU()]
            width = config.hidden_size
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, config.num_labels)
        self.post_init()


class CnnForImageClassification(_SmallClassifier):
    """3×3 convolutions with GroupNorm and GELU, each halving the side down to 4 pixels, then a linear layer."""

    config_class = CnnConfig

    def __init__(self, config: CnnConfig) -> None:
        super().__init__(config)
        hidden, channels, side = config.hidden_size, config.num_channels, config.image_size
        layers: list[nn.Module] = []
        for _ in range(config.num_hidden_layers):
            stride = 2 if side > 4 else 1
            layers += [
                nn.Conv2d(channels, hidden, kernel_size=3, stride=stride, padding=1),
                nn.GroupNorm(math.gcd(hidden, 8), hidden),
                nn.GELU(),
            ]
            channels, side = hidden, math.ceil(side / stride)
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(hidden * side**2, hidden), nn.GELU())
        self.classifier = nn.Linear(hidden, config.num_labels)
        self.post_init()


for _model in (MlpForImageClassification, CnnForImageClassification):
    AutoConfig.register(_model.config_class.model_type, _model.config_class, exist_ok=True)
    AutoModelForImageClassification.register(_model.config_class, _model, exist_ok=True)
