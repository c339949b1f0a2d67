"""Every module of every family is found by its flattened name, in both layouts, from both layouts: the counts of the docs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_against_diffusers import SD15, XL
from torch import nn

from emomerge.adapters.images.families import family_of
from emomerge.adapters.images.layouts import alias
from emomerge.adapters.images.targets import Targets
from emomerge.checkpoints import Checkpoint, MemoryCheckpoint

pytestmark = pytest.mark.peers
DOCS = Path(__file__).parents[3] / "docs" / "adapters.md"
DEFAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "SD1.5": ("UNet2DConditionModel", SD15),
    "SDXL": ("UNet2DConditionModel", XL),
    "SD3 Medium": ("SD3Transformer2DModel", {"num_layers": 24}),
    "SD3.5 Large": ("SD3Transformer2DModel", {"num_layers": 38, "qk_norm": "rms_norm"}),
    "Flux.1": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "Flux.2": ("Flux2Transformer2DModel", {}),
    "Chroma": ("ChromaTransformer2DModel", {}),
    "Qwen-Image": ("QwenImageTransformer2DModel", {}),
    "Z-Image": ("ZImageTransformer2DModel", {}),
    "Lumina 2": ("Lumina2Transformer2DModel", {}),
    "Wan 2.1 14B": ("WanTransformer3DModel", {}),
    "HunyuanVideo": ("HunyuanVideoTransformer3DModel", {}),
    "Anima": ("CosmosTransformer3DModel", {"num_layers": 28, "extra_pos_embed_type": None}),
}


def in_docs() -> dict[str, tuple[int, int]]:
    rows = re.findall(r"^\| ([^|]+?) \| (\d+) \| (\d+) \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: (int(original), int(diffusers)) for name, original, diffusers in rows}


def flat(name: str) -> str:
    return f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"


def test_every_family_is_in_the_table() -> None:
    assert list(in_docs()) == list(DEFAULTS)


@pytest.mark.parametrize("name", DEFAULTS)
def test_every_module_has_one_place(name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    model_class, config = DEFAULTS[name]
    with torch.device("meta"):
        model = getattr(diffusers, model_class)(**config)
    kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
    modules = {f"{key}.weight" for key, module in model.named_modules() if isinstance(module, kinds)}
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    family = family_of(shapes)
    assert family is not None
    original = alias(shapes, family.rules(tuple(shapes)))
    renamed = {place.tensor for places in original.values() for place in places}
    widths = {
        key: (sum(shapes[place.tensor][0] for place in places), *shapes[places[0].tensor][1:])
        for key, places in original.items()
    } | {key: shape for key, shape in shapes.items() if key not in renamed}
    targeted = {key: places for key, places in original.items() if places[0].tensor in modules}
    theirs = sorted([*targeted, *(key for key in modules if key not in renamed)])
    assert (len(theirs), len(modules)) == in_docs()[name]

    split = Targets(on_meta(shapes))
    whole = Targets(on_meta(widths))
    for key in modules:
        assert places_of(split, key) == [(key, None)]
        assert places_of(whole, key), f"{key} from the original layout"
    for key in theirs:
        assert places_of(whole, key) == [(key, None)]
        assert [tensor for tensor, _ in places_of(split, key)] == [p.tensor for p in targeted.get(key, ())] or key in modules
    covered = [place for key in modules for place in places_of(whole, key)]
    assert len(set(covered)) == len(modules), "no two modules share rows"


def on_meta(shapes: dict[str, tuple[int, ...]]) -> Checkpoint:
    return MemoryCheckpoint({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})


def places_of(targets: Targets, key: str) -> list[tuple[str, tuple[int, int] | None]]:
    found = targets.find(flat(key), where=key)
    assert found is not None, key
    return [(place.tensor, place.rows) for place in found["weight"]]


@pytest.mark.parametrize(
    ("name", "usual", "count"), [("SDXL", ".attentions.", 722), ("SD1.5", ".attentions.", 192), ("Flux.1", "_blocks.", 304)]
)
def test_the_usual_sets_of_modules(name: str, usual: str, count: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    model_class, config = DEFAULTS[name]
    with torch.device("meta"):
        model = getattr(diffusers, model_class)(**config)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items() if key.endswith(".weight")}
    family = family_of(shapes)
    assert family is not None
    original = alias(shapes, family.rules(tuple(shapes)))
    assert sum(usual in places[0].tensor and len(shapes[places[0].tensor]) > 1 for places in original.values()) == count
