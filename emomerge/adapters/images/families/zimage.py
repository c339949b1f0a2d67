"""Z-Image and Lumina 2, whose layers fuse the query, key and value of attention."""

from __future__ import annotations

from collections.abc import Iterable

from emomerge.adapters.images.layouts import Family, Rule, each

_STACKS = ("layers", "noise_refiner", "context_refiner")
_ATTENTION = {"qkv": ("to_q", "to_k", "to_v"), "out": "to_out.0", "q_norm": "norm_q", "k_norm": "norm_k"}


def _zimage(_: Iterable[str]) -> list[Rule]:
    return [
        *(rule for stack in _STACKS
          for rule in each(f"{stack}.{{n}}.attention.{{}}.{{p}}", _ATTENTION, f"{stack}.{{n}}.attention.{{}}.{{p}}")),
        Rule("final_layer.{*}", "all_final_layer.2-1.{*}"),
        Rule("x_embedder.{p}", "all_x_embedder.2-1.{p}"),
    ]  # fmt: skip


_LAYER = {
    "attention.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attention.out": "attn.to_out.0", "attention.q_norm": "attn.norm_q",
    "attention.k_norm": "attn.norm_k", "feed_forward.w1": "feed_forward.linear_1", "feed_forward.w2": "feed_forward.linear_2",
    "feed_forward.w3": "feed_forward.linear_3", "attention_norm2": "norm2", "adaLN_modulation.1": "norm1.linear",
}  # fmt: skip
_OUTSIDE = {
    "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
    "cap_embedder.0": "time_caption_embed.caption_embedder.0", "cap_embedder.1": "time_caption_embed.caption_embedder.1",
    "final_layer.adaLN_modulation.1": "norm_out.linear_1", "final_layer.linear": "norm_out.linear_2",
}  # fmt: skip


def _lumina(_: Iterable[str]) -> list[Rule]:
    rules = [*each("{}.{p}", _OUTSIDE, "{}.{p}")]
    for stack in _STACKS:
        first = "norm1" if stack == "context_refiner" else "norm1.norm"
        layer = _LAYER | {"attention_norm1": first}
        rules += each(f"{stack}.{{n}}.{{}}.{{p}}", layer, f"{stack}.{{n}}.{{}}.{{p}}")
    return rules


FAMILIES = (
    Family("Lumina 2", ("layers.0.attn.to_q.weight", "time_caption_embed.caption_embedder.0.weight"), _lumina),
    Family("Z-Image", ("x_pad_token", "all_x_embedder.2-1.weight", "layers.0.attention.to_q.weight"), _zimage),
    Family("Lumina 2", ("layers.0.attention.qkv.weight",), _lumina),
)
