"""Models in FP8 are read as models in bfloat16, with their scales applied."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from emomerge.adapters import bake, open_dense
from emomerge.checkpoints import MemoryCheckpoint
from emomerge.checkpoints.fp8 import Dequantized
from emomerge.cli import main
from emomerge.errors import BadInput

OUT, IN, RANK, ALPHA = 6, 8, 2, 1.5
E4M3 = "float8_e4m3fn"
NAME = "transformer_blocks.0.attn.to_q"


def codes(dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    return (torch.randn(OUT, IN) * 100).to(dtype)


def described(layer_format: str) -> Tensor:
    return torch.tensor(list(json.dumps({"format": layer_format}).encode()), dtype=torch.uint8)


def model(weight: Tensor, **others: Tensor) -> dict[str, Tensor]:
    """A Qwen-Image of one layer and what stands beside it."""
    found = {f"{NAME}.weight": weight, f"{NAME}.bias": torch.randn(OUT).bfloat16(), "transformer_blocks.0.img_mod.1.weight":
             torch.randn(3, 5).bfloat16()}  # fmt: skip
    return found | {key.replace("_in_", f"{NAME}."): value for key, value in others.items()}


SCALES: dict[str, Callable[[], tuple[dict[str, Tensor], Tensor]]] = {
    "plain": lambda: ({}, torch.ones(())),
    "one number": lambda: ({"_in_scale_weight": torch.tensor(3e-3), "_in_scale_input": torch.tensor(0.5)}, torch.tensor(3e-3)),
    "a vector of one": lambda: ({"_in_weight_scale": torch.tensor([2e-3])}, torch.tensor(2e-3)),
    "a scale for each row": lambda: ({"_in_weight_scale": (row := torch.rand(OUT, 1) * 1e-2)}, row),
    "a scale for each block": lambda: (
        {"_in_scale_weight": (blocks := torch.rand(OUT, 4, 1) * 1e-2)}, blocks.squeeze(-1).repeat_interleave(IN // 4, dim=1),
    ),
    "layers described by ComfyUI": lambda: (
        {"_in_weight_scale": torch.tensor(9e-3), "_in_input_scale": torch.ones(()), "_in_comfy_quant": described(E4M3)},
        torch.tensor(9e-3),
    ),
    "a marker": lambda: ({"_in_scale_weight": torch.tensor(1e-2), "scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn)},
                         torch.tensor(1e-2)),
}  # fmt: skip


def lora(file: Path) -> Tensor:
    down, up = torch.randn(RANK, IN), torch.randn(OUT, RANK)
    stem = f"diffusion_model.{NAME}"
    save_file({f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(ALPHA)}, file)
    return ALPHA / RANK * up.double() @ down.double()


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_lora_is_baked_into_what_the_codes_mean(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    others, scale = SCALES[kind]()
    stored = model(codes(dtype), **others)
    save_file(stored, tmp_path / "base.safetensors", {"_quantization_metadata": "{}", "modelspec.author": "somebody"})
    delta = lora(tmp_path / "a.safetensors")
    run("bake", tmp_path / "base.safetensors", tmp_path / "a.safetensors", "--quiet", "-o", tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert sorted(found) == sorted(model(stored[f"{NAME}.weight"])), "no scale is left"
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.author"] == "somebody" and "_quantization_metadata" not in metadata
    weight = stored[f"{NAME}.weight"].float() * scale
    expected = (weight.double() + delta).float()
    assert found[f"{NAME}.weight"].dtype == torch.bfloat16
    spacing = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(found[f"{NAME}.weight"].double(), expected.double(), rtol=spacing / 2, atol=1e-9)
    unrounded = bake(open_dense(tmp_path / "base.safetensors"), tmp_path / "a.safetensors")[f"{NAME}.weight"]
    torch.testing.assert_close(unrounded.double(), weight.double() + delta, rtol=1e-6, atol=1e-6)
    for name in (f"{NAME}.bias", "transformer_blocks.0.img_mod.1.weight"):
        assert torch.equal(found[name], stored[name])


def test_fp8_is_written_on_request(tmp_path: Path) -> None:
    stored = model(codes())
    save_file(stored, tmp_path / "base.safetensors")
    delta = lora(tmp_path / "a.safetensors")
    out = tmp_path / "out.safetensors"
    run("bake", tmp_path / "base.safetensors", tmp_path / "a.safetensors", "--dtype", "float8_e5m2", "--quiet", "-o", out)
    found = load_file(out)
    expected = (stored[f"{NAME}.weight"].double() + delta).float().to(torch.float8_e5m2)
    assert torch.equal(found[f"{NAME}.weight"].float(), expected.float())
    assert found[f"{NAME}.bias"].dtype == torch.bfloat16


def test_inspect_says_how_a_model_is_stored_and_read(tmp_path: Path) -> None:
    for kind, name in (("plain", "FP8"), ("a scale for each row", "FP8 with scales")):
        save_file(model(codes(), **SCALES[kind]()[0]), tmp_path / "base.safetensors")
        found = json.loads(run("inspect", tmp_path / "base.safetensors", "--json"))
        assert (found["quantized"], found["to use it"]) == (name, "bake and merge read it as bfloat16")


REFUSED = {
    "nvfp4": {"_in_comfy_quant": described("nvfp4")},
    "mxfp8": {"_in_comfy_quant": described("mxfp8"), "_in_weight_scale": torch.ones(OUT, 1, dtype=torch.uint8)},
    "NVFP4": {"_in_weight_scale": torch.ones(OUT, 1), "_in_weight_scale_2": torch.ones(())},
    "MXFP8": {"_in_weight_scale": torch.ones(OUT, 1).to(torch.float8_e8m0fnu)},
    "FP8 with scales": {"_in_weight_scale_inv": torch.ones(1, 1)},
    "SVDQuant of nunchaku": {"_in_wscales": torch.ones(1, OUT), "_in_proj_down": torch.ones(IN, 2)},
    "bitsandbytes, 4 bits": {"_in_weight.quant_state.bitsandbytes__nf4": torch.ones(3, dtype=torch.uint8)},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_kinds_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    base = tmp_path / "base.safetensors"
    save_file(model(codes(), **REFUSED[kind]), base)
    lora(tmp_path / "a.safetensors")
    message = run("bake", base, tmp_path / "a.safetensors", "-o", tmp_path / "out.safetensors", code=2)
    assert f"the model is quantized ({kind})" in message and "give the model in safetensors" in message
    assert json.loads(run("inspect", base, "--json"))["quantized"] == kind
    assert not (tmp_path / "out.safetensors").exists()


def test_integers_with_scales_are_refused(tmp_path: Path) -> None:
    base = tmp_path / "base.safetensors"
    save_file(model(torch.ones(OUT, IN, dtype=torch.int8), _in_weight_scale=torch.ones(OUT, 1)), base)
    with pytest.raises(BadInput, match=r"quantized \(8-bit integers with scales\)"):
        open_dense(base)


def test_a_declared_quantization_is_left_to_its_library(tmp_path: Path) -> None:
    save_file(model(codes(), _in_weight_scale=torch.ones(OUT, 1)), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "compressed-tensors"}}')
    with pytest.raises(BadInput, match=r"quantized \(FP8 with scales\)"):
        open_dense(tmp_path)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"_in_weight_scale": torch.ones(OUT, 3, 1)}, "a scale does not fit its weight"),
        ({"_in_weight_scale": torch.ones(IN)}, "a scale does not fit its weight"),
        ({"_in_weight_scale": torch.ones(()), "_in_scale_weight": torch.ones(())}, "a weight has two scales"),
        ({"_in_comfy_quant": torch.ones(3, dtype=torch.uint8)}, "not a description of a quantization"),
        ({"_in_comfy_quant": torch.ones(3)}, "not a description of a quantization"),
    ],
)
def test_scales_that_do_not_fit_are_refused(others: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    save_file(model(codes(), **others), tmp_path / "base.safetensors")
    with pytest.raises(BadInput, match=message):
        open_dense(tmp_path / "base.safetensors")


def test_a_scale_that_is_not_finite_is_refused_when_it_is_used() -> None:
    with pytest.raises(BadInput, match="NaN or infinite"):
        Dequantized(MemoryCheckpoint(model(codes(), _in_weight_scale=torch.tensor(torch.nan))))[f"{NAME}.weight"]


def test_merge_takes_the_same_weights(tmp_path: Path) -> None:
    """Two adapters and a whole model in FP8 over a base in FP8, in one file and in a folder of diffusers."""
    stored = model(codes(), _in_weight_scale=(scale := torch.rand(OUT, 1) * 1e-2))
    base = stored[f"{NAME}.weight"].float() * scale
    other = model(codes(), _in_weight_scale=scale)
    other[f"{NAME}.bias"], other["transformer_blocks.0.img_mod.1.weight"] = (
        stored[name] for name in (f"{NAME}.bias", "transformer_blocks.0.img_mod.1.weight")
    )
    save_file(stored, tmp_path / "base.safetensors")
    save_file(other, tmp_path / "whole.safetensors")
    part = tmp_path / "folder" / "transformer"
    part.mkdir(parents=True)
    (part / "config.json").write_text("{}")
    (tmp_path / "folder" / "model_index.json").write_text('{"_class_name": "QwenImagePipeline", "transformer": ["d", "T"]}')
    save_file(stored, part / "diffusion_pytorch_model.safetensors")
    deltas = [lora(tmp_path / "a.safetensors"), lora(tmp_path / "b.safetensors")]
    runs = [tmp_path / f"{name}.safetensors" for name in ("a", "b")]
    run(
        "merge",
        tmp_path / "base.safetensors",
        *runs,
        "--method",
        "mean",
        "--quiet",
        "--dtype",
        "float32",
        "-o",
        tmp_path / "o.safetensors",
    )
    found = load_file(tmp_path / "o.safetensors")[f"{NAME}.weight"]
    torch.testing.assert_close(found.double(), base.double() + sum(deltas) / 2, rtol=1e-6, atol=1e-5)
    run("merge", tmp_path / "folder", *runs, "--method", "mean", "--quiet", "--dtype", "float32", "-o", tmp_path / "out")
    written = load_file(tmp_path / "out/transformer/diffusion_pytorch_model.safetensors")
    assert torch.equal(written[f"{NAME}.weight"], found) and sorted(written) == sorted(model(codes()))
    whole = [tmp_path / "whole.safetensors", runs[0]]
    run(
        "merge",
        tmp_path / "base.safetensors",
        *whole,
        "--method",
        "mean",
        "--quiet",
        "--dtype",
        "float32",
        "-o",
        tmp_path / "w.safetensors",
    )
    theirs = other[f"{NAME}.weight"].float() * scale
    expected = (theirs.double() + base.double() + deltas[0]) / 2
    torch.testing.assert_close(load_file(tmp_path / "w.safetensors")[f"{NAME}.weight"].double(), expected, rtol=1e-6, atol=1e-5)
