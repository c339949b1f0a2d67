"""The tables of names against diffusers' converters, by tensors of one column whose rows are numbered."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from emomerge.adapters.images.families import family_of
from emomerge.adapters.images.layouts import alias

pytestmark = pytest.mark.peers
XL: dict[str, Any] = {
    "cross_attention_dim": 48, "block_out_channels": (32, 64, 128), "transformer_layers_per_block": (1, 2, 10),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (2, 4, 8),
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}  # fmt: skip
SD15: dict[str, Any] = {"cross_attention_dim": 48, "block_out_channels": (32, 64, 128, 128)}


@pytest.mark.parametrize(("config", "count"), [(XL, 1680), (SD15, 686)])
def test_every_name_of_a_unet(config: dict[str, Any], count: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(**config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    family = family_of(shapes)
    assert family is not None and len(shapes) == count
    original = alias(shapes, family.rules(tuple(shapes)))
    numbered = {name: torch.full((shape[0], 1), float(n)) for n, (name, shape) in enumerate(shapes.items())}
    stored = {f"model.diffusion_model.{name}": numbered[places[0].tensor] for name, places in original.items()}
    converted = convert_ldm_unet_checkpoint(stored, {**config, "layers_per_block": 2, "class_embed_type": None})
    assert converted.keys() == shapes.keys()
    assert all(torch.equal(converted[name], numbered[name]) for name in shapes)
    back = alias({name: shapes[places[0].tensor] for name, places in original.items()}, family.rules(tuple(original)))
    assert back.keys() == shapes.keys()
