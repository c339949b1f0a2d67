"""What is written of a single-file model: one file that other programs show and load as they do its base."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from image_models import UNET, Tensors, effect, lora
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from emomerge.cli import main

METADATA = {
    "modelspec.title": "SDXL", "modelspec.architecture": "stable-diffusion-xl-v1-base", "modelspec.hash_sha256": "0xabc",
    "modelspec.date": "2023-07-20T12:00:00", "config": "{}", "sshs_model_hash": "1", "sshs_legacy_hash": "2", "ss_v2": "False",
}  # fmt: skip
NAMES = ("out.2.weight", "conv_in.weight", "time_embed.0.weight")


def header(path: Path) -> dict[str, object]:
    data = path.read_bytes()
    found = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert isinstance(found, dict)
    return found


@pytest.fixture
def base(tmp_path: Path) -> tuple[Path, Tensors]:
    """A few tensors of an SDXL file in an order of their own, of three dtypes."""
    torch.manual_seed(0)
    tensors = {
        f"{UNET}out.2.weight": torch.randn(4, 3, 3, 3).half(),
        f"{UNET}input_blocks.0.0.weight": torch.randn(3, 4, 3, 3).half(),
        f"{UNET}time_embed.0.weight": torch.randn(6, 3),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(6).unsqueeze(0),
        "first_stage_model.decoder.conv_in.weight": torch.randn(3, 4, 3, 3).half(),
        f"{UNET}label_emb.0.0.weight": torch.randn(6, 13).half(),
        "v_pred": torch.zeros(0), "edm_mean": torch.tensor([1.5]),
    }  # fmt: skip
    dtypes = {torch.half: "F16", torch.float: "F32", torch.int64: "I64"}
    entries: dict[str, object] = {"__metadata__": METADATA}
    begin, body = 0, b""
    for name, tensor in tensors.items():
        data = tensor.numpy().tobytes()
        offsets = [begin, begin + len(data)]
        entries[name] = {"dtype": dtypes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        begin, body = begin + len(data), body + data
    text = json.dumps(entries).encode()
    (tmp_path / "models").mkdir()
    path = tmp_path / "models" / "xl.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    (tmp_path / "models" / "other.json").write_text("{}")
    return path, tensors


@pytest.fixture
def adapters(base: tuple[Path, Tensors], tmp_path: Path) -> list[tuple[Path, Tensors]]:
    """Two kohya files, in folders whose names have an equals sign."""
    found = []
    for seed, module in ((1, "out_2"), (2, "out_2")):
        torch.manual_seed(seed)
        factors = lora(f"lora_unet_{module}", base[1][f"{UNET}out.2.weight"]) | lora(
            "lora_unet_time_embed_0", base[1][f"{UNET}time_embed.0.weight"]
        )
        folder = tmp_path / f"lr=1e-{seed}"
        folder.mkdir()
        save_file(factors, folder / f"style{seed}.safetensors", {"ss_network_dim": "2", "ss_output_name": "style"})
        found.append((folder / f"style{seed}.safetensors", factors))
    return found


def run(*arguments: object) -> None:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("command", ["bake", "merge"])
def test_order_dtypes_markers_and_metadata_are_kept(
    base: tuple[Path, Tensors], adapters: list[tuple[Path, Tensors]], tmp_path: Path, command: str
) -> None:
    out = tmp_path / "mixed v1.5.safetensors"
    run(command, base[0], *(path for path, _ in adapters), "-o", out, *(("--method", "mean") if command == "merge" else ()))
    before, after = header(base[0]), header(out)
    metadata = after.pop("__metadata__")
    assert isinstance(metadata, dict)
    del before["__metadata__"]
    assert list(after) == list(before) and after == before  # order, dtypes, shapes and offsets
    written = load_file(out)
    touched = {f"{UNET}out.2.weight", f"{UNET}time_embed.0.weight"}
    assert {name for name, tensor in base[1].items() if not torch.equal(tensor, written[name])} == touched
    assert metadata["format"] == "pt" and metadata["config"] == "{}"
    assert metadata["modelspec.architecture"] == METADATA["modelspec.architecture"]
    assert metadata["modelspec.title"] == "mixed v1.5" and metadata["modelspec.merged_from"] == "xl, style1, style2"
    assert metadata["modelspec.date"] > METADATA["modelspec.date"]
    assert not [key for key in metadata if key.startswith(("ss_", "sshs_")) or key == "modelspec.hash_sha256"]
    sources = json.loads(metadata["emomerge"])["sources"]
    assert [source["metadata"] for source in sources] == [{"ss_network_dim": "2", "ss_output_name": "style"}] * 2


def test_a_folder_holds_one_file_of_its_name_and_nothing_of_other_models(
    base: tuple[Path, Tensors], adapters: list[tuple[Path, Tensors]], tmp_path: Path
) -> None:
    run("bake", base[0], adapters[0][0], "-o", tmp_path / "baked", "--max-shard-size", "100")
    assert sorted(path.name for path in (tmp_path / "baked").iterdir()) == ["README.md", "bake.json", "baked.safetensors"]
    run("merge", base[0], adapters[0][0], "--method", "mean", "-o", tmp_path / "merged")
    run("merge", "--again", tmp_path / "merged", "-o", tmp_path / "again")
    files = [tmp_path / name / f"{name}.safetensors" for name in ("merged", "again")]
    first, second = (load_file(file) for file in files)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_strengths_are_summed_and_rounded_once(
    base: tuple[Path, Tensors], adapters: list[tuple[Path, Tensors]], tmp_path: Path
) -> None:
    (first, one), (second, two) = adapters
    run("bake", base[0], f"{first}=0.8", f"{second}=-0.5", "-o", tmp_path / "both")
    written = load_file(tmp_path / "both" / "both.safetensors")
    for name, module in ((f"{UNET}out.2.weight", "lora_unet_out_2"), (f"{UNET}time_embed.0.weight", "lora_unet_time_embed_0")):
        old = base[1][name]
        exact = old.double() + 0.8 * effect(one, module, tuple(old.shape)) - 0.5 * effect(two, module, tuple(old.shape))
        if old.dtype == torch.half:
            away = (written[name].double() - exact).abs()
            spacing = 2.0 ** (exact.abs().log2().floor() - 10)
            assert (away <= 0.501 * spacing).all()  # one rounding: at most half a unit in the last place
        else:
            torch.testing.assert_close(written[name].double(), exact, rtol=0, atol=1e-6)
    record = json.loads((tmp_path / "both" / "bake.json").read_text())
    assert record["adapters"] == [{"adapter": str(first), "strength": 0.8}, {"adapter": str(second), "strength": -0.5}]


def test_strength_of_an_adapter_that_is_not_additive(base: tuple[Path, Tensors], tmp_path: Path) -> None:
    name = f"{UNET}time_embed.0.weight"
    old, new = base[1][name], torch.randn(6, 3)
    save_file({"lora_unet_time_embed_0.set_weight": new}, tmp_path / "set.safetensors")
    run("bake", base[0], f"{tmp_path}/set.safetensors=0.25", "-o", tmp_path / "a.safetensors")
    torch.testing.assert_close(load_file(tmp_path / "a.safetensors")[name], old + 0.25 * (new - old), rtol=0, atol=1e-6)
    run("bake", base[0], f"{tmp_path}/set.safetensors=1", "-o", tmp_path / "b.safetensors")
    assert torch.equal(load_file(tmp_path / "b.safetensors")[name], new)
    run("bake", base[0], f"{tmp_path}/set.safetensors=0", "-o", tmp_path / "c.safetensors")
    assert torch.equal(load_file(tmp_path / "c.safetensors")[name], old)


@pytest.mark.parametrize("strength", ["", "strong", "nan", "inf"])
def test_a_strength_that_is_no_number(base: tuple[Path, Tensors], adapters: list[tuple[Path, Tensors]], strength: str) -> None:
    result = CliRunner().invoke(main, ["bake", str(base[0]), f"{adapters[0][0]}={strength}", "-o", "never.safetensors"])
    assert result.exit_code == 2 and "a strength is a number" in result.output
    assert not Path("never.safetensors").exists()


def test_metadata_can_be_read_by_safetensors(
    base: tuple[Path, Tensors], adapters: list[tuple[Path, Tensors]], tmp_path: Path
) -> None:
    run("bake", base[0], adapters[0][0], "-o", tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt" and set(file.keys()) == set(base[1])


@pytest.mark.parametrize("style", ["kohya", "diffusers"])
def test_an_adapter_of_a_merge_bakes_to_the_merge(
    base: tuple[Path, Tensors], adapters: list[tuple[Path, Tensors]], tmp_path: Path, style: str
) -> None:
    runs = [path for path, _ in adapters]
    whole = ("merge", base[0], *runs, "--method", "mean", "--dtype", "float32", "-o")
    run(*whole, tmp_path / "merged.safetensors")
    out = tmp_path / "adapter" if style == "kohya" else tmp_path / "adapter.safetensors"
    run("merge", base[0], *runs, "--method", "mean", "--as-lora", "4", "--format", style, "-o", out)
    file = out / "adapter.safetensors" if style == "kohya" else out
    metadata = header(file)["__metadata__"]
    assert isinstance(metadata, dict) and metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    names = set(load_file(file))
    if style == "kohya":
        assert names >= {"lora_unet_out_2.lora_down.weight", "lora_unet_time_embed_0.alpha"}
        assert metadata["ss_network_dim"] == "4" and metadata["ss_network_alpha"] == "4.0"
        data = file.read_bytes()
        body = data[8 + int.from_bytes(data[:8], "little") :]
        assert metadata["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
        assert sorted(path.name for path in out.iterdir()) == ["README.md", "adapter.safetensors", "merge.json"]
    run("bake", base[0], file, "--dtype", "float32", "-o", tmp_path / "baked.safetensors")
    first, second = load_file(tmp_path / "merged.safetensors"), load_file(tmp_path / "baked.safetensors")
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-5, atol=1e-5)


def test_what_an_adapter_file_cannot_hold(base: tuple[Path, Tensors], tmp_path: Path) -> None:
    tuned = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in base[1].items()}
    save_file(tuned, tmp_path / "tuned.safetensors")
    options = ["merge", str(base[0]), str(tmp_path / "tuned.safetensors"), "--method", "mean", "--as-lora", "4", "-o"]
    result = CliRunner().invoke(main, [*options, str(tmp_path / "a.safetensors")])
    assert result.exit_code == 2 and "edm_mean" in result.output and "--allow-partial" in result.output
    run(*options, tmp_path / "a.safetensors", "--allow-partial")
    result = CliRunner().invoke(main, [*options, str(tmp_path / "b"), "--format", "peft"])
    assert result.exit_code == 2 and "give --format diffusers" in result.output
