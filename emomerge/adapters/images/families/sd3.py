"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Iterable

from emomerge.adapters.images.layouts import Family, Order, Rule, each

_X = {
    "attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "attn.ln_q": "attn.norm_q", "attn.ln_k": "attn.norm_k",
    "attn.proj": "attn.to_out.0", "attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"), "attn2.ln_q": "attn2.norm_q",
    "attn2.ln_k": "attn2.norm_k", "attn2.proj": "attn2.to_out.0", "adaLN_modulation.1": "norm1.linear",
    "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2",
}  # fmt: skip
_CONTEXT = {
    "attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "attn.ln_q": "attn.norm_added_q",
    "attn.ln_k": "attn.norm_added_k", "attn.proj": "attn.to_add_out", "mlp.fc1": "ff_context.net.0.proj",
    "mlp.fc2": "ff_context.net.2",
}  # fmt: skip
_OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj", "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2", "final_layer.linear": "proj_out",
}  # fmt: skip


def _rules(names: Iterable[str]) -> list[Rule]:
    numbers = [int(name.split(".")[1]) for name in names if name.startswith(("joint_blocks.", "transformer_blocks."))]
    rules = [
        *each("joint_blocks.{n}.x_block.{}.{p}", _X, "transformer_blocks.{n}.{}.{p}"),
        *each("joint_blocks.{n}.context_block.{}.{p}", _CONTEXT, "transformer_blocks.{n}.{}.{p}"),
        *each("{}.{p}", _OUTSIDE, "{}.{p}"),
        Rule("pos_embed", "pos_embed.pos_embed"),
        Rule("final_layer.adaLN_modulation.1.{p}", "norm_out.linear.{p}", "halves swapped"),
    ]
    for number in set(numbers):  # the context of the last block has only a scale and a shift, which diffusers swaps
        original = f"joint_blocks.{number}.context_block.adaLN_modulation.1.{{p}}"
        order: Order = "halves swapped" if number == max(numbers) else "same"
        rules.append(Rule(original, f"transformer_blocks.{number}.norm1_context.linear.{{p}}", order))
    return rules


FAMILIES = (Family("SD3", ("joint_blocks.0.x_block.attn.qkv.weight", "pos_embed.proj.weight"), _rules),)
