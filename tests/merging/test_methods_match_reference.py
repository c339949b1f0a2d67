"""Every method equals its readable twin, however the work is split: bit for bit, unless it decomposes or rotates."""

import math
import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from emomerge.checkpoints import MemoryCheckpoint
from emomerge.merging import merge, reference, vectors
from emomerge.merging.methods.sparse import uniform

SHAPES = {"a.weight": (3, 5), "b.weight": (), "c.weight": (0, 4), "d.weight": (17,), "e.weight": (2, 2, 2)}


class Case(NamedTuple):
    base: MemoryCheckpoint
    runs: list
    taus: torch.Tensor  # (runs, d), all tensors in the order of names
    weights: list


@st.composite
def cases(draw, dtype=torch.float32):
    """Runs over a base of five tensors; magnitudes may tie, be zero of either sign, or be left out altogether."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    number = draw(st.integers(1, 5))
    values = draw(st.sampled_from(["normal", "grid", "tiny", "sparse"]))
    silent = draw(st.sets(st.tuples(st.integers(0, number - 1), st.sampled_from(sorted(SHAPES)))))

    def tau(shape):
        x = torch.randn(shape, generator=generator, dtype=dtype)
        if values == "grid":  # exact cancellation and equal magnitudes; -0.0 where a small negative rounds
            return (x * 1.5).round() / 4
        if values == "tiny":  # subnormal in float32
            return x * torch.finfo(dtype).tiny * 0.3
        return torch.where(torch.rand(shape, generator=generator) < 0.8, 0.0, x) if values == "sparse" else x

    base = MemoryCheckpoint({n: torch.randn(s, generator=generator, dtype=dtype) for n, s in SHAPES.items()})
    taus = [{n: None if (t, n) in silent else tau(s) for n, s in SHAPES.items()} for t in range(number)]
    flat = torch.stack(
        [
            torch.cat(
                [torch.zeros(math.prod(s), dtype=dtype) if run[n] is None else run[n].flatten() for n, s in SHAPES.items()]
            )
            for run in taus
        ]
    )
    weights = draw(st.lists(st.floats(0.1, 3), min_size=number, max_size=number))
    return Case(base, taus, flat, weights)


def bits(tensor):
    return tensor.view({torch.float32: torch.int32, torch.float64: torch.int64}[tensor.dtype])


def assert_same(case, exact_run, expected, *, scale=0.7, chunk=4, threads=1, **arguments):
    """The streamed merge is θ₀ + scale·expected in every bit, for these pieces and threads."""
    runs = [exact_run(case.base, taus, source=f"run {i}") for i, taus in enumerate(case.runs)]
    torch.set_num_threads(threads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectors, "CHUNK", chunk)
        merged = merge(case.base, runs, scale=scale, **arguments)
        got = {name: merged[name] for name in merged}
    parts = dict(zip(SHAPES, expected.split([math.prod(s) for s in SHAPES.values()]), strict=True))
    for name, shape in SHAPES.items():
        piece = parts[name].view(shape)
        if all(taus[name] is None for taus in case.runs) or piece.numel() == 0:
            assert got[name] is case.base[name]
        else:
            want = case.base[name] + scale * piece
            assert torch.equal(bits(got[name]), bits(want)), (name, got[name], want)


def tensor_by_tensor(case, function):
    """A twin that takes one tensor's taus (runs, *shape), over all tensors, joined end to end."""
    parts = case.taus.split([math.prod(shape) for shape in SHAPES.values()], dim=1)
    shaped = [(name, part.view(len(part), *shape)) for (name, shape), part in zip(SHAPES.items(), parts, strict=True)]
    return torch.cat([(function(name, taus) if taus.numel() else taus[0]).flatten() for name, taus in shaped])


def chances(name, taus, seed):
    return torch.stack([uniform(tau, name, run, seed) for run, tau in enumerate(taus)])


def mean_one(case):
    total = math.fsum(case.weights)
    return case.taus.new_tensor([w * len(case.weights) / total for w in case.weights])


split = {"chunk": st.sampled_from([1, 4, 1000]), "threads": st.sampled_from([1, 2])}
any_case = st.one_of(cases(), cases(dtype=torch.float64))
few = settings(max_examples=40, deadline=None)
densities = st.sampled_from([0.001, 0.02, 0.2, 1 / 3, 0.5, 0.99, 1.0])


