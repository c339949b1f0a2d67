"""Baked weights against PEFT's live adapter, on tiny random models."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from emomerge.adapters import BakedCheckpoint, bake, open_run
from emomerge.checkpoints import (
    MemoryCheckpoint,
    load_into,
    model_checkpoint,
    open_checkpoint,
    write_checkpoint,
    write_json,
)
from emomerge.errors import BadInput

TOLERANCE = 1e-5
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def bert(labels: int = 3) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=labels, **SMALL))


def gpt2(tied: bool = False) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=50,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=16,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=3, **SMALL))


def mixtral(hidden: int = 16) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = SMALL | {"num_hidden_layers": 1, "hidden_size": hidden}
    return MixtralForCausalLM(MixtralConfig(vocab_size=50, num_key_value_heads=2, num_local_experts=4, **sizes))


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.mix = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(self.stem(x).relu()).relu().mean((2, 3)))


class Lines(nn.Module):
    """One- and three-dimensional convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(3, 8, 3, padding=1)
        self.cube = nn.Conv3d(1, 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cube(self.line(x.flatten(2)).tanh()[:, None, None]).flatten(1)


def output(model: nn.Module) -> torch.Tensor:
    model.eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        if not hasattr(model, "config") or model.config.model_type in ("vit", "custom"):
            out = model(torch.randn(4, 3, 16, 16, generator=generator))
        else:
            out = model(input_ids=torch.randint(0, 50, (4, 7), generator=generator))
    return getattr(out, "logits", out)


def loud(model: nn.Module) -> nn.Module:
    """The model with weights so large that every change shows in its output."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def save_base(model: nn.Module, folder: Path) -> Path:
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
    else:
        write_checkpoint(model_checkpoint(model, source="test"), folder)
    return folder


def adapted(model: nn.Module, folder: Path, **config: object) -> torch.Tensor:
    """Save a random adapter of the model to the folder and return what the live one computes."""
    return output(save_adapter(model, folder, **config))


def save_adapter(model: nn.Module, folder: Path, **config: object) -> nn.Module:
    """Save a random adapter of the model to the folder and return the live one."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = get_peft_model(copy.deepcopy(model), LoraConfig(init_lora_weights=False, **config))
        with torch.no_grad():
            for parameter in live.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        live.save_pretrained(folder)
    return live


QUERY_VALUE = ["query", "value"]
CASES = {
    "lora": (bert, {"target_modules": QUERY_VALUE, "r": 4, "lora_alpha": 10}),
    "all-linear": (bert, {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "rslora": (bert, {"target_modules": QUERY_VALUE, "r": 4, "lora_alpha": 10, "use_rslora": True}),
    "dora": (bert, {"target_modules": QUERY_VALUE, "r": 4, "lora_alpha": 10, "use_dora": True, "use_rslora": True}),
    "dora-conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj"], "r": 3, "lora_alpha": 5, "use_dora": True}),
    "dora-conv2d": (ConvNet, {"target_modules": ["stem", "mix", "head"], "r": 2, "lora_alpha": 5, "use_dora": True}),
    "patterns": (
        bert,
        {
            "target_modules": ["query", "value", "dense"],
            "rank_pattern": {"layer.1.attention.self.query": 3, "output.dense": 2},
            "alpha_pattern": {r"layer\.0\..*\.value": 5, "dense": 32},
        },
    ),
    "embedding": (bert, {"target_modules": ["word_embeddings", "query"], "r": 3}),
    "lora-bias": (bert, {"target_modules": QUERY_VALUE, "lora_bias": True, "lora_alpha": 12}),
    "bias-lora-only": (bert, {"target_modules": QUERY_VALUE, "bias": "lora_only"}),
    "bias-all": (bert, {"target_modules": QUERY_VALUE, "bias": "all", "modules_to_save": ["classifier"]}),
    "modules-to-save": (bert, {"target_modules": QUERY_VALUE, "modules_to_save": ["classifier", "pooler"]}),
    "token-rows": (bert, {"target_modules": QUERY_VALUE, "trainable_token_indices": {"word_embeddings": [3, 7, 30]}}),
    "conv1d-gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "r": 3}),
    "conv1d-and-linear": (gpt2, {"target_modules": ["c_proj", "lm_head"], "r": 3}),
    "embedding-gpt2": (gpt2, {"target_modules": ["c_attn", "wte"], "r": 3}),
    "conv2d": (ConvNet, {"target_modules": ["stem", "mix", "head"], "r": 2, "lora_bias": True}),
    "conv1d-conv3d": (Lines, {"target_modules": ["line", "cube"], "r": 2}),
    "vit": (vit, {"target_modules": ["q_proj", "v_proj", "projection"], "modules_to_save": ["classifier"]}),
    "experts": (
        mixtral,
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.down_proj", "experts.gate_up_proj"],
            "rank_pattern": {"experts.down_proj": 2},
            "r": 3,
        },
    ),
    "square-experts": (
        lambda: mixtral(hidden=24),
        {"target_modules": [], "target_parameters": ["experts.down_proj"], "r": 3},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_baked_model_computes_what_the_live_adapter_does(case, tmp_path, record_property):
    make, config = CASES[case]
    model = loud(make())
    save_base(model, tmp_path / "base")
    live = adapted(model, tmp_path / "adapter", **config)
    before = output(model)
    baked = bake(tmp_path / "base", tmp_path / "adapter")
    write_checkpoint(baked, tmp_path / "out", files_from=tmp_path / "base")
    load_into(model, open_checkpoint(tmp_path / "out"))
    difference = (output(model) - live).abs().max().item()
    record_property("difference", difference)
    print(f"{case}: {difference:.1e}")
    assert difference <= TOLERANCE
    for name in baked.touched():  # what a merge multiplies out block by block
        factors = baked.factors(name, baked.base)
        assert factors is None or torch.equal(factors.dense(), baked.delta(name, baked.base))
    assert (before - live).abs().max() > 0.05  # or the test would show nothing


def qwen3_moe() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"moe_intermediate_size": 20, "num_key_value_heads": 1, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=50, **SMALL, **sizes))


