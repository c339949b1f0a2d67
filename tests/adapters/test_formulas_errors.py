"""Damaged adapter modules: one line that says which tensor is wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from emomerge.adapters.formulas import module_of
from emomerge.errors import BadInput


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


UP, DOWN = {"lora_up": ones(6, 2)}, {"lora_down": ones(2, 5)}
LORA = UP | DOWN
LOHA = {"hada_w1_a": ones(6, 2), "hada_w1_b": ones(2, 5), "hada_w2_a": ones(6, 2), "hada_w2_b": ones(2, 5)}
LOKR = {"lokr_w1_a": ones(3, 2), "lokr_w1_b": ones(2, 1), "lokr_w2": ones(2, 5)}
GLORA = {"a1": ones(5, 2), "a2": ones(2, 5), "b1": ones(6, 2), "b2": ones(2, 5)}
NAN, INF = torch.tensor(float("nan")), torch.tensor(float("inf"))

BROKEN = {
    "half a LoRA": (UP, "missing.*expected lora_down"),
    "the other half": (DOWN, "missing.*expected lora_up"),
    "only alpha": ({"alpha": ones()}, "not an adapter of a known kind.*alpha"),
    "nothing": ({}, "not an adapter of a known kind"),
    "a weight alone": ({"weight": ones(6, 5)}, "not an adapter of a known kind.*weight"),
    "unequal ranks": (UP | {"lora_down": ones(3, 5)}, "disagree about its rank.*down 3, up 2"),
    "up with a kernel": ({"lora_up": ones(6, 2, 3, 3), "lora_down": ones(2, 5, 3, 3)}, "wrong shape.*lora_up.*kernel"),
    "a vector for a factor": (UP | {"lora_down": ones(2)}, "wrong shape.*lora_down.*2 dimensions"),
    "a core of another rank": (LORA | {"lora_mid": ones(2, 3, 3, 3)}, "disagree about its rank.*second of mid 3"),
    "a core without kernel": (LORA | {"lora_mid": ones(2, 2)}, "wrong shape.*lora_mid"),
    "alpha with two elements": (LORA | {"alpha": ones(2)}, r"wrong shape.*alpha.*one number.*\(2,\)"),
    "alpha as a matrix": (LORA | {"alpha": ones(1, 1)}, "wrong shape.*alpha"),
    "infinite alpha": (LORA | {"alpha": INF}, "alpha is not a usable number.*inf"),
    "alpha that float16 cannot hold": (LORA | {"alpha": torch.tensor(99999.0).half()}, "alpha is not a usable number.*inf"),
    "alpha is NaN": (LORA | {"alpha": NAN}, "alpha is not a usable number.*nan"),
    "alpha is 0": (LORA | {"alpha": ones() * 0}, "alpha is not a usable number.*set alpha to the rank"),
    "NaN in a factor": (UP | {"lora_down": DOWN["lora_down"] * NAN}, "NaN or infinity.*lora_down"),
    "infinity in a factor": (DOWN | {"lora_up": UP["lora_up"] * INF}, "NaN or infinity.*lora_up"),
    "integers": (UP | {"lora_down": ones(2, 5).int()}, "dtype.*lora_down.*int32"),
    "an empty factor": ({"lora_up": ones(6, 0), "lora_down": ones(0, 5)}, "empty tensor"),
    "two kinds": (LORA | LOHA, "two kinds"),
    "two changes of the weight": (LORA | {"diff": ones(6, 5)}, "two tensors change one parameter.*diff.*weight"),
    "two changes of the bias": (LORA | {"lora_up.bias": ones(6), "diff_b": ones(6)}, "two tensors change one parameter.*bias"),
    "something else beside it": (LORA | {"rescale": ones(6)}, "do not belong to LoRA.*rescale"),
    "an unknown suffix": (LORA | {"lora_extra": ones(6)}, "do not belong to LoRA.*lora_extra"),
    "two magnitudes": (LORA | {"dora_scale": ones(6, 1), "magnitude": ones(6)}, "dora_scale and magnitude beside LoRA"),
    "a magnitude that is a matrix": (LORA | {"dora_scale": ones(6, 5)}, "wrong shape.*dora_scale.*vector"),
    "half a LoHa": ({name: LOHA[name] for name in ("hada_w1_a", "hada_w1_b")}, "missing.*hada_w2_a"),
    "LoHa of two shapes": (LOHA | {"hada_w2_b": ones(2, 4)}, "differ in shape"),
    "LoHa of two ranks": (LOHA | {"hada_w2_a": ones(6, 3), "hada_w2_b": ones(3, 5)}, "disagree about its rank"),
    "LoHa with one core": (LOHA | {"hada_t1": ones(2, 2)}, "wrong shape.*hada_t1"),
    "half a LoKr": ({"lokr_w1": ones(3, 2)}, "missing.*lokr_w2_a"),
    "LoKr twice": (LOKR | {"lokr_w1": ones(3, 1)}, "whole and as a product.*lokr_w1"),
    "LoKr of two ranks": (LOKR | {"lokr_w1_b": ones(3, 1)}, "disagree about its rank"),
    "LoKr with an infinite alpha that counts": (LOKR | {"alpha": INF}, "alpha is not a usable number"),
    "GLoRA without b1": ({name: GLORA[name] for name in ("a1", "a2", "b2")}, "missing.*b1"),
    "GLoRA of another rank": (GLORA | {"a2": ones(3, 5)}, "disagree about its rank"),
    "GLoRA that is not square": (GLORA | {"a1": ones(4, 2)}, "not square"),
    "GLoRA with a magnitude": (GLORA | {"dora_scale": ones(6, 1)}, "dora_scale beside GLoRA"),
    "IA3 without side": ({"weight": ones(6), "on_input": ones() * 2}, "on_input is neither 0 nor 1"),
    "IA3 as a matrix": ({"weight": ones(6, 5), "on_input": ones()}, "wrong shape.*vector"),
    "OFT that is not square": ({"oft_blocks": ones(3, 2, 4)}, "wrong shape.*square"),
    "OFT of two dimensions": ({"oft_blocks": ones(3, 3)}, "wrong shape.*square"),
    "OFT with another rescale": ({"oft_blocks": ones(3, 2, 2), "rescale": ones(5)}, "wrong shape.*rescale.*6 rows"),
    "OFT with a gap": ({"oft_blocks.0": ones(3, 2, 2), "oft_blocks.2": ones(3, 2, 2)}, "missing.*oft_blocks.1"),
    "OFT with a negative constraint": ({"oft_blocks": ones(3, 2, 2), "alpha": -ones()}, "constraint.*-1"),
    "OFT with an infinite constraint": ({"oft_blocks": ones(3, 2, 2), "alpha": INF}, "constraint.*inf"),
    "BOFT of odd blocks": ({"oft_blocks": ones(2, 4, 3, 3)}, "wrong shape.*butterfly"),
    "BOFT with too many levels": ({"oft_blocks": ones(4, 4, 2, 2)}, "wrong shape.*butterfly"),
    "oft_R": ({"oft_R": ones(3, 6)}, "input side.*oft_R"),
    "a scalar": (LORA | {"scalar": ones() * 0.5}, "scalar"),
    "reshape_weight": (LORA | {"reshape_weight": torch.tensor([6, 9])}, "enlarges"),
    "a sparse residual": (LORA | {"bias_indices": torch.tensor([0])}, "sparse residual"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_modules_are_refused_in_one_line(name):
    tensors, message = BROKEN[name]
    with pytest.raises(BadInput, match=message) as error:
        module_of(tensors, where="file.safetensors, lora_unet_x")
    assert "file.safetensors, lora_unet_x" in str(error.value)
    assert "\n" not in str(error.value)


def test_glora_with_rs_lora_is_refused_because_its_alpha_lacks_a_factor():
    module_of(GLORA, where="x")
    with pytest.raises(BadInput, match=r"rs_lora.*√r"):
        module_of(GLORA, where="x", rs_lora=True)
    module_of(LORA, where="x", rs_lora=True)  # folded into alpha by the trainer


@pytest.mark.parametrize(
    ("tensors", "shape"),
    [
        (LORA, (6, 4)), (LORA, (5, 6)), (LORA, (6, 5, 3, 3)), (LORA, (6,)),
        ({"lora_up": ones(6, 2, 1, 1), "lora_down": ones(2, 4, 3, 3)}, (6, 9, 3, 3)),  # an inpainting base
        ({"lora_up": ones(6, 2, 1, 1), "lora_down": ones(2, 4, 3, 1)}, (6, 4, 1, 3)),
        (LOHA, (6, 4)), (LOKR, (6, 10)), (GLORA, (6, 4)), (GLORA, (6, 5, 3)),
        (LORA | {"dora_scale": ones(5, 1)}, (6, 5)), (LORA | {"dora_scale": ones(1, 6)}, (6, 5)),
        (LORA | {"magnitude": ones(5)}, (6, 5)),
        ({"weight": ones(6), "on_input": torch.tensor(1)}, (6, 5)), ({"weight": ones(5), "on_input": torch.tensor(0)}, (6, 5)),
        ({"weight": ones(6), "on_input": torch.tensor(1)}, (6,)),
        ({"oft_blocks": ones(3, 2, 2)}, (5, 6)), ({"oft_blocks": ones(2, 4, 2, 2)}, (6, 8)),
        ({"diff": ones(6, 5)}, (5, 6)), ({"set_weight": ones(6)}, (6, 5)), ({"w_norm": ones(6)}, (7,)),
    ],
)  # fmt: skip
def test_a_base_of_another_shape_is_refused(tensors, shape):
    formula = module_of(tensors, where="file, x").parameters["weight"]
    with pytest.raises(BadInput, match="another shape than the adapter expects.*found"):
        formula.check(shape, where="file, x")
