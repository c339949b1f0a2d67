"""Anima, whose denoiser is that of Cosmos Predict 2."""

from __future__ import annotations

from collections.abc import Iterable

from emomerge.adapters.images.layouts import Family, Rule, each

_PROJECTIONS = {
    "q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "output_proj": "to_out.0", "q_norm": "norm_q", "k_norm": "norm_k",
}  # fmt: skip
_BLOCK = {
    **{f"self_attn.{name}": f"attn1.{other}" for name, other in _PROJECTIONS.items()},
    **{f"cross_attn.{name}": f"attn2.{other}" for name, other in _PROJECTIONS.items()},
    "adaln_modulation_self_attn.1": "norm1.linear_1", "adaln_modulation_self_attn.2": "norm1.linear_2",
    "adaln_modulation_cross_attn.1": "norm2.linear_1", "adaln_modulation_cross_attn.2": "norm2.linear_2",
    "adaln_modulation_mlp.1": "norm3.linear_1", "adaln_modulation_mlp.2": "norm3.linear_2",
    "mlp.layer1": "ff.net.0.proj", "mlp.layer2": "ff.net.2",
}  # fmt: skip


def _rules(_: Iterable[str]) -> list[Rule]:
    return [
        *each("blocks.{n}.{}.{p}", _BLOCK, "transformer_blocks.{n}.{}.{p}"),
        Rule("t_embedder.1.{*}", "time_embed.t_embedder.{*}"),
        Rule("t_embedding_norm.{p}", "time_embed.norm.{p}"),
        Rule("x_embedder.proj.1.{p}", "patch_embed.proj.{p}"),
        Rule("final_layer.adaln_modulation.1.{p}", "norm_out.linear_1.{p}"),
        Rule("final_layer.adaln_modulation.2.{p}", "norm_out.linear_2.{p}"),
        Rule("final_layer.linear.{p}", "proj_out.{p}"),
    ]


FAMILIES = (
    Family("Anima", ("blocks.0.adaln_modulation_self_attn.1.weight", "transformer_blocks.0.norm1.linear_1.weight"), _rules),
)