@pytest.mark.parametrize("stored", ["an expert at a time", "stacked"])
@pytest.mark.parametrize("make", [mixtral, qwen3_moe])
def test_experts_are_baked_however_they_are_stored(make, stored, tmp_path):
    from transformers import AutoModelForCausalLM

    model = loud(make())
    save_base(model, tmp_path / "base")
    if stored == "stacked":
        stacked = MemoryCheckpoint(model.state_dict())
        write_checkpoint(stacked, tmp_path / "stacked", files_from=tmp_path / "base")
        base = tmp_path / "stacked"
    else:
        base = tmp_path / "base"
        assert any(".experts.3." in name for name in open_checkpoint(base))
    parameters = ["experts.down_proj", "experts.gate_up_proj"]
    config = {"target_modules": ["q_proj"], "target_parameters": parameters, "r": 3}
    live = adapted(model, tmp_path / "adapter", **config, rank_pattern={"experts.down_proj": 2})
    baked = bake(base, tmp_path / "adapter")
    assert sum("experts" in name for name in baked.touched()) == sum("experts" in name for name in open_checkpoint(base))
    write_checkpoint(baked, tmp_path / "out", files_from=base)
    loaded, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values()), told
    torch.testing.assert_close(output(loaded), live, rtol=0, atol=TOLERANCE)
    assert (output(model) - live).abs().max() > 0.05


def test_an_adapter_trained_on_a_compiled_model_is_baked(tmp_path):
    model = loud(bert())
    save_base(model, tmp_path / "base")
    live = adapted(model, tmp_path / "adapter", target_modules=["query"], modules_to_save=["classifier"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    keys = {
        key.replace("base_model.model.", "base_model.model._orig_mod."): t.clone() for key, t in open_checkpoint(file).items()
    }
    write_checkpoint(MemoryCheckpoint(keys), file, force=True)
    write_checkpoint(bake(tmp_path / "base", tmp_path / "adapter"), tmp_path / "out")
    load_into(model, open_checkpoint(tmp_path / "out"))
    torch.testing.assert_close(output(model), live, rtol=0, atol=TOLERANCE)


def llava() -> nn.Module:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    text = {"model_type": "qwen2", "vocab_size": 50, "num_key_value_heads": 1, **SMALL}
    vision = {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, **SMALL}
    return LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, image_token_index=49, tie_word_embeddings=True)
    )


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=50, decoder_start_token_id=0, **sizes))


