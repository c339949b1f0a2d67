"""HunyuanVideo, FramePack and HunyuanImage: in Tencent's layout, in ComfyUI's, and in diffusers'."""

from __future__ import annotations

from collections.abc import Iterable

from emomerge.adapters.images.layouts import Family, Rule, each

_QKV, _ADDED = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
_DOUBLE = {
    "img_attn_qkv": _QKV, "txt_attn_qkv": _ADDED, "img_attn_proj": "attn.to_out.0", "txt_attn_proj": "attn.to_add_out",
    "img_mod.linear": "norm1.linear", "txt_mod.linear": "norm1_context.linear",
    "img_mlp.fc1": "ff.net.0.proj", "img_mlp.fc2": "ff.net.2",
    "txt_mlp.fc1": "ff_context.net.0.proj", "txt_mlp.fc2": "ff_context.net.2",
}  # fmt: skip
_SINGLE = {"linear1": (*_QKV, "proj_mlp"), "linear2": "proj_out", "modulation.linear": "norm.linear"}
_REFINER = {
    "self_attn_qkv": _QKV, "self_attn_proj": "attn.to_out.0", "norm1": "norm1", "norm2": "norm2",
    "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2", "adaLN_modulation.1": "norm_out.linear",
}  # fmt: skip
_TEXT, _TIME = "context_embedder.time_text_embed", "time_text_embed"
_OUTSIDE = {
    "img_in.proj": "x_embedder.proj", "final_layer.linear": "proj_out", "txt_in.input_embedder": "context_embedder.proj_in",
    "time_in.mlp.0": f"{_TIME}.timestep_embedder.linear_1", "time_in.mlp.2": f"{_TIME}.timestep_embedder.linear_2",
    "guidance_in.mlp.0": f"{_TIME}.guidance_embedder.linear_1", "guidance_in.mlp.2": f"{_TIME}.guidance_embedder.linear_2",
    "vector_in.in_layer": f"{_TIME}.text_embedder.linear_1", "vector_in.out_layer": f"{_TIME}.text_embedder.linear_2",
    "txt_in.t_embedder.mlp.0": f"{_TEXT}.timestep_embedder.linear_1",
    "txt_in.t_embedder.mlp.2": f"{_TEXT}.timestep_embedder.linear_2",
    "txt_in.c_embedder.linear_1": f"{_TEXT}.text_embedder.linear_1",
    "txt_in.c_embedder.linear_2": f"{_TEXT}.text_embedder.linear_2",
}  # fmt: skip
_NORMS = {
    "double_blocks.{n}.img_attn_q_norm": "transformer_blocks.{n}.attn.norm_q",
    "double_blocks.{n}.img_attn_k_norm": "transformer_blocks.{n}.attn.norm_k",
    "double_blocks.{n}.txt_attn_q_norm": "transformer_blocks.{n}.attn.norm_added_q",
    "double_blocks.{n}.txt_attn_k_norm": "transformer_blocks.{n}.attn.norm_added_k",
    "single_blocks.{n}.q_norm": "single_transformer_blocks.{n}.attn.norm_q",
    "single_blocks.{n}.k_norm": "single_transformer_blocks.{n}.attn.norm_k",
}
_REFINED = "txt_in.individual_token_refiner.blocks.{n}"


def _rules(_: Iterable[str]) -> list[Rule]:
    return [
        *each("double_blocks.{n}.{}.{p}", _DOUBLE, "transformer_blocks.{n}.{}.{p}"),
        *each("single_blocks.{n}.{}.{p}", _SINGLE, "single_transformer_blocks.{n}.{}.{p}"),
        *each(f"{_REFINED}.{{}}.{{p}}", _REFINER, "context_embedder.token_refiner.refiner_blocks.{n}.{}.{p}"),
        *each("{}.{p}", _OUTSIDE, "{}.{p}"),
        *each("{}.weight", _NORMS, "{}.weight"),
        Rule("final_layer.adaLN_modulation.1.{p}", "norm_out.linear.{p}", "halves swapped"),
    ]


_COMFY = (
    ("txt_in.t_embedder.mlp.0.", "txt_in.t_embedder.in_layer."), ("txt_in.t_embedder.mlp.2.", "txt_in.t_embedder.out_layer."),
    ("txt_in.c_embedder.linear_1.", "txt_in.c_embedder.in_layer."),
    ("txt_in.c_embedder.linear_2.", "txt_in.c_embedder.out_layer."),
    ("_in.mlp.0.", "_in.in_layer."), ("_in.mlp.2.", "_in.out_layer."),
    ("_mod.linear.", "_mod.lin."), (".modulation.linear.", ".modulation.lin."), ("mlp.fc1.", "mlp.0."), ("mlp.fc2.", "mlp.2."),
    ("_attn_qkv.", "_attn.qkv."), ("_attn_proj.", "_attn.proj."),
    ("_attn_q_norm.weight", "_attn.norm.query_norm.scale"), ("_attn_k_norm.weight", "_attn.norm.key_norm.scale"),
    (".q_norm.weight", ".norm.query_norm.scale"), (".k_norm.weight", ".norm.key_norm.scale"),
)  # fmt: skip
"""What ComfyUI replaces in the original names, to have those of Flux."""


def _comfy(names: Iterable[str]) -> list[Rule]:
    """Return the table of ComfyUI's layout against both others."""
    rules = []
    for rule in _rules(names):
        name = rule.original
        for old, new in _COMFY:
            name = name.replace(old, new)
        rules.append(rule._replace(original=name))
        if name != rule.original:
            rules.append(Rule(name, rule.original))
    return rules


FAMILIES = (
    Family(
        "HunyuanVideo",
        (
            "double_blocks.0.img_attn_qkv.weight", "txt_in.individual_token_refiner.blocks.0.norm1.weight",
            "context_embedder.token_refiner.refiner_blocks.0.norm1.weight",
        ),
        _rules, (_comfy,),
    ),
)  # fmt: skip
