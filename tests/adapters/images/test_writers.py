"""Files as each training program writes them: recognised by their keys, and baked exactly onto tiny models."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from click.testing import CliRunner
from image_models import Tensors, clip, lora
from safetensors.torch import load_file, save_file
from tiny_transformers import (
    DIFFUSION,
    MLP,
    TEXT,
    H,
    anima,
    flux,
    flux_in_diffusers,
    hunyuan,
    qwen,
    t5,
    wan,
    zimage,
)  # fmt: skip
from torch import Tensor

from emomerge.adapters import bake
from emomerge.adapters.images.format import IMAGES
from emomerge.adapters.images.layouts import Place
from emomerge.adapters.images.targets import Targets
from emomerge.checkpoints import MemoryCheckpoint
from emomerge.cli import main
from emomerge.errors import BadInput

RANK, ALPHA = 2, 1.5
CLIP, T5 = (
    "text_encoders.clip_l.transformer.text_model.encoder.layers.0",
    "text_encoders.t5xxl.transformer.encoder.block.0.layer",
)
PEFT, DOWN_UP = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")


class Written(NamedTuple):
    """A file of a trainer, and what it does.

    Args:
        tensors: the file.
        deltas: base tensor → its change.
        metadata: of its header.
    """

    tensors: Tensors
    deltas: Tensors
    metadata: Mapping[str, str] = {}


def pairs(
    base: Tensors, modules: Mapping[str, str], *, names: tuple[str, str] = DOWN_UP, alpha: float | None = ALPHA,
    stored_alpha: bool = True,
) -> Written:  # fmt: skip
    """LoRA pairs: module in the file → weight in the base."""
    tensors, deltas = {}, {}
    for module, name in modules.items():
        factors = lora("x", base[name], RANK, alpha)
        down, up = factors["x.lora_down.weight"], factors["x.lora_up.weight"]
        tensors |= {f"{module}.{names[0]}": down, f"{module}.{names[1]}": up}
        if alpha is not None and stored_alpha:
            tensors[f"{module}.alpha"] = torch.tensor(alpha)
        scale = 1.0 if alpha is None else alpha / RANK
        deltas[name] = (scale * up.double().flatten(1) @ down.double().flatten(1)).reshape(base[name].shape)
    return Written(tensors, deltas)


def sd_scripts_flux(base: Tensors) -> Written:
    modules = {
        "lora_unet_double_blocks_0_img_attn_qkv": f"{DIFFUSION}double_blocks.0.img_attn.qkv.weight",
        "lora_unet_single_blocks_0_linear1": f"{DIFFUSION}single_blocks.0.linear1.weight",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": f"{CLIP}.mlp.fc1.weight",
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q":
            f"{T5}.0.SelfAttention.q.weight",
    }  # fmt: skip
    metadata = {"ss_network_module": "networks.lora_flux", "ss_network_dim": "2", "ss_network_alpha": "1.5"}
    return pairs(base, modules)._replace(metadata=metadata)


def whole_flux() -> Tensors:
    """A single file of ComfyUI with both text encoders."""
    found = flux(DIFFUSION) | clip("text_encoders.clip_l.transformer.text_model.", 5, 1)
    return found | t5("text_encoders.t5xxl.transformer.")


def musubi_hunyuan(base: Tensors) -> Written:
    modules = {
        "lora_unet_double_blocks_0_img_attn_qkv": "double_blocks.0.img_attn_qkv.weight",
        "lora_unet_double_blocks_0_txt_mlp_fc1": "double_blocks.0.txt_mlp.fc1.weight",
        "lora_unet_single_blocks_0_modulation_linear": "single_blocks.0.modulation.linear.weight",
    }
    return pairs(base, modules)._replace(metadata={"ss_network_module": "networks.lora"})


def comfy_hunyuan(base: Tensors) -> Written:
    modules = {
        "lora_unet_double_blocks_0_img_attn_qkv": "double_blocks.0.img_attn_qkv.weight",
        "lora_unet_double_blocks_0_txt_mlp_0": "double_blocks.0.txt_mlp.fc1.weight",
        "lora_unet_single_blocks_0_modulation_lin": "single_blocks.0.modulation.linear.weight",
    }
    return pairs(base, modules)


def musubi_wan(base: Tensors) -> Written:
    modules = {f"lora_unet_blocks_0_self_attn_{name}": f"blocks.0.self_attn.{name}.weight" for name in "qkvo"}
    modules["lora_unet_blocks_0_ffn_0"] = "blocks.0.ffn.0.weight"
    return pairs(base, modules)._replace(metadata={"ss_network_module": "networks.lora_wan"})


def videox_fun(base: Tensors) -> Written:
    return pairs(base, {"lora_unet__blocks_0_cross_attn_q": "blocks.0.cross_attn.q.weight"})


def lightx2v(base: Tensors) -> Written:
    written = pairs(base, {"diffusion_model.blocks.0.ffn.2": "blocks.0.ffn.2.weight"}, names=PEFT, alpha=None)
    changes = {
        "blocks.0.ffn.2.bias": ("diffusion_model.blocks.0.ffn.2.diff_b", torch.randn(H)),
        "blocks.0.self_attn.norm_q.weight": ("diffusion_model.blocks.0.self_attn.norm_q.diff", torch.randn(H)),
        "blocks.0.modulation": ("diffusion_model.blocks.0.diff_m", torch.randn(1, 6, H)),
    }
    tensors = dict(changes.values())
    return Written(written.tensors | tensors, written.deltas | {name: value for name, (_, value) in changes.items()})


def lycoris_lokr(base: Tensors) -> Written:
    """LoKr with a full first matrix and a factorised second: α/r is that of the second."""
    name = "transformer_blocks.0.img_mlp.net.0.proj.weight"
    one, a, b = torch.randn(1, 2), torch.randn(MLP, RANK), torch.randn(RANK, H // 2)
    stem = "lycoris_transformer_blocks_0_img_mlp_net_0_proj"
    tensors = {f"{stem}.lokr_w1": one, f"{stem}.lokr_w2_a": a, f"{stem}.lokr_w2_b": b, f"{stem}.alpha": torch.tensor(ALPHA)}
    return Written(tensors, {name: ALPHA / RANK * torch.kron(one.double(), a.double() @ b.double())})


def lycoris_kohya(base: Tensors) -> Written:
    name, stem = "layers.0.feed_forward.w1.weight", "lora_unet_layers_0_feed_forward_w1"
    a, b, c, d = torch.randn(MLP, RANK), torch.randn(RANK, H), torch.randn(MLP, RANK), torch.randn(RANK, H)
    parts = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "alpha": torch.tensor(ALPHA)}
    delta = ALPHA / RANK * (a.double() @ b.double()) * (c.double() @ d.double())
    metadata = {"ss_network_module": "lycoris.kohya", "ss_network_args": '{"algo": "loha"}'}
    return Written({f"{stem}.{key}": value for key, value in parts.items()}, {name: delta}, metadata)


def ai_toolkit(base: Tensors) -> Written:
    """LoRA without α over the split names of diffusers, as ai-toolkit writes Z-Image."""
    stem, fused = "diffusion_model.layers.0.attention", "layers.0.attention.qkv.weight"
    tensors, deltas = {}, []
    for part in ("to_q", "to_k", "to_v"):
        down, up = torch.randn(RANK, H), torch.randn(H, RANK)
        tensors |= {f"{stem}.{part}.lora_A.weight": down, f"{stem}.{part}.lora_B.weight": up}
        deltas.append(up.double() @ down.double())
    return Written(tensors, {fused: torch.cat(deltas)}, {"software": json.dumps({"name": "ai-toolkit", "version": "0.7"})})


def ai_toolkit_lokr(base: Tensors) -> Written:
    """LoKr of full rank: α is 9999999999, which is infinite in half precision, and means nothing."""
    stem, name = "diffusion_model.layers.0.feed_forward.w1", "layers.0.feed_forward.w1.weight"
    one, two = torch.randn(1, 3), torch.randn(MLP, 2)
    tensors = {f"{stem}.lokr_w1": one, f"{stem}.lokr_w2": two, f"{stem}.alpha": torch.tensor(9999999999.0).half()}
    metadata = {"software": json.dumps({"name": "ai-toolkit"})}
    return Written(tensors, {name: torch.kron(one.double(), two.double())}, metadata)


def diffusers_with_alphas(base: Tensors) -> Written:
    """α is in the metadata of the header, with a pattern for one module."""
    stem = "transformer_blocks.0.attn"
    one, other = (
        pairs(base, {f"transformer.{stem}.{name}": f"{stem}.{name}.weight"}, names=PEFT, alpha=alpha, stored_alpha=False)
        for name, alpha in (("to_q", 5.0), ("to_k", 3.0))
    )
    settings = {"r": RANK, "lora_alpha": 5.0, "alpha_pattern": {f"{stem}.to_k": 3.0}, "use_rslora": False}
    settings = {f"transformer.{key}": value for key, value in settings.items()}
    return Written(one.tensors | other.tensors, one.deltas | other.deltas, {"lora_adapter_metadata": json.dumps(settings)})


def diffusers_wrapped(base: Tensors) -> Written:
    """The names of a PEFT model, with the name of the adapter."""
    modules = {"base_model.model.transformer_blocks.0.attn.to_q": "transformer_blocks.0.attn.to_q.weight"}
    return pairs(base, modules, names=("lora_A.default.weight", "lora_B.default.weight"), alpha=None)


def diffusers_dora(base: Tensors) -> Written:
    """PEFT's DoRA on a square layer, whose axis only the name of the magnitude tells."""
    module, name = "transformer.transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q.weight"
    written = pairs(base, {module: name}, names=PEFT, alpha=None)
    magnitude = torch.rand(H) + 0.5
    direction = base[name].double() + written.deltas[name]
    changed = magnitude.double()[:, None] * direction / direction.norm(dim=1, keepdim=True)
    tensors = written.tensors | {f"{module}.lora_magnitude_vector": magnitude}
    return Written(tensors, {name: changed - base[name].double()})


