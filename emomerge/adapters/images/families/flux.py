"""Flux.1, Kontext, Chroma and Flux.2: double and single blocks."""

from __future__ import annotations

from collections.abc import Iterable

from emomerge.adapters.images.layouts import Family, Rule, each

_QKV, _ADDED = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
_DOUBLE = {
    "img_attn.qkv": _QKV, "txt_attn.qkv": _ADDED, "img_attn.proj": "attn.to_out.0", "txt_attn.proj": "attn.to_add_out",
    "img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear",
    "img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2",
}  # fmt: skip
_DOUBLE_NORMS = {
    "img_attn.norm.query_norm": "norm_q", "img_attn.norm.key_norm": "norm_k",
    "txt_attn.norm.query_norm": "norm_added_q", "txt_attn.norm.key_norm": "norm_added_k",
}  # fmt: skip
_SINGLE = {
    "linear1": (*_QKV, "proj_mlp"), "linear2": "proj_out", "modulation.lin": "norm.linear",
}  # fmt: skip
_OUTSIDE = {
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "txt_in": "context_embedder", "img_in": "x_embedder", "final_layer.linear": "proj_out",
}  # fmt: skip
_SINGLE_NORMS = {"norm.query_norm": "norm_q", "norm.key_norm": "norm_k"}
_D, _S = "transformer_blocks.{n}", "single_transformer_blocks.{n}"
_SWAPPED = Rule("final_layer.adaLN_modulation.1.{p}", "norm_out.linear.{p}", "halves swapped")
_NORMS = [
    *each("double_blocks.{n}.{}.scale", _DOUBLE_NORMS, f"{_D}.attn.{{}}.weight"),
    *each("single_blocks.{n}.{}.scale", _SINGLE_NORMS, f"{_S}.attn.{{}}.weight"),
]


def _flux(_: Iterable[str]) -> list[Rule]:
    return [
        *each("double_blocks.{n}.{}.{p}", _DOUBLE, f"{_D}.{{}}.{{p}}"),
        *each("single_blocks.{n}.{}.{p}", _SINGLE, f"{_S}.{{}}.{{p}}"),
        *_NORMS,
        *each("{}.{p}", _OUTSIDE, "{}.{p}"),
        _SWAPPED,
    ]


def _xlabs(_: Iterable[str]) -> list[Rule]:
    """Return the table of the rows of q, k and v in `linear1`, to which XLabs gives a name of their own."""
    own = "single_blocks.{n}.linear1_qkv.{p}"
    return [
        Rule(own, tuple(f"{_S}.{part}.{{p}}" for part in _QKV)),
        Rule("single_blocks.{n}.linear1.{p}", (own, "single_blocks.{n}.linear1_mlp.{p}")),
    ]


_DISTILLED = {"in_layer": "linear_1", "out_layer": "linear_2"}


def _chroma(names: Iterable[str]) -> list[Rule]:
    guidance = "distilled_guidance_layer"
    return [
        *_flux(names),
        *each(f"{guidance}.layers.{{n}}.{{}}.{{p}}", _DISTILLED, f"{guidance}.layers.{{n}}.{{}}.{{p}}"),
        Rule(f"{guidance}.norms.{{n}}.scale", f"{guidance}.norms.{{n}}.weight"),
    ]


_DOUBLE_2 = _DOUBLE | {
    "img_mlp.0": "ff.linear_in", "img_mlp.2": "ff.linear_out",
    "txt_mlp.0": "ff_context.linear_in", "txt_mlp.2": "ff_context.linear_out",
}  # fmt: skip
_OUTSIDE_2 = {
    "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
}  # fmt: skip


def _flux2(_: Iterable[str]) -> list[Rule]:
    return [
        *each("double_blocks.{n}.{}.{p}", _DOUBLE_2, f"{_D}.{{}}.{{p}}"),
        *each("single_blocks.{n}.{}.{p}", {"linear1": "to_qkv_mlp_proj", "linear2": "to_out"}, f"{_S}.attn.{{}}.{{p}}"),
        *_NORMS,
        *each("{}.{p}", _OUTSIDE_2, "{}.{p}"),
        _SWAPPED,
    ]


FAMILIES = (
    Family("Flux.2", ("double_stream_modulation_img.lin.weight", "double_stream_modulation_img.linear.weight"), _flux2),
    Family("Chroma", ("distilled_guidance_layer.{*}",), _chroma),
    Family(
        "Flux.1",
        ("double_blocks.0.img_attn.qkv.weight", "single_transformer_blocks.0.proj_mlp.weight"),
        _flux,
        (_xlabs,),
    ),
)
