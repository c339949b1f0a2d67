"""kohya files over Stable Diffusion checkpoints, as one file and as a folder of diffusers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from image_models import TE1, TE2, UNET, Tensors, effect, lora, sd15, sdxl
from safetensors.torch import load_file, save_file

from emomerge.adapters import bake, format_of, open_dense
from emomerge.adapters.images.targets import Targets
from emomerge.checkpoints import Checkpoint, MemoryCheckpoint
from emomerge.cli import main
from emomerge.errors import BadInput


@pytest.fixture(scope="session")
def xl() -> Tensors:
    torch.manual_seed(1)
    return sdxl()


@pytest.fixture(scope="session")
def xl_file(xl: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("xl") / "sd_xl.safetensors"
    save_file(xl, path, {"modelspec.title": "SDXL", "modelspec.architecture": "stable-diffusion-xl-v1-base"})
    return path


def flat(name: str) -> str:
    return name.replace(".", "_")


def test_every_module_of_sdxl_is_found_by_its_flattened_name(xl: Tensors) -> None:
    targets = Targets(MemoryCheckpoint(xl))
    assert targets.family == "SDXL"
    names = [name for name in xl if name.startswith(UNET)]
    assert len(names) == 1680
    modules = [name.removesuffix(".weight") for name in names if name.endswith(".weight") and xl[name].ndim > 1]
    assert len(modules) == 794
    for module in modules:
        found = targets.find(f"lora_unet_{flat(module.removeprefix(UNET))}", where="")
        assert found is not None and found["weight"][0].tensor == f"{module}.weight"


def test_every_module_of_the_text_encoders_is_found(xl: Tensors) -> None:
    targets = Targets(MemoryCheckpoint(xl))
    counts = []
    for number, layers in ((1, 12), (2, 32)):
        found = [
            targets.find(f"lora_te{number}_text_model_encoder_layers_{layer}_{module}", where="")
            for layer in range(layers)
            for module in (*(f"self_attn_{which}_proj" for which in ("q", "k", "v", "out")), "mlp_fc1", "mlp_fc2")
        ]
        places = [each["weight"][0] for each in found if each is not None]
        assert len(set(places)) == len(found)
        counts.append(len(found))
    assert counts == [72, 192]


DIFFUSERS_NAMES = {
    "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k": "input_blocks.4.1.transformer_blocks.1.attn2.to_k",
    "down_blocks.2.resnets.1.time_emb_proj": "input_blocks.8.0.emb_layers.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "mid_block.resnets.1.conv1": "middle_block.2.in_layers.2",
    "up_blocks.0.attentions.2.proj_out": "output_blocks.2.1.proj_out",
    "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
    "up_blocks.2.resnets.0.conv_shortcut": "output_blocks.6.0.skip_connection",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
}


def test_both_spellings_of_a_module_give_the_same_bits(xl: Tensors, xl_file: Path, tmp_path: Path) -> None:
    first, second = {}, {}
    for other, name in DIFFUSERS_NAMES.items():
        factors = lora("x", xl[f"{UNET}{name}.weight"])
        first |= {key.replace("x", f"lora_unet_{flat(name)}", 1): value for key, value in factors.items()}
        second |= {key.replace("x", f"lora_unet_{flat(other)}", 1): value for key, value in factors.items()}
    save_file(first, tmp_path / "ldm.safetensors")
    save_file(second, tmp_path / "diffusers.safetensors")
    baked = [bake(xl_file, tmp_path / name) for name in ("ldm.safetensors", "diffusers.safetensors")]
    assert baked[0].touched() == tuple(sorted(f"{UNET}{name}.weight" for name in DIFFUSERS_NAMES.values()))
    for name in baked[0].touched():
        assert torch.equal(baked[0][name], baked[1][name])
        delta = effect(first, f"lora_unet_{flat(name.removeprefix(UNET).removesuffix('.weight'))}", tuple(xl[name].shape))
        torch.testing.assert_close(baked[0][name].double(), xl[name] + delta, rtol=0, atol=1e-6)


def kohya(xl: Tensors, seed: int = 0, **options: float | None) -> Tensors:
    """Some modules of the UNet and both text encoders."""
    torch.manual_seed(seed)
    found: Tensors = {}
    for name in (
        "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
        "input_blocks.1.0.in_layers.2",
        "output_blocks.0.1.proj_in",
    ):
        found |= lora(f"lora_unet_{flat(name)}", xl[f"{UNET}{name}.weight"], **options)
    layer = "encoder.layers.3.mlp.fc1"
    found |= lora(f"lora_te1_text_model_{flat(layer)}", xl[f"{TE1}transformer.text_model.{layer}.weight"], **options)
    fused = xl[f"{TE2}model.transformer.resblocks.3.attn.in_proj_weight"]
    width = fused.shape[1]
    for part in "qv":
        found |= lora(f"lora_te2_text_model_encoder_layers_3_self_attn_{part}_proj", fused[:width], **options)
    fc1 = xl[f"{TE2}model.transformer.resblocks.3.mlp.c_fc.weight"]
    found |= lora("lora_te2_text_model_encoder_layers_3_mlp_fc1", fc1, **options)
    return found | lora("lora_te2_text_projection", xl[f"{TE2}model.text_projection"].T, **options)


def test_text_encoders_of_both_layouts(xl: Tensors, xl_file: Path, tmp_path: Path) -> None:
    adapter = kohya(xl)
    save_file(adapter, tmp_path / "a.safetensors")
    baked = bake(xl_file, tmp_path / "a.safetensors")
    fused = f"{TE2}model.transformer.resblocks.3.attn.in_proj_weight"
    stem = "lora_te2_text_model_encoder_layers_3_self_attn"
    q, v = effect(adapter, f"{stem}_q_proj"), effect(adapter, f"{stem}_v_proj")
    expected = xl[fused] + torch.cat((q, torch.zeros_like(q), v))
    torch.testing.assert_close(baked[fused].double(), expected, rtol=0, atol=1e-6)
    projection = f"{TE2}model.text_projection"
    expected = xl[projection] + effect(adapter, "lora_te2_text_projection").T
    torch.testing.assert_close(baked[projection].double(), expected, rtol=0, atol=1e-6)
    first = f"{TE1}transformer.text_model.encoder.layers.3.mlp.fc1.weight"
    expected = xl[first] + effect(adapter, "lora_te1_text_model_encoder_layers_3_mlp_fc1")
    torch.testing.assert_close(baked[first].double(), expected, rtol=0, atol=1e-6)
    assert len(baked.touched()) == 7


def as_folder(xl: Tensors, folder: Path, *, text_model: str = "text_model.") -> Path:
    """The modules of `kohya` in a folder of diffusers."""
    blocks, open_clip = {}, f"{TE2}model.transformer.resblocks.3"
    for other, name in {
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
        "down_blocks.0.resnets.0.conv1": "input_blocks.1.0.in_layers.2",
        "up_blocks.0.attentions.0.proj_in": "output_blocks.0.1.proj_in",
        "add_embedding.linear_1": "label_emb.0.0",
    }.items():
        blocks[f"{other}.weight"] = xl[f"{UNET}{name}.weight"]
    inner = f"{TE1}transformer.text_model."
    first = {text_model + name.removeprefix(inner): tensor for name, tensor in xl.items() if name.startswith(inner)}
    second = {
        "text_model.final_layer_norm.weight": xl[f"{TE2}model.ln_final.weight"],
        "text_projection.weight": xl[f"{TE2}model.text_projection"].T.contiguous(),
        "text_model.encoder.layers.3.mlp.fc1.weight": xl[f"{open_clip}.mlp.c_fc.weight"],
    }
    for part, weight in zip("qkv", xl[f"{open_clip}.attn.in_proj_weight"].chunk(3), strict=True):
        second[f"text_model.encoder.layers.3.self_attn.{part}_proj.weight"] = weight.contiguous()
    for part, stem, tensors in (
        ("unet", "diffusion_pytorch_model", blocks), ("text_encoder", "model", first), ("text_encoder_2", "model", second),
    ):  # fmt: skip
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text("{}")
        save_file(tensors, folder / part / f"{stem}.safetensors")
    index = {part: ["x", "X"] for part in ("unet", "text_encoder", "text_encoder_2")}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("text_model", ["text_model.", ""])
def test_a_folder_of_diffusers_gets_the_same_values(text_model: str, xl: Tensors, xl_file: Path, tmp_path: Path) -> None:
    save_file(kohya(xl), tmp_path / "a.safetensors")
    whole = bake(xl_file, tmp_path / "a.safetensors")
    folder = bake(as_folder(xl, tmp_path / "folder", text_model=text_model), tmp_path / "a.safetensors")
    assert len(folder.touched()) == 8
    block = f"{TE2}model.transformer.resblocks.3"
    q, k, v = whole[f"{block}.attn.in_proj_weight"].chunk(3)
    layer = "text_encoder_2/text_model.encoder.layers.3"
    expected = {
        f"{layer}.self_attn.q_proj.weight": q, f"{layer}.self_attn.k_proj.weight": k, f"{layer}.self_attn.v_proj.weight": v,
        f"{layer}.mlp.fc1.weight": whole[f"{block}.mlp.c_fc.weight"],
        "text_encoder_2/text_projection.weight": whole[f"{TE2}model.text_projection"].T,
        f"text_encoder/{text_model}encoder.layers.3.mlp.fc1.weight":
            whole[f"{TE1}transformer.text_model.encoder.layers.3.mlp.fc1.weight"],
        "unet/down_blocks.0.resnets.0.conv1.weight": whole[f"{UNET}input_blocks.1.0.in_layers.2.weight"],
    }  # fmt: skip
    for name, value in expected.items():
        torch.testing.assert_close(folder[name], value, rtol=0, atol=1e-6)


def test_sd15_in_both_spellings(tmp_path: Path) -> None:
    base = sd15()
    save_file(base, tmp_path / "v1-5.safetensors")
    targets = Targets(open_dense(tmp_path / "v1-5.safetensors"))
    assert targets.family == "SD1.5 or SD2"
    pairs = {
        "lora_unet_down_blocks_0_attentions_1_proj_in": f"{UNET}input_blocks.2.1.proj_in.weight",
        "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn2_to_v":
            f"{UNET}output_blocks.11.1.transformer_blocks.0.attn2.to_v.weight",
        "lora_unet_up_blocks_0_upsamplers_0_conv": f"{UNET}output_blocks.2.1.conv.weight",
        "lora_te_text_model_encoder_layers_11_mlp_fc2":
            "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc2.weight",
    }  # fmt: skip
    adapter: Tensors = {}
    for module, name in pairs.items():
        found = targets.find(module, where="")
        assert found is not None and found["weight"][0].tensor == name
        adapter |= lora(module, base[name])
    save_file(adapter, tmp_path / "a.safetensors")
    baked = bake(tmp_path / "v1-5.safetensors", tmp_path / "a.safetensors")
    for module, name in pairs.items():
        expected = base[name] + effect(adapter, module, tuple(base[name].shape))
        torch.testing.assert_close(baked[name].double(), expected, rtol=0, atol=1e-6)


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output if code == 0 else result.stderr


@pytest.fixture(scope="session")
def small(xl: Tensors) -> Tensors:
    """The tensors that `kohya` changes, and few others: writing thousands of tensors takes long."""
    blocks = ("input_blocks.4.1.", "input_blocks.1.0.", "output_blocks.0.1.proj", "label_emb.")
    starts = (*(UNET + block for block in blocks), "v_pred", f"{TE1}transformer.text_model.encoder.layers.3.")
    ends = (
        f"{TE1}transformer.text_model.final",
        f"{TE2}model.transformer.resblocks.3.",
        f"{TE2}model.ln",
        f"{TE2}model.text_p",
    )
    return {name: tensor for name, tensor in xl.items() if name.startswith(starts + ends)}


@pytest.fixture
def small_file(small: Tensors, tmp_path: Path) -> Path:
    save_file(small, tmp_path / "sdxl.safetensors")
    return tmp_path / "sdxl.safetensors"


def test_five_files_are_merged_in_one_command(small: Tensors, small_file: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.safetensors" for name in "abcde"]
    base = open_dense(small_file)
    dense: list[Checkpoint] = []
    for seed, file in enumerate(files):
        save_file(kohya(small, seed), file)
        dense.append(MemoryCheckpoint({name: tensor.clone() for name, tensor in bake(base, file).items()}))
    run("merge", small_file, *files, "--method", "tall-mask", "--quiet", "-o", tmp_path / "merged.safetensors")
    from emomerge.merging import merge

    expected = merge(base, dense, method="tall-mask")
    found = load_file(tmp_path / "merged.safetensors")
    moved = [name for name in found if not torch.equal(found[name], small[name])]
    assert len(moved) == 7
    for name in found:
        torch.testing.assert_close(found[name], expected[name].to(found[name].dtype), rtol=1e-5, atol=1e-5)


def test_bake_and_inspect(small: Tensors, small_file: Path, tmp_path: Path) -> None:
    adapter, file = kohya(small), tmp_path / "a.safetensors"
    save_file(adapter, file, {"ss_network_module": "networks.lora", "ss_network_dim": "2"})
    run("bake", small_file, file, "--quiet", "-o", tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {name: (t.dtype, t.shape) for name, t in small.items()}
    assert sum(not torch.equal(found[name], small[name]) for name in small) == 7
    facts = json.loads(run("inspect", file, "--json"))
    assert facts["kind"] == "adapter" and facts["trainer"] == "sd-scripts" and facts["family"] == "SDXL"
    assert facts["modules"] == 8
    assert facts["kinds"] == ["LoRA × 8"] and facts["ranks"] == ["2 × 8"] and facts["alphas"] == ["1.5 × 8"]


@pytest.fixture
def base(xl: Tensors) -> MemoryCheckpoint:
    return MemoryCheckpoint(xl, source="sd_xl.safetensors")


def test_a_module_that_the_base_lacks_is_refused_with_counts(xl: Tensors, base: MemoryCheckpoint, tmp_path: Path) -> None:
    extra = "lora_unet_input_blocks_4_1_transformer_blocks_7_attn1_to_q"
    save_file(kohya(xl) | lora(extra, torch.zeros(4, 4)), tmp_path / "a.safetensors")
    with pytest.raises(BadInput, match=rf"match no tensor of the base.*{extra}.*8 of 9 modules match"):
        bake(base, tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="8 of 9 modules match"):
        assert len(bake(base, tmp_path / "a.safetensors", allow_unmatched=True).touched()) == 7


def test_a_module_without_effect_needs_no_target(xl: Tensors, base: MemoryCheckpoint, tmp_path: Path) -> None:
    extra = lora("lora_unet_input_blocks_4_1_transformer_blocks_7_attn1_to_q", torch.zeros(4, 4))
    zero = {key: torch.zeros_like(value) if "lora_up" in key else value for key, value in extra.items()}
    save_file(kohya(xl) | zero, tmp_path / "a.safetensors")
    assert len(bake(base, tmp_path / "a.safetensors").touched()) == 7


def test_an_adapter_of_another_family_names_both(xl: Tensors, base: MemoryCheckpoint, tmp_path: Path) -> None:
    save_file(lora("lora_unet_double_blocks_0_img_attn_qkv", torch.zeros(12, 4)), tmp_path / "a.safetensors")
    with pytest.raises(BadInput, match=r"of another model.*SDXL.*Flux"):
        bake(base, tmp_path / "a.safetensors")


def test_one_module_in_two_spellings_is_refused(xl: Tensors, base: MemoryCheckpoint, tmp_path: Path) -> None:
    weight = xl[f"{UNET}input_blocks.4.1.proj_in.weight"]
    both = lora("lora_unet_input_blocks_4_1_proj_in", weight) | lora("lora_unet_down_blocks_1_attentions_0_proj_in", weight)
    save_file(both, tmp_path / "a.safetensors")
    with pytest.raises(BadInput, match=r"two modules of the adapter.*down_blocks_1.*and lora_unet_input_blocks_4"):
        bake(base, tmp_path / "a.safetensors")


def test_one_tensor_in_two_spellings_is_refused(xl: Tensors, base: MemoryCheckpoint, tmp_path: Path) -> None:
    adapter = kohya(xl)
    key = next(key for key in adapter if key.endswith("lora_down.weight"))
    again = key.replace("lora_down", "lora_A")
    save_file(adapter | {again: adapter[key].clone()}, tmp_path / "a.safetensors")
    with pytest.raises(BadInput, match=r"one tensor has two spellings"):
        bake(base, tmp_path / "a.safetensors")


@pytest.mark.parametrize("extra", ["lora_unet_input_blocks_4_1_proj_in.unheard_of", "bundle_emb.word.string_to_param"])
def test_an_unknown_key_is_refused(extra: str, xl: Tensors, base: MemoryCheckpoint, tmp_path: Path) -> None:
    save_file(kohya(xl) | {extra: torch.ones(3)}, tmp_path / "a.safetensors")
    with pytest.raises(BadInput, match=rf"keys that are not of an adapter.*{extra}.*1 of 25 tensors"):
        bake(base, tmp_path / "a.safetensors")


def test_the_base_of_another_width_is_refused(xl: Tensors, base: MemoryCheckpoint, tmp_path: Path) -> None:
    save_file(lora("lora_unet_input_blocks_4_1_proj_in", torch.zeros(4, 5)), tmp_path / "a.safetensors")
    with pytest.raises(BadInput, match=r"another shape.*\(4, 5\).*\(4, 4\)"):
        bake(base, tmp_path / "a.safetensors")


def test_a_difference_of_a_bias_that_the_base_lacks_is_refused(base: MemoryCheckpoint, tmp_path: Path) -> None:
    name = "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.diff_b"
    save_file({name: torch.ones(4)}, tmp_path / "a.safetensors")
    with pytest.raises(BadInput, match=r"the module of the base has no bias"):
        bake(base, tmp_path / "a.safetensors")


def test_a_checkpoint_is_no_adapter(xl_file: Path) -> None:
    assert format_of(xl_file) is None
