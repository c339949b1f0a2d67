"""Models with the true tensor names of their families and small widths, all of them distinct."""

from __future__ import annotations

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
UNET, TE1, TE2 = "model.diffusion_model.", "conditioner.embedders.0.", "conditioner.embedders.1."
CONTEXT, TIME, ADDED = 7, 11, 13
VOCABULARY, POSITIONS = 9, 6


def linear(name: str, out: int, into: int, *kernel: int, bias: bool = True) -> Tensors:
    found = {f"{name}.weight": torch.randn(out, into, *kernel) * 0.1}
    return found | ({f"{name}.bias": torch.randn(out) * 0.1} if bias else {})


def norm(name: str, size: int) -> Tensors:
    return {f"{name}.weight": torch.rand(size) + 0.5, f"{name}.bias": torch.randn(size)}


def _resnet(name: str, into: int, out: int) -> Tensors:
    found = norm(f"{name}.in_layers.0", into) | linear(f"{name}.in_layers.2", out, into, 3, 3)
    found |= linear(f"{name}.emb_layers.1", out, TIME) | norm(f"{name}.out_layers.0", out)
    found |= linear(f"{name}.out_layers.3", out, out, 3, 3)
    return found | (linear(f"{name}.skip_connection", out, into, 1, 1) if into != out else {})


def _attention(name: str, width: int, depth: int, *, conv: bool = False) -> Tensors:
    kernel = (1, 1) if conv else ()
    found = norm(f"{name}.norm", width) | linear(f"{name}.proj_in", width, width, *kernel)
    for number in range(depth):
        block = f"{name}.transformer_blocks.{number}"
        for attention, context in (("attn1", width), ("attn2", CONTEXT)):
            found |= linear(f"{block}.{attention}.to_q", width, width, bias=False)
            found |= linear(f"{block}.{attention}.to_k", width, context, bias=False)
            found |= linear(f"{block}.{attention}.to_v", width, context, bias=False)
            found |= linear(f"{block}.{attention}.to_out.0", width, width)
        found |= linear(f"{block}.ff.net.0.proj", 8 * width, width) | linear(f"{block}.ff.net.2", width, 4 * width)
        for norms in ("norm1", "norm2", "norm3"):
            found |= norm(f"{block}.{norms}", width)
    return found | linear(f"{name}.proj_out", width, width, *kernel)


def unet(widths: tuple[int, ...], depths: tuple[int, ...], middle: int, *, xl: bool) -> Tensors:
    """The UNet of an LDM checkpoint, without prefix: two residual blocks on each level, with attention where depth is not 0."""
    found = linear("time_embed.0", TIME, widths[0]) | linear("time_embed.2", TIME, TIME)
    found |= linear("label_emb.0.0", TIME, ADDED) | linear("label_emb.0.2", TIME, TIME) if xl else {}
    found |= linear("input_blocks.0.0", widths[0], 4, 3, 3)
    skips, current, number = [widths[0]], widths[0], 1
    for level, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for _ in range(2):
            found |= _resnet(f"input_blocks.{number}.0", current, width)
            found |= _attention(f"input_blocks.{number}.1", width, depth, conv=not xl) if depth else {}
            current, number = width, number + 1
            skips.append(current)
        if level < len(widths) - 1:
            found |= linear(f"input_blocks.{number}.0.op", current, current, 3, 3)
            number += 1
            skips.append(current)
    found |= _resnet("middle_block.0", current, current) | _resnet("middle_block.2", current, current)
    found |= _attention("middle_block.1", current, middle, conv=not xl)
    number = 0
    for level in reversed(range(len(widths))):
        for layer in range(3):
            found |= _resnet(f"output_blocks.{number}.0", current + skips.pop(), widths[level])
            current = widths[level]
            found |= _attention(f"output_blocks.{number}.1", current, depths[level], conv=not xl) if depths[level] else {}
            if level and layer == 2:
                found |= linear(f"output_blocks.{number}.{2 if depths[level] else 1}.conv", current, current, 3, 3)
            number += 1
    return found | norm("out.0", current) | linear("out.2", 4, current, 3, 3)


def clip(prefix: str, width: int, layers: int) -> Tensors:
    """A CLIP text encoder as transformers stores it."""
    found = {
        f"{prefix}embeddings.token_embedding.weight": torch.randn(VOCABULARY, width),
        f"{prefix}embeddings.position_embedding.weight": torch.randn(POSITIONS, width),
    } | norm(f"{prefix}final_layer_norm", width)
    for number in range(layers):
        layer = f"{prefix}encoder.layers.{number}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= linear(f"{layer}.self_attn.{projection}", width, width)
        found |= norm(f"{layer}.layer_norm1", width) | norm(f"{layer}.layer_norm2", width)
        found |= linear(f"{layer}.mlp.fc1", 4 * width, width) | linear(f"{layer}.mlp.fc2", width, 4 * width)
    return found


