"""The peft dialect against peft: its functions on tensors of three shapes, and adapters merged by peft itself.

peft's `linear`, `ties` and so on of `add_weighted_adapter` merge the factors A and B, which is another merge than that of
the weights; its `…_svd` forms merge the weights, as we do, and at full rank lose nothing.
"""

import pytest
import torch
from torch import nn

from emomerge.checkpoints import MemoryCheckpoint, model_checkpoint
from emomerge.merging import merge
from emomerge.merging.methods.sparse import uniform

pytestmark = pytest.mark.peers
peft = pytest.importorskip("peft")
utils = pytest.importorskip("peft.utils.merge_utils")

SHAPES = [(40, 12), (601,), (6, 3, 3, 3), (3,)]
WEIGHTS = [0.5, 0.3, -0.9]
CASES = [
    ("task-arithmetic", {}, "task_arithmetic", {}),
    ("ties", {"preset": "peft", "density": 0.3}, "ties", {"density": 0.3}),
    ("ties", {"preset": "peft", "density": 0.5, "elect": "count"}, "ties",
     {"density": 0.5, "majority_sign_method": "frequency"}),
    ("breadcrumbs", {"density": 0.3, "gamma": 0.0}, "magnitude_prune", {"density": 0.3}),
    ("dare-linear", {"density": 0.3}, "dare_linear", {"density": 0.3}),
    ("dare-ties", {"density": 0.6, "aggregate": "count"}, "dare_ties", {"density": 0.6}),
    ("dare-ties", {"density": 0.6, "aggregate": "count", "elect": "count"}, "dare_ties",
     {"density": 0.6, "majority_sign_method": "frequency"}),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("method", "params", "peer", "theirs"), CASES)
def test_functions(monkeypatch, exact_run, shape, method, params, peer, theirs):
    taus = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    masks = iter([uniform(tau, "w", run, 0) for run, tau in enumerate(taus)])
    monkeypatch.setattr(torch, "bernoulli", lambda p: (next(masks) < p).to(p.dtype))  # the masks that we draw
    expected = getattr(utils, peer)(list(taus), torch.tensor(WEIGHTS), **theirs)
    base = MemoryCheckpoint({"w": torch.zeros(shape)})
    merged = merge(base, [exact_run(base, {"w": tau}) for tau in taus], method=method, weights=WEIGHTS, **params)
    torch.testing.assert_close(merged["w"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "params", "combination", "density"),
    [
        ("task-arithmetic", {}, "svd", None),
        ("ties", {"preset": "peft", "density": 0.3}, "ties_svd", 0.3),
        ("breadcrumbs", {"density": 0.4, "gamma": 0.0}, "magnitude_prune_svd", 0.4),
    ],
)
def test_adapters(tmp_path, method, params, combination, density):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))
    base = MemoryCheckpoint({name: tensor.clone() for name, tensor in model_checkpoint(model, source="base").items()})
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config, adapter_name="one")
    adapted.add_adapter("two", config)
    adapted.save_pretrained(tmp_path)
    adapted.add_weighted_adapter(["one", "two"], [0.7, 0.4], "joint", combination, svd_rank=12, density=density)
    merged = merge(base, [tmp_path / "one", tmp_path / "two"], method=method, weights=[0.7, 0.4], **params)
    for layer in ("0", "2"):
        expected = adapted.base_model.model.get_submodule(layer).get_delta_weight("joint")
        torch.testing.assert_close(merged.delta(f"{layer}.weight", base), expected, rtol=0, atol=1e-6)