def simpletuner(base: Tensors) -> Written:
    modules = {
        "transformer.base_model.model.single_transformer_blocks.0.attn.to_v": "single_transformer_blocks.0.attn.to_v.weight"
    }
    return pairs(base, modules, names=("lora.down.weight", "lora.up.weight"), alpha=None)


def early_diffusers(base: Tensors) -> Written:
    modules = {"transformer.transformer_blocks.0.attn.to_out.0": "transformer_blocks.0.attn.to_out.0.weight"}
    return pairs(base, modules, names=("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"), alpha=None)


def earliest_diffusers(base: Tensors) -> Written:
    written = pairs(base, {"x": "transformer_blocks.0.attn.to_q.weight"}, alpha=None)
    stem = "transformer_blocks.0.attn.processor.to_q_lora"
    down, up = written.tensors.values()
    return Written({f"{stem}.down.weight": down, f"{stem}.up.weight": up}, written.deltas)


def onetrainer_legacy(base: Tensors) -> Written:
    """diffusers' names behind kohya's prefix; `te2` is T5."""
    modules = {
        "lora_transformer_double_blocks_0_img_attn_proj": f"{DIFFUSION}double_blocks.0.img_attn.proj.weight",
        "lora_transformer_transformer_blocks_0_attn_to_add_out": f"{DIFFUSION}double_blocks.0.txt_attn.proj.weight",
        "lora_te1_text_model_encoder_layers_0_mlp_fc2": f"{CLIP}.mlp.fc2.weight",
        "lora_te2_encoder_block_0_layer_1_DenseReluDense_wi_0":
            f"{T5}.1.DenseReluDense.wi_0.weight",
    }  # fmt: skip
    return pairs(base, modules)._replace(metadata={"ot_branch": "master", "ss_base_model_version": "flux1"})


