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


TRANSFORMERS: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "SD3": ("SD3Transformer2DModel", {"num_layers": 3}, "sd3_transformer_checkpoint_to", 95),
    "SD3.5": (
        "SD3Transformer2DModel", {"num_layers": 3, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
        "sd3_transformer_checkpoint_to", 127,
    ),
    "Flux.1": (
        "FluxTransformer2DModel", {"num_layers": 2, "num_single_layers": 2, "guidance_embeds": True},
        "flux_transformer_checkpoint_to", 112,
    ),
    "Flux.2": ("Flux2Transformer2DModel", {"num_layers": 2, "num_single_layers": 2}, "flux2_transformer_checkpoint_to", 51),
    "Chroma": ("ChromaTransformer2DModel", {"num_layers": 2, "num_single_layers": 2}, "chroma_transformer_checkpoint_to", 115),
    "Z-Image": ("ZImageTransformer2DModel", {"n_layers": 2, "n_refiner_layers": 2}, "z_image_transformer_checkpoint_to", 101),
    "Lumina 2": ("Lumina2Transformer2DModel", {"num_layers": 2}, "lumina2_to", 99),
    "Wan, text to video": ("WanTransformer3DModel", {"num_layers": 2}, "wan_transformer_to", 69),
    "Wan, image to video": (
        "WanTransformer3DModel", {"num_layers": 2, "image_dim": 1280, "added_kv_proj_dim": 5120}, "wan_transformer_to", 87,
    ),
    "HunyuanVideo": (
        "HunyuanVideoTransformer3DModel", {"num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 2},
        "hunyuan_video_transformer_to", 156,
    ),
    "Anima": (
        "CosmosTransformer3DModel", {"num_layers": 2, "extra_pos_embed_type": None}, "cosmos_transformer_checkpoint_to", 47,
    ),
}  # fmt: skip


def ordered(rows: torch.Tensor, order: str) -> torch.Tensor:
    """Return rows in the order of the other layout; swapping halves undoes itself."""
    return torch.cat(rows.chunk(2)[::-1]) if order == "halves swapped" else rows


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_name_of_a_transformer(name: str) -> None:
    """Whole, sliced or permuted, from either layout of the base: every row is where diffusers' converter puts it."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders import single_file_utils

    model_class, config, converter, count = TRANSFORMERS[name]
    with torch.device("meta"):
        model = getattr(diffusers, model_class)(**config)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert len(shapes) == count
    ends = torch.tensor([shape[0] for shape in shapes.values()]).cumsum(0).tolist()
    numbered = {
        key: torch.arange(end - shape[0], end, dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 1))
        for (key, shape), end in zip(shapes.items(), ends, strict=True)
    }
    family = family_of(shapes)
    assert family is not None and name.startswith(family.name)
    original = alias(shapes, family.rules(tuple(shapes)))
    stored = {
        key: torch.cat([ordered(numbered[place.tensor], place.order) for place in places]) for key, places in original.items()
    }
    widths = {key: (len(stored[key]), *shapes[places[0].tensor][1:]) for key, places in original.items()}
    renamed = {place.tensor for places in original.values() for place in places}
    stored |= {key: numbered[key] for key in shapes if key not in renamed}
    widths |= {key: shapes[key] for key in shapes if key not in renamed}
    converted = getattr(single_file_utils, f"convert_{converter}_diffusers")(dict(stored))
    assert converted.keys() == shapes.keys()
    assert all(torch.equal(converted[key].flatten(), numbered[key].flatten()) for key in shapes)

    recognised = family_of(widths)
    assert recognised is not None and recognised.name == family.name, "in the original layout too"
    back = alias(widths, recognised.rules(tuple(widths)))
    assert back.keys() == renamed
    for key, (place,) in back.items():
        rows = stored[place.tensor][slice(*(place.rows or (None,)))]
        assert torch.equal(ordered(rows, place.order).flatten(), numbered[key].flatten())
