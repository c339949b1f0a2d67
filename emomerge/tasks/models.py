"""The small networks of `base.prepare`: an MLP, a CNN and a DiT of our own, and a small ViT and Llama of transformers.

Importing this module imports transformers and registers `emomerge_mlp`, `emomerge_cnn` and `emomerge_dit` with its Auto
classes, so it is imported inside functions only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput, ModelOutput

from emomerge import recipe
from emomerge.errors import BadInput
from emomerge.numerics.seeds import cpu_seed


def name_classes(config: Any, classes: Sequence[str]) -> None:
    """Write the labels' names into a model's configuration."""
    config.num_labels = len(classes)
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: index for index, name in enumerate(classes)}
    config.problem_type = "single_label_classification"


def build(prepare: recipe.Prepare, *, channels: int, image_size: int, classes: Sequence[str]) -> nn.Module:
    """Return a new image classifier in float32 and eval mode, its weights drawn with `prepare.seed`.

    Args:
        prepare: model and sizes.
        channels: number of channels of the images.
        image_size: pixels per side.
        classes: names of the labels in order.

    Raises:
        BadInput: the sizes do not divide.
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
    """Return a new Llama with heads of width 32 for a tokenizer's vocabulary, in float32 and eval mode.

    Its weights are drawn with `prepare.seed`.

    Raises:
        BadInput: the hidden width does not divide into heads.
    """
    _check_heads(prepare, 32)
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


def build_dit(prepare: recipe.Prepare, *, channels: int, image_size: int, classes: Sequence[str]) -> nn.Module:
    """Return a new diffusion transformer with heads of width 32, in float32 and eval mode.

    Its weights are drawn with `prepare.seed`.

    Raises:
        BadInput: the sizes do not divide.
    """
    _check_heads(prepare, 32)
    _check_patches(prepare, image_size)
    config = DitConfig(
        hidden_size=prepare.hidden,
        num_hidden_layers=prepare.layers,
        patch_size=prepare.patch_size,
        num_channels=channels,
        image_size=image_size,
    )
    name_classes(config, classes)
    with cpu_seed(prepare.seed):
        model: nn.Module = DitForFlowMatching(config)
    return model.eval()


def _check_heads(prepare: recipe.Prepare, head: int) -> None:
    if prepare.hidden % head:
        raise BadInput(
            f"the hidden width does not divide into heads of {head}",
            where="base.prepare.hidden",
            expected=f"a multiple of {head}",
            found=prepare.hidden,
        )


def _check_patches(prepare: recipe.Prepare, image_size: int) -> None:
    if image_size % prepare.patch_size:
        raise BadInput(
            "images do not divide into patches",
            where="base.prepare.patch_size",
            expected=f"a divisor of the images' {image_size} pixels per side",
            found=prepare.patch_size,
        )


