"""Whole SDXL models in diffusers: five adapters merged onto one by one command, and adapters extracted from a fine-tune."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from image_models import TE1, TE2, UNET, Tensors, effect, lora, sdxl
from safetensors.torch import load_file, save_file
from torch import Tensor

from emomerge.cli import main

pytestmark = pytest.mark.peers
diffusers = pytest.importorskip("diffusers")
RUNS, LAMBDA, VOTES = 5, 0.4, 2


def configured() -> Any:
    """A pipeline whose sizes are those of `image_models.sdxl`, with weights of its own."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    sizes: dict[str, Any] = {"vocab_size": 9, "max_position_embeddings": 6, "num_attention_heads": 1}
    first = CLIPTextConfig(hidden_size=2, intermediate_size=8, num_hidden_layers=12, projection_dim=2, **sizes)
    second = CLIPTextConfig(hidden_size=5, intermediate_size=20, num_hidden_layers=32, projection_dim=7, **sizes)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(3, 4, 6), transformer_layers_per_block=(1, 2, 10), norm_num_groups=1, cross_attention_dim=7,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=(1, 2, 3),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
        time_embedding_dim=11, addition_embed_type="text_time", addition_time_embed_dim=1,
        projection_class_embeddings_input_dim=13, sample_size=8,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(3, 5), layers_per_block=1, norm_num_groups=1, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae=vae, unet=unet, text_encoder=CLIPTextModel(first), text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=tokenizer(), tokenizer_2=tokenizer(), scheduler=diffusers.EulerDiscreteScheduler(),
    )  # fmt: skip


def tokenizer() -> Any:
    from transformers import CLIPTokenizer

    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "b</w>": 3, "a": 4, "b": 5}
    return CLIPTokenizer(vocab=words, merges=[], model_max_length=6)


@pytest.fixture(scope="module")
def xl() -> Tensors:
    torch.manual_seed(1)
    return sdxl()


