"""One block of each transformer with the true names of its family, and small widths that differ where they can."""

from __future__ import annotations

import torch
from image_models import Tensors, linear
from torch import Tensor

H, MLP, TEXT = 6, 11, 7
DIFFUSION = "model.diffusion_model."


def flux(prefix: str = "") -> Tensors:
    """Flux.1 in the original layout: a double and a single block."""
    found = linear("img_in", H, 4) | linear("txt_in", H, TEXT) | linear("final_layer.adaLN_modulation.1", 2 * H, H)
    for part in ("img", "txt"):
        block = f"double_blocks.0.{part}"
        found |= (
            linear(f"{block}_attn.qkv", 3 * H, H) | linear(f"{block}_attn.proj", H, H) | linear(f"{block}_mod.lin", 6 * H, H)
        )
        found |= linear(f"{block}_mlp.0", MLP, H) | linear(f"{block}_mlp.2", H, MLP)
        found |= {f"{block}_attn.norm.{which}_norm.scale": torch.rand(3) + 0.5 for which in ("query", "key")}
    found |= linear("single_blocks.0.linear1", 3 * H + MLP, H) | linear("single_blocks.0.linear2", H, H + MLP)
    found |= linear("single_blocks.0.modulation.lin", 3 * H, H)
    return {prefix + name: tensor for name, tensor in found.items()}


def flux_in_diffusers() -> Tensors:
    """Flux.1 in diffusers' layout, with the same values as `flux()` after the same seed."""
    whole = flux()
    found = {"single_transformer_blocks.0.norm.linear.weight": whole["single_blocks.0.modulation.lin.weight"]}
    for names, fused in (
        (("to_q", "to_k", "to_v"), "img_attn"), (("add_q_proj", "add_k_proj", "add_v_proj"), "txt_attn"),
    ):  # fmt: skip
        for name, rows in zip(names, whole[f"double_blocks.0.{fused}.qkv.weight"].chunk(3), strict=True):
            found[f"transformer_blocks.0.attn.{name}.weight"] = rows.clone()
    single = whole["single_blocks.0.linear1.weight"].split([H, H, H, MLP])
    for name, rows in zip(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), single, strict=True):
        found[f"single_transformer_blocks.0.{name}.weight"] = rows.clone()
    found["single_transformer_blocks.0.proj_out.weight"] = whole["single_blocks.0.linear2.weight"]
    for name, other in {
        "img_attn.proj": "attn.to_out.0",
        "txt_attn.proj": "attn.to_add_out",
        "img_mlp.0": "ff.net.0.proj",
    }.items():
        found[f"transformer_blocks.0.{other}.weight"] = whole[f"double_blocks.0.{name}.weight"]
    swapped = whole["final_layer.adaLN_modulation.1.weight"].chunk(2)
    return found | {"norm_out.linear.weight": torch.cat(swapped[::-1])}


def hunyuan() -> Tensors:
    """HunyuanVideo in Tencent's layout."""
    found = linear("txt_in.individual_token_refiner.blocks.0.self_attn_qkv", 3 * H, H) | linear("img_in.proj", H, 4, 1, 2, 2)
    for part in ("img", "txt"):
        block = f"double_blocks.0.{part}"
        found |= (
            linear(f"{block}_attn_qkv", 3 * H, H) | linear(f"{block}_attn_proj", H, H) | linear(f"{block}_mod.linear", 6 * H, H)
        )
        found |= linear(f"{block}_mlp.fc1", MLP, H) | linear(f"{block}_mlp.fc2", H, MLP)
    found |= linear("single_blocks.0.linear1", 3 * H + MLP, H) | linear("single_blocks.0.linear2", H, H + MLP)
    return found | linear("single_blocks.0.modulation.linear", 3 * H, H)


def wan(*, image: bool = False) -> Tensors:
    """Wan in the original layout; `image` adds what only 2.1's image-to-video models have."""
    found = linear("time_projection.1", 6 * H, H) | {"blocks.0.modulation": torch.randn(1, 6, H)}
    for attention in ("self_attn", "cross_attn"):
        for name in "qkvo":
            found |= linear(f"blocks.0.{attention}.{name}", H, H)
        found |= {f"blocks.0.{attention}.norm_q.weight": torch.rand(H) + 0.5}
    if image:
        found |= linear("blocks.0.cross_attn.k_img", H, H) | linear("blocks.0.cross_attn.v_img", H, H)
    return found | linear("blocks.0.ffn.0", MLP, H) | linear("blocks.0.ffn.2", H, MLP)


def qwen() -> Tensors:
    """Qwen-Image, in its only layout."""
    found = linear("img_in", H, 4)
    for name in ("img_mod.1", "txt_mod.1"):
        found |= linear(f"transformer_blocks.0.{name}", 6 * H, H)
    for name in ("to_q", "to_k", "to_v", "add_q_proj", "to_out.0"):
        found |= linear(f"transformer_blocks.0.attn.{name}", H, H)
    return found | linear("transformer_blocks.0.img_mlp.net.0.proj", MLP, H)


def zimage() -> Tensors:
    """Z-Image in the single file's layout."""
    found = {"x_pad_token": torch.randn(1, H)} | linear("layers.0.attention.qkv", 3 * H, H, bias=False)
    return found | linear("layers.0.attention.out", H, H, bias=False) | linear("layers.0.feed_forward.w1", MLP, H, bias=False)


def anima(prefix: str = "net.") -> Tensors:
    """Anima in a single file."""
    found = linear("x_embedder.proj.1", H, 4, bias=False) | linear("blocks.0.mlp.layer1", MLP, H, bias=False)
    for attention, context in (("self_attn", H), ("cross_attn", TEXT)):
        for name, columns in (("q_proj", H), ("k_proj", context), ("v_proj", context), ("output_proj", H)):
            found |= linear(f"blocks.0.{attention}.{name}", H, columns, bias=False)
    found |= linear("blocks.0.adaln_modulation_self_attn.1", 4, H, bias=False)
    found |= linear("llm_adapter.blocks.0.self_attn.q_proj", TEXT, TEXT, bias=False)
    return {prefix + name: tensor for name, tensor in found.items()}


def t5(prefix: str) -> Tensors:
    """A T5 text encoder of one block."""
    block = "encoder.block.0.layer"
    found = {"shared.weight": torch.randn(9, TEXT)} | linear(f"{block}.0.SelfAttention.q", TEXT, TEXT, bias=False)
    found |= linear(f"{block}.1.DenseReluDense.wi_0", MLP, TEXT, bias=False)
    return {prefix + name: tensor for name, tensor in found.items()}


def factors(weight: Tensor, rank: int = 2) -> tuple[Tensor, Tensor]:
    """Down (r, in, *kernel) and up (out, r) for a weight."""
    return torch.randn(rank, *weight.shape[1:]), torch.randn(len(weight), rank, *(1,) * (weight.ndim - 2))
