"""The table of adapter formats, and adapter files that none of them reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor

from emomerge.adapters import Change, bake, format_of, input_files, is_adapter, open_dense, open_run
from emomerge.adapters import formats as table
from emomerge.adapters.formats import FORMATS, all_formats, weight_files
from emomerge.adapters.unsupported import family_of
from emomerge.checkpoints import MemoryCheckpoint, open_checkpoint
from emomerge.cli import main
from emomerge.errors import BadInput

BASE = {"net.layer.weight": torch.randn(6, 4), "net.layer.bias": torch.randn(6)}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    save_file(BASE, tmp_path / "base/model.safetensors")
    return tmp_path / "base"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    stem = "base_model.model.net.layer.lora_"
    factors = {f"{stem}A.weight": torch.randn(2, 4), f"{stem}B.weight": torch.randn(6, 2)}
    save_file(factors, folder / "adapter_model.safetensors")
    return folder


def test_the_files_that_a_source_most_likely_consists_of(tmp_path: Path) -> None:
    assert weight_files(str(tmp_path / "nothing")) == []
    shards = [tmp_path / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for file in (*shards, tmp_path / "other.safetensors"):
        file.write_text("")
    assert weight_files(str(tmp_path)) == shards
    (tmp_path / "model.safetensors").write_text("")
    assert weight_files(str(tmp_path)) == [tmp_path / "model.safetensors"]
    assert weight_files(str(shards[0])) == [shards[0]]


def test_the_files_of_an_adapter(adapter: Path, base: Path) -> None:
    files = [adapter / "adapter_config.json", adapter / "adapter_model.safetensors"]
    assert weight_files(adapter) == files
    assert input_files(adapter) == {file.name: file for file in files}
    assert input_files(base) == {"model.safetensors": base / "model.safetensors"}
    files[1].unlink()
    assert weight_files(adapter) == files[:1]


def test_the_files_of_a_model_of_several_parts_are_named_with_their_folder(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"unet": ["d", "U"], "vae": ["d", "V"]}')
    for part in ("unet", "vae"):
        (tmp_path / part).mkdir()
        save_file(BASE, tmp_path / part / "diffusion_pytorch_model.safetensors")
    assert list(input_files(tmp_path)) == [f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")]


def test_every_format_is_found_without_torch() -> None:
    code = (
        "import sys; from emomerge.adapters.formats import all_formats, is_adapter, weight_files; list(all_formats());"
        "is_adapter('x'); weight_files('x'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_format_says_what_it_consists_of() -> None:
    assert [form.layout for form in all_formats()]
    assert len(list(all_formats())) == len(FORMATS)


def test_a_weight_file_beside_its_configuration_is_the_adapter(adapter: Path, base: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    assert is_adapter(adapter) and is_adapter(file)
    assert not is_adapter(base) and not is_adapter(adapter / "adapter_config.json")
    baked = [bake(base, path)["net.layer.weight"] for path in (adapter, file)]
    assert torch.equal(*baked)


def test_an_adapter_is_not_a_base(adapter: Path) -> None:
    for path in (adapter, adapter / "adapter_model.safetensors"):
        with pytest.raises(BadInput, match=r"an adapter, not a whole model.*emomerge bake"):
            open_dense(path)
    for arguments in (["bake", adapter, adapter], ["merge", adapter, adapter, "--method", "mean"]):
        result = CliRunner().invoke(main, [*map(str, arguments), "-o", str(adapter.parent / "out")])
        assert result.exit_code == 2 and "not a whole model" in result.stderr, result.output


def test_a_folder_that_holds_a_model_beside_an_adapter_is_both(adapter: Path, base: Path) -> None:
    save_file(BASE, adapter / "model.safetensors")
    assert open_dense(adapter).names() == tuple(sorted(BASE))
    assert is_adapter(adapter)


def test_a_custom_format_is_one_object_and_one_entry(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled:
        """A file `*.double` that doubles all weights."""

        layout = "a file NAME.double"

        def claims(self, path: Path) -> bool:
            return path.suffix == ".double"

        def files(self, path: Path) -> list[Path]:
            return [path]

        def read(self, path: Path, base: MemoryCheckpoint, *, allow_unmatched: bool) -> dict[str, Change]:
            return {name: Change(replace=lambda tensor: 2 * tensor) for name in base}

        def facts(self, path: Path) -> dict[str, object]:
            return {}

    monkeypatch.setitem(FORMATS, "double", "doubled:FORMAT")
    monkeypatch.setitem(sys.modules, "doubled", SimpleNamespace(FORMAT=Doubled()))
    (tmp_path / "x.double").touch()
    form = format_of(tmp_path / "x.double")
    assert isinstance(form, Doubled)
    opened = open_run(open_dense(base), tmp_path / "x.double")
    assert all(torch.equal(opened[name], 2 * tensor) for name, tensor in BASE.items())
    assert table.weight_files(tmp_path / "x.double") == [tmp_path / "x.double"]
    with pytest.raises(BadInput, match=r"adapter_config\.json.* or a file NAME\.double"):
        bake(base, tmp_path)


def shapes(down: str, up: str, *more: str) -> dict[str, Tensor]:
    return {down: torch.randn(2, 8), up: torch.randn(8, 2)} | {name: torch.ones(()) for name in more}


ADAPTERS = [
    ("PEFT adapter without its configuration", shapes(
        "base_model.model.bert.query.lora_A.weight", "base_model.model.bert.query.lora_B.default.weight"
    ) | {"base_model.model.classifier.weight": torch.randn(40, 8)}),
    ("LoRA without a configuration", shapes("model.layers.0.q_proj.lora_A.weight", "model.layers.0.q_proj.lora_B.weight")),
]  # fmt: skip


@pytest.mark.parametrize(("family", "tensors"), ADAPTERS)
def test_an_adapter_file_that_no_format_reads_is_refused_by_name(
    family: str, tensors: dict[str, Tensor], base: Path, tmp_path: Path
) -> None:
    file = tmp_path / "style.safetensors"
    save_file(tensors, file)
    for opened in (lambda: bake(base, file), lambda: open_run(open_dense(base), file), lambda: open_dense(file)):
        with pytest.raises(BadInput, match=rf"nor an adapter that emomerge reads: a {family}.*; .*give "):
            opened()
    for arguments in (["bake", base, file], ["merge", base, file, "--method", "mean"], ["bake", file, base]):
        result = CliRunner().invoke(main, [*map(str, arguments), "-o", str(tmp_path / "out")])
        assert result.exit_code == 2 and "style.safetensors" in result.stderr, result.output
    described = CliRunner().invoke(main, ["inspect", str(file), "--json"])
    assert json.loads(described.output)["kind"].startswith(family)
    assert not (tmp_path / "out").exists()


MODELS = {
    "Llama": ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"],
    "BERT": ["bert.encoder.layer.0.attention.self.query.weight", "cls.predictions.bias"],
    "DeepSeek": ["model.layers.0.self_attn.kv_a_proj_with_mqa.weight", "model.layers.0.self_attn.q_a_layernorm.weight"],
    "RWKV-7": ["model.layers.0.attn.w_lora.lora.0.weight", "model.layers.0.attn.w_lora.lora.2.bias", "model.embeddings.weight"],
    "Zamba2": ["model.layers.6.shared_transformer.self_attn.linear_q_adapter_list.0.0.weight", "model.embed_tokens.weight"],
    "Mamba": ["backbone.layers.0.mixer.A_log", "backbone.layers.0.mixer.D", "backbone.layers.0.mixer.x_proj.weight"],
    "SDXL": ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.encoder.conv_in.weight",
             "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight",
             "conditioner.embedders.1.model.logit_scale"],
    "Flux": ["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.modulation.lin.weight", "final_layer.linear.weight"],
    "diffusers UNet": ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight", "conv_in.weight"],
    "Wan": ["blocks.0.self_attn.q.weight", "blocks.0.modulation", "head.modulation"],
    "vocoder": ["conv_pre.weight", "resblocks.0.activations.0.act.alpha", "resblocks.0.activations.0.act.beta"],
    "reward model around a causal one": ["base_model.model.layers.0.mlp.up_proj.weight", "base_model.lm_head.weight"],
    "GPT-2": ["transformer.h.0.attn.c_attn.weight", "transformer.wte.weight"],
}  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_a_model_is_not_taken_for_an_adapter(model: str) -> None:
    assert family_of(MemoryCheckpoint({name: torch.zeros(4, 4) for name in MODELS[model]})) is None


@pytest.mark.parametrize("weight", ["base_layer.weight", "weight", "parametrizations.weight.original"])
def test_a_model_that_contains_lora_factors_is_a_model(weight: str, tmp_path: Path) -> None:
    module = "model.layers.0.mlp.down_proj"
    tensors = {f"{module}.{weight}": torch.randn(64, 64)}
    for name in ("speech", "vision"):
        tensors[f"{module}.lora_A.{name}.weight"] = torch.randn(4, 64)
        tensors[f"{module}.lora_B.{name}.weight"] = torch.randn(64, 4)
    save_file(tensors, tmp_path / "model.safetensors")
    assert open_dense(tmp_path).names() == open_checkpoint(tmp_path).names()
    tensors.pop(f"{module}.{weight}")
    assert family_of(MemoryCheckpoint(tensors)) is not None


def test_a_model_of_several_parts_is_merged_part_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tensors = {"mid.weight": torch.randn(6, 4), "mid.bias": torch.randn(6)}
    for number, folder in enumerate(map(Path, ("base", "a", "b"))):
        for part, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
            (folder / part).mkdir(parents=True)
            (folder / part / "config.json").write_text("{}")
            save_file({name: tensor + number for name, tensor in tensors.items()}, folder / part / f"{stem}.safetensors")
        (folder / "model_index.json").write_text('{"unet": ["d", "U"], "text_encoder": ["t", "C"]}')
    result = CliRunner().invoke(main, ["merge", "base", "a", "b", "--method", "mean", "-o", "out"])
    assert result.exit_code == 0, result.output
    merged = open_dense("out")
    assert merged.names() == open_dense("base").names()
    for part in ("unet", "text_encoder"):
        for name, tensor in tensors.items():
            torch.testing.assert_close(merged[f"{part}/{name}"], tensor + 1.5)
    files = ["text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors"]
    record = json.loads(Path("out/merge.json").read_text())
    assert list(record["base_sha256"]) == list(record["runs"][0]["sha256"]) == files
    assert Path("out/unet/config.json").is_file() and Path("out/model_index.json").is_file()
    again = CliRunner().invoke(main, ["merge", "--again", "out/merge.json", "-o", "again"])
    assert again.exit_code == 0, again.output
    assert all(Path("again", file).read_bytes() == Path("out", file).read_bytes() for file in files)
