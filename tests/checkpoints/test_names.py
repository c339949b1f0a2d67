"""Names on disk of live models; written models load with transformers and compute the same outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from emomerge.checkpoints import (
    MemoryCheckpoint,
    disk_names,
    load_into,
    model_checkpoint,
    open_checkpoint,
    write_checkpoint,
)
from emomerge.errors import BadInput

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def config_and_class(kind: str):
    import transformers as t

    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    if kind == "vit":
        return t.ViTConfig(image_size=16, patch_size=8, num_labels=3, **SMALL), t.AutoModelForImageClassification
    if kind == "bert":
        return t.BertConfig(vocab_size=50, num_labels=3, **SMALL), t.AutoModelForSequenceClassification
    if kind == "bert-mlm":
        return t.BertConfig(vocab_size=50, **SMALL), t.AutoModelForMaskedLM
    configs = {
        "gpt2": lambda: t.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16, **tokens),
        "llama-tied": lambda: t.LlamaConfig(vocab_size=50, tie_word_embeddings=True, **SMALL),
        "llama": lambda: t.LlamaConfig(vocab_size=50, tie_word_embeddings=False, **SMALL),
        "mixtral": lambda: t.MixtralConfig(vocab_size=50, num_key_value_heads=2, num_local_experts=4, **SMALL),
    }
    return configs[kind](), t.AutoModelForCausalLM


KINDS = ["bert", "bert-mlm", "vit", "gpt2", "llama-tied", "llama", "mixtral"]


def make(kind: str, seed: int = 0):
    config, auto = config_and_class(kind)
    torch.manual_seed(seed)
    model = auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval(), auto


def logits(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        if model.config.model_type == "vit":
            return model(pixel_values=torch.randn(2, 3, 16, 16, generator=generator)).logits
        return model(input_ids=torch.randint(0, 50, (2, 6), generator=generator)).logits


@pytest.mark.parametrize("kind", KINDS)
def test_written_models_load_with_transformers_to_the_same_logits(kind, tmp_path):
    model, auto = make(kind)
    model.config.save_pretrained(tmp_path / "config")
    write_checkpoint(
        model_checkpoint(model, source="live"),
        tmp_path / "out",
        files_from=tmp_path / "config",
        max_shard_size=5000,
    )
    loaded, told = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values()), told
    assert torch.equal(logits(loaded.eval()), logits(model))
    other, _ = make(kind, seed=1)
    assert not torch.equal(logits(other), logits(model))
    load_into(other, open_checkpoint(tmp_path / "out"))
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_those_that_transformers_saves(kind, tmp_path):
    model, auto = make(kind)
    model.save_pretrained(tmp_path)
    saved, ours = open_checkpoint(tmp_path), model_checkpoint(model, source="live")
    assert saved.names() == ours.names()
    for name in saved:
        assert torch.equal(saved[name], ours[name])
    loaded = auto.from_pretrained(tmp_path)
    assert disk_names(loaded) == disk_names(model)
    load_into(loaded, saved)


def test_renames_reach_disk_although_experts_are_stacked():
    names = disk_names(make("vit")[0])
    assert names["vit.layers.0.attention.q_proj.weight"] == "vit.encoder.layer.0.attention.attention.query.weight"
    names = disk_names(make("mixtral")[0])
    assert names["model.layers.0.mlp.gate.weight"] == "model.layers.0.block_sparse_moe.gate.weight"
    assert not any("experts" in name for name in names)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("scratch", torch.ones(2), persistent=False)


def test_plain_modules_keep_names_buffers_and_ties():
    model = Plain()
    checkpoint = model_checkpoint(model, source="live")
    assert disk_names(model) == {name: name for name in model.state_dict()}
    assert checkpoint.names() == (
        "first.weight",
        "norm.bias",
        "norm.num_batches_tracked",
        "norm.running_mean",
        "norm.running_var",
        "norm.weight",
    )
    changed = MemoryCheckpoint({name: tensor + 1 for name, tensor in checkpoint.items()})
    load_into(model, changed)
    assert torch.equal(model.second.weight, changed["first.weight"])
    assert model.norm.num_batches_tracked == 1
    load_into(model, MemoryCheckpoint({**checkpoint, "second.weight": changed["first.weight"]}))  # tied names twice


def test_loading_casts_to_the_model():
    model = nn.Linear(2, 2).bfloat16()
    weight = model.weight
    load_into(model, MemoryCheckpoint({"weight": torch.full((2, 2), 1.001), "bias": torch.zeros(2)}))
    assert model.weight is weight
    assert weight.dtype == torch.bfloat16
    assert (weight == 1).all()


@pytest.mark.parametrize(
    "tensors, words",
    [
        ({"weight": torch.zeros(2, 2)}, "missing.*bias"),
        ({"weight": torch.zeros(2, 2), "bias": torch.zeros(2), "extra": torch.zeros(1)}, "unexpected.*extra"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}, r"weight.*expected \(2, 2\).*found \(2, 3\)"),
    ],
)
def test_a_checkpoint_of_another_model_leaves_the_model_alone(tensors, words):
    model = nn.Linear(2, 2)
    before = model.weight.clone()
    with pytest.raises(BadInput, match=words):
        load_into(model, MemoryCheckpoint(tensors, source="other"))
    assert torch.equal(model.weight, before)


def test_reading_weights_does_not_import_transformers():
    import subprocess
    import sys

    modules = "emomerge.checkpoints, emomerge.adapters.run, emomerge.adapters.peft.reader, emomerge.adapters.peft.writer"
    code = f"import sys, {modules}; assert not {{'transformers', 'peft'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
