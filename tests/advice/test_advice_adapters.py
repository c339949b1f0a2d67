"""Following the advice of messages about adapters, their bases, and files that are neither."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from advising import Scenario, Scenarios, W, adapter, model, refused, works
from safetensors.torch import load_file, save_file

from emomerge.adapters import bake, naming
from emomerge.checkpoints import MemoryCheckpoint, open_checkpoint
from emomerge.errors import BadInput

SCENARIOS = Scenarios()
follows = SCENARIOS.follows
NAN = torch.tensor([[float("nan"), 1.0]])
LORA = {"x.a.lora_down.weight": torch.ones(1, 2), "x.a.lora_up.weight": torch.ones(2, 1)}
GLORA = {f"x.a.{name}.weight": torch.ones(2, 2) for name in ("a1", "a2", "b1", "b2")}


def llama(**options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 16}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **options))


def peft_of(base: Any, folder: Path, **config: Any) -> Any:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, init_lora_weights=False, **config))
    adapted.save_pretrained(folder)
    return adapted


def image_file(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata)
    return path


@follows("give the model in safetensors that it was quantized from")
def _unquantized(tmp: Path) -> None:
    whole, quantized = model(tmp / "whole"), tmp / "quantized"
    quantized.mkdir()
    save_file({"a.qweight": torch.ones(2, 2, dtype=torch.int32), "a.g_idx": torch.ones(2)}, quantized / "model.safetensors")
    (tmp / "a.gguf").write_bytes(b"GGUF" + bytes(60))
    for base in (quantized, tmp / "a.gguf"):
        assert refused("bake", base, tmp, "-o", tmp / "out").endswith("that it was quantized from")
    works("bake", whole, adapter(tmp / "adapter"), "-o", tmp / "out")


@follows("bake into the unquantized base")
def _integers(tmp: Path) -> None:
    base, whole, lora = model(tmp / "base", a=W.char()), model(tmp / "whole"), adapter(tmp / "adapter")
    for each in (lora, image_file(tmp / "image.safetensors", {name[2:]: tensor for name, tensor in LORA.items()})):
        assert refused("bake", base, each, "-o", tmp / "out").endswith("bake into the unquantized base")
        works("bake", whole, each, "-o", tmp / f"out-{each.name}")


@follows("give the base that the adapter was trained on")
def _other_base(tmp: Path) -> None:
    other, base, lora = model(tmp / "other", a=torch.ones(3, 5)), model(tmp / "base"), adapter(tmp / "adapter")
    for wrong in (other, model(tmp / "another", b=W)):
        assert refused("bake", wrong, lora, "-o", tmp / "out").endswith("give the base that the adapter was trained on")
    works("bake", base, lora, "-o", tmp / "out")
    bias = image_file(tmp / "bias.safetensors", {"x.a.diff_b": torch.ones(2)})
    with pytest.raises(BadInput, match=r"has no bias.*give the base that the adapter was trained on"):
        bake(MemoryCheckpoint({"x.a.weight": W}), bias)
    assert bake(MemoryCheckpoint({"x.a.weight": W, "x.a.bias": W[0]}), bias)["x.a.bias"].tolist() == [2, 3]


@follows("give the base that the adapter was trained on, or --allow-unmatched to skip them")
def _unmatched(tmp: Path) -> None:
    two = {name.replace("x.a", module): tensor for module in ("a", "b") for name, tensor in LORA.items()}
    image = image_file(tmp / "image.safetensors", two)
    lora = adapter(tmp / "adapter", target_modules=["a", "b"])
    file = lora / "adapter_model.safetensors"
    tensors = load_file(file)
    image_file(file, tensors | {name.replace("model.a", "model.b"): tensor for name, tensor in tensors.items()})
    base, own = model(tmp / "base"), model(tmp / "own", a=W, b=W)
    for number, each in enumerate((image, lora)):
        assert "or --allow-unmatched to skip them" in refused("bake", base, each, "-o", tmp / "out")
        assert "Note: " in works("bake", base, each, "--allow-unmatched", "-o", tmp / f"some-{number}")
        works("bake", own, each, "-o", tmp / f"all-{number}")


@follows("pip install 'emomerge[train]', which resolves names, or give the base that the adapter was trained on")
def _without_transformers(tmp: Path) -> None:
    base = llama()
    base.save_pretrained(tmp / "base")
    peft_of(base, tmp / "adapter", target_modules=["q_proj"])
    stored = load_file(tmp / "adapter/adapter_model.safetensors")  # in the names of another version
    tensors = {name.replace("model.model.model.", "model.language_model.model."): tensor for name, tensor in stored.items()}
    save_file(tensors, tmp / "adapter/adapter_model.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(naming, "installed", lambda name: False)
        assert "pip install 'emomerge[train]'" in refused("bake", tmp / "base", tmp / "adapter", "-o", tmp / "out")
    save_file(stored, tmp / "adapter/adapter_model.safetensors")
    works("bake", tmp / "base", tmp / "adapter", "-o", tmp / "out")


@follows("put the base's config.json beside its weights")
def _order(tmp: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 16}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6, "head_dim": 4, "num_key_value_heads": 1}
    base = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes, **experts))
    state = {name: tensor.contiguous().clone() for name, tensor in base.state_dict().items()}
    base.save_pretrained(tmp / "base")
    save_file(state, tmp / "base/model.safetensors")  # as it is in memory
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    peft_of(base, tmp / "adapter", target_modules=[], target_parameters=parameters)
    config = (tmp / "base/config.json").rename(tmp / "config.json")
    assert refused("bake", tmp / "base", tmp / "adapter", "-o", tmp / "out").endswith("config.json beside its weights")
    config.rename(tmp / "base/config.json")
    works("bake", tmp / "base", tmp / "adapter", "-o", tmp / "out")


@follows("train it again")
def _not_finite(tmp: Path) -> None:
    base = model(tmp / "base")
    broken = adapter(tmp / "broken", a=NAN), image_file(tmp / "broken.safetensors", {**LORA, "x.a.lora_down.weight": NAN})
    for each in broken:
        assert refused("bake", base, each, "-o", tmp / "out").endswith("train it again")
    works("bake", base, adapter(tmp / "adapter"), "-o", tmp / "out")


@follows("train with ensure_weight_tying=True or untie the base first")
def _tied(tmp: Path) -> None:
    llama(tie_word_embeddings=True).save_pretrained(tmp / "tied")
    embedding = {"target_modules": ["embed_tokens"]}
    peft_of(llama(tie_word_embeddings=True), tmp / "one", **embedding)
    assert refused("bake", tmp / "tied", tmp / "one", "-o", tmp / "out").endswith("or untie the base first")
    peft_of(llama(tie_word_embeddings=True), tmp / "both", target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
    works("bake", tmp / "tied", tmp / "both", "-o", tmp / "out-both")
    llama(tie_word_embeddings=False).save_pretrained(tmp / "untied")
    works("bake", tmp / "untied", tmp / "one", "-o", tmp / "out-untied")


@follows("merge into a base that stores both, with tie_word_embeddings set to false in its configuration")
def _two_values(tmp: Path) -> None:
    base = llama(tie_word_embeddings=True)
    base.save_pretrained(tmp / "base")
    base.save_pretrained(tmp / "run")
    tensors = load_file(tmp / "run/model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    changed = {"model.embed_tokens.weight": embedding + 1, "lm_head.weight": embedding + 2}
    save_file({**tensors, **changed}, tmp / "run/model.safetensors", {"format": "pt"})
    merge = ("merge", tmp / "base", tmp / "run", "--method", "mean", "-o", tmp / "out")
    assert "merge into a base that stores both" in refused(*merge)
    save_file({**tensors, "lm_head.weight": embedding.clone()}, tmp / "base/model.safetensors", {"format": "pt"})
    config = json.loads((tmp / "base/config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp / "base/config.json").write_text(json.dumps(config))
    works(*merge)
    merged = open_checkpoint(tmp / "out")
    for name, tensor in changed.items():
        torch.testing.assert_close(merged[name], tensor)


@follows(
    "convert it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=…); or give the base as it was saved "
    "after the initialization, and set init_lora_weights to true"
)
def _changed_base(tmp: Path) -> None:
    peft = pytest.importorskip("peft")
    base = llama()
    base.save_pretrained(tmp / "base")
    adapted = peft.get_peft_model(
        base, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], init_lora_weights="pissa")
    )
    adapted.peft_config["default"].init_lora_weights = True  # PEFT's documentation
    adapted.save_pretrained(tmp / "initial")
    adapted.peft_config["default"].init_lora_weights = "pissa"
    residual = {name.replace(".base_layer", ""): tensor for name, tensor in base.state_dict().items() if "lora_" not in name}
    save_file({name: tensor.clone() for name, tensor in residual.items()}, tmp / "residual.safetensors")
    with torch.no_grad():
        adapted.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.add_(0.1)
    adapted.save_pretrained(tmp / "changed")
    assert "path_initial_model_for_weight_conversion" in refused("bake", tmp / "base", tmp / "changed", "-o", tmp / "out")
    wanted = adapted(torch.arange(5)[None]).logits
    adapted.save_pretrained(tmp / "plain", path_initial_model_for_weight_conversion=str(tmp / "initial"))
    works("bake", tmp / "base", tmp / "plain", "-o", tmp / "one")
    config = tmp / "changed/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"init_lora_weights": True}))
    works("bake", tmp / "residual.safetensors", tmp / "changed", "-o", tmp / "other/model.safetensors")
    (tmp / "other/config.json").write_text((tmp / "base/config.json").read_text())
    for out in ("one", "other"):
        baked = type(llama()).from_pretrained(tmp / out)
        torch.testing.assert_close(baked(torch.arange(5)[None]).logits, wanted, atol=1e-5, rtol=1e-5)


@follows("copy the repeated layers into a base with that many layers, and remove layer_replication")
def _repeated_layers(tmp: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    llama().save_pretrained(tmp / "base")
    adapted = peft_of(llama(), tmp / "adapter", target_modules=["q_proj"], layer_replication=[[0, 1], [0, 1]])
    wanted = adapted(torch.arange(5)[None]).logits
    assert "remove layer_replication" in refused("bake", tmp / "base", tmp / "adapter", "-o", tmp / "out")
    longer = type(llama())(transformers.LlamaConfig(**(llama().config.to_dict() | {"num_hidden_layers": 2})))
    longer.load_state_dict(peft.PeftModel.from_pretrained(llama(), tmp / "adapter").unload().state_dict())
    longer.save_pretrained(tmp / "repeated")
    config = tmp / "adapter/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"layer_replication": None}))
    works("bake", tmp / "repeated", tmp / "adapter", "-o", tmp / "out")
    baked = type(llama()).from_pretrained(tmp / "out")
    torch.testing.assert_close(baked(torch.arange(5)[None]).logits, wanted, atol=1e-5, rtol=1e-5)


@follows("merge it in PEFT with merge_and_unload, and give the model that this makes")
def _other_type(tmp: Path) -> None:
    peft = pytest.importorskip("peft")
    base = llama()
    base.save_pretrained(tmp / "base")
    adapted = peft.get_peft_model(base, peft.PsoftConfig(r=2, psoft_alpha=2, target_modules=["q_proj"], init_weights=False))
    adapted.save_pretrained(tmp / "adapter")
    merge = ("merge", tmp / "base", "--method", "mean", "-o", tmp / "out")
    assert "merge it in PEFT" in refused(*merge, tmp / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp / "merged")
    works(*merge, tmp / "merged")


@follows("train it again without this layer in target_modules, or with BOFT")
def _rotated_kernel(tmp: Path) -> None:
    peft = pytest.importorskip("peft")

    def net() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, bias=False), torch.nn.Conv2d(6, 4, 1, bias=False))

    base = model(tmp / "base", **{str(n): layer.weight.detach() for n, layer in enumerate(net().children())})
    for name, config in {
        "adapter": peft.OFTConfig(target_modules=["0", "1"], r=0, oft_block_size=2),
        "without": peft.OFTConfig(target_modules=["1"], r=0, oft_block_size=2),
        "boft": peft.BOFTConfig(target_modules=["0", "1"], boft_block_size=2),
    }.items():
        peft.get_peft_model(net(), config).save_pretrained(tmp / name)
    assert refused("bake", base, tmp / "adapter", "-o", tmp / "out").endswith("or with BOFT")
    works("bake", base, tmp / "without", "-o", tmp / "one")
    works("bake", base, tmp / "boft", "-o", tmp / "other")


@follows("if you trust it, load it in PEFT and save_pretrained")
def _adapter_pickle(tmp: Path) -> None:
    peft = pytest.importorskip("peft")
    llama().save_pretrained(tmp / "base")
    peft_of(llama(), tmp / "adapter", target_modules=["q_proj"])
    weights = tmp / "adapter/adapter_model.safetensors"
    torch.save(load_file(weights), tmp / "adapter/adapter_model.bin")
    weights.unlink()
    assert refused("bake", tmp / "base", tmp / "adapter", "-o", tmp / "out").endswith("load it in PEFT and save_pretrained")
    peft.PeftModel.from_pretrained(llama(), tmp / "adapter").save_pretrained(tmp / "again")
    works("bake", tmp / "base", tmp / "again", "-o", tmp / "out")


@follows("give the adapter's folder, with its {}")
def _file_of_a_folder(tmp: Path) -> None:
    base, lora = model(tmp / "base"), adapter(tmp / "adapter")
    alone = (tmp / "adapter_model.safetensors").absolute()
    alone.write_bytes((lora / "adapter_model.safetensors").read_bytes())
    message = refused("merge", base, alone, "--method", "mean", "-o", tmp / "out")
    assert message.endswith("give the adapter's folder, with its adapter_config.json")
    works("merge", base, lora, "--method", "mean", "-o", tmp / "out")


@follows("load it in PEFT with its rank and alpha, save_pretrained, and give that folder (with {})")
def _without_configuration(tmp: Path) -> None:
    peft = pytest.importorskip("peft")
    llama().save_pretrained(tmp / "base")
    config = {"target_modules": ["q_proj"], "lora_alpha": 3}
    peft_of(llama(), tmp / "adapter", **config)
    weights = load_file(tmp / "adapter/adapter_model.safetensors")
    bare = {name.removeprefix("base_model.model.").replace(".weight", ".default.weight"): t for name, t in weights.items()}
    save_file(bare, tmp / "bare.safetensors")
    merge = ("merge", tmp / "base", tmp / "bare.safetensors", "--method", "mean", "-o", tmp / "out")
    assert "load it in PEFT with its rank and alpha" in refused(*merge)
    again = peft.get_peft_model(llama(), peft.LoraConfig(r=2, **config))
    peft.set_peft_model_state_dict(again, weights)
    again.save_pretrained(tmp / "again")
    works("merge", tmp / "base", tmp / "again", "--method", "mean", "-o", tmp / "out")


@follows("remove them if they are not needed", "remove them, and load them in your image program")
def _unknown_keys(tmp: Path) -> None:
    base = MemoryCheckpoint({"x.a.weight": W})
    for key, advice in {"x.a.unheard_of": "remove them if", "bundle_emb.word.string_to_param": "image program"}.items():
        with pytest.raises(BadInput, match=advice):
            bake(base, image_file(tmp / "more.safetensors", {**LORA, key: torch.ones(3)}))
    assert bake(base, image_file(tmp / "image.safetensors", LORA)).touched() == ("x.a.weight",)


@follows("remove one of the two: the file names this module in two ways")
def _two_names(tmp: Path) -> None:
    base = MemoryCheckpoint({"x.a.weight": W})
    again = {name.replace("x.a", "lora_unet_x_a"): tensor for name, tensor in LORA.items()}
    with pytest.raises(BadInput, match="remove one of the two"):
        bake(base, image_file(tmp / "image.safetensors", {**LORA, **again}))
    assert bake(base, image_file(tmp / "image.safetensors", again))["x.a.weight"].tolist() == (W + 1).tolist()


@follows("set alpha to the rank for a scale of 1", "train it again, or save it in float32")
def _alpha(tmp: Path) -> None:
    base = MemoryCheckpoint({"x.a.weight": W})
    for alpha, advice in {0.0: "set alpha to the rank", float("inf"): "save it in float32"}.items():
        with pytest.raises(BadInput, match=advice):
            bake(base, image_file(tmp / "image.safetensors", {**LORA, "x.a.alpha": torch.tensor(alpha)}))
    rank = image_file(tmp / "image.safetensors", {**LORA, "x.a.alpha": torch.tensor(1.0)})
    assert bake(base, rank)["x.a.weight"].tolist() == (W + 1).tolist()
    half = torch.tensor(1e5).half()  # infinite
    single = image_file(tmp / "image.safetensors", {**LORA, "x.a.alpha": torch.tensor(1e5)})
    assert half.isinf() and bake(base, single)["x.a.weight"].tolist() == (W + 1e5).tolist()


@follows("multiply alpha by √r and remove rs_lora from ss_network_args")
def _rs_lora(tmp: Path) -> None:
    base, alpha = MemoryCheckpoint({"x.a.weight": W}), torch.tensor(3.0)
    tensors = {**GLORA, "x.a.alpha": alpha}
    with pytest.raises(BadInput, match="multiply alpha by √r"):
        bake(base, image_file(tmp / "image.safetensors", tensors, ss_network_args='{"rs_lora": true}'))
    rank = 2
    scaled = image_file(tmp / "image.safetensors", {**tensors, "x.a.alpha": alpha * rank**0.5}, ss_network_args="{}")
    product, scale = torch.full((2, 2), 2.0), 3 / rank**0.5  # of two matrices of ones; α/√r
    torch.testing.assert_close(bake(base, scaled)["x.a.weight"], W + scale * (product + W @ product))


@follows("write it as ADAPTER=0.8")
def _strength(tmp: Path) -> None:
    base, lora = model(tmp / "base"), adapter(tmp / "adapter")
    assert refused("bake", base, f"{lora}=strong", "-o", tmp / "out").endswith("write it as ADAPTER=0.8")
    works("bake", base, f"{lora}=0.8", "-o", tmp / "out")


@pytest.mark.parametrize("scenario", SCENARIOS.each())
def test_following_the_advice_succeeds(scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scenario(tmp_path)
