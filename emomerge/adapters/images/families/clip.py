"""Text encoders: CLIP in transformers' layout, which version 5 writes without `text_model.`, and in OpenCLIP's; T5."""

from __future__ import annotations

from collections.abc import Iterable

from emomerge.adapters.images.layouts import Family, Rule

_OPEN, _LAYER = "model.transformer.resblocks.{n}", "text_model.encoder.layers.{n}"
_WHOLE = ("embeddings", "encoder", "final_layer_norm")


def _rules(_: Iterable[str]) -> list[Rule]:
    return [
        Rule("transformer.text_model.{*}", "text_model.{*}"),
        *(Rule(f"{name}.{{*}}", f"text_model.{name}.{{*}}") for name in _WHOLE),
        Rule(f"{_OPEN}.attn.in_proj_{{p}}", tuple(f"{_LAYER}.self_attn.{each}_proj.{{p}}" for each in "qkv")),
        Rule(f"{_OPEN}.attn.out_proj.{{p}}", f"{_LAYER}.self_attn.out_proj.{{p}}"),
        Rule(f"{_OPEN}.mlp.c_fc.{{p}}", f"{_LAYER}.mlp.fc1.{{p}}"),
        Rule(f"{_OPEN}.mlp.c_proj.{{p}}", f"{_LAYER}.mlp.fc2.{{p}}"),
        Rule(f"{_OPEN}.ln_1.{{p}}", f"{_LAYER}.layer_norm1.{{p}}"),
        Rule(f"{_OPEN}.ln_2.{{p}}", f"{_LAYER}.layer_norm2.{{p}}"),
        Rule("model.ln_final.{p}", "text_model.final_layer_norm.{p}"),
        Rule("model.token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
        Rule("model.positional_embedding", "text_model.embeddings.position_embedding.weight"),
        Rule("model.text_projection", "text_projection.weight", "transposed"),
        Rule("transformer.text_projection.weight", "text_projection.weight"),
    ]


def _others(_: Iterable[str]) -> list[Rule]:
    return [Rule(f"transformer.{name}.{{*}}", f"{name}.{{*}}") for name in ("encoder", "shared", "model")]


FAMILIES = (
    Family(
        "CLIP",
        (
            "transformer.text_model.final_layer_norm.weight", "text_model.final_layer_norm.weight",
            "final_layer_norm.weight", "model.ln_final.weight",
        ),
        _rules,
    ),
    Family(
        "T5 or language model",
        ("transformer.shared.weight", "transformer.model.embed_tokens.weight", "shared.weight", "model.embed_tokens.weight"),
        _others,
    ),
)  # fmt: skip