@few
@given(case=any_case, **split)
def test_mean(exact_run, case, chunk, threads):
    expected = reference.mean(case.taus, mean_one(case))
    assert_same(case, exact_run, expected, method="mean", weights=case.weights, chunk=chunk, threads=threads)


@few
@given(case=any_case, **split)
def test_equal_weights_give_the_sum_over_n(exact_run, case, chunk, threads):
    expected = reference.total(case.taus) / len(case.taus)
    assert_same(case, exact_run, expected, method="mean", chunk=chunk, threads=threads)


@few
@given(case=any_case, **split)
def test_task_arithmetic(exact_run, case, chunk, threads):
    expected = reference.task_arithmetic(case.taus, case.taus.new_tensor(case.weights))
    assert_same(case, exact_run, expected, method="task-arithmetic", weights=case.weights, chunk=chunk, threads=threads)


@few
@given(case=any_case, density=densities, aggregate=st.sampled_from(["mean", "sum"]), **split)
def test_ties_of_the_paper(exact_run, case, density, aggregate, chunk, threads):
    trimmed = reference.trim(case.taus, density)
    expected = reference.ties(trimmed, reference.elect(trimmed), aggregate)
    assert_same(case, exact_run, expected, method="ties", density=density, aggregate=aggregate, chunk=chunk, threads=threads)


elections = st.sampled_from(["sum", "weighted", "count"])
aggregates = st.sampled_from(["mean", "count", "sum", "max"])


@few
@given(case=any_case, density=densities, preset=st.sampled_from(["mergekit", "peft"]), threads=split["threads"])
def test_ties_in_two_other_dialects(exact_run, case, density, preset, threads):
    weights = case.taus.new_tensor(case.weights)
    elect, aggregate, least = {"mergekit": ("weighted", "mean", 1), "peft": ("sum", "count", 0)}[preset]

    def twin(name, taus):
        count = max(int(density * taus[0].numel()), least)
        return reference.consensus(torch.stack([reference.top(tau, count) for tau in taus]), weights, elect, aggregate)

    arguments = {"method": "ties", "preset": preset, "density": density, "weights": case.weights, "threads": threads}
    assert_same(case, exact_run, tensor_by_tensor(case, twin), **arguments)


@few
@given(case=any_case, density=densities, **split)
def test_the_paper_s_draw_with_exact_counts(exact_run, case, density, chunk, threads):
    def twin(name, taus):
        return torch.stack([reference.top(tau, max(1, int(density * tau.numel()))) for tau in taus]).flatten(1)

    sizes = [math.prod(shape) for shape in SHAPES.values()]
    parts = case.taus.split(sizes, dim=1)
    trimmed = torch.cat([twin("", part) if part.numel() else part for part in parts], dim=1)
    expected = reference.ties(trimmed, reference.elect(trimmed))
    assert_same(case, exact_run, expected, method="ties", density=density, trim="tensor", chunk=chunk, threads=threads)


@few
@given(case=any_case, density=densities, elect=elections, aggregate=aggregates, seed=st.integers(0, 3), **split)
def test_dare(exact_run, case, density, elect, aggregate, seed, chunk, threads):
    weights = case.taus.new_tensor(case.weights)

    def kept(name, taus):
        return reference.kept_at_random(taus, chances(name, taus, seed), density)

    common = {"weights": case.weights, "density": density, "seed": seed, "chunk": chunk, "threads": threads}
    expected = tensor_by_tensor(case, lambda name, taus: reference.consensus(kept(name, taus), weights, elect, aggregate))
    assert_same(case, exact_run, expected, method="dare-ties", elect=elect, aggregate=aggregate, **common)
    expected = tensor_by_tensor(
        case, lambda name, taus: reference.task_arithmetic(kept(name, taus).flatten(1), weights) if taus.ndim > 1
        else reference.total(weights * kept(name, taus))
    )  # fmt: skip
    assert_same(case, exact_run, expected, method="dare-linear", **common)


@few
@given(case=any_case, density=st.sampled_from([0.3, 0.5]), epsilon=st.sampled_from([0.0, 0.2]), elect=elections)
def test_della(exact_run, case, density, epsilon, elect):
    weights = case.taus.new_tensor(case.weights)

    def twin(name, taus):
        kept = [reference.magprune(tau, c, density, epsilon) for tau, c in zip(taus, chances(name, taus, 5), strict=True)]
        return reference.consensus(torch.stack(kept), weights, elect)

    common = {"method": "della", "weights": case.weights, "density": density, "epsilon": epsilon}
    assert_same(case, exact_run, tensor_by_tensor(case, twin), **common, elect=elect, seed=5)


