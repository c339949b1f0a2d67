"""Every adapter that cannot be baked is refused in one line that names the place."""

from __future__ import annotations

import json
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from emomerge.adapters import bake
from emomerge.checkpoints import MemoryCheckpoint
from emomerge.errors import BadInput

BASE = MemoryCheckpoint(
    {
        "net.layer.weight": torch.randn(6, 4),
        "net.layer.bias": torch.randn(6),
        "net.conv.weight": torch.randn(4, 2, 3, 3),  # in two groups of four channels
        "net.codes.weight": torch.zeros(6, 4, dtype=torch.float8_e4m3fn),
        "net.attention.in_proj_weight": torch.randn(12, 4),
    },
    source="the base",
)
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["layer"]}


def factors(module: str = "net.layer", out: int = 6, rank: int = 2, features: int = 4) -> dict[str, Tensor]:
    return {
        f"base_model.model.{module}.lora_A.weight": torch.randn(rank, features),
        f"base_model.model.{module}.lora_B.weight": torch.randn(out, rank),
    }


def adapter(folder: Path, tensors: dict[str, Tensor] | None = None, **config: object) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    save_file(factors() if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(BadInput) as caught:
        bake(BASE, folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_plain_adapter_of_these_tests_bakes(tmp_path):
    baked = bake(BASE, adapter(tmp_path))
    assert baked.touched() == ("net.layer.weight",)
    a, b = factors().values()
    assert baked.delta("net.layer.weight", BASE).shape == (b @ a).shape


@pytest.mark.parametrize(
    "field, value",
    [
        ("peft_type", "TOMORROW"),
        ("use_dora", True),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("alora_invocation_tokens", [1, 2]),
        ("use_qalora", True),
        ("layer_replication", [[0, 2]]),
        ("kasa_config", {"a": 1}),
        ("something_of_tomorrow", "x"),
        ("r", 0),
        ("lora_alpha", "big"),
    ],
)
def test_fields_that_change_the_formula_are_named(field, value, tmp_path):
    message = refusal(adapter(tmp_path, **{field: value}))
    assert f"adapter_config.json, {field}" in message


@pytest.mark.parametrize("text", ["{", "[1]", '{"r": 4}'])
def test_a_damaged_configuration_is_refused(text, tmp_path):
    adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    assert "adapter_config.json" in refusal(tmp_path)


def test_missing_files_are_refused(tmp_path):
    assert "adapter_config.json" in refusal(tmp_path)
    adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    assert "pickle" in refusal(tmp_path)
    (tmp_path / "adapter_model.bin").unlink()
    assert "missing" in refusal(tmp_path)
    save_file({}, tmp_path / "adapter_model.safetensors")
    assert "no tensors" in refusal(tmp_path)


@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_missing_factor_is_named(factor, tmp_path):
    tensors = factors()
    del tensors[f"base_model.model.net.layer.lora_{factor}.weight"]
    message = refusal(adapter(tmp_path, tensors))
    assert f"expected lora_{factor}" in message
    assert "net.layer" in message


def test_a_key_without_a_base_tensor_is_an_error_or_a_warning(tmp_path):
    adapter(tmp_path, factors() | factors("net.other"))
    message = refusal(tmp_path)
    assert "adapter_model.safetensors, base_model.model.net.other.lora_A.weight" in message
    assert "the base" in message
    with pytest.warns(UserWarning, match=r"net\.other"):
        baked = bake(BASE, tmp_path, allow_unmatched=True)
    assert baked.touched() == ("net.layer.weight",)


def test_an_adapter_of_another_model_is_refused_even_if_unmatched_keys_are_allowed(tmp_path):
    adapter(tmp_path, factors("other.thing"))
    with pytest.raises(BadInput, match="another model"):
        bake(BASE, tmp_path, allow_unmatched=True)


def test_without_transformers_equal_names_are_found_and_others_name_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "vocab_size": 6}))
    base = MemoryCheckpoint(dict(BASE), source="the base", folder=tmp_path)
    assert bake(base, adapter(tmp_path, factors("layer"))).touched() == ("net.layer.weight",)
    with pytest.raises(BadInput, match=r"another model.*pip install 'emomerge\[train\]'"):
        bake(base, adapter(tmp_path, factors("other.thing")))
    with pytest.raises(BadInput, match=r"matches no base tensor(?!.*pip)"):
        bake(base, adapter(tmp_path, factors() | factors("other.thing")))


