"""The UNets of Stable Diffusion 1.5, 2 and XL."""

from __future__ import annotations

from collections.abc import Iterable

from emomerge.adapters.images.layouts import Family, Rule, each

_RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
_LEVELS, _LAYERS = 4, 2


def _rules(names: Iterable[str]) -> list[Rule]:
    rules = [
        Rule("time_embed.0.{p}", "time_embedding.linear_1.{p}"),
        Rule("time_embed.2.{p}", "time_embedding.linear_2.{p}"),
        Rule("label_emb.0.0.{p}", "add_embedding.linear_1.{p}"),
        Rule("label_emb.0.2.{p}", "add_embedding.linear_2.{p}"),
        Rule("input_blocks.0.0.{p}", "conv_in.{p}"),
        Rule("out.0.{p}", "conv_norm_out.{p}"),
        Rule("out.2.{p}", "conv_out.{p}"),
        *_resnet("middle_block.0", "mid_block.resnets.0"),
        Rule("middle_block.1.{*}", "mid_block.attentions.0.{*}"),
        *_resnet("middle_block.2", "mid_block.resnets.1"),
    ]
    with_attention = {name.rpartition(".attentions.")[0] for name in names if name.startswith("up_blocks.")}
    for level in range(_LEVELS):
        for layer in range(_LAYERS + 1):
            down, up = 1 + level * (_LAYERS + 1) + layer, level * (_LAYERS + 1) + layer
            if layer < _LAYERS:
                rules += _resnet(f"input_blocks.{down}.0", f"down_blocks.{level}.resnets.{layer}")
                rules.append(Rule(f"input_blocks.{down}.1.{{*}}", f"down_blocks.{level}.attentions.{layer}.{{*}}"))
            else:
                rules.append(Rule(f"input_blocks.{down}.0.op.{{p}}", f"down_blocks.{level}.downsamplers.0.conv.{{p}}"))
            rules += _resnet(f"output_blocks.{up}.0", f"up_blocks.{level}.resnets.{layer}")
            rules += [
                Rule(f"output_blocks.{up}.1.{inner}.{{*}}", f"up_blocks.{level}.attentions.{layer}.{inner}.{{*}}")
                for inner in ("norm", "proj_in", "transformer_blocks", "proj_out")
            ]
        upsampler = f"up_blocks.{level}.upsamplers.0.conv.{{p}}"
        last = level * (_LAYERS + 1) + _LAYERS
        slots = [2 if f"up_blocks.{level}" in with_attention else 1] if any(with_attention) else [1, 2]
        rules += [Rule(f"output_blocks.{last}.{slot}.conv.{{p}}", upsampler) for slot in slots]
    return rules


def _resnet(original: str, diffusers: str) -> list[Rule]:
    return each(f"{original}.{{}}.{{p}}", _RESNET, f"{diffusers}.{{}}.{{p}}")


FAMILIES = (
    Family("SDXL", ("label_emb.0.0.weight", "add_embedding.linear_1.weight"), _rules),
    Family("SD1.5 or SD2", ("input_blocks.0.0.weight", "down_blocks.0.resnets.0.conv1.weight"), _rules),
)
