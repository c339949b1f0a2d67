"""Models of several parts: diffusers folders and single files, read and written as one checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from emomerge.checkpoints import MemoryCheckpoint, RoundingLoss, open_checkpoint, write_checkpoint
from emomerge.checkpoints.parts import parts_of
from emomerge.checkpoints.reader import _from_hub
from emomerge.errors import BadInput

UNET = {"conv_in.weight": torch.randn(4, 3, 3, 3), "mid.weight": torch.randn(6, 4), "out.bias": torch.randn(4)}
TEXT = {"embeddings.weight": torch.randn(5, 4), "mid.weight": torch.randn(3, 3)}
VAE = {"decoder.weight": torch.randn(2, 2).half()}


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    folder = tmp_path / "pipeline"
    index = {
        "_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModel"], "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "safety_checker": [None, None], "requires_safety_checker": False, "outside": ["diffusers", "../elsewhere"],
    }  # fmt: skip
    for part in ("unet", "text_encoder", "vae", "scheduler", "tokenizer", "unlisted"):
        (folder / part).mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps(index))
    for part in ("unet", "text_encoder", "vae"):
        (folder / part / "config.json").write_text(json.dumps({"part": part}))
    (folder / "scheduler/scheduler_config.json").write_text("{}")
    (folder / "tokenizer/merges.txt").write_text("a b")
    write_checkpoint(MemoryCheckpoint(UNET), folder / "shards", max_shard_size=200)
    for file in (folder / "shards").iterdir():
        file.rename(folder / "unet" / file.name.replace("model", "diffusion_pytorch_model"))
    (folder / "shards").rmdir()
    index_file = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    index_file.write_text(index_file.read_text().replace('"model-', '"diffusion_pytorch_model-'))
    save_file(TEXT, folder / "text_encoder/model.safetensors")
    save_file(TEXT, folder / "text_encoder/model.fp16.safetensors")
    save_file(VAE, folder / "vae/diffusion_pytorch_model.safetensors")
    save_file(TEXT, folder / "unlisted/model.safetensors")
    return folder


def expected() -> dict[str, torch.Tensor]:
    parts = {"unet": UNET, "text_encoder": TEXT, "vae": VAE}
    return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def test_a_diffusers_folder_is_one_checkpoint_whose_names_carry_the_part(pipeline: Path) -> None:
    opened = open_checkpoint(pipeline)
    assert opened.names() == tuple(sorted(expected()))
    for name, tensor in expected().items():
        assert torch.equal(opened[name], tensor)
        assert opened.info(name) == (tensor.dtype, tuple(tensor.shape))
    assert "unet/nothing" not in opened
    assert "nothing" not in opened
    assert len(opened.paths) == len(list(pipeline.glob("unet/*.safetensors"))) + 2
    assert parts_of(opened) == {part: f"{part}/" for part in ("text_encoder", "unet", "vae")}


def test_it_is_written_back_part_by_part_in_the_layout_of_its_base(pipeline: Path, tmp_path: Path) -> None:
    base = open_checkpoint(pipeline)
    moved = MemoryCheckpoint({name: tensor + 1 for name, tensor in base.items()}, folder=pipeline)
    loss = RoundingLoss(base)
    hashes = write_checkpoint(moved, tmp_path / "out", files_from=pipeline, max_shard_size=300, loss=loss)
    again = open_checkpoint(tmp_path / "out")
    assert {name: tensor.tolist() for name, tensor in again.items()} == {n: t.tolist() for n, t in moved.items()}
    assert loss.figures()["unchanged"] == 0
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    weights = {name for name in written if name.endswith(".safetensors")}
    assert weights == set(hashes)
    assert weights - {name for name in weights if "unet/" in name} == {
        "text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    assert "unet/diffusion_pytorch_model.safetensors.index.json" in written
    assert {"model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "tokenizer/merges.txt"} <= written
    assert set(load_file(tmp_path / "out/vae/diffusion_pytorch_model.safetensors")) == set(VAE)


def test_one_file_cannot_hold_a_folder_of_parts(pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="several parts is written as a folder: .*unet"):
        write_checkpoint(open_checkpoint(pipeline), tmp_path / "one.safetensors")


def test_stochastic_rounding_draws_by_the_full_name(pipeline: Path, tmp_path: Path) -> None:
    wide = MemoryCheckpoint(
        {f"{part}/mid.weight": torch.full((64, 64), 1.001) for part in ("unet", "text_encoder")}, folder=pipeline
    )
    write_checkpoint(wide, tmp_path / "out", dtype="bfloat16", rounding="stochastic", seed=3)
    out = open_checkpoint(tmp_path / "out" / "unet")["mid.weight"]
    other = open_checkpoint(tmp_path / "out" / "text_encoder")["mid.weight"]
    assert not torch.equal(out, other)


def test_a_part_whose_weights_are_missing_or_a_pickle_is_refused(pipeline: Path) -> None:
    (pipeline / "vae/diffusion_pytorch_model.safetensors").rename(pipeline / "vae/diffusion_pytorch_model.bin")
    with pytest.raises(BadInput, match=r"pickle.*vae"):
        open_checkpoint(pipeline)
    (pipeline / "vae/diffusion_pytorch_model.bin").unlink()
    with pytest.raises(BadInput, match=r"no weights.*vae"):
        open_checkpoint(pipeline)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_index_of_parts_is_refused(text: str, pipeline: Path) -> None:
    (pipeline / "model_index.json").write_text(text)
    with pytest.raises(BadInput, match=r"model_index\.json"):
        open_checkpoint(pipeline)


def test_a_model_in_one_file_beside_an_index_of_absent_parts(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DConditionModel"]}')
    save_file(UNET, tmp_path / "v1-5.safetensors")
    assert open_checkpoint(tmp_path).names() == tuple(sorted(UNET))


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (
            ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.encoder.conv_in.weight",
             "cond_stage_model.transformer.text_model.embeddings.position_ids", "model_ema.decay"],
            {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."},
        ),
        (
            ["model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.transformer.x",
             "conditioner.embedders.1.model.x"],
            {"unet": "model.diffusion_model.", "text_encoder": "conditioner.embedders.0.",
             "text_encoder_2": "conditioner.embedders.1."},
        ),
        (
            ["model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "vae.encoder.x", "text_encoders.t5xxl.x"],
            {"transformer": "model.diffusion_model.", "vae": "vae.", "text_encoder_3": "text_encoders.t5xxl."},
        ),
        (["vae.encoder.x", "model.layers.0.mlp.weight"], {}),
    ],
)  # fmt: skip
def test_the_parts_of_a_single_file(names: list[str], parts: dict[str, str]) -> None:
    assert parts_of(MemoryCheckpoint({name: torch.zeros(1) for name in names})) == parts


def test_names_with_slashes_are_no_parts_without_an_index(tmp_path: Path) -> None:
    tensors = {"bert/encoder/kernel": torch.ones(2)}
    write_checkpoint(MemoryCheckpoint(tensors), tmp_path / "out")
    assert set(load_file(tmp_path / "out/model.safetensors")) == set(tensors)


def test_the_parts_of_a_hub_model_are_downloaded_too(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls = []

    def download(name: str, **patterns: object) -> str:
        calls.append(patterns)
        return str(pipeline)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert _from_hub("org/model", "main") == pipeline
    assert calls[0]["ignore_patterns"] == ["*/*"]
    assert "*/*.safetensors" in calls[1]["allow_patterns"]