def test_shapes_are_compared(tmp_path):
    message = refusal(adapter(tmp_path, factors(out=5)))
    assert "expected (5, 4)" in message
    assert "found (6, 4)" in message
    assert "net.layer.weight" in message


def test_a_replacement_of_another_shape_is_refused(tmp_path):
    message = refusal(adapter(tmp_path, factors() | {"base_model.model.net.layer.bias": torch.zeros(7)}))
    assert "expected (7,)" in message


def test_ranks_are_compared(tmp_path):
    assert "rank" in refusal(adapter(tmp_path, rank_pattern={"layer": 3}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_are_refused(value, tmp_path):
    tensors = factors()
    tensors["base_model.model.net.layer.lora_B.weight"][3, 1] = value
    assert "lora_B.weight" in refusal(adapter(tmp_path, tensors))


def test_layers_whose_lora_is_no_change_of_a_weight_are_refused(tmp_path):
    grouped = {
        "base_model.model.net.conv.lora_A.weight": torch.randn(2, 4, 3, 3),
        "base_model.model.net.conv.lora_B.weight": torch.randn(4, 1, 1, 1),
    }
    assert "grouped" in refusal(adapter(tmp_path, grouped))
    assert "MultiheadAttention" in refusal(adapter(tmp_path, factors("net.attention", out=12)))


def test_a_quantized_base_is_refused(tmp_path):
    assert "quantized" in refusal(adapter(tmp_path, factors("net.codes")))


def test_other_lora_tensors_are_refused(tmp_path):
    magnitude = {"base_model.model.net.layer.lora_magnitude_vector": torch.ones(6)}
    assert "lora_magnitude_vector" in refusal(adapter(tmp_path, factors() | magnitude))


def test_token_rows_need_their_indices(tmp_path):
    rows = {"base_model.model.net.layer.token_adapter.trainable_tokens_delta": torch.ones(2, 4)}
    assert "trainable_token_indices" in refusal(adapter(tmp_path, rows, trainable_token_indices=[1]))
    assert "at [1, 6]" in refusal(adapter(tmp_path, rows, trainable_token_indices=[1, 6]))
    baked = bake(BASE, adapter(tmp_path, rows, trainable_token_indices={"layer": [1, 4]}))
    changed = (baked["net.layer.weight"] != BASE["net.layer.weight"]).any(1)
    assert changed.nonzero().flatten().tolist() == [1, 4]


def test_two_keys_for_one_tensor_are_refused(tmp_path):
    assert "two adapter keys" in refusal(adapter(tmp_path, factors() | factors("layer")))


def test_a_bias_of_another_shape_is_refused(tmp_path):
    bias = {"base_model.model.net.layer.lora_B.bias": torch.ones(1)}
    assert "expected (1,)" in refusal(adapter(tmp_path, factors() | bias, lora_bias=True))


def test_nothing_warns_without_reason(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bake(BASE, adapter(tmp_path, bias="none", lora_dropout=0.1, peft_version="0.21.2"))


@pytest.mark.parametrize(
    ("magnitude", "config", "message"),
    [
        ({}, {"use_dora": True}, "half a DoRA adapter.*use_dora.*no lora_magnitude_vector of net.layer"),
        ({"net.layer": torch.ones(6)}, {}, "half a DoRA adapter.*lora_magnitude_vector"),
        ({"net.layer": torch.ones(4)}, {"use_dora": True}, r"another shape.*lora_magnitude_vector.*expected \(4,\).*\(6,\)"),
        ({"net.layer": torch.ones(6, 4)}, {"use_dora": True}, "another shape.*lora_magnitude_vector"),
        ({"net.layer": torch.ones(6), "net.other": torch.ones(6)}, {"use_dora": True}, "magnitude without.*net.other"),
    ],
)
def test_a_magnitude_belongs_to_a_pair_of_factors(magnitude, config, message, tmp_path):
    tensors = {f"base_model.model.{module}.lora_magnitude_vector": value for module, value in magnitude.items()}
    assert re.search(message, refusal(adapter(tmp_path, factors() | tensors, **config)))