@pytest.fixture(scope="module")
def place(xl: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the base as one file and, as `pipeline`, as diffusers saves it."""
    folder = tmp_path_factory.mktemp("end")
    save_file(xl, folder / "xl.safetensors", {"modelspec.title": "SDXL"})
    configured().save_pretrained(folder / "config")
    loaded(folder / "xl.safetensors", folder).save_pretrained(folder / "pipeline")
    return folder


def loaded(file: Path, place: Path) -> Any:
    return diffusers.StableDiffusionXLPipeline.from_single_file(str(file), config=str(place / "config"))


def latents(unet: Any) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    conditions = {"text_embeds": torch.randn(2, 7, generator=generator), "time_ids": torch.rand(2, 6, generator=generator)}
    states = torch.randn(2, 6, 7, generator=generator)
    with torch.no_grad():
        out: Tensor = unet(torch.randn(2, 4, 8, 8, generator=generator), 7, states, added_cond_kwargs=conditions).sample
    return out


def tall_mask(deltas: Tensor) -> Tensor:
    mean = deltas.mean(dim=0)
    votes = (deltas.abs() > LAMBDA * (mean - deltas).abs()).sum(dim=0)
    return torch.where(votes >= VOTES, mean, 0)


def lokr(module: str, weight: Tensor) -> Tensors:
    """A LoKr with r = 1 and α = 0.5 whose first factor is one number."""
    rows, columns = len(weight), weight[0].numel()
    factors = {"w1": torch.randn(1, 1), "w2_a": torch.randn(rows, 1), "w2_b": torch.randn(1, columns)}
    return {f"{module}.lokr_{name}": value for name, value in factors.items()} | {f"{module}.alpha": torch.tensor(0.5)}


def lokr_effect(adapter: Tensors, module: str, shape: tuple[int, ...]) -> Tensor:
    w1, a, b = (adapter[f"{module}.lokr_{name}"].double() for name in ("w1", "w2_a", "w2_b"))
    return 0.5 * torch.kron(w1, a @ b).reshape(shape)


KINDS: dict[str, tuple[Callable[..., Tensors], Callable[..., Tensor], dict[str, str]]] = {
    "kohya": (lora, effect, {"ss_network_module": "networks.lora", "ss_network_dim": "2", "ss_network_alpha": "1.5"}),
    "LyCORIS": (lokr, lokr_effect, {"ss_network_module": "lycoris.kohya", "ss_network_args": '{"algo": "lokr"}'}),
}


def merged(base: Path, adapters: list[Path], out: Path) -> Path:
    arguments = ["merge", *map(str, (base, *adapters)), "--method", "tall-mask", "-o", str(out)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_from_files_in_the_names_of_the_checkpoint(xl: Tensors, place: Path, tmp_path: Path, kind: str) -> None:
    make, effect_of, metadata = KINDS[kind]
    names = {name: UNET + name for name in unet_weights(xl)}
    modules = {f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}": full for name, full in names.items()}
    layer = "encoder.layers.3.mlp.fc1"
    modules[f"lora_te1_text_model_{layer.replace('.', '_')}"] = f"{TE1}transformer.text_model.{layer}.weight"
    modules["lora_te2_text_model_encoder_layers_30_mlp_fc1"] = f"{TE2}model.transformer.resblocks.30.mlp.c_fc.weight"
    files, deltas = [], {name: [] for name in modules.values()}  # type: dict[str, list[Tensor]]
    for seed in range(RUNS):
        torch.manual_seed(seed)
        adapter: Tensors = {}
        for module, name in modules.items():
            adapter |= {key: value * 0.3 if value.ndim else value for key, value in make(module, xl[name]).items()}
            deltas[name].append(effect_of(adapter, module, tuple(xl[name].shape)))
        files.append(tmp_path / f"{seed}.safetensors")
        save_file(adapter, files[-1], metadata)
    assert len(modules) == 794 + 2
    out = merged(place / "xl.safetensors", files, tmp_path / "merged.safetensors")
    summed = xl | {name: (xl[name] + tall_mask(torch.stack(found))).float() for name, found in deltas.items()}
    save_file(summed, tmp_path / "summed.safetensors")
    ours, expected = loaded(out, place), loaded(tmp_path / "summed.safetensors", place)
    for part, count in (("unet", 1680), ("text_encoder", None), ("text_encoder_2", None), ("vae", None)):
        states = [getattr(pipeline, part).state_dict() for pipeline in (ours, expected)]
        assert count in (None, len(states[0]))
        for name, tensor in states[0].items():
            torch.testing.assert_close(
                tensor, states[1][name], rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
    found = latents(ours.unet)
    torch.testing.assert_close(found, latents(expected.unet), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, latents(loaded(place / "xl.safetensors", place).unet), rtol=1e-2, atol=1e-2)


def test_from_ai_toolkit_files_over_both_layouts(place: Path, tmp_path: Path) -> None:
    """ai-toolkit names the modules of a UNet as diffusers does, with underscores."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(place / "pipeline", subfolder="unet")
    weights = {n: t for n, t in unet.state_dict().items() if n.endswith(".weight") and t.ndim > 1}
    files, deltas = [], {name: [] for name in weights}  # type: dict[str, list[Tensor]]
    for seed in range(RUNS):
        torch.manual_seed(seed)
        adapter: Tensors = {}
        for name, weight in weights.items():
            module = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
            factors = lora(module, weight, alpha=2.0)  # ai-toolkit: the rank
            adapter |= {key: value * 0.3 if value.ndim else value for key, value in factors.items()}
            deltas[name].append(effect(adapter, module, tuple(weight.shape)))
        files.append(tmp_path / f"{seed}.safetensors")
        save_file(adapter, files[-1], {"software": json.dumps({"name": "ai-toolkit", "version": "0.7"})})
    assert len(weights) == 794
    single = loaded(merged(place / "xl.safetensors", files, tmp_path / "m.safetensors"), place).unet
    folder = merged(place / "pipeline", files, tmp_path / "folder")
    several = diffusers.StableDiffusionXLPipeline.from_pretrained(folder).unet
    for name, tensor in single.state_dict().items():
        assert torch.equal(tensor, several.state_dict()[name])
    unet.load_state_dict(unet.state_dict() | {n: weights[n] + tall_mask(torch.stack(d)).float() for n, d in deltas.items()})
    torch.testing.assert_close(latents(several), latents(unet), rtol=1e-4, atol=1e-4)
    assert len(load_file(tmp_path / "m.safetensors")) == len(load_file(place / "xl.safetensors"))


def unet_weights(xl: Tensors) -> list[str]:
    names = (name.removeprefix(UNET) for name in xl if name.startswith(UNET) and name.endswith(".weight"))
    return [name for name in names if xl[UNET + name].ndim > 1]


@pytest.mark.parametrize("style", ["kohya", "diffusers"])
def test_an_adapter_extracted_from_a_fine_tune_loads_in_diffusers(xl: Tensors, place: Path, tmp_path: Path, style: str) -> None:
    """Every layer of the UNet and some of the encoders have a change of rank 2, which an adapter of rank 2 holds exactly."""
    torch.manual_seed(3)
    tuned = dict(xl)
    others = [
        f"{TE1}transformer.text_model.encoder.layers.3.mlp.fc1.weight",
        f"{TE2}model.transformer.resblocks.30.mlp.c_proj.weight",
    ]
    for name in (*(UNET + name for name in unet_weights(xl)), *others):
        rows, columns = len(xl[name]), xl[name][0].numel()
        tuned[name] = xl[name] + (0.2 * torch.randn(rows, 2) @ torch.randn(2, columns)).reshape(xl[name].shape)
    save_file(tuned, tmp_path / "tuned.safetensors")
    out = tmp_path / "extracted.safetensors"
    arguments = [str(place / "xl.safetensors"), str(tmp_path / "tuned.safetensors"), "--method", "mean", "--as-lora", "2"]
    result = CliRunner().invoke(main, ["merge", *arguments, "--format", style, "-o", str(out)])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(
        main, ["bake", str(place / "xl.safetensors"), str(out), "-o", str(tmp_path / "baked.safetensors")]
    )
    assert result.exit_code == 0, result.output
    baked = load_file(tmp_path / "baked.safetensors")
    for name, tensor in tuned.items():
        torch.testing.assert_close(baked[name], tensor, rtol=1e-4, atol=1e-4)
    pipeline, expected = loaded(place / "xl.safetensors", place), loaded(tmp_path / "tuned.safetensors", place)
    pipeline.load_lora_weights(str(tmp_path), weight_name="extracted.safetensors")
    pipeline.fuse_lora(components=["unet", "text_encoder", "text_encoder_2"])
    pipeline.unload_lora_weights()
    for part in ("unet", "text_encoder", "text_encoder_2"):
        states = [getattr(each, part).state_dict() for each in (pipeline, expected)]
        assert states[0].keys() == states[1].keys()
        for name, tensor in states[0].items():
            torch.testing.assert_close(
                tensor, states[1][name], rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )
