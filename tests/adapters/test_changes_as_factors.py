"""Changes of low rank as products of factors: the bits of the dense change, wherever its rows lie in the base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from emomerge import native
from emomerge.adapters.baked import BakedCheckpoint
from emomerge.adapters.change import Change
from emomerge.adapters.combined import CombinedCheckpoint
from emomerge.adapters.formulas.formula import Difference, Formula
from emomerge.adapters.formulas.lora import LowRankProduct
from emomerge.adapters.images.edits import change_of, edits_of
from emomerge.adapters.images.layouts import Place
from emomerge.checkpoints import MemoryCheckpoint, RoundingLoss, open_checkpoint, write_checkpoint

PLACES = {
    "the whole tensor": [(Place("w"),)],
    "halves swapped": [(Place("w", None, "halves swapped"),)],
    "transposed": [(Place("square", None, "transposed"),)],
    "a part of a fused tensor": [(Place("w", (4, 10)),)],
    "two parts of it": [(Place("w", (10, 14)),), (Place("w", (0, 6), "halves swapped"),)],
    "over two tensors": [(Place("w", (8, 14)), Place("other"))],
}


def low_rank(rows: int, columns: int, seed: int, *, core: bool = False) -> LowRankProduct:
    generator = torch.Generator().manual_seed(seed)
    up, down = torch.randn(rows, 3, generator=generator), torch.randn(3, columns, generator=generator).half()
    if not core:
        return LowRankProduct(up, down, 0.7)
    return LowRankProduct(up[:, :2], down, 0.7, torch.randn(2, 3, 2, 2, generator=generator))


@pytest.fixture
def base() -> MemoryCheckpoint:
    shapes = {"w": (14, 9), "other": (5, 9), "square": (9, 14), "conv": (14, 9, 2, 2)}
    return MemoryCheckpoint({name: torch.ones(shape).half() for name, shape in shapes.items()})


def changes(base: MemoryCheckpoint, places: list[tuple[Place, ...]]) -> dict[str, Change]:
    """One product over each group of places."""
    edits = []
    for seed, group in enumerate(places):
        rows = sum((p.rows or (0, base.info(p.tensor).shape[p.order == "transposed"]))[1] - (p.rows or (0,))[0] for p in group)
        edits += edits_of(low_rank(rows, 9, seed), group, base, key=f"module {seed}")
    return {
        name: change_of([edit for edit in edits if edit.place.tensor == name], base) for name in {e.place.tensor for e in edits}
    }


@pytest.mark.parametrize("case", PLACES)
def test_rows_in_other_places(case: str, base: MemoryCheckpoint) -> None:
    found = changes(base, PLACES[case])
    for name, change in found.items():
        assert change.factors is not None and change.delta is not None
        dense = change.delta(torch.float32)
        assert dense.shape == base.info(name).shape and dense.any()
        assert torch.equal(change.factors().dense(), dense)


def test_a_convolution_with_a_core(base: MemoryCheckpoint) -> None:
    change = change_of(edits_of(low_rank(14, 9, 0, core=True), [Place("conv")], base, key="conv"), base)
    assert change.factors is not None and change.delta is not None
    assert torch.equal(change.factors().dense(), change.delta(torch.float32))


@pytest.mark.parametrize("formula", [Difference(torch.ones(14, 9))])
def test_other_formulas_have_none(formula: Formula, base: MemoryCheckpoint) -> None:
    assert change_of(edits_of(formula, [Place("w")], base, key="w"), base).factors is None


@pytest.fixture
def combined(base: MemoryCheckpoint, tmp_path: Path) -> CombinedCheckpoint:
    """Three adapters with strengths."""

    def baked(places: list[tuple[Place, ...]]) -> BakedCheckpoint:
        return BakedCheckpoint(base, changes(base, places), source="a", adapter_folder=tmp_path, reopen=lambda: None)

    adapters = [baked(PLACES[case]) for case in ("halves swapped", "two parts of it", "over two tensors")]
    return CombinedCheckpoint(base, [*zip(adapters, (0.3, -1.5, 1.0), strict=True)])


def test_a_machine_without_compiler_writes_the_same_bytes(
    combined: CombinedCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = tmp_path / "compiled.safetensors", tmp_path / "plain.safetensors"
    write_checkpoint(combined, one, loss=RoundingLoss(combined.base))
    monkeypatch.setattr(native, "library", lambda *_: None)
    write_checkpoint(combined, other, loss=RoundingLoss(combined.base))
    assert one.read_bytes() == other.read_bytes()
    assert not torch.equal(open_checkpoint(one)["w"], combined.base["w"])


def test_several_adapters_with_strengths(base: MemoryCheckpoint, combined: CombinedCheckpoint) -> None:
    for name in ("w", "other"):
        factors = combined.factors(name, base)
        assert factors is not None and torch.equal(factors.dense(), combined.delta(name, base))
        rounded = combined.rounded(name, torch.bfloat16, None)
        assert rounded is None or torch.equal(rounded, combined[name].bfloat16())
    assert combined.factors("conv", base) is None