@few
@given(case=any_case, density=densities, gamma=st.sampled_from([0.0, 0.01, 0.2, 0.7]), elect=elections, aggregate=aggregates)
def test_breadcrumbs(exact_run, case, density, gamma, elect, aggregate):
    weights = case.taus.new_tensor(case.weights)

    def twin(name, taus):
        kept = torch.stack([reference.breadcrumbs(tau, density, gamma) for tau in taus])
        return reference.consensus(kept, weights, elect, aggregate)

    common = {"weights": case.weights, "density": density, "gamma": gamma, "elect": elect, "aggregate": aggregate}
    assert_same(case, exact_run, tensor_by_tensor(case, twin), method="breadcrumbs-ties", **common)


# Methods on inner products and singular vectors: equal up to rounding.

NORMAL = {"a.weight": (6, 9), "b.weight": (), "d.weight": (17,), "e.weight": (4, 3, 2)}


@st.composite
def related_runs(draw, most=5):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    number, size = draw(st.integers(2, most)), draw(st.sampled_from([1e-4, 1.0]))

    def normal():
        return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in NORMAL.items()}

    shared, noise = normal(), [normal() for _ in range(number)]
    runs = [{name: size * (shared[name] + run[name]) for name in NORMAL} for run in noise]
    for run in runs:
        run["b.weight"].abs_()  # numbers lie on a sphere of two points, where opposite runs have no mean
    return runs, draw(st.lists(st.floats(0.1, 3), min_size=number, max_size=number)), size


def assert_close(exact_run, given_runs, twin, **arguments):
    runs, _, size = given_runs
    base = MemoryCheckpoint({name: torch.zeros(shape, dtype=torch.float64) for name, shape in NORMAL.items()})
    merged = merge(base, [exact_run(base, run) for run in runs], **arguments)
    for name in NORMAL:
        expected = twin(torch.stack([run[name] for run in runs]) / size)
        torch.testing.assert_close(merged[name] / size, expected, rtol=1e-6, atol=1e-6)


@few
@given(given_runs=related_runs())
def test_model_stock(exact_run, given_runs):
    assert_close(exact_run, given_runs, reference.model_stock, method="model-stock")


