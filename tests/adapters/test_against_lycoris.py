"""Adapter modules against the live layers of lycoris-lora and PEFT: the same file, the same output."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from emomerge.adapters.formulas import ModuleChange, module_of, split_key

pytestmark = pytest.mark.peers
TOLERANCE = 1e-5
RANK, ALPHA, STRENGTH = 3, 5.0, 0.7
LAYERS = {
    "linear": lambda: nn.Linear(20, 12),
    "conv": lambda: nn.Conv2d(10, 12, (3, 5), padding=(1, 2)),
    "conv 1x1": lambda: nn.Conv2d(20, 12, 1),
    "line": lambda: nn.Conv1d(10, 12, 3),
}
KINDS = {
    "locon": ("locon.LoConModule", {}),
    "locon tucker": ("locon.LoConModule", {"use_tucker": True}),
    "locon rslora": ("locon.LoConModule", {"rs_lora": True}),
    "loha": ("loha.LohaModule", {}),
    "loha tucker": ("loha.LohaModule", {"use_tucker": True}),
    "loha rslora": ("loha.LohaModule", {"rs_lora": True}),
    "lokr": ("lokr.LokrModule", {"lora_dim": 1, "factor": 2}),
    "lokr both products": ("lokr.LokrModule", {"lora_dim": 1, "factor": 4, "decompose_both": True}),
    "lokr whole": ("lokr.LokrModule", {"full_matrix": True}),
    "lokr tucker": ("lokr.LokrModule", {"lora_dim": 1, "factor": 2, "use_tucker": True}),
    "glora": ("glora.GLoRAModule", {}),
    "ia3": ("ia3.IA3Module", {}),
    "ia3 on input": ("ia3.IA3Module", {"train_on_input": True}),
    "oft": ("diag_oft.DiagOFTModule", {"lora_dim": 3}),
    "oft constraint": ("diag_oft.DiagOFTModule", {"lora_dim": 3, "constraint": 0.01}),
    "boft": ("boft.ButterflyOFTModule", {"lora_dim": 6}),
}
DORA = {"weight_decompose": True}


def live(layer: nn.Module, kind: str, *, strength: float, **more: object) -> tuple[nn.Module, ModuleChange]:
    """Return a lycoris module with random parameters over a layer, and what we read from its state."""
    from importlib import import_module

    path, options = KINDS[kind]
    module, _, name = path.partition(".")
    cls = getattr(import_module(f"lycoris.modules.{module}"), name)
    adapter = cls("x", layer, strength, **{"lora_dim": RANK, "alpha": ALPHA, **options, **more}).eval()
    with torch.no_grad():
        for key, parameter in adapter.named_parameters():
            parameter.copy_(
                torch.rand_like(parameter) + 0.5 if key in ("dora_scale", "rescale") else torch.randn_like(parameter) * 0.3
            )
    tensors: dict[str, Tensor] = {}
    for key, tensor in adapter.state_dict().items():
        split = split_key(f"x.{key}")
        assert split is not None, key
        tensors[split[1]] = tensor.detach().clone()
    return adapter, module_of(tensors, where=kind)


def outputs(layer: nn.Module, adapter: nn.Module, module: ModuleChange, strength: float) -> tuple[Tensor, Tensor]:
    """Return the live output, and that of the layer with our weight."""
    x = torch.randn(2, layer.weight.shape[1], *(7, 9)[: layer.weight.ndim - 2])
    formula = module.parameters["weight"]
    formula.check(tuple(layer.weight.shape), where="test")
    with torch.no_grad():
        theirs = adapter(x)
        changed = formula.apply(layer.weight, strength)
        bias = layer.bias
        ours = torch.func.functional_call(layer, {"weight": changed, "bias": bias}, (x,))
    assert (theirs - layer(x)).abs().max() > 0.01, "the adapter must have an effect"
    return theirs, ours


def assert_close(theirs: Tensor, ours: Tensor) -> None:
    assert (theirs - ours).abs().max() <= TOLERANCE * max(1.0, float(theirs.abs().max()))


CASES = [
    (kind, layer)
    for kind in KINDS if kind != "boft"
    for layer in LAYERS if "tucker" not in kind or layer in ("conv", "line")  # a core needs a kernel
]  # fmt: skip


@pytest.mark.parametrize("strength", [1.0, STRENGTH])
@pytest.mark.parametrize(("kind", "layer"), CASES)
def test_the_live_forward_of_lycoris(kind, layer, strength):
    pytest.importorskip("lycoris")
    base = LAYERS[layer]()
    adapter, module = live(base, kind, strength=strength)
    theirs, ours = outputs(base, adapter, module, strength)
    assert_close(theirs, ours)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("kind", "more"), [("boft", {}), ("boft", {"rescaled": True, "constraint": 0.01}), ("oft", {"rescaled": True})]
)
def test_rotations_at_full_strength(kind, more, layer):
    """At other strengths lycoris scales each factor of BOFT, and the part before the rescale; ours is W + s(W′ − W)."""
    pytest.importorskip("lycoris")
    base = LAYERS[layer]()
    adapter, module = live(base, kind, strength=1.0, **more)
    theirs, ours = outputs(base, adapter, module, 1.0)
    assert_close(theirs, ours)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("on_output", [True, False])
@pytest.mark.parametrize("kind", ["locon", "loha", "lokr"])
def test_dora_at_full_strength(kind, on_output, layer):
    """With strength 0, lycoris gives W + ΔW, not W; ours is W + s(W′ − W)."""
    pytest.importorskip("lycoris")
    base = LAYERS[layer]()
    adapter, module = live(base, kind, strength=1.0, **DORA, wd_on_out=on_output)
    assert module.kind.endswith("DoRA")
    theirs, ours = outputs(base, adapter, module, 1.0)
    assert_close(theirs, ours)


@pytest.mark.parametrize("kind", ["loha", "lokr both products"])
def test_lycoris_merge_scales_twice_and_its_live_forward_is_right(kind):
    """`merge_to` multiplies ΔW, which contains α/r, by α/r again. What was trained is the live forward."""
    pytest.importorskip("lycoris")
    base = nn.Linear(20, 12)
    before = base.weight.detach().clone()
    options = {"alpha": 0.5} if kind != "loha" else {"alpha": 1.5}  # α/r = 0.5 in both
    adapter, module = live(base, kind, strength=1.0, **options)
    delta = module.parameters["weight"].delta((12, 20), torch.float32)
    with torch.no_grad():
        x = torch.eye(20)
        assert ((adapter(x) - base(x)).T - delta).abs().max() <= TOLERANCE
        adapter.merge_to(1.0)
    assert (base.weight - before - 0.5 * delta).abs().max() <= TOLERANCE


@pytest.mark.parametrize("layer", ["linear", "conv", "conv 1x1"])
@pytest.mark.parametrize("dora", [False, True])
def test_the_live_forward_of_peft(layer, dora):
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    base = nn.Sequential(LAYERS[layer]())
    weight, bias = base[0].weight.detach().clone(), base[0].bias.detach().clone()
    config = LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=["0"], use_dora=dora, lora_bias=not dora
    )  # PEFT's files hold no α
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.rand_like(parameter) + 0.5 if "magnitude" in name else torch.randn_like(parameter) * 0.3)
    parts = {split_key(key): tensor for key, tensor in get_peft_model_state_dict(model).items()}
    assert {split[0] for split in parts} == {"base_model.model.0"}
    module = module_of({split[1]: tensor for split, tensor in parts.items()}, where="peft")
    assert module.kind == ("LoRA + DoRA" if dora else "LoRA")
    fresh = LAYERS[layer]()
    changed = {"weight": module.parameters["weight"].apply(weight), "bias": bias}
    if not dora:
        changed["bias"] = module.parameters["bias"].apply(bias)
    x = torch.randn(2, weight.shape[1], *(7, 9)[: weight.ndim - 2])
    with torch.no_grad():
        theirs, ours = model(x), torch.func.functional_call(fresh, changed, (x,))
    assert_close(theirs, ours)
