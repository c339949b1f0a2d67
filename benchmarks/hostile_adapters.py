"""Samples of adapters and quantized bases for `hostile_inputs.py`: files of image models, every type of PEFT, FP8, GGUF."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from hostile_damage import Files, Reader
from safetensors.torch import save

H, MLP, RANK = 6, 10, 2
QWEN = "transformer_blocks.0.attn.to_q"


def base() -> dict[str, torch.Tensor]:
    """Flux.1 with a double and a single block, and a convolution of a UNet that no family has beside it."""
    torch.manual_seed(0)
    shapes = {
        "double_blocks.0.img_attn.qkv.weight": (3 * H, H), "double_blocks.0.img_attn.proj.weight": (H, H),
        "double_blocks.0.img_mlp.0.weight": (MLP, H), "double_blocks.0.img_mlp.0.bias": (MLP,),
        "double_blocks.0.img_attn.norm.query_norm.scale": (3,), "single_blocks.0.linear1.weight": (3 * H + MLP, H),
        "final_layer.adaLN_modulation.1.weight": (2 * H, H), "img_in.weight": (H, 4), "conv.weight": (4, 3, 3, 3),
    }  # fmt: skip
    return {f"model.diffusion_model.{name}": torch.randn(shape) for name, shape in shapes.items()}


def modules() -> dict[str, dict[str, torch.Tensor]]:
    """Every kind of module: name → suffix → tensor."""

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape)

    alpha, qkv = torch.tensor(1.5), "lora_unet_double_blocks_0_img_attn_qkv"
    lora = {"lora_down.weight": some(RANK, H), "lora_up.weight": some(3 * H, RANK), "alpha": alpha}
    pairs = {"hada_w1_a": some(MLP, RANK), "hada_w1_b": some(RANK, H), "hada_w2_a": some(MLP, RANK), "hada_w2_b": some(RANK, H)}
    return {
        "LoRA, fused": {f"{qkv}.{key}": value for key, value in lora.items()},
        "LoRA, split": {f"transformer.transformer_blocks.0.attn.to_{part}.lora_{side}.weight": some(*shape)
                        for part in "qk" for side, shape in (("A", (RANK, H)), ("B", (H, RANK)))},
        "LoRA of a convolution": {"lora_unet_conv.lora_down.weight": some(RANK, 3, 1, 1), "lora_unet_conv.alpha": alpha,
                                  "lora_unet_conv.lora_mid.weight": some(RANK, RANK, 3, 3),
                                  "lora_unet_conv.lora_up.weight": some(4, RANK, 1, 1)},
        "DoRA": {f"{qkv}.{key}": value for key, value in {**lora, "dora_scale": torch.rand(3 * H, 1) + 0.5}.items()},
        "LoHa": {f"lora_unet_double_blocks_0_img_mlp_0.{key}": value for key, value in {**pairs, "alpha": alpha}.items()},
        "LoKr": {f"lycoris_final_layer_adaLN_modulation_1.{key}": value for key, value in {
            "lokr_w1": some(2, 2), "lokr_w2_a": some(6, RANK), "lokr_w2_b": some(RANK, 3), "alpha": alpha}.items()},
        "GLoRA": {f"lora_unet_double_blocks_0_img_attn_proj.{key}.weight": some(*shape) for key, shape in {
            "a1": (H, RANK), "a2": (RANK, H), "b1": (H, RANK), "b2": (RANK, H)}.items()},
        "IA3": {"lora_unet_double_blocks_0_img_attn_proj.weight": some(H),
                "lora_unet_double_blocks_0_img_attn_proj.on_input": torch.tensor(True)},
        "OFT": {"oft_unet_single_blocks_0_linear1.oft_blocks": some(7, 4, 4), "oft_unet_single_blocks_0_linear1.alpha": alpha},
        "BOFT": {"lora_unet_final_layer_adaLN_modulation_1.oft_blocks": some(1, 3, 4, 4),
                 "lora_unet_final_layer_adaLN_modulation_1.rescale": torch.rand(12, 1) + 0.5},
        "differences": {"diffusion_model.img_in.diff": some(H, 4),
                        "diffusion_model.double_blocks.0.img_mlp.0.diff_b": some(MLP),
                        "diffusion_model.conv.set_weight": some(4, 3, 3, 3),
                        "diffusion_model.double_blocks.0.img_attn.norm.query_norm.w_norm": some(3)},
        "XLabs": {f"single_blocks.0.processor.qkv_lora.{side}.weight": some(*shape)
                  for side, shape in (("down", (RANK, H)), ("up", (3 * H, RANK)))},
    }  # fmt: skip


def _bake_file(folder: Path, base: str = "base.safetensors") -> None:
    from hostile_samples import refuse

    from emomerge import adapters
    from emomerge.cli.inspection import describe
    from emomerge.files import to_json

    adapter, model = folder / "adapter.safetensors", folder / base
    described = describe(str(adapter), str(model) if adapters.is_adapter(adapter) else None)
    json.loads(to_json(described), parse_constant=refuse)
    baked = adapters.bake(model, adapter)
    for name in baked:
        baked[name]


def _image_adapters() -> Iterator[tuple[str, Reader]]:
    model = save(base(), metadata={"modelspec.architecture": "flux-1-dev"})
    for name, tensors in modules().items():
        metadata = {"ss_network_module": "lycoris.kohya", "ss_network_dim": "2", "ss_network_args": '{"algo": "lora"}'}
        if name == "LoRA, split":
            metadata = {
                "lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 3, "transformer.alpha_pattern": {"to_k": 5}})
            }
        yield (
            f"image adapter, {name}",
            Reader({"base.safetensors": model, "adapter.safetensors": save(tensors, metadata=metadata)}, _bake_file),
        )


def _quantized_bases() -> Iterator[tuple[str, Reader]]:
    lora = save(
        {f"transformer.{QWEN}.lora_A.weight": torch.randn(RANK, 32), f"transformer.{QWEN}.lora_B.weight": torch.randn(4, RANK)}
    )
    described = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    weight = torch.randn(4, 32).to(torch.float8_e4m3fn)
    layer = {f"{QWEN}.weight": weight, f"{QWEN}.weight_scale": torch.rand(4, 2, 1), f"{QWEN}.comfy_quant": described}
    other = {"transformer_blocks.0.img_mod.1.weight": torch.randn(3, 5).bfloat16()}
    yield "FP8 base", Reader({"base.safetensors": save(layer | other), "adapter.safetensors": lora}, _bake_file)
    if find_spec("gguf") is not None:
        yield "GGUF base", Reader({"base.gguf": _gguf(), "adapter.safetensors": lora}, partial(_bake_file, base="base.gguf"))


def _gguf() -> bytes:
    import gguf
    import numpy as np

    with tempfile.TemporaryDirectory() as scratch:
        writer = gguf.GGUFWriter(Path(scratch) / "a.gguf", "qwen_image")
        writer.add_array("words", ["a", "b"])
        writer.add_array(f"comfy.gguf.orig_shape.{QWEN}.weight", [4, 32])
        kind = gguf.GGMLQuantizationType.Q8_0
        data = gguf.quants.quantize(np.random.default_rng(0).standard_normal((4, 32), np.float32), kind)
        writer.add_tensor(f"{QWEN}.weight", data, raw_dtype=kind)
        writer.add_tensor("transformer_blocks.0.img_mod.1.weight", np.ones((3, 5), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return (Path(scratch) / "a.gguf").read_bytes()


class _Layers(torch.nn.Module):
    """A module with the names of the samples' base."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList(
            [torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 6, bias=False)}) for _ in range(2)]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the first layer."""
        return self.model.layers[0]["q_proj"](x)


def _peft_configs() -> dict[str, Any]:
    import peft

    target = {"target_modules": ["q_proj"]}
    return {
        "AdaLoRA": peft.AdaLoraConfig(init_r=2, target_r=2, total_step=10, **target),
        "BOFT": peft.BOFTConfig(boft_block_size=2, **target),
        "DoRA": peft.LoraConfig(r=2, use_dora=True, **target),
        "FourierFT": peft.FourierFTConfig(n_frequency=5, **target),
        "HRA": peft.HRAConfig(r=2, **target),
        "IA3": peft.IA3Config(feedforward_modules=[], **target),
        "LoHa": peft.LoHaConfig(r=2, alpha=3, **target),
        "LoKr": peft.LoKrConfig(r=2, alpha=3, **target),
        "MiSS": peft.MissConfig(r=2, **target),
        "OFT": peft.OFTConfig(r=0, oft_block_size=2, **target),
        "RandLoRA": peft.RandLoraConfig(r=2, save_projection=True, **target),
        "VeRA": peft.VeraConfig(r=2, save_projection=True, **target),
    }


def _peft_files(config: Any) -> Files:
    import peft

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        adapted = peft.get_peft_model(_Layers(), config)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        adapted.save_pretrained(scratch)
        names = ("adapter_config.json", "adapter_model.safetensors")
        return {f"adapter/{name}": (Path(scratch) / name).read_bytes() for name in names}


def _peft_adapters() -> Iterator[tuple[str, Reader]]:
    from hostile_samples import BASE, bake_folder

    if find_spec("peft") is None:
        return
    for name, config in _peft_configs().items():
        yield f"PEFT, {name}", Reader({"base/model.safetensors": BASE, **_peft_files(config)}, bake_folder, 0.5)


def adapter_readers() -> dict[str, Reader]:
    """Return the readers of adapters and quantized bases by name."""
    return dict([*_image_adapters(), *_quantized_bases(), *_peft_adapters()])