def onetrainer_comfy(base: Tensors) -> Written:
    modules = {
        "diffusion_model.double_blocks.0.img_attn.proj": f"{DIFFUSION}double_blocks.0.img_attn.proj.weight",
        f"{CLIP}.mlp.fc1":
            f"{CLIP}.mlp.fc1.weight",
        f"{T5}.0.SelfAttention.q":
            f"{T5}.0.SelfAttention.q.weight",
    }  # fmt: skip
    return pairs(base, modules)._replace(metadata={"ot_revision": "abc"})


def onetrainer_diffusers(base: Tensors) -> Written:
    """α is folded into B."""
    modules = {"transformer.transformer_blocks.0.attn.to_out.0": f"{DIFFUSION}double_blocks.0.img_attn.proj.weight"}
    return pairs(base, modules, names=PEFT, alpha=None)._replace(metadata={"ot_revision": "abc"})


def onetrainer_original(base: Tensors) -> Written:
    modules = {
        "double_blocks.0.txt_mlp.2": f"{DIFFUSION}double_blocks.0.txt_mlp.2.weight",
        "single_blocks.0.linear2": f"{DIFFUSION}single_blocks.0.linear2.weight",
    }
    return pairs(base, modules)._replace(metadata={"ot_revision": "abc"})


def onetrainer_omi(base: Tensors) -> Written:
    modules = {
        "transformer.double_blocks.0.txt_mlp.2": f"{DIFFUSION}double_blocks.0.txt_mlp.2.weight",
        "clip_l.text_model.encoder.layers.0.mlp.fc1": f"{CLIP}.mlp.fc1.weight",
        "t5.encoder.block.0.layer.0.SelfAttention.q":
            f"{T5}.0.SelfAttention.q.weight",
    }  # fmt: skip
    return pairs(base, modules)


