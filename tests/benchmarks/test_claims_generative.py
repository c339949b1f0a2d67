"""What the claims about generative models share: figures at equal loss, LoRA that moves between bases, copies and diversity."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    importlib.import_module("claims").load_claims()
    return importlib.import_module("claims_generative")


def units_of(paths: dict[str, list[list[tuple[float, float, float]]]]) -> Any:
    """Return units whose paths have the figures train, test and validation."""
    core = importlib.import_module("claims_core")
    names = ("train", "test", "validation")
    return core.Units(
        core.Unit({"rule": rule}, seed, {"path": [dict(zip(names, point, strict=True)) for point in points]})
        for rule, seeds in paths.items()
        for seed, points in enumerate(seeds)
    )


def test_a_rival_is_read_where_it_first_reaches_the_level(shared: ModuleType) -> None:
    path = [{"train": 4.0, "test": 1.0}, {"train": 2.0, "test": 5.0}, {"train": 3.0, "test": 0.0}, {"train": 1.0, "test": 9.0}]
    assert shared.crossing(path, "train", 2.5) == {"train": 2.5, "test": 4.0}
    assert shared.crossing(path, "train", 5.0) == path[0]
    assert shared.crossing(path, "train", 0.5) is None


def test_at_equal_loss_the_rival_with_the_best_validation_is_taken_and_seeds_are_paired(shared: ModuleType) -> None:
    units = units_of({
        "ours": [[(4.0, 1.0, 0.0), (2.0, 3.0, 0.0)], [(4.0, 1.0, 0.0), (3.0, 2.5, 0.0)]],
        "careless": [[(4.0, 1.0, 1.0), (0.0, 9.0, 9.0)]] * 2,
        "careful": [[(4.0, 1.0, 1.0), (0.0, 5.0, 5.0)]] * 2,
        "slow": [[(4.0, 1.0, 0.0), (2.5, 1.0, 0.0)]] * 2,  # never where ours is with the first seed
    })  # fmt: skip
    rivals = [{"rule": name} for name in ("careless", "careful", "slow")]
    found = shared.at_equal(units, {"rule": "ours"}, rivals, "train", "test", "validation")
    assert found.rival == {"rule": "careful"}
    assert found.difference.values == (3.0 - 3.0, 2.5 - 2.0)
    assert shared.at_equal(units, {"rule": "ours"}, rivals[2:], "train", "test", "validation") is None


def test_a_lora_changes_nothing_at_first_and_its_change_is_what_it_adds(shared: ModuleType) -> None:
    torch.manual_seed(0)
    model, rows = shared.Flow(width=12, depth=1), torch.randn(3, shared.PIXELS)
    t, y = torch.rand(3), torch.tensor([0, 4, 9])
    before = model(rows, t, y)
    names = [name for name, _ in model.named_parameters()]
    added = shared.add_lora(model, seed=1)
    torch.testing.assert_close(model(rows, t, y), before, rtol=0, atol=0)
    assert len(shared.trained(model)) == 2 * len(added)
    assert not any(parameter.requires_grad for parameter in (lora.layer.weight for lora in added)) and len(names) > len(added)
    with torch.no_grad():
        for lora in added:
            lora.up.normal_()
        after = model(rows, t, y)
        for lora in added:
            lora.layer.weight += lora.change()
            lora.up.zero_()
    assert not torch.allclose(after, before, atol=1e-2)
    torch.testing.assert_close(model(rows, t, y), after, rtol=1e-4, atol=1e-4)


def test_a_random_lora_has_the_singular_values_of_the_trained_one(shared: ModuleType) -> None:
    module = importlib.import_module("claims_random_base")
    generator = torch.Generator().manual_seed(3)
    lora = shared.Lora(torch.nn.Linear(20, 13), generator)
    with torch.no_grad():
        lora.up.normal_(generator=generator)
    random = module._random_like(lora, generator)
    assert random.shape == lora.change().shape
    torch.testing.assert_close(torch.linalg.svdvals(random), torch.linalg.svdvals(lora.change()), rtol=1e-4, atol=1e-5)
    assert abs(float((random * lora.change()).sum() / random.square().sum())) < 0.5


def test_copies_and_diversity_of_samples(shared: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("claims_few_images")
    unseen, seen = torch.randn(300, 5), torch.full((1, 5), 7.0)
    made = torch.cat([seen.expand(50, 5) + 0.01 * torch.randn(50, 5), unseen[:150]])
    monkeypatch.setattr(module, "sample", lambda model, y, seed: made[: len(y)])
    figures = module.samples(torch.nn.Identity(), seen, unseen)
    assert figures["copies"] == 0.25
    assert 1.0 < figures["diversity"] < 3.0
    monkeypatch.setattr(module, "sample", lambda model, y, seed: made * float("nan"))
    assert module.samples(torch.nn.Identity(), seen, unseen) == {"copies": 1.0, "diversity": 0.0}
