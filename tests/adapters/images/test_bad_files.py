"""Adapter files and bases that do not go together, or are damaged: one clear line each, exit status 2, nothing written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from click.testing import CliRunner
from image_models import UNET, Tensors, linear, lora, sd15
from safetensors.torch import load_file, save, save_file
from tiny_transformers import MLP, H, flux, wan

from emomerge.cli import main

QKV, Q = "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_blocks_0_self_attn_q"
OFT, CONFIG = "oft_unet_double_blocks_0_img_attn_qkv", "lora_adapter_metadata"
NAN, INF, ONE = float("nan"), float("inf"), torch.ones(())


class Case(NamedTuple):
    """A command that must fail.

    Args:
        says: a pattern of its line.
        adapter: tensors of the adapter file, or its bytes.
        base: tensors of the base.
        metadata: of the adapter.
    """

    says: str
    adapter: Tensors | bytes
    base: Callable[[], Tensors] = flux
    metadata: dict[str, str] | None = None


def pair(module: str = QKV, out: int = 3 * H, into: int = H, **changed: torch.Tensor | None) -> Tensors:
    """A sound LoRA of rank 2 with some of its tensors replaced, added or, for None, left out."""
    found: dict[str, Any] = {
        "lora_down.weight": torch.randn(2, into), "lora_up.weight": torch.randn(out, 2), "alpha": torch.tensor(1.5),
    }  # fmt: skip
    found |= {key.replace("__", "."): value for key, value in changed.items()}
    return {f"{module}.{key}": value for key, value in found.items() if value is not None}


def with_value(value: float) -> torch.Tensor:
    tensor = torch.randn(3 * H, 2)
    tensor[4, 1] = value
    return tensor


def unet(channels: int) -> Tensors:
    return {name: tensor for name, tensor in sd15().items() if name.startswith(f"{UNET}input_blocks.1.")} | linear(
        f"{UNET}input_blocks.0.0", 5, channels, 3, 3
    )


def lokr(**changed: torch.Tensor | None) -> Tensors:
    """A sound LoKr for 3H × H."""
    found: dict[str, Any] = {"lokr_w1": torch.randn(3, 2), "lokr_w2": torch.randn(H, 3)} | changed
    return {f"{QKV}.{key}": value for key, value in found.items() if value is not None}


def loha(**changed: torch.Tensor) -> Tensors:
    shapes = {"hada_w1_a": (3 * H, 2), "hada_w1_b": (2, H), "hada_w2_a": (3 * H, 2), "hada_w2_b": (2, H)}
    return {f"{QKV}.{key}": changed.get(key, torch.randn(shape)) for key, shape in shapes.items()}


PEFT = {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.randn(2, H),
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.randn(H, 2)}  # fmt: skip
WHOLE = save(pair())
CASES = {
    "half a pair": Case(r"a tensor of the adapter is missing.*expected lora_up", pair(lora_up__weight=None)),
    "the other half": Case(r"a tensor of the adapter is missing.*expected lora_down", pair(lora_down__weight=None)),
    "alpha alone": Case(r"not an adapter of a known kind", pair() | {"lora_unet_double_blocks_0_img_mlp_0.alpha": ONE}),
    "ranks that differ": Case(r"disagree about its rank.*down 2, up 3", pair(lora_up__weight=torch.randn(3 * H, 3))),
    "a core of another rank": Case(
        r"disagree about its rank.*second of mid 3",
        pair(lora_down__weight=torch.randn(2, H, 1, 1), lora_up__weight=torch.randn(3 * H, 2, 1, 1),
             lora_mid__weight=torch.randn(2, 3, 3, 3)),
    ),
    "a factor of one dimension": Case(r"wrong shape.*lora_up.*\(36,\)", pair(lora_up__weight=torch.randn(36))),
    "alpha of a wrong shape": Case(r"wrong shape.*alpha.*expected one number.*\(2,\)", pair(alpha=torch.ones(2))),
    "alpha that overflowed": Case(r"alpha is not a usable number.*inf.*float32", pair(alpha=torch.tensor(1e10).half())),
    "alpha of zero": Case(r"alpha is not a usable number.*0", pair(alpha=torch.tensor(0.0))),
    "alpha that is NaN": Case(r"alpha is not a usable number.*nan", pair(alpha=torch.tensor(NAN))),
    "NaN": Case(r"NaN or infinity in an adapter.*lora_up", pair(lora_up__weight=with_value(NAN))),
    "infinity": Case(r"NaN or infinity in an adapter.*lora_up", pair(lora_up__weight=with_value(INF))),
    "integers": Case(r"a dtype that cannot be added.*int32", pair(lora_up__weight=torch.ones(3 * H, 2, dtype=torch.int32))),
    "an empty tensor": Case(
        r"an empty tensor.*\(0, 6\)", pair(lora_down__weight=torch.randn(0, H), lora_up__weight=torch.randn(18, 0)),
    ),
    "another family": Case(r"of another model.*\(Wan\).*0 of 1 modules match; the adapter is for Flux", pair(), wan),
    "another width": Case(r"another shape than the adapter expects.*\(18, 7\).*\(18, 6\)", pair(into=7)),
    "other output rows": Case(r"another shape than the adapter expects.*\(15, 6\).*\(18, 6\)", pair(out=15)),
    "one module in two spellings": Case(
        r"two modules of the adapter change one base tensor.*double_blocks\.0\.img_attn\.qkv\.weight.*to_k",
        pair() | pair("transformer.transformer_blocks.0.attn.to_k", H),
    ),
    "one tensor in two spellings": Case(r"one tensor has two spellings.*lora_A", pair(lora_A__weight=torch.randn(2, H))),
    "an unknown suffix": Case(r"keys that are not of an adapter.*lora_sideways.*1 of 4 tensors", pair(lora_sideways=ONE)),
    "a truncated file": Case(r"truncated.*expected \d+ bytes.*found", WHOLE[:-20]),
    "a file that is too long": Case(r"longer than its header says", WHOLE + bytes(9)),
    "a cut header": Case(r"truncated", WHOLE[:40]),
    "no safetensors": Case(r"not a safetensors file", b"\x20\0\0\0\0\0\0\0" + b"no JSON at all, of 32 bytes ...  "),
    "an empty file": Case(r"not a safetensors file", b""),
    "a pickle": Case(r"a pickle, which is never loaded", b"\x80\x02}q\x00." + bytes(40)),
    "a model of inpainting": Case(
        r"another shape than the adapter expects.*input_blocks_0_0.*\(5, 4, 3, 3\).*\(5, 9, 3, 3\)",
        lora("lora_unet_input_blocks_0_0", torch.zeros(5, 4, 3, 3)), lambda: unet(9),
    ),
    "image to video on 2.2": Case(
        r"match no tensor of the base.*k_img.*1 of 2 modules match.*--allow-unmatched",
        pair("diffusion_model.blocks.0.cross_attn.k_img", H) | pair(Q, H), wan,
    ),
    "a text encoder that is not there": Case(
        r"match no tensor of the base.*te1_text_model.*1 of 2 modules match",
        pair() | pair("lora_te1_text_model_encoder_layers_0_mlp_fc1", 12, 5),
    ),
    "a difference of a bias that is not there": Case(
        r"the module of the base has no bias.*found weight", {"net.blocks.0.self_attn.norm_q.diff_b": torch.ones(H)}, wan,
    ),
    "a difference of another shape": Case(r"another shape.*\(4, 4\).*\(6, 4\)", {"net.img_in.diff": torch.randn(4, 4)}),
    "a replacement of another shape": Case(r"another shape.*\(6, 5\).*\(6, 4\)", {"net.img_in.set_weight": torch.randn(H, 5)}),
    "half of LoKr": Case(r"a tensor of the adapter is missing.*lokr_w2", lokr(lokr_w2=None)),
    "a LoKr of another size": Case(r"another shape.*\(12, 6\).*\(18, 6\)", lokr(lokr_w1=torch.randn(2, 2))),
    "a LoHa of two shapes": Case(r"the two matrices differ in shape", loha(hada_w2_a=torch.randn(12, 2))),
    "two kinds in one module": Case(r"two kinds of adapter", pair() | lokr()),
    "a magnitude of another length": Case(r"double_blocks_0_img_attn_qkv.*18", pair(dora_scale=torch.ones(17, 1))),
    "OFT on the input side": Case(r"OFT on the input side.*not supported", pair() | {"lora_unet_img_in.oft_R.weight": ONE}),
    "blocks that are not square": Case(r"wrong shape.*oft_blocks.*square", {f"{OFT}.oft_blocks": torch.ones(3, 6, 5)}),
    "an enlarged tensor": Case(r"enlarges a tensor of the base", pair(reshape_weight=torch.tensor([18, 12]))),
    "a kernel on a linear layer": Case(
        r"another shape.*\(18, 6, 3, 3\)",
        pair(lora_down__weight=torch.randn(2, H, 3, 3), lora_up__weight=torch.randn(18, 2, 1, 1)),
    ),
    "GLoRA with rs_lora": Case(
        r"GLoRA with rs_lora is not supported",
        {f"{QKV}.{key}.weight": torch.randn(shape) for key, shape in
         {"a1": (H, 2), "a2": (2, H), "b1": (3 * H, 2), "b2": (2, H)}.items()},
        metadata={"ss_network_args": '{"algo": "glora", "rs_lora": "True"}'},
    ),
    "embeddings": Case(r"not of an adapter, but embeddings.*bundle_emb", pair() | {"bundle_emb.word.clip_l": torch.ones(2, 5)}),
    "a configuration that is no JSON": Case(r"not JSON.*lora_adapter_metadata", PEFT, metadata={CONFIG: "{r: 4"}),
    "alpha that is a text": Case(
        r"not a number.*lora_alpha", PEFT, metadata={CONFIG: json.dumps({"transformer.lora_alpha": "four"})},
    ),
    "a model in place of an adapter": Case(r"no adapter here", wan()),
    "a result beyond half precision": Case(
        r"values too large for torch\.float16.*img_attn\.qkv.*bfloat16",
        pair(lora_up__weight=torch.full((3 * H, 2), 6e4), lora_down__weight=torch.full((2, H), 6e4)),
        lambda: {name: tensor.half() for name, tensor in flux().items()},
    ),
}  # fmt: skip


def refused(folder: Path, base: Path, adapter: Path) -> str:
    """Return the line of a bake that must fail, and leave nothing."""
    out, before = folder / "out.safetensors", sorted(folder.rglob("*"))
    result = CliRunner().invoke(main, ["bake", str(base), str(adapter), "-o", str(out), "--quiet"])
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("emomerge: "), result.stderr
    assert sorted(folder.rglob("*")) == before, "something is left"
    return lines[0]


@pytest.mark.parametrize("name", CASES)
def test_one_line_says_what_is_wrong(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    save_file(case.base(), tmp_path / "base.safetensors")
    if isinstance(case.adapter, bytes):
        (tmp_path / "adapter.safetensors").write_bytes(case.adapter)
    else:
        save_file(case.adapter, tmp_path / "adapter.safetensors", case.metadata)
    line = refused(tmp_path, tmp_path / "base.safetensors", tmp_path / "adapter.safetensors")
    assert re.search(case.says, line), line
    assert "safetensors" in line, "the file is named"


@pytest.mark.parametrize("length", [99_999_990, 100_000_001, 2**62])
def test_a_header_of_a_hundred_megabytes(length: int, tmp_path: Path) -> None:
    save_file(flux(), tmp_path / "base.safetensors")
    path = tmp_path / "adapter.safetensors"
    with path.open("wb") as file:
        file.write(length.to_bytes(8, "little") + b'{"lora_unet_x.lora_down.weight": ')
        file.truncate(min(length, 2**27) + 64)  # sparse
    assert "not a safetensors file" in refused(tmp_path, tmp_path / "base.safetensors", path)


def test_the_other_way_round(tmp_path: Path) -> None:
    save_file(flux(), tmp_path / "base.safetensors")
    save_file(pair(), tmp_path / "adapter.safetensors")
    line = refused(tmp_path, tmp_path / "adapter.safetensors", tmp_path / "base.safetensors")
    assert "the base comes first" in line


def test_there_are_thirty_and_more() -> None:
    assert len(CASES) >= 30


def test_what_does_not_match_can_be_left_out(tmp_path: Path) -> None:
    """The file of an image-to-video model over one without its image layers: the rest is baked, with a note."""
    base = wan()
    save_file(base, tmp_path / "base.safetensors")
    save_file(
        pair("diffusion_model.blocks.0.ffn.0", MLP) | pair("diffusion_model.img_emb.proj.1", 4), tmp_path / "a.safetensors"
    )
    out = tmp_path / "out.safetensors"
    arguments = ["bake", tmp_path / "base.safetensors", tmp_path / "a.safetensors", "--allow-unmatched", "-o", out]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert "1 of 2 modules match" in " ".join(result.stderr.split())
    moved = [name for name, tensor in load_file(out).items() if not torch.equal(tensor, base[name])]
    assert moved == ["blocks.0.ffn.0.weight"]