def comfyui(base: Tensors) -> Written:
    """Whole tensors beside factors: a difference, one of a bias, a replacement."""
    written = pairs(base, {"diffusion_model.img_in": f"{DIFFUSION}img_in.weight"})
    diff, bias, new = torch.randn(MLP, H), torch.randn(H), torch.randn(H, TEXT)
    tensors = {
        "diffusion_model.double_blocks.0.img_mlp.0.diff": diff, "diffusion_model.img_in.diff_b": bias,
        "diffusion_model.txt_in.set_weight": new,
    }  # fmt: skip
    name = f"{DIFFUSION}txt_in.weight"
    deltas = {f"{DIFFUSION}double_blocks.0.img_mlp.0.weight": diff, f"{DIFFUSION}img_in.bias": bias, name: new - base[name]}
    return Written(written.tensors | tensors, written.deltas | deltas)


def bare_names(base: Tensors) -> Written:
    return pairs(base, {"transformer_blocks.0.img_mod.1": "transformer_blocks.0.img_mod.1.weight"}, names=PEFT, alpha=None)


def xlabs(base: Tensors) -> Written:
    """The processors of both streams, and of a single block, whose qkv is the first part of a fused layer."""
    double, single = "double_blocks.0.processor", "single_blocks.0.processor"
    tensors, deltas = {}, {}
    for stem, name, rows in (
        (f"{double}.qkv_lora1", "double_blocks.0.img_attn.qkv.weight", 3 * H),
        (f"{double}.qkv_lora2", "double_blocks.0.txt_attn.qkv.weight", 3 * H),
        (f"{double}.proj_lora1", "double_blocks.0.img_attn.proj.weight", H),
        (f"{single}.qkv_lora", "single_blocks.0.linear1.weight", 3 * H),
        (f"{single}.proj_lora", "single_blocks.0.linear2.weight", H),
    ):
        down, up = torch.randn(RANK, base[DIFFUSION + name].shape[1]), torch.randn(rows, RANK)
        tensors |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
        deltas[DIFFUSION + name] = torch.zeros(base[DIFFUSION + name].shape, dtype=torch.float64)
        deltas[DIFFUSION + name][:rows] = up.double() @ down.double()
    return Written(tensors, deltas)


def sd_scripts_anima(base: Tensors) -> Written:
    modules = {
        "lora_unet_blocks_0_self_attn_q_proj": "net.blocks.0.self_attn.q_proj.weight",
        "lora_unet_blocks_0_cross_attn_k_proj": "net.blocks.0.cross_attn.k_proj.weight",
        "lora_unet_llm_adapter_blocks_0_self_attn_q_proj": "net.llm_adapter.blocks.0.self_attn.q_proj.weight",
    }
    return pairs(base, modules)._replace(metadata={"ss_network_module": "networks.lora_anima"})


def diffusers_anima(base: Tensors) -> Written:
    modules = {
        "transformer.transformer_blocks.0.attn2.to_k": "net.blocks.0.cross_attn.k_proj.weight",
        "text_conditioner.blocks.0.self_attn.q_proj": "net.llm_adapter.blocks.0.self_attn.q_proj.weight",
    }
    return pairs(base, modules, names=PEFT, alpha=None)