@few
@given(given_runs=related_runs(most=2), t=st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_slerp(exact_run, given_runs, t):
    assert_close(exact_run, given_runs, lambda taus: reference.slerp(taus[0], taus[1], t), method="slerp", t=t)
    assert_close(exact_run, given_runs, lambda taus: reference.slerp(taus[0], taus[1], t), method="nuslerp", weights=[1 - t, t])


@few
@given(given_runs=related_runs())
def test_karcher_and_multislerp(exact_run, given_runs):
    weights = given_runs[1]
    w = torch.tensor(weights, dtype=torch.float64)
    assert_close(exact_run, given_runs, lambda taus: reference.karcher(taus, w), method="karcher", weights=weights)
    assert_close(exact_run, given_runs, lambda taus: reference.multislerp(taus, w), method="multislerp", weights=weights)


@few
@given(given_runs=related_runs(most=3))
def test_singular_vectors(exact_run, given_runs):
    def twin(function):
        return lambda taus: function(taus) if taus.ndim == 3 else taus.mean(0)

    assert_close(exact_run, given_runs, twin(reference.tsv), method="tsv")
    assert_close(exact_run, given_runs, twin(reference.iso_c), method="iso-c")


@few
@given(given_runs=related_runs(), density=st.sampled_from([0.2, 0.7, 1.0]))
def test_sce(exact_run, given_runs, density):
    assert_close(exact_run, given_runs, lambda taus: reference.sce(taus, density), method="sce", density=density)


def test_fisher(exact_run, tmp_path):
    generator = torch.Generator().manual_seed(0)
    taus, information = (torch.randn(3, 5, 4, generator=generator) for _ in range(2))
    information = information.square()
    information[:, 0] = 0
    base = MemoryCheckpoint({"w": torch.zeros(5, 4)})
    for run, f in enumerate(information):
        save_file({"w": f.contiguous()}, tmp_path / f"{run}.safetensors")
    files = [str(tmp_path / f"{run}.safetensors") for run in range(3)]
    weights = [0.5, 1.0, 1.5]
    merged = merge(base, [exact_run(base, {"w": tau}) for tau in taus], method="fisher", information=files, weights=weights)
    expected = reference.fisher(taus, information, torch.tensor(weights))
    assert torch.equal(merged["w"][1:], expected[1:])
    assert torch.equal(merged["w"][0], reference.mean(taus.flatten(1), torch.tensor(weights)).view(5, 4)[0])


@few
@given(case=any_case, density=densities, **split)
def test_ties_trimmed_among_the_weights_that_moved(exact_run, case, density, chunk, threads):
    trimmed = torch.zeros_like(case.taus)
    for tau, row in zip(case.taus, trimmed, strict=True):
        if moved := int(tau.count_nonzero()):
            row[tau != 0] = reference.trim(tau[tau != 0].view(1, moved), density)[0]
    expected = reference.ties(trimmed, reference.elect(trimmed))
    assert_same(case, exact_run, expected, method="ties", density=density, trim="touched", chunk=chunk, threads=threads)


@few
@given(
    case=any_case,
    r=st.sampled_from(["mean", "sum", "ties"]),
    lambda_=st.sampled_from([0.0, 0.2, 0.4, 1.0]),
    k=st.integers(0, 2),
    **split,
)
def test_tall_mask(exact_run, case, r, lambda_, k, chunk, threads):
    weights, runs = mean_one(case), len(case.taus)
    trimmed = reference.trim(case.taus, 0.2)
    vector = {
        "mean": reference.mean(case.taus, weights),
        "sum": reference.task_arithmetic(case.taus, weights),
        "ties": reference.ties(trimmed, reference.elect(trimmed), "sum"),
    }[r]
    expected = reference.tall_mask(case.taus, vector, [lambda_] * runs, min(k, runs))
    arguments = {"method": "tall-mask", "reference": r, "lambda_": lambda_, "k": k, "weights": case.weights}
    assert_same(case, exact_run, expected, chunk=chunk, threads=threads, **arguments)


def test_pieces_of_the_real_size_and_two_threads_change_nothing(exact_run):
    """Tensors beyond a piece and beyond what torch gives to one thread."""
    generator = torch.Generator().manual_seed(0)
    base = MemoryCheckpoint({"w": torch.randn(700, 600, generator=generator)})
    taus = torch.randn(5, 420_000, generator=generator) + torch.randn(420_000, generator=generator)
    runs = [exact_run(base, {"w": tau.view(700, 600)}) for tau in taus]
    trimmed = reference.trim(taus, 0.2)
    expected = {
        "mean": reference.mean(taus, torch.ones(5)),
        "ties": reference.ties(trimmed, reference.elect(trimmed)),
        "tall-mask": reference.tall_mask(taus, reference.mean(taus, torch.ones(5)), [0.4] * 5, 2),
    }
    for method, tau in expected.items():
        reports = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            merged = merge(base, runs, method=method)
            assert torch.equal(bits(merged["w"]), bits(base["w"] + tau.view(700, 600)))
            reports.append(merged.diagnostics())
        assert reports[0] == reports[1]


PROBE = """
import hashlib, torch
from emomerge.checkpoints import MemoryCheckpoint
from emomerge.merging import merge
torch.set_num_threads({threads})
make = lambda seed: torch.randn(200, 300, generator=torch.Generator().manual_seed(seed))
base = MemoryCheckpoint({{"x.0.w": make(0), "x.1.w": make(1)}})
runs = [MemoryCheckpoint({{name: base[name] + make(10 + t) for name in base}}) for t in range(3)]
hashes = hashlib.sha256()
for method in {methods}:
    merged = merge(base, runs, method=method)
    for name in merged:
        hashes.update(merged[name].numpy().tobytes())
    hashes.update(repr(merged.diagnostics()).encode())
print(hashes.hexdigest())
"""
DETERMINISTIC = [
    "ties", "dare-ties", "della", "breadcrumbs", "sce", "tall-mask", "model-stock", "karcher", "multislerp", "tsv", "iso-c",
]  # fmt: skip


def test_processes_with_other_hash_seeds_and_threads_agree():
    seen = []
    for seed, threads in (("1", 1), ("2", 2)):
        script = PROBE.format(threads=threads, methods=DETERMINISTIC)
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
        seen.append(result.stdout)
    assert seen[0] == seen[1] != ""
