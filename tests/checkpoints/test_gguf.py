"""GGUF files of image models: shapes, numbers, adapters over them, and damage."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from emomerge import extras
from emomerge.adapters import bake, open_dense
from emomerge.checkpoints import open_checkpoint
from emomerge.cli import main
from emomerge.errors import BadInput, MissingExtra

gguf = pytest.importorskip("gguf")
OUT, IN, RANK, ALPHA = 3, 256, 2, 1.5
NAME = "transformer_blocks.0.attn.to_q"
PLAIN = ("F32", "F16", "BF16")
CODES = ("Q8_0", "Q4_0", "Q5_1", "Q4_K", "Q6_K")


def numbers(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Data of one type, and its values in float32, by the package itself."""
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    if kind in ("Q8_0", "Q4_0", "Q5_1", *PLAIN):
        data = gguf.quants.quantize(np.random.default_rng(1).standard_normal((OUT, IN), np.float32), number)
    else:  # codes that nothing wrote, with scales that are small numbers
        data = np.random.default_rng(2).integers(0, 60, (OUT, IN // block * size), np.uint8)
    return data, gguf.quants.dequantize(data, number)


def write(path: Path, tensors: dict[str, tuple[np.ndarray, str]], **shapes: list[int]) -> Path:
    writer = gguf.GGUFWriter(path, "qwen_image")
    writer.add_array("some.words", ["one", "two"])
    for name, shape in shapes.items():
        writer.add_array(f"comfy.gguf.orig_shape.{name}", shape)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def model(path: Path, kind: str) -> tuple[Path, Tensor]:
    data, values = numbers(kind)
    other = np.arange(15, dtype=np.float32).reshape(3, 5)
    write(path, {f"{NAME}.weight": (data, kind), "transformer_blocks.0.img_mod.1.weight": (other, "F32")})
    return path, torch.from_numpy(values.astype(np.float32).reshape(OUT, IN))


@pytest.mark.parametrize("kind", [*PLAIN, *CODES])
def test_the_numbers_are_those_of_the_package(kind: str, tmp_path: Path) -> None:
    path, values = model(tmp_path / "a.gguf", kind)
    found = open_checkpoint(path)
    assert found.info(f"{NAME}.weight").shape == (OUT, IN), "dimensions are stored the other way round"
    assert torch.equal(found[f"{NAME}.weight"].float(), values)
    assert found["transformer_blocks.0.img_mod.1.weight"].tolist()[1] == [5, 6, 7, 8, 9]


def test_the_only_one_in_a_folder_is_read(tmp_path: Path) -> None:
    path, values = model(tmp_path / "a.gguf", "Q8_0")
    (tmp_path / "config.json").write_text("{}")
    found = open_checkpoint(tmp_path)
    assert found.paths == (path,) and torch.equal(found[f"{NAME}.weight"].float(), values)
    model(tmp_path / "b.gguf", "F16")
    with pytest.raises(BadInput, match="several checkpoints.*a.gguf, b.gguf.*name the file you mean"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_K"])
def test_a_lora_is_baked_and_written_as_safetensors(kind: str, tmp_path: Path) -> None:
    path, values = model(tmp_path / "base.gguf", kind)
    down, up = torch.randn(RANK, IN), torch.randn(OUT, RANK)
    stem = f"transformer.{NAME}"
    factors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(ALPHA)}
    save_file(factors, tmp_path / "a.safetensors")
    expected = values.double() + ALPHA / RANK * up.double() @ down.double()
    baked = bake(open_dense(path), tmp_path / "a.safetensors")[f"{NAME}.weight"]
    torch.testing.assert_close(baked.double(), expected, rtol=1e-6, atol=1e-5)
    out = tmp_path / "out.safetensors"
    arguments = ["bake", str(path), str(tmp_path / "a.safetensors"), "-o", str(out), "--quiet"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    found = load_file(out)
    assert found[f"{NAME}.weight"].dtype == (torch.float16 if kind == "F16" else torch.bfloat16)
    assert torch.equal(found[f"{NAME}.weight"], baked.to(found[f"{NAME}.weight"].dtype))
    merged = [
        "merge",
        str(path),
        *[str(tmp_path / "a.safetensors")] * 2,
        "--method",
        "mean",
        "--quiet",
        "-o",
        str(tmp_path / "m"),
    ]
    result = CliRunner().invoke(main, merged)
    assert result.exit_code == 0, result.output
    (file,) = (tmp_path / "m").glob("*.safetensors")
    torch.testing.assert_close(load_file(file)[f"{NAME}.weight"], found[f"{NAME}.weight"], rtol=1e-2, atol=1e-5)
    described = CliRunner().invoke(main, ["inspect", str(path), "--json"])
    assert json.loads(described.stdout)["quantized"].startswith("GGUF, 1 × ")


def test_a_flattened_tensor_gets_its_shape_back(tmp_path: Path) -> None:
    data = np.arange(24, dtype=np.float32)
    path = write(tmp_path / "a.gguf", {"conv.weight": (data, "F32")}, **{"conv.weight": [2, 3, 1, 2, 2]})
    assert torch.equal(open_checkpoint(path)["conv.weight"], torch.arange(24.0).reshape(2, 3, 1, 2, 2))
    wrong = write(tmp_path / "b.gguf", {"conv.weight": (data, "F32")}, **{"conv.weight": [2, 3]})
    with pytest.raises(BadInput, match="not the shape of 24 numbers"):
        open_checkpoint(wrong)


def test_a_language_model_of_llama_cpp_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", {"blk.0.attn_q.weight": (np.ones((2, 2), np.float32), "F32")})
    with pytest.raises(BadInput, match=r"llama\.cpp.*give the model in safetensors"):
        open_checkpoint(path)


def test_the_extra_is_named_if_the_package_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = model(tmp_path / "a.gguf", "Q8_0")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(MissingExtra, match=r"needs gguf; pip install 'emomerge\[gguf\]'"):
        open_checkpoint(path)
    assert "gguf" in extras.EXTRAS


def damaged(path: Path) -> dict[str, bytes]:
    data = path.read_bytes()
    return {
        "another version": data[:4] + struct.pack("<I", 9) + data[8:],
        "too many tensors": data[:8] + struct.pack("<Q", 2**63) + data[16:],
        "too many fields": data[:16] + struct.pack("<Q", 2**40) + data[24:],
        "a long text": data[:24] + struct.pack("<Q", 2**62) + data[32:],
        "cut in the header": data[:60],
        "cut in the data": data[:-200],
        "an unknown type": data.replace(struct.pack("<QQI", IN, OUT, 8), struct.pack("<QQI", IN, OUT, 777)),
        "a wide row": data.replace(struct.pack("<QQI", IN, OUT, 8), struct.pack("<QQI", 2**62, 2**62, 8)),
        "half a block": data.replace(struct.pack("<QQI", IN, OUT, 8), struct.pack("<QQI", IN - 1, OUT, 8)),
        "not text": data.replace(b"some.words", b"some.\xff\xffrds"),
    }


def test_damage_is_one_line(tmp_path: Path) -> None:
    path, _ = model(tmp_path / "a.gguf", "Q8_0")
    cases = damaged(path)
    assert len(cases) == 10 and all(data != path.read_bytes() for data in cases.values())
    for what, data in cases.items():
        (tmp_path / "b.gguf").write_bytes(data)
        with pytest.raises(BadInput, match="a GGUF file that cannot be read"):
            open_checkpoint(tmp_path / "b.gguf")
            pytest.fail(what)