CASES: list[tuple[Callable[[Tensors], Written], Callable[[], Tensors], str, str]] = [
    (sd_scripts_flux, whole_flux, "sd-scripts", "Flux.1 or similar"),
    (sd_scripts_anima, anima, "sd-scripts", "Anima"),
    (diffusers_anima, anima, "diffusers or PEFT", "Anima"),
    (musubi_hunyuan, hunyuan, "sd-scripts", "HunyuanVideo"),
    (comfy_hunyuan, hunyuan, "sd-scripts or compatible", "Flux.1 or similar"),
    (musubi_wan, wan, "musubi-tuner", "Wan"),
    (videox_fun, wan, "VideoX-Fun", "Wan"),
    (lightx2v, wan, "ai-toolkit or ComfyUI", "Wan"),
    (lycoris_lokr, qwen, "LyCORIS or SimpleTuner", "Qwen-Image"),
    (lycoris_kohya, zimage, "LyCORIS", "Z-Image or Lumina 2"),
    (ai_toolkit, zimage, "ai-toolkit", "Z-Image or Lumina 2"),
    (ai_toolkit_lokr, zimage, "ai-toolkit", "Z-Image or Lumina 2"),
    (diffusers_with_alphas, flux_in_diffusers, "diffusers", "Flux.1, SD3 or similar"),
    (diffusers_wrapped, flux_in_diffusers, "diffusers or PEFT", "Flux.1, SD3 or similar"),
    (diffusers_dora, flux_in_diffusers, "diffusers or PEFT", "Flux.1, SD3 or similar"),
    (simpletuner, flux_in_diffusers, "SimpleTuner", "Flux.1 or similar"),
    (early_diffusers, flux_in_diffusers, "diffusers before 0.22", "Flux.1, SD3 or similar"),
    (earliest_diffusers, flux_in_diffusers, "diffusers before 0.22", "Flux.1, SD3 or similar"),
    (onetrainer_legacy, whole_flux, "OneTrainer", "Flux.1 or similar"),
    (onetrainer_comfy, whole_flux, "OneTrainer", "Flux.1 or similar"),
    (onetrainer_diffusers, whole_flux, "OneTrainer", "Flux.1, SD3 or similar"),
    (onetrainer_original, whole_flux, "OneTrainer", "Flux.1 or similar"),
    (onetrainer_omi, whole_flux, "OneTrainer", "Flux.1 or similar"),
    (comfyui, whole_flux, "ai-toolkit or ComfyUI", "Flux.1 or similar"),
    (bare_names, qwen, "ComfyUI or compatible", "Qwen-Image"),
    (xlabs, whole_flux, "XLabs", "Flux.1 or similar"),
]


