"""Wan 2.1 and 2.2."""

from __future__ import annotations

from collections.abc import Iterable

from emomerge.adapters.images.layouts import Family, Rule, each

_PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
_IMAGE = {"k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"}
_BLOCK = {
    **{f"self_attn.{name}": f"attn1.{other}" for name, other in _PROJECTIONS.items()},
    **{f"cross_attn.{name}": f"attn2.{other}" for name, other in (_PROJECTIONS | _IMAGE).items()},
    "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2", "norm3": "norm2", "before_proj": "proj_in", "after_proj": "proj_out",
}  # fmt: skip
_CONDITION = "condition_embedder"
_OUTSIDE = {
    "time_embedding.0": f"{_CONDITION}.time_embedder.linear_1", "time_embedding.2": f"{_CONDITION}.time_embedder.linear_2",
    "text_embedding.0": f"{_CONDITION}.text_embedder.linear_1", "text_embedding.2": f"{_CONDITION}.text_embedder.linear_2",
    "time_projection.1": f"{_CONDITION}.time_proj", "head.head": "proj_out",
    "img_emb.proj.0": f"{_CONDITION}.image_embedder.norm1", "img_emb.proj.1": f"{_CONDITION}.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": f"{_CONDITION}.image_embedder.ff.net.2", "img_emb.proj.4": f"{_CONDITION}.image_embedder.norm2",
}  # fmt: skip


def _rules(_: Iterable[str]) -> list[Rule]:
    return [
        *each("blocks.{n}.{}.{p}", _BLOCK, "blocks.{n}.{}.{p}"),
        *each("vace_blocks.{n}.{}.{p}", _BLOCK, "vace_blocks.{n}.{}.{p}"),
        Rule("blocks.{n}.modulation", "blocks.{n}.scale_shift_table"),
        Rule("vace_blocks.{n}.modulation", "vace_blocks.{n}.scale_shift_table"),
        *each("{}.{p}", _OUTSIDE, "{}.{p}"),
        Rule("head.modulation", "scale_shift_table"),
    ]


FAMILIES = (Family("Wan", ("blocks.0.cross_attn.norm_q.weight", f"{_CONDITION}.time_proj.weight"), _rules),)