def masked_bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(vocab_size=50, **SMALL))


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (llava, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
        (llava, {"target_modules": ["lm_head"]}),
        (t5, {"target_modules": ["q"], "modules_to_save": ["lm_head"]}),
        (masked_bert, {"target_modules": ["word_embeddings"]}),
        (masked_bert, {"target_modules": ["query"], "modules_to_save": ["decoder"]}),
    ],
)
def test_one_side_of_a_tie_is_refused_wherever_the_model_declares_it(make, config, tmp_path):
    model = make()
    save_base(model, tmp_path / "base")
    save_adapter(model, tmp_path / "adapter", **config)
    with pytest.raises(BadInput, match="ties this tensor"):
        bake(tmp_path / "base", tmp_path / "adapter")


def test_a_baked_folder_loads_with_from_pretrained(tmp_path):
    from transformers import AutoModelForImageClassification

    model = vit()
    save_base(model, tmp_path / "base")
    live = adapted(model, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["classifier"])
    write_checkpoint(bake(tmp_path / "base", tmp_path / "adapter"), tmp_path / "out", files_from=tmp_path / "base")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(output(loaded), live, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("make", [bert, vit])
def test_an_adapter_finds_a_base_without_the_head_prefix(make, tmp_path):
    model = make()
    targets = ["query"] if make is bert else ["q_proj"]
    adapted(model, tmp_path / "adapter", target_modules=targets)
    save_base(model, tmp_path / "base")
    save_base(model.base_model, tmp_path / "headless")
    whole, headless = (bake(tmp_path / name, tmp_path / "adapter") for name in ("base", "headless"))
    prefix = model.base_model_prefix + "."
    assert len(headless.touched()) == 2
    assert tuple(prefix + name for name in headless.touched()) == whole.touched()
    for name in headless.touched():
        assert torch.equal(headless[name], whole[prefix + name])


def test_deltas_are_exact_over_a_bf16_base(tmp_path):
    model = bert()
    save_base(model, tmp_path / "full")
    write_checkpoint(open_checkpoint(tmp_path / "full"), tmp_path / "base", dtype="bfloat16", files_from=tmp_path / "full")
    adapted(model, tmp_path / "adapter", target_modules=["query"], modules_to_save=["classifier"], lora_alpha=0.001)
    base = open_checkpoint(tmp_path / "base")
    baked, exact = bake(base, tmp_path / "adapter"), bake(tmp_path / "full", tmp_path / "adapter")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert baked.info(name).dtype == torch.bfloat16
    assert baked[name].dtype == torch.float32
    full = open_checkpoint(tmp_path / "full")
    assert torch.equal(baked.delta(name, base), exact._changes[name].delta(torch.float32))
    assert torch.equal(baked[name], base[name].float() + baked.delta(name, base))
    assert not torch.equal(baked[name].bfloat16() - base[name], baked.delta(name, base))  # what rounding would lose
    assert baked.delta("bert.embeddings.word_embeddings.weight", base) is None
    head = "classifier.weight"
    assert torch.equal(baked.delta(head, base), baked[head] - base[head].float())
    assert torch.equal(baked.delta(name, full), baked[name] - full[name])  # another base: the plain difference


def test_a_float64_base_is_baked_in_float64(tmp_path):
    model = ConvNet()
    adapted(model, tmp_path / "adapter", target_modules=["head"])
    base = MemoryCheckpoint({name: tensor.double() for name, tensor in model.state_dict().items()})
    baked = bake(base, tmp_path / "adapter")
    assert baked["head.weight"].dtype == baked.delta("head.weight", base).dtype == torch.float64
    assert baked.factors("head.weight", base) is None  # these are float32


def test_baking_does_not_depend_on_the_thread_count(tmp_path):
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(700, 1030)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x.flatten(1)[:, :700])

    model = Wide()
    adapted(model, tmp_path / "adapter", target_modules=["layer"], r=24)
    baked = bake(model_checkpoint(model, source="test"), tmp_path / "adapter")
    one = baked["layer.weight"]
    torch.set_num_threads(2)
    assert torch.equal(one, baked["layer.weight"])