def open_clip(width: int, layers: int) -> Tensors:
    """A CLIP text encoder as OpenCLIP stores it."""
    found = {
        "logit_scale": torch.tensor(4.6), "positional_embedding": torch.randn(POSITIONS, width),
        "text_projection": torch.randn(width, width + 2), "token_embedding.weight": torch.randn(VOCABULARY, width),
    } | norm("ln_final", width)  # fmt: skip
    for number in range(layers):
        block = f"transformer.resblocks.{number}"
        found |= {f"{block}.attn.in_proj_weight": torch.randn(3 * width, width) * 0.1}
        found |= {f"{block}.attn.in_proj_bias": torch.randn(3 * width)} | linear(f"{block}.attn.out_proj", width, width)
        found |= norm(f"{block}.ln_1", width) | norm(f"{block}.ln_2", width)
        found |= linear(f"{block}.mlp.c_fc", 4 * width, width) | linear(f"{block}.mlp.c_proj", width, 4 * width)
    return found


def _vae_resnet(name: str, into: int, out: int) -> Tensors:
    found = norm(f"{name}.norm1", into) | linear(f"{name}.conv1", out, into, 3, 3)
    found |= norm(f"{name}.norm2", out) | linear(f"{name}.conv2", out, out, 3, 3)
    return found | (linear(f"{name}.nin_shortcut", out, into, 1, 1) if into != out else {})


def _vae_middle(name: str, width: int) -> Tensors:
    found = _vae_resnet(f"{name}.block_1", width, width) | _vae_resnet(f"{name}.block_2", width, width)
    found |= norm(f"{name}.attn_1.norm", width)
    for projection in ("q", "k", "v", "proj_out"):
        found |= linear(f"{name}.attn_1.{projection}", width, width, 1, 1)
    return found


def autoencoder(widths: tuple[int, ...], layers: int) -> Tensors:
    """The autoencoder of an LDM checkpoint, without prefix."""
    found = linear("quant_conv", 8, 8, 1, 1) | linear("post_quant_conv", 4, 4, 1, 1)
    found |= linear("encoder.conv_in", widths[0], 3, 3, 3) | linear("decoder.conv_in", widths[-1], 4, 3, 3)
    current = widths[0]
    for level, width in enumerate(widths):
        for layer in range(layers):
            found |= _vae_resnet(f"encoder.down.{level}.block.{layer}", current, width)
            current = width
        found |= linear(f"encoder.down.{level}.downsample.conv", width, width, 3, 3) if level < len(widths) - 1 else {}
    found |= _vae_middle("encoder.mid", current) | _vae_middle("decoder.mid", current)
    found |= norm("encoder.norm_out", current) | linear("encoder.conv_out", 8, current, 3, 3)
    for level, width in reversed([*enumerate(widths)]):
        for layer in range(layers + 1):
            found |= _vae_resnet(f"decoder.up.{level}.block.{layer}", current, width)
            current = width
        found |= linear(f"decoder.up.{level}.upsample.conv", width, width, 3, 3) if level else {}
    return found | norm("decoder.norm_out", current) | linear("decoder.conv_out", 3, current, 3, 3)


def sdxl(
    widths: tuple[int, int, int] = (3, 4, 6), encoders: tuple[int, int] = (2, 5), vae: tuple[int, ...] = (3, 5),
    vae_layers: int = 1,
) -> Tensors:  # fmt: skip
    """A whole SDXL checkpoint with all names of its UNet and text encoders; the autoencoder has fewer levels and layers."""
    found = {UNET + name: tensor for name, tensor in unet(widths, (0, 2, 10), 10, xl=True).items()}
    found |= clip(f"{TE1}transformer.text_model.", encoders[0], 12)
    found |= {f"{TE2}model.{name}": t for name, t in open_clip(encoders[1], 32).items()}
    found[f"{TE1}transformer.text_model.embeddings.position_ids"] = torch.arange(POSITIONS).unsqueeze(0)
    found |= {f"first_stage_model.{name}": tensor for name, tensor in autoencoder(vae, vae_layers).items()}
    return found | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}


def sd15() -> Tensors:
    """A whole SD1.5 checkpoint."""
    found = {UNET + name: tensor for name, tensor in unet((3, 4, 6, 6), (1, 1, 1, 0), 1, xl=False).items()}
    found |= clip("cond_stage_model.transformer.text_model.", 5, 12)
    return found | linear("first_stage_model.decoder.conv_in", 3, 4, 3, 3)


def lora(module: str, weight: Tensor, rank: int = 2, alpha: float | None = 1.5) -> Tensors:
    """The factors of one module in kohya's spelling, and α ≠ r."""
    up = torch.randn(len(weight), rank, *(1,) * (weight.ndim - 2))
    found = {f"{module}.lora_down.weight": torch.randn(rank, *weight.shape[1:]), f"{module}.lora_up.weight": up}
    return found | ({} if alpha is None else {f"{module}.alpha": torch.tensor(alpha)})


def effect(adapter: Tensors, module: str, shape: tuple[int, ...] | None = None) -> Tensor:
    """ΔW of one module, from the formula."""
    up, down = adapter[f"{module}.lora_up.weight"].double(), adapter[f"{module}.lora_down.weight"].double()
    scale = float(adapter[f"{module}.alpha"]) / len(down) if f"{module}.alpha" in adapter else 1.0
    product = scale * up.flatten(1) @ down.flatten(1)
    return product.reshape(shape or (len(up), *down.shape[1:]))