@pytest.mark.parametrize(("write", "model", "trainer", "family"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_file_is_recognised_and_baked_exactly(
    write: Callable[[Tensors], Written], model: Callable[[], Tensors], trainer: str, family: str, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    base = model()
    written, file = write(base), tmp_path / "adapter.safetensors"
    save_file(written.tensors, file, dict(written.metadata))
    assert IMAGES.claims(file)
    facts = IMAGES.facts(file)
    assert (facts["trainer"], facts["family"]) == (trainer, family)
    baked = bake(MemoryCheckpoint(base), file)
    assert set(baked.touched()) == set(written.deltas)
    for name, delta in written.deltas.items():
        torch.testing.assert_close(baked[name].double(), base[name].double() + delta, rtol=0, atol=1e-6)
    assert IMAGES.fit(file, MemoryCheckpoint(base))["modules in the base"] == f"{facts['modules']} of {facts['modules']}"


def test_every_layout_of_the_base_gets_the_same_change(tmp_path: Path) -> None:
    """A fused adapter over split rows, and the swapped halves of the last layer."""
    torch.manual_seed(4)
    whole = flux()
    modules = {
        "lora_unet_double_blocks_0_txt_attn_qkv": "double_blocks.0.txt_attn.qkv.weight",
        "lora_unet_single_blocks_0_linear1": "single_blocks.0.linear1.weight",
        "lora_unet_final_layer_adaLN_modulation_1": "final_layer.adaLN_modulation.1.weight",
    }
    written = pairs(whole, modules)
    save_file(written.tensors, tmp_path / "a.safetensors")
    torch.manual_seed(4)
    split = flux_in_diffusers()
    baked = bake(MemoryCheckpoint(split), tmp_path / "a.safetensors")
    parts = {
        "double_blocks.0.txt_attn.qkv.weight": [f"transformer_blocks.0.attn.add_{part}_proj.weight" for part in "qkv"],
        "single_blocks.0.linear1.weight": [
            f"single_transformer_blocks.0.{part}.weight" for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        ],
    }
    for name, places in parts.items():
        found = torch.cat([baked[place] for place in places])
        torch.testing.assert_close(found.double(), whole[name] + written.deltas[name], rtol=0, atol=1e-6)
    name = "final_layer.adaLN_modulation.1.weight"
    expected = torch.cat((whole[name] + written.deltas[name]).chunk(2)[::-1])
    torch.testing.assert_close(baked["norm_out.linear.weight"].double(), expected, rtol=0, atol=1e-6)


def test_hunyuan_of_comfyui_takes_the_names_of_all_three_layouts() -> None:
    base = {
        "double_blocks.0.img_attn.qkv.weight": torch.randn(3 * H, H), "double_blocks.0.txt_mlp.0.weight": torch.randn(MLP, H),
        "txt_in.individual_token_refiner.blocks.0.norm1.weight": torch.randn(H),
        "txt_in.individual_token_refiner.blocks.0.self_attn.qkv.weight": torch.randn(3 * H, H),
        "single_blocks.0.modulation.lin.weight": torch.randn(3 * H, H), "vector_in.in_layer.weight": torch.randn(H, 4),
        "time_in.out_layer.weight": torch.randn(H, H), "txt_in.c_embedder.in_layer.weight": torch.randn(H, TEXT),
    }  # fmt: skip
    targets = Targets(MemoryCheckpoint(base))
    assert targets.family == "HunyuanVideo"
    q, k = (0, H), (H, 2 * H)
    refined = "txt_in.individual_token_refiner.blocks.0.self_attn.qkv.weight"
    for name, (tensor, rows) in {
        "lora_unet_double_blocks_0_img_attn_qkv": ("double_blocks.0.img_attn.qkv.weight", None),
        "transformer.transformer_blocks.0.attn.to_k": ("double_blocks.0.img_attn.qkv.weight", k),
        "lora_unet_double_blocks_0_txt_mlp_fc1": ("double_blocks.0.txt_mlp.0.weight", None),
        "diffusion_model.double_blocks.0.txt_mlp.0": ("double_blocks.0.txt_mlp.0.weight", None),
        "transformer.transformer_blocks.0.ff_context.net.0.proj": ("double_blocks.0.txt_mlp.0.weight", None),
        "transformer.context_embedder.token_refiner.refiner_blocks.0.attn.to_q": (refined, q),
        "lora_unet_txt_in_individual_token_refiner_blocks_0_self_attn_qkv": (refined, None),
        "lora_unet_single_blocks_0_modulation_linear": ("single_blocks.0.modulation.lin.weight", None),
        "lora_unet_time_in_mlp_2": ("time_in.out_layer.weight", None),
        "transformer.time_text_embed.timestep_embedder.linear_2": ("time_in.out_layer.weight", None),
        "lora_unet_txt_in_c_embedder_linear_1": ("txt_in.c_embedder.in_layer.weight", None),
        "transformer.time_text_embed.text_embedder.linear_1": ("vector_in.in_layer.weight", None),
    }.items():
        found = targets.find(name, where=name)
        assert found is not None and found["weight"] == (Place(tensor, rows),), name


def test_the_only_text_encoder_may_be_t5(tmp_path: Path) -> None:
    """As in Chroma: ComfyUI calls it t5xxl, diffusers text_encoder."""
    base = t5("text_encoders.t5xxl.transformer.") | flux(DIFFUSION)
    name = f"{T5}.0.SelfAttention.q.weight"
    for module in ("lora_te1_encoder_block_0_layer_0_SelfAttention_q", "text_encoder.encoder.block.0.layer.0.SelfAttention.q"):
        written = pairs(base, {module: name})
        save_file(written.tensors, tmp_path / "a.safetensors")
        assert bake(MemoryCheckpoint(base), tmp_path / "a.safetensors").touched() == (name,)


def test_a_file_of_split_qkv_is_baked_as_it_says_with_a_note(tmp_path: Path) -> None:
    """sd-scripts fuses three factors of rank r into one of 3r and leaves α as it was."""
    base = flux()
    name, stem = "double_blocks.0.img_attn.qkv.weight", "lora_unet_double_blocks_0_img_attn_qkv"
    down, up = torch.randn(3 * RANK, H), torch.block_diag(*torch.randn(3, H, RANK))
    save_file(
        {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(ALPHA)},
        tmp_path / "a.safetensors",
        {"ss_network_module": "networks.lora_flux", "ss_network_dim": str(RANK), "ss_network_args": '{"split_qkv": "True"}'},
    )
    with pytest.warns(UserWarning, match=r"3 or 4 times weaker"):
        baked = bake(MemoryCheckpoint(base), tmp_path / "a.safetensors")
    delta = ALPHA / (3 * RANK) * up.double() @ down.double()
    torch.testing.assert_close(baked[name].double(), base[name] + delta, rtol=0, atol=1e-6)
    assert "split_qkv" in IMAGES.facts(tmp_path / "a.safetensors")["notes"][0]


@pytest.mark.parametrize(("alpha", "noted"), [(1.0, True), (32.0, False), (9999999999.0, False)])
def test_alpha_of_whole_matrices_is_noted_if_it_looks_meant(alpha: float, noted: bool, tmp_path: Path) -> None:
    stem, name = "lora_unet_layers_0_feed_forward_w1", "layers.0.feed_forward.w1.weight"
    base, one, two = zimage(), torch.randn(1, 3), torch.randn(MLP, 2)
    save_file(
        {f"{stem}.lokr_w1": one, f"{stem}.lokr_w2": two, f"{stem}.alpha": torch.tensor(alpha)},
        tmp_path / "a.safetensors",
        {"ss_network_module": "lycoris.kohya", "ss_network_dim": "32"},
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        baked = bake(MemoryCheckpoint(base), tmp_path / "a.safetensors")
    torch.testing.assert_close(baked[name].double(), base[name] + torch.kron(one.double(), two.double()), rtol=0, atol=1e-6)
    assert ["taken as 1" in str(each.message) for each in caught] == [True] * noted


def test_inspect_shows_how_much_of_an_adapter_a_base_has(tmp_path: Path) -> None:
    base, file = tmp_path / "wan22.safetensors", tmp_path / "a.safetensors"
    save_file(wan(), base)
    image = wan(image=True)
    written = pairs(
        image, {f"diffusion_model.blocks.0.cross_attn.{n}": f"blocks.0.cross_attn.{n}.weight" for n in ("q", "k_img")}
    )
    save_file(written.tensors, file)
    result = CliRunner().invoke(main, ["inspect", str(file), str(base), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert (found["family"], found["family of the base"], found["modules in the base"]) == ("Wan", "Wan", "1 of 2")
    assert found["not in the base"] == "diffusion_model.blocks.0.cross_attn.k_img"
    arguments = ["bake", str(base), str(file), "-o", str(tmp_path / "out.safetensors"), "--quiet"]
    assert CliRunner().invoke(main, arguments).exit_code == 2
    result = CliRunner().invoke(main, [*arguments, "--allow-unmatched"])
    assert result.exit_code == 0, result.output
    name = "blocks.0.cross_attn.q.weight"
    stored: Tensor = load_file(tmp_path / "out.safetensors")[name]
    torch.testing.assert_close(stored.double(), load_file(base)[name] + written.deltas[name], rtol=0, atol=1e-6)


def test_bfl_control_files_are_refused_by_name(tmp_path: Path) -> None:
    stem = "double_blocks.0.img_attn.qkv"
    tensors = {f"{stem}.lora_A.weight": torch.randn(RANK, H), f"{stem}.lora_B.weight": torch.randn(3 * H, RANK)}
    norm = {"double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(3)}
    save_file(tensors | {f"{stem}.lora_B.bias": torch.randn(3 * H)} | norm, tmp_path / "a.safetensors")
    with pytest.raises(BadInput, match=r"control LoRA"):
        bake(MemoryCheckpoint(flux()), tmp_path / "a.safetensors")
