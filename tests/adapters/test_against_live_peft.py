"""Baked weights against the live PEFT model, for every type, on tiny models whose axes differ in length."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from emomerge.adapters import bake
from emomerge.checkpoints import load_into, model_checkpoint, open_checkpoint, write_checkpoint
from emomerge.errors import BadInput

pytestmark = pytest.mark.peers
TOLERANCE = 1e-5
LLAMA = ["q_proj", "k_proj", "down_proj"]
TOKENS = [*range(2, 49, 3)]
CONVOLUTIONS = ["stem", "point", "head"]


def llama(**more: Any) -> nn.Module:
    """A model with fewer keys than queries; every projection has another shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "head_dim": 6, **more}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=50, num_attention_heads=4, num_key_value_heads=2, attention_bias=True, **sizes)
    )


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, **sizes))


class ConvNet(nn.Module):
    """A convolution with a kernel, a point-wise one, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 12, 3, padding=1)
        self.point = nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.point(self.stem(x).relu()).relu().mean((2, 3)))


class Line(nn.Module):
    """A one-dimensional convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(4, 12, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.line(x.flatten(2)).tanh().mean(2)


class Grouped(nn.Module):
    """A convolution in two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 6, 3, padding=1, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stem(x).tanh().mean((2, 3))


def output(model: nn.Module) -> torch.Tensor:
    model.eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        if not hasattr(model, "config") or model.config.model_type == "custom":
            out = model(torch.randn(4, 4, 9, 7, generator=generator))
        else:
            out = model(input_ids=torch.randint(0, 50, (4, 7), generator=generator))
    return getattr(out, "logits", out)


def loud(model: nn.Module) -> nn.Module:
    """The model with weights so large that every change shows in its output."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def save_base(model: nn.Module, folder: Path) -> None:
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
    else:
        write_checkpoint(model_checkpoint(model, source="test"), folder)


def trained(model: nn.Module, config: Any, noise: float) -> nn.Module:
    """Return a live adapter of a copy of the model with random numbers in place of a training."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * noise)
    return live


Make = Callable[[], nn.Module]
Case = tuple[str, Make, dict[str, Any]]
BOTH = {"init_weights": False}
CASES: dict[str, Case] = {
    "LoHa": ("LoHaConfig", llama, {"target_modules": LLAMA, "r": 3, "alpha": 5, **BOTH}),
    "LoHa with patterns": (
        "LoHaConfig", llama,
        {"target_modules": LLAMA, "r": 3, "alpha": 5, "rank_pattern": {"q_proj": 2, r"layers\.1.*down_proj": 4},
         "alpha_pattern": {"k_proj": 7}, **BOTH},
    ),
    "LoHa of convolutions": ("LoHaConfig", ConvNet, {"target_modules": CONVOLUTIONS, "r": 3, "alpha": 5, **BOTH}),
    "LoHa of convolutions with a core": (
        "LoHaConfig", ConvNet, {"target_modules": CONVOLUTIONS, "r": 3, "alpha": 5, "use_effective_conv2d": True, **BOTH},
    ),
    "LoHa of a line": ("LoHaConfig", Line, {"target_modules": ["line"], "r": 3, "alpha": 5, **BOTH}),
    "LoHa of a line with a core": (
        "LoHaConfig", Line, {"target_modules": ["line"], "r": 3, "alpha": 5, "use_effective_conv2d": True, **BOTH},
    ),
    "LoKr": ("LoKrConfig", llama, {"target_modules": LLAMA, "r": 2, "alpha": 5, **BOTH}),
    "LoKr of whole matrices": ("LoKrConfig", llama, {"target_modules": LLAMA, "r": 64, "alpha": 5, **BOTH}),
    "LoKr of two products": (
        "LoKrConfig", llama,
        {"target_modules": LLAMA, "r": 1, "alpha": 5, "decompose_both": True, "decompose_factor": 4, **BOTH},
    ),
    "LoKr of convolutions": ("LoKrConfig", ConvNet, {"target_modules": CONVOLUTIONS, "r": 1, "alpha": 5, **BOTH}),
    "LoKr of convolutions with a core": (
        "LoKrConfig", ConvNet, {"target_modules": CONVOLUTIONS, "r": 1, "alpha": 5, "use_effective_conv2d": True, **BOTH},
    ),
    "LoKr of whole convolutions": ("LoKrConfig", ConvNet, {"target_modules": CONVOLUTIONS, "r": 64, "alpha": 5, **BOTH}),
    "LoKr of a line": ("LoKrConfig", Line, {"target_modules": ["line"], "r": 1, "alpha": 5, **BOTH}),
    "LoKr of a whole line": ("LoKrConfig", Line, {"target_modules": ["line"], "r": 64, "alpha": 5, **BOTH}),
    "LoKr of a line with a core": (
        "LoKrConfig", Line, {"target_modules": ["line"], "r": 1, "alpha": 5, "use_effective_conv2d": True, **BOTH},
    ),
    "IA³": (
        "IA3Config", llama,
        {"target_modules": LLAMA, "feedforward_modules": ["down_proj"], "modules_to_save": ["lm_head"],
         "init_ia3_weights": False},
    ),
    "IA³ of GPT-2": (
        "IA3Config", gpt2,
        {"target_modules": ["c_attn", "c_fc", "c_proj"], "feedforward_modules": r".*mlp\.c_proj", "init_ia3_weights": False},
    ),
    "IA³ of convolutions": (
        "IA3Config", ConvNet, {"target_modules": CONVOLUTIONS, "feedforward_modules": ["point"], "init_ia3_weights": False},
    ),
    "IA³ of the input of groups": (
        "IA3Config", Grouped, {"target_modules": ["stem"], "feedforward_modules": ["stem"], "init_ia3_weights": False},
    ),
    "OFT": ("OFTConfig", llama, {"target_modules": LLAMA, "oft_block_size": 6, "r": 0, "bias": "oft_only", **BOTH}),
    "OFT by the number of blocks": ("OFTConfig", llama, {"target_modules": LLAMA, "oft_block_size": 0, "r": 3, **BOTH}),
    "OFT without a series": (
        "OFTConfig", llama, {"target_modules": LLAMA, "oft_block_size": 4, "r": 0, "use_cayley_neumann": False, **BOTH},
    ),
    "OFT with seven terms": (
        "OFTConfig", llama, {"target_modules": LLAMA, "oft_block_size": 4, "r": 0, "num_cayley_neumann_terms": 7, **BOTH},
    ),
    "OFT with three terms": (
        "OFTConfig", llama, {"target_modules": LLAMA, "oft_block_size": 4, "r": 0, "num_cayley_neumann_terms": 3, **BOTH},
    ),
    "OFT with shared blocks": (
        "OFTConfig", llama, {"target_modules": LLAMA, "oft_block_size": 4, "r": 0, "block_share": True, **BOTH},
    ),
    "OFT with a limit": (
        "OFTConfig", llama, {"target_modules": LLAMA, "oft_block_size": 4, "r": 0, "coft": True, "eps": 0.6, **BOTH},
    ),
    "OFT of an embedding": (
        "OFTConfig", llama, {"target_modules": ["embed_tokens", "q_proj"], "oft_block_size": 4, "r": 0, **BOTH},
    ),
    "OFT of a point-wise convolution": (
        "OFTConfig", ConvNet, {"target_modules": ["point", "head"], "oft_block_size": 4, "r": 0, **BOTH},
    ),
    "BOFT": ("BOFTConfig", llama, {"target_modules": LLAMA, "boft_block_size": 6, "bias": "boft_only", **BOTH}),
    "BOFT by the number of blocks": (
        "BOFTConfig", llama, {"target_modules": LLAMA, "boft_block_size": 0, "boft_block_num": 4, **BOTH},
    ),
    "BOFT of convolutions": (
        "BOFTConfig", ConvNet, {"target_modules": CONVOLUTIONS, "boft_block_size": 4, **BOTH},
    ),
    "HRA": ("HRAConfig", llama, {"target_modules": LLAMA, "r": 3, "bias": "all", **BOTH}),
    "HRA with orthogonal directions": ("HRAConfig", llama, {"target_modules": LLAMA, "r": 3, "apply_GS": True, **BOTH}),
    "HRA of convolutions": ("HRAConfig", ConvNet, {"target_modules": CONVOLUTIONS, "r": 3, **BOTH}),
    "VeRA": ("VeraConfig", llama, {"target_modules": LLAMA, "r": 5, **BOTH}),
    "VeRA of GPT-2": ("VeraConfig", gpt2, {"target_modules": ["c_attn", "c_proj"], "r": 5, "fan_in_fan_out": True, **BOTH}),
    "VeRA without its matrices": (
        "VeraConfig", llama, {"target_modules": LLAMA, "r": 5, "save_projection": False, "projection_prng_key": 3, **BOTH},
    ),
    "VeRA of GPT-2 without its matrices": (
        "VeraConfig", gpt2, {"target_modules": ["c_attn", "c_proj"], "r": 5, "save_projection": False, **BOTH},
    ),
    "RandLoRA": ("RandLoraConfig", llama, {"target_modules": LLAMA, "r": 5, "randlora_alpha": 0.7, **BOTH}),
    "RandLoRA of GPT-2": (
        "RandLoraConfig", gpt2, {"target_modules": ["c_attn", "c_proj"], "r": 5, "randlora_alpha": 0.7, **BOTH},
    ),
    "RandLoRA without its matrices": (
        "RandLoraConfig", llama, {"target_modules": LLAMA, "r": 5, "randlora_alpha": 0.7, "save_projection": False, **BOTH},
    ),
    "sparse RandLoRA without its matrices": (
        "RandLoraConfig", llama,
        {"target_modules": LLAMA, "r": 5, "randlora_alpha": 0.7, "save_projection": False, "sparse": True, **BOTH},
    ),
    "very sparse RandLoRA without its matrices": (
        "RandLoraConfig", llama,
        {"target_modules": LLAMA, "r": 5, "randlora_alpha": 0.7, "save_projection": False, "very_sparse": True, **BOTH},
    ),
    "FourierFT": (
        "FourierFTConfig", llama,
        {"target_modules": LLAMA, "n_frequency": 40, "scaling": 60.0, "random_loc_seed": 5,
         "n_frequency_pattern": {"k_proj": 25}, **BOTH},
    ),
    "FourierFT of GPT-2": (
        "FourierFTConfig", gpt2, {"target_modules": ["c_attn", "c_proj"], "n_frequency": 40, "scaling": 60.0, **BOTH},
    ),
    "MiSS": ("MissConfig", llama, {"target_modules": LLAMA, "r": 5, **BOTH}),
    "MiSS, bat": ("MissConfig", llama, {"target_modules": LLAMA, "r": 4, "init_weights": "bat"}),
    "MiSS, mini": ("MissConfig", llama, {"target_modules": LLAMA, "r": 5, "mini_r": 3, "init_weights": "mini"}),
    "AdaLoRA": (
        "AdaLoraConfig", llama, {"target_modules": LLAMA, "init_r": 5, "lora_alpha": 7, "total_step": 900},
    ),
    "AdaLoRA of GPT-2": (
        "AdaLoraConfig", gpt2, {"target_modules": ["c_attn", "c_proj"], "init_r": 5, "lora_alpha": 7, "total_step": 900},
    ),
    "AdaLoRA of convolutions": (
        "AdaLoraConfig", ConvNet, {"target_modules": CONVOLUTIONS, "init_r": 5, "lora_alpha": 7, "total_step": 900},
    ),
    "tokens": ("TrainableTokensConfig", llama, {"target_modules": ["embed_tokens"], "token_indices": TOKENS, **BOTH}),
    "LN tuning": ("LNTuningConfig", llama, {"target_modules": ["input_layernorm", "norm"]}),
    "LoRA with tokens": (
        "LoraConfig", llama,
        {"target_modules": LLAMA, "r": 3, "lora_alpha": 5, "trainable_token_indices": TOKENS, "init_lora_weights": False},
    ),
    "DoRA of an embedding": (
        "LoraConfig", llama,
        {"target_modules": ["embed_tokens", "q_proj"], "r": 3, "lora_alpha": 5, "use_dora": True, "init_lora_weights": False},
    ),
}  # fmt: skip
LIVE: dict[str, Case] = {
    "C³A": ("C3AConfig", llama, {"target_modules": ["q_proj", "down_proj"], "block_size": 6, "init_weights": "gaussian"}),
    "DEFT": ("DeftConfig", llama, {"target_modules": LLAMA, "r": 3, **BOTH}),
    "DeLoRA": (
        "DeloraConfig", llama, {"target_modules": LLAMA, "r": 3, "delora_lambda": 5, "rank_pattern": {"k_proj": 2}, **BOTH},
    ),
    "GLoRA": ("GloraConfig", llama, {"target_modules": LLAMA, "r": 3}),
    "GraLoRA": ("GraloraConfig", llama, {"target_modules": LLAMA, "r": 4, "alpha": 6, "gralora_k": 2, **BOTH}),
    "HiRA": ("HiraConfig", llama, {"target_modules": LLAMA, "r": 3, **BOTH}),
    "HiRA of GPT-2": ("HiraConfig", gpt2, {"target_modules": ["c_attn", "c_proj"], "r": 3, **BOTH}),
    "HiRA of convolutions": ("HiraConfig", ConvNet, {"target_modules": CONVOLUTIONS, "r": 3, **BOTH}),
    "RoAd": ("RoadConfig", llama, {"target_modules": LLAMA, "group_size": 2, **BOTH}),
    "SHiRA": ("ShiraConfig", llama, {"target_modules": LLAMA, "r": 3, **BOTH}),
    "VB-LoRA": ("VBLoRAConfig", llama, {"target_modules": LLAMA, "r": 3, "num_vectors": 12, "vector_length": 6, "topk": 2}),
    "VB-LoRA with its largest weights only": (
        "VBLoRAConfig", llama,
        {"target_modules": LLAMA, "r": 3, "num_vectors": 12, "vector_length": 6, "topk": 2, "save_only_topk_weights": True},
    ),
    "WaveFT": ("WaveFTConfig", llama, {"target_modules": LLAMA, "n_frequency": 40, **BOTH}),
    "WaveFT of GPT-2": ("WaveFTConfig", gpt2, {"target_modules": ["c_attn", "c_proj"], "n_frequency": 40, **BOTH}),
}  # fmt: skip
"""Types that PEFT's own layer merges here, too: what is shown is that a module alone is merged as in its model."""
CASES |= LIVE
NOISE = {
    **dict.fromkeys(("AdaLoRA", "AdaLoRA of GPT-2", "AdaLoRA of convolutions"), 0.4),
    **dict.fromkeys(("LoHa of a line with a core", "LoKr of whole convolutions", "LoKr of a whole line"), 0.4),
    "LoKr of a line with a core": 0.9,
}
"""How far the numbers of a case move, unless it is 0.1."""


@pytest.fixture(autouse=True)
def _contiguous_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let PEFT compute with the core of a line: `torch.kron` refuses its strides in torch 2.13."""
    layer = pytest.importorskip("peft.tuners.lokr.layer")
    original = layer.make_kron

    def make_kron(w1: torch.Tensor, w2: torch.Tensor, scale: float) -> torch.Tensor:
        return original(w1, torch.empty(w2.shape).copy_(w2), scale)

    monkeypatch.setattr(layer, "make_kron", make_kron)


@pytest.mark.parametrize("case", CASES)
def test_the_baked_model_computes_what_the_live_adapter_does(
    case: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    import peft

    name, make, options = CASES[case]
    model = loud(make())
    save_base(model, tmp_path / "base")
    live = trained(model, getattr(peft, name)(**options), NOISE.get(case, 0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live.save_pretrained(tmp_path / "adapter")
    expected, before = output(live), output(model)
    write_checkpoint(bake(tmp_path / "base", tmp_path / "adapter"), tmp_path / "out", files_from=tmp_path / "base")
    load_into(model, open_checkpoint(tmp_path / "out"))
    found = output(model)
    difference = (found - expected).abs().max().item()
    record_property("difference", difference)
    assert difference <= TOLERANCE
    assert (before - expected).abs().max() > 0.02  # or the test would show nothing
    torch.testing.assert_close(output(live.merge_and_unload()), found, rtol=0, atol=TOLERANCE)


def test_oft_of_a_kernel_is_refused_since_the_live_layer_is_no_convolution(tmp_path: Path) -> None:
    """Its patches overlap and are added up: rotations by nothing change the output, and PEFT's own merge gives another."""
    from peft import OFTConfig

    model = loud(ConvNet())
    save_base(model, tmp_path / "base")
    live = trained(model, OFTConfig(target_modules=["stem"], r=0, oft_block_size=4), 0)
    live.save_pretrained(tmp_path / "adapter")
    assert (output(live) - output(model)).abs().max() > 0.1
    with pytest.raises(BadInput, match="OFT of a convolution with a kernel"):
        bake(tmp_path / "base", tmp_path / "adapter")
    torch.testing.assert_close(output(live.merge_and_unload()), output(model), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("make", "targets", "size"), [(llama, ["q_proj", "k_proj"], 6), (ConvNet, ["stem", "point"], 2)])
def test_several_factors_of_a_butterfly(
    make: Make, targets: list[str], size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT has them on a GPU only, with a kernel that makes a matrix of diagonal blocks: here torch does that."""
    from peft import BOFTConfig
    from peft.tuners.boft import layer

    class Blocks:
        @staticmethod
        def apply(blocks: torch.Tensor) -> torch.Tensor:
            return torch.stack([torch.block_diag(*factor) for factor in blocks])

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(layer, "FastBlockDiag", Blocks)
    model = loud(make())
    save_base(model, tmp_path / "base")
    config = BOFTConfig(target_modules=targets, boft_block_size=size, boft_n_butterfly_factor=2, init_weights=False)
    live = trained(model, config, 0.3)
    live.save_pretrained(tmp_path / "adapter")
    expected, before = output(live), output(model)
    baked = bake(tmp_path / "base", tmp_path / "adapter")
    load_into(model, baked)
    torch.testing.assert_close(output(model), expected, rtol=0, atol=TOLERANCE)
    assert (before - expected).abs().max() > 0.02


@pytest.mark.parametrize("kind", ["TrainableTokensConfig", "LoraConfig"])
def test_trained_tokens_of_a_tied_embedding_change_the_head_as_well(kind: str, tmp_path: Path) -> None:
    import peft

    model = loud(llama(tie_word_embeddings=True))
    save_base(model, tmp_path / "base")
    options = {"token_indices": TOKENS} if kind == "TrainableTokensConfig" else {"trainable_token_indices": TOKENS}
    targets = ["embed_tokens"] if kind == "TrainableTokensConfig" else LLAMA
    live = trained(model, getattr(peft, kind)(target_modules=targets, **options), 0.3)
    live.save_pretrained(tmp_path / "adapter")
    expected, before = output(live), output(model)
    write_checkpoint(bake(tmp_path / "base", tmp_path / "adapter"), tmp_path / "out", files_from=tmp_path / "base")
    found = type(model).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(output(found), expected, rtol=0, atol=TOLERANCE)
    assert (before - expected).abs().max() > 0.02


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora"])
def test_initializations_are_baked_if_they_leave_the_base_or_were_converted(init: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = loud(llama())
    save_base(model, tmp_path / "base")
    options = {"target_modules": LLAMA, "r": 4, "lora_alpha": 6, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 5}}
    live = get_peft_model(copy.deepcopy(model), LoraConfig(init_lora_weights=init, **options))
    config = live.peft_config["default"]
    config.init_lora_weights = True
    live.save_pretrained(tmp_path / "initial")
    config.init_lora_weights = init
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    expected, before = output(live), output(model)
    initial = None if init in ("gaussian", "orthogonal") else str(tmp_path / "initial")
    live.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=initial)
    load_into(model, bake(tmp_path / "base", tmp_path / "adapter"))
    torch.testing.assert_close(output(model), expected, rtol=0, atol=TOLERANCE)
    assert (before - expected).abs().max() > 0.02
