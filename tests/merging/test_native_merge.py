"""The compiled methods against torch's operations: every bit of τ_m, the counts, and the sums to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import emomerge.merging.vectors as vectors
from emomerge.checkpoints import Checkpoint, MemoryCheckpoint, RoundingLoss, write_checkpoint
from emomerge.checkpoints.factors import Factors, Term
from emomerge.errors import BadInput
from emomerge.merging import merge
from emomerge.merging.native import PIECE, open_stored

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
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(kind, torch.float32)

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
    monkeypatch.setattr(vectors, "open_stored", lambda *_: None)
    plain = merge(*args, **kwargs)
    return values, ({name: plain[name] for name in plain}, plain.diagnostics())


def close(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(close, one, other))
    return bool(one == pytest.approx(other, rel=1e-6, abs=1e-9)) if isinstance(one, float) else bool(one == other)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "mixed"])
@pytest.mark.parametrize(("method", "params"), METHODS)
def test_same_bits(method: str, params: dict[str, Any], kind: str, rounded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    base, runs = models(kind, rounded)
    assert open_stored("a", base, runs, ["0", "1", "2"]) is not None or pytest.skip("no C compiler")
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


class Product(MemoryCheckpoint):
    """A run whose task vectors are products of factors, but for one that is zero."""

    def __init__(self, base: MemoryCheckpoint, shapes: dict[str, tuple[int, int]], seed: int) -> None:
        super().__init__({name: base[name] for name in base}, source=f"run {seed}")
        generator = torch.Generator().manual_seed(seed)
        self.base, self.products = base, {}
        for (name, (rows, columns)), rank in zip(shapes.items(), (3, 16, 7, 1), strict=True):
            a, b = torch.randn(rank, columns, generator=generator), 0.01 * torch.randn(rows, rank, generator=generator)
            self.products[name] = Factors((rows, columns), (Term(a, b, 0.7),))

    def factors(self, name: str, base: Checkpoint) -> Factors | None:
        return self.products.get(name) if base is self.base else None

    def delta(self, name: str, base: Checkpoint) -> Tensor | None:
        return self.products[name].dense() if name in self.products else None


@pytest.mark.parametrize("runs", [1, 3, 5])
@pytest.mark.parametrize(("method", "params"), [METHODS[1], METHODS[2], METHODS[3], METHODS[4], METHODS[6], METHODS[9]])
def test_products_of_factors(runs: int, method: str, params: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Short rows and rows longer than the cache, whole panels and parts of them."""
    shapes = {"a": (300, 211), "b": (31, 5003), "c": (1, 9), "d": (5, PIECE // 4 + 3)}
    generator = torch.Generator().manual_seed(0)
    base = MemoryCheckpoint({name: torch.randn(shape, generator=generator).half() for name, shape in shapes.items()})
    some = [Product(base, shapes, seed) for seed in range(runs)]
    some[0].products.pop("a")
    params = {key.replace("lambda", "lambda_"): value for key, value in params.items()}
    params["k"] = min(params["k"], runs) if "k" in params else None
    params |= {"weights": params["weights"][:runs] + [1.0] * (runs - 3)} if "weights" in params else {}
    params = {key: value for key, value in params.items() if value is not None}
    assert open_stored("b", base, some, "abcde"[:runs]) is not None or pytest.skip("no C compiler")
    reports, merges = [], []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        merged = merge(base, some, method=method, **params)
        merges.append({name: merged[name] for name in merged})
        reports.append(merged.diagnostics())
    assert reports[0] == reports[1] == reports[2]
    monkeypatch.setattr(vectors, "open_stored", lambda *_: None)
    plain = merge(base, some, method=method, **params)
    for name in base:
        assert all(torch.equal(found[name], plain[name]) for found in merges), name
    assert close(reports[0], plain.diagnostics())


@pytest.mark.parametrize("count", [1, 2, 4, 5, 6, 8, 10, 13])
def test_any_number_of_runs(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(count)
    tensors = [torch.randn(1000, generator=generator) for _ in range(1 + count)]
    base, *runs = [MemoryCheckpoint({"a": tensor.bfloat16()}) for tensor in tensors]
    for params in ({"method": "mean"}, {"method": "ties", "preset": "mergekit", "density": 0.3}):
        with monkeypatch.context() as patch:
            (ours, report), (theirs, other) = both(patch, base, runs, **params)
        assert torch.equal(ours["a"], theirs["a"]) and close(report, other)


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


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("method", "params"), [METHODS[2], METHODS[3], METHODS[6]])
def test_what_is_written_in_one_reading(
    method: str, params: dict[str, Any], kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, runs = models(kind, rounded=kind == "bfloat16")
    merged = merge(base, runs, method=method, **params)
    ours, theirs = RoundingLoss(base), RoundingLoss(base)
    for name in base:
        written, (theta, theta0, tau) = merged.rounded(name, dtype, ours), merged.with_base(name, base)
        if tau is None:
            assert written is None
            continue
        assert written is not None and written.dtype == dtype
        assert torch.equal(written, theta.to(dtype)), name
        theirs.add(theta0, tau, written)
    assert close(ours.figures(), theirs.figures())


@pytest.mark.parametrize("dtype", HALVES)
def test_every_sixteen_bit_value_is_read_and_written(dtype: torch.dtype) -> None:
    """θ₀ + τ is each value, the spaces between two of them, and the halfway points."""
    values = torch.arange(2**16).to(torch.int16).view(dtype)
    values = values[values.isfinite()]
    exact = MemoryCheckpoint({"w": values})
    zeros = MemoryCheckpoint({"w": torch.zeros(len(values))})
    assert torch.equal(merge(exact, [exact, exact], method="mean")["w"], values.float())
    near, far = values.double(), values.sort().values.double()
    between = torch.cat([near, (far[1:] + far[:-1]) / 2, (far[1:] + far[:-1]) / 2 * (1 + 2**-20)]).float()
    base = MemoryCheckpoint({"w": torch.zeros(len(between))})
    written = merge(base, [MemoryCheckpoint({"w": between})], method="mean").rounded("w", dtype, None)
    assert written is not None and torch.equal(written, between.to(dtype))
    assert torch.equal(merge(zeros, [exact], method="mean")["w"], values.float())


@pytest.mark.parametrize(("start", "step"), [(6e4, 1e4), (3e38, 3e38)])
def test_a_value_too_large_is_left_to_the_writer(start: float, step: float, tmp_path: Path) -> None:
    base = MemoryCheckpoint({"w": torch.full((600,), start)})
    run = MemoryCheckpoint({"w": torch.full((600,), start).index_fill(0, torch.tensor([513]), start + min(step, 3e37))})
    merged = merge(base, [run], method="mean", scale=step / min(step, 3e37))
    assert merged.rounded("w", torch.float16, None) is None
    with pytest.raises(BadInput, match="values too large for torch.float16|NaN or infinity"):
        write_checkpoint(merged, tmp_path / "out", dtype="float16")