def _vit_config(prepare: recipe.Prepare, image_size: int, sizes: dict[str, Any]) -> ViTConfig:
    heads = max(1, prepare.hidden // 16)
    _check_heads(prepare, 16 if heads > 1 else prepare.hidden)
    _check_patches(prepare, image_size)
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
    """Image features, (rows, channels, side, side) -> (rows, hidden), and a linear head."""

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
        """Return logits (rows, classes), and the mean cross-entropy if labels (rows,) are given."""
        logits = self.classifier(self.features(pixel_values))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


class MlpForImageClassification(_SmallClassifier):
    """Hidden layers of equal width with GELU, on the flattened image."""

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


class DitConfig(PretrainedConfig):  # type: ignore[misc]
    """Sizes of the diffusion transformer."""

    model_type = "emomerge_dit"

    hidden_size: int = 128
    num_hidden_layers: int = 4
    patch_size: int = 4
    image_size: int = 28
    num_channels: int = 1


@dataclass
class FlowOutput(ModelOutput):  # type: ignore[misc]
    """dx/dt of x_t = (1 − t)·x₀ + t·ε, in the shape of the images."""

    velocity: Tensor | None = None


class DitForFlowMatching(PreTrainedModel):  # type: ignore[misc]
    """Diffusion transformer with adaLN-Zero blocks (Peebles & Xie 2023), conditioned on time and class."""

    config_class = DitConfig
    main_input_name = "pixel_values"

    def __init__(self, config: DitConfig) -> None:
        super().__init__(config)
        hidden, patch = config.hidden_size, config.patch_size
        pixels = config.num_channels * patch**2
        self.patch_embedding = nn.Linear(pixels, hidden)
        self.positions = nn.Parameter(torch.zeros((config.image_size // patch) ** 2, hidden))
        self.time_embedding = nn.Sequential(nn.Linear(_FREQUENCIES, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.class_embedding = nn.Embedding(config.num_labels + 1, hidden)  # the last one stands for no class
        self.blocks = nn.ModuleList(DitBlock(hidden) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(hidden, eps=1e-6, elementwise_affine=False)
        self.modulation = ZeroLinear(hidden, 2 * hidden)
        self.velocity = ZeroLinear(hidden, pixels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ZeroLinear):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.02)
        elif isinstance(module, DitForFlowMatching):
            init.normal_(module.positions, std=0.02)

    def forward(self, pixel_values: Tensor, time: Tensor, classes: Tensor, **_: Any) -> FlowOutput:
        """Return velocities (rows, channels, side, side) at images of that shape, times (rows,) and class numbers (rows,)."""
        patch, side = self.config.patch_size, self.config.image_size // self.config.patch_size
        patches = F.unfold(pixel_values, patch, stride=patch).transpose(1, 2)  # (rows, patches, pixels)
        x = self.patch_embedding(patches) + self.positions
        condition = F.silu(self.time_embedding(_sinusoids(time)) + self.class_embedding(classes))
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation(condition).unsqueeze(1).chunk(2, dim=-1)
        pixels = self.velocity(self.norm(x) * (1 + scale) + shift)
        return FlowOutput(velocity=F.fold(pixels.transpose(1, 2), (side * patch, side * patch), patch, stride=patch))


class DitBlock(nn.Module):
    """Attention and MLP, each with a shift, scale and gate computed from the condition; the gates start at zero.

    Args:
        hidden: width, a multiple of the heads' 32.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden, eps=1e-6, elementwise_affine=False)
        self.query_key_value = nn.Linear(hidden, 3 * hidden)
        self.projection = nn.Linear(hidden, hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(approximate="tanh"), nn.Linear(4 * hidden, hidden))
        self.modulation = ZeroLinear(hidden, 6 * hidden)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map (rows, patches, hidden) and condition (rows, hidden) to (rows, patches, hidden)."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(condition).unsqueeze(1).chunk(6, dim=-1)
        x = x + gate * self._attention(self.norm(x) * (1 + scale) + shift)
        return x + mlp_gate * self.mlp(self.norm(x) * (1 + mlp_scale) + mlp_shift)  # type: ignore[no-any-return]

    def _attention(self, x: Tensor) -> Tensor:
        heads = self.query_key_value(x).unflatten(-1, (3, -1, 32)).permute(2, 0, 3, 1, 4)
        return self.projection(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero."""


_FREQUENCIES = 128


def _sinusoids(time: Tensor) -> Tensor:
    """Embed times (rows,) in [0, 1] as (rows, _FREQUENCIES): cosines and sines of 1000·t, periods from 2π to 20000π."""
    rates = torch.exp(torch.arange(_FREQUENCIES // 2, device=time.device) * (-math.log(10_000) / (_FREQUENCIES // 2)))
    angles = 1000 * time[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1)


AutoConfig.register(DitConfig.model_type, DitConfig, exist_ok=True)
AutoModel.register(DitConfig, DitForFlowMatching, exist_ok=True)
for _model in (MlpForImageClassification, CnnForImageClassification):
    AutoConfig.register(_model.config_class.model_type, _model.config_class, exist_ok=True)
    AutoModelForImageClassification.register(_model.config_class, _model, exist_ok=True)
