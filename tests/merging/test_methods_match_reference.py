"""Every method that streams equals its flat twin bit for bit, however the work is split."""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emomerge.checkpoints import MemoryCheckpoint
from emomerge.merging import merge, reference, vectors

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
    start = 0
    for name, shape in SHAPES.items():
        piece = expected[start : start + math.prod(shape)].view(shape)
        start += math.prod(shape)
        if all(taus[name] is None for taus in case.runs) or piece.numel() == 0:
            assert got[name] is case.base[name]
        else:
            want = case.base[name] + scale * piece
            assert torch.equal(bits(got[name]), bits(want)), (name, got[name], want)


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


@few
@given(case=any_case, density=densities, **split)
def test_ties_trimmed_tensor_by_tensor(exact_run, case, density, chunk, threads):
    sizes = [math.prod(shape) for shape in SHAPES.values()]
    parts = [reference.trim(part, density) if part.numel() else part for part in case.taus.split(sizes, dim=1)]
    trimmed = torch.cat(parts, dim=1)
    expected = reference.ties(trimmed, reference.elect(trimmed))
    assert_same(case, exact_run, expected, method="ties", density=density, trim="tensor", chunk=chunk, threads=threads)


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
