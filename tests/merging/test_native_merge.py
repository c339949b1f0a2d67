"""The compiled methods against torch's operations: every bit of τ_m, the counts, and the sums to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import emomerge.merging.vectors as vectors
from emomerge.checkpoints import MemoryCheckpoint
from emomerge.errors import BadInput
from emomerge.merging import merge
from emomerge.merging.native import PIECE, open_source

SHAPES = {"a": (300, 211), "b": (PIECE + 1,), "c": (1,), "d": (), "e": (0, 3), "f": (2, PIECE)}
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("mean", {}),
    ("mean", {"weights": [1, 2, 0.5]}),
    ("task-arithmetic", {"weights": [1, -0.5, 0.3], "scale": 0.7}),
    ("tall-mask", {}),
    ("tall-mask", {"lambda": 0.2, "reference": "sum", "k": 1, "weights": [1, 2, 3]}),
    ("tall-mask", {"k": 0}),
    ("ties", {}),
    ("ties", {"density": 0.01, "aggregate": "sum"}),
    ("ties", {"trim": "touched", "aggregate": "max"}),
    ("ties", {"preset": "mergekit", "weights": [1, 2, 0.5]}),
    ("ties", {"preset": "mergekit", "elect": "count", "aggregate": "count", "density": 0.7}),
    ("ties", {"preset": "peft", "density": 0.5}),
]
"""`lambda` is a keyword of Python and given as `lambda_`."""


def models(kind: str, rounded: bool) -> tuple[MemoryCheckpoint, list[MemoryCheckpoint]]:
    """A base and three runs; rounded deltas have many equal magnitudes and zeros."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32

    def draw(scale: float) -> dict[str, Tensor]:
        return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}

    base = draw(1.0)
    if rounded:
        base = {name: (t * 64).round() / 64 for name, t in base.items()}
    runs = []
    for number in range(3):
        taus = draw(0.05)
        if rounded:
            taus = {name: (t * 32).round() / 32 for name, t in taus.items()}
        theta = {
            name: (base[name] + t).to(torch.float32 if kind == "mixed" and number == 1 else dtype) for name, t in taus.items()
        }
        runs.append(MemoryCheckpoint(theta, source=f"run {number}"))
    return MemoryCheckpoint({name: t.to(dtype) for name, t in base.items()}), runs


def both(monkeypatch: pytest.MonkeyPatch, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """The merge by compiled kernels and by torch's operations."""
    compiled = merge(*args, **kwargs)
    values = {name: compiled[name] for name in compiled}, compiled.diagnostics()
    monkeypatch.setattr(vectors, "open_source", lambda *_: None)
    plain = merge(*args, **kwargs)
    return values, ({name: plain[name] for name in plain}, plain.diagnostics())


def close(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(close, one, other))
    return bool(one == pytest.approx(other, rel=1e-6, abs=1e-9)) if isinstance(one, float) else bool(one == other)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "mixed"])
@pytest.mark.parametrize(("method", "params"), METHODS)
def test_same_bits(method: str, params: dict[str, Any], kind: str, rounded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    base, runs = models(kind, rounded)
    assert open_source("a", base, runs, ["0", "1", "2"]) is not None or pytest.skip("no C compiler")
    params = {key.replace("lambda", "lambda_"): value for key, value in params.items()}
    (ours, report), (theirs, other) = both(monkeypatch, base, runs, method=method, **params)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert close(report, other)


def test_known_deltas_and_runs_that_stay(exact_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base, _ = models("bfloat16", rounded=False)
    generator = torch.Generator().manual_seed(3)
    taus = [{name: torch.randn(base.info(name).shape, generator=generator) for name in base} for _ in range(2)]
    taus.append(dict.fromkeys(base))
    taus[0]["a"] = None
    runs = [exact_run(base, tau) for tau in taus]
    for method in ("mean", "tall-mask", "ties"):
        with monkeypatch.context() as patch:
            (ours, report), (theirs, other) = both(patch, base, runs, method=method)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours) and close(report, other)


@pytest.mark.parametrize("method", ["mean", "tall-mask", "ties"])
def test_any_number_of_threads(method: str) -> None:
    base, runs = models("bfloat16", rounded=True)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        merged = merge(base, runs, method=method)
        results.append(([merged[name] for name in merged], merged.diagnostics()))
    for tensors, report in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(tensors, results[0][0], strict=True))
        assert report == results[0][1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("params", [{}, {"preset": "mergekit"}, {"preset": "paper"}])
def test_a_value_that_is_not_finite_names_tensor_and_run(bad: float, params: dict[str, Any]) -> None:
    base, runs = models("float32", rounded=False)
    spoilt = {name: runs[1][name].clone() for name in runs[1]}
    spoilt["f"].view(-1)[PIECE + 5] = bad
    runs[1] = MemoryCheckpoint(spoilt)
    with pytest.raises(BadInput, match="non-finite task vector: f of run second"):
        merged = merge(base, runs, method="ties" if params else "mean", names=["first", "second", "third"], **params)
        merged["f"]