def test_a_tied_embedding_is_refused_but_an_untied_view_of_it_is_not(tmp_path):
    model = loud(gpt2(tied=True))
    save_base(model, tmp_path / "base")
    adapted(model, tmp_path / "adapter", target_modules=["wte"])
    with pytest.raises(BadInput, match=r"ties.*lm_head"):
        bake(tmp_path / "base", tmp_path / "adapter")
    live = adapted(model, tmp_path / "both", target_modules=["wte", "lm_head"], ensure_weight_tying=True)
    write_checkpoint(bake(tmp_path / "base", tmp_path / "both"), tmp_path / "out")
    load_into(model, open_checkpoint(tmp_path / "out"))
    torch.testing.assert_close(output(model), live, rtol=1e-6, atol=TOLERANCE)


def test_open_run_accepts_every_kind_of_run(tmp_path):
    model = ConvNet()
    base = open_checkpoint(save_base(model, tmp_path / "base"))
    adapted(model, tmp_path / "run" / "adapter", target_modules=["head"])
    with pytest.raises(BadInput, match="no weights"):
        open_run(base, tmp_path / "run")
    write_json(tmp_path / "run" / "run.json", {"artefact": "adapter"})
    baked = open_run(base, tmp_path / "run")
    assert isinstance(baked, BakedCheckpoint)
    assert open_run(base, baked) is baked
    assert torch.equal(open_run(base, tmp_path / "run" / "adapter")["head.weight"], baked["head.weight"])
    write_checkpoint(baked, tmp_path / "run" / "model")
    write_json(tmp_path / "run" / "run.json", {"artefact": "model"})
    assert torch.equal(open_run(base, tmp_path / "run")["head.weight"], baked["head.weight"])
    assert open_run(base, tmp_path / "base" / "model.safetensors").names() == base.names()


@pytest.mark.parametrize("name", ["../base", "/etc", "missing", ""])
def test_a_run_whose_artefact_is_missing_is_refused(name, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "run.json", {"artefact": name})
    with pytest.raises(BadInput):
        open_run(MemoryCheckpoint({}), tmp_path / "run")


SQUARE = """
import json, sys
from emomerge.adapters import bake
from emomerge.checkpoints import open_checkpoint
base = open_checkpoint(sys.argv[1])
delta = bake(base, sys.argv[2]).delta(sys.argv[3], base).tolist()
print(json.dumps(["transformers" in sys.modules, delta]))
"""


@pytest.mark.parametrize(
    ("kind", "module", "imported"), [("llama", "a.q_proj", False), ("gpt2", "h.0.attn.c_proj", True), ("unknown", "a.b", True)]
)
def test_a_square_matrix_is_transposed_where_it_is_a_conv1d(kind: str, module: str, imported: bool, tmp_path: Path) -> None:
    """transformers is imported to find out, unless its source says that the model has none."""
    base, adapter, tensor = tmp_path / "base", tmp_path / "adapter", f"{module}.weight"
    if kind == "gpt2":
        gpt2().save_pretrained(base)
        module, tensor = f"transformer.{module}", f"transformer.{tensor}"
    else:
        write_checkpoint(MemoryCheckpoint({tensor: torch.zeros(16, 16)}), base)
        write_json(base / "config.json", {"model_type": kind})
    a, b = torch.randn(2, 16), torch.randn(16, 2)
    factors = {f"base_model.model.{module}.lora_{k}.weight": t for k, t in {"A": a, "B": b}.items()}
    write_checkpoint(MemoryCheckpoint(factors), adapter / "adapter_model.safetensors")
    write_json(adapter / "adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 2})
    command = [sys.executable, "-c", SQUARE, str(base), str(adapter), tensor]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    was_imported, delta = json.loads(done.stdout)
    assert was_imported == imported
    torch.testing.assert_close(torch.tensor(delta), (b @ a).T if kind == "gpt2" else b @ a)
