from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest

from emomerge.experiment.assessment import united_columns
from emomerge.experiment.scores import COSINE, DISTANCE, ENTROPY, GRADIENT_NORM, Figure, score_figures
from emomerge.probing import report
from emomerge.results import (
    ArtefactRow,
    Claim,
    Column,
    Cosines,
    Curve,
    Data,
    Density,
    Estimate,
    Evidence,
    Hessian,
    Matrix,
    MergeFacts,
    Plane,
    Point,
    ProbeFacts,
    Results,
    Rows,
    Selected,
    Subspace,
    Surface,
    Trace,
    Verdict,
)  # fmt: skip

OPTIMIZERS = ("sens", "airy", "cats", "tion", "void")
TEST_LOSS = {"sens": 0.3421, "airy": 0.3368, "cats": 0.3515, "tion": 0.3402, "void": 0.3607}
SHARPNESS = {"sens": 0.0142, "airy": 0.0131, "cats": 0.0188, "tion": 0.0139, "void": 0.0213}
DISTANCES = {"sens": 3.1, "airy": 2.9, "cats": 3.8, "tion": 3.0, "void": 4.2}
MERGES = {
    "tall-mask": (0.3215, 0.0083, 1.95),
    "ties": (0.3341, 0.0107, 2.3),
    "mean": (0.3229, 0.0086, 1.9),
    "greedy-soup": (0.3252, 0.0091, 2.1),
}


def figures_of(
    test: float, sharp: float, distance: float, train_accuracy: float, test_accuracy: float, cosine: bool
) -> list[Figure]:
    """The figures of a quick probe, in the order of the tables."""

    def scores(split: str, loss: float, accuracy: float) -> list[Figure]:
        of_rows = {"loss": np.array([loss]), "accuracy": np.array([accuracy]), "weight": np.ones(1)}
        return score_figures(split, of_rows, "nats", perplexity=False)

    shaken = {
        radius: {"mean": sharp * scale, "stderr": sharp * scale * 0.05, "n": 64}
        for radius, scale in (("0.01", 0.11), ("0.03", 1.0), ("0.1", 10.4))
    }
    return [
        *scores("test", test, test_accuracy),
        *report.gaussian(shaken, "model").figures,
        (DISTANCE, Estimate(mean=distance)),
        *scores("validation", round(test + 0.004, 4), round(1 - test / 3 - 0.002, 4)),
        *scores("train", round(test - 0.06, 4), train_accuracy),
        *([(COSINE, Estimate(mean=0.91))] if cosine else []),
        (ENTROPY, Estimate(mean=0.21)),
        (GRADIENT_NORM, Estimate(mean=0.131)),
    ]


def _artefact(
    name: str, role: str, test: float, sharp: float, distance: float, **more: Any
) -> tuple[ArtefactRow, list[Column]]:
    train = more.pop("train_accuracy", round(1 - test / 3 + 0.02, 4))
    accuracy = more.pop("test_accuracy", round(1 - test / 3, 4))
    figures = figures_of(test, sharp, distance, train_accuracy=train, test_accuracy=accuracy, cosine=role != "base")
    seconds = 8.4 if role == "run" else None
    estimates = {column.key: estimate for column, estimate in figures}
    row = ArtefactRow(name=name, role=role, path=f"out/{name}", seconds=seconds, estimates=estimates, **more)
    return row, [column for column, _ in figures]


LAYERS = [
    f"encoder.layer.{i}.{part}"
    for i in range(6)
    for part in ("attention.query", "attention.key", "attention.value", "attention.output.dense", "mlp.up", "mlp.down")
]


def full_probe(sharp: float) -> tuple[list[Figure], Hessian]:
    """What the full probe adds to an artefact of that sharpness; invented."""
    largest, trace = 1500 * sharp, 20_000 * sharp
    at = [-0.1 * largest + 1.14 * largest * k / 200 for k in range(201)]
    nodes = [(0.0, 1.0), (0.02, 3e-3), (0.1, 2e-4), (0.35, 4e-5), (0.7, 2e-5), (1.0, 1e-5), (-0.05, 3e-4)]
    width = 0.012 * largest
    density = [
        sum(w / width * math.exp(-(((x - node * largest) / width) ** 2) / 2) for node, w in nodes) / math.sqrt(2 * math.pi)
        for x in at
    ]
    span = [0.3 * largest / (k + 1) for k in range(5)]
    adaptive = {r: {"mean": sharp * s, "stderr": sharp * s * 0.06, "n": 32} for r, s in (("0.05", 2), ("0.1", 8), ("0.2", 33))}
    worst = {
        ball: {
            f"{radius:g}": {"excess": sharp * s * 6, "rise": sharp * s * 6 + 0.02 * s, "gradient": 0.02 * s}
            for radius, s in zip(radii, (1, 2.5, 7), strict=True)
        }
        for ball, radii in (
            ("l2", (0.5, 1, 2)), ("linf", (5e-4, 1e-3, 2e-3)),
            ("adaptive l2", (0.5, 1, 2)), ("adaptive linf", (5e-4, 1e-3, 2e-3)),
        )
    }  # fmt: skip
    basin = 0.01 / sharp**0.5
    curvature = {
        "largest": largest, "smallest": -0.05 * largest, "step": None, "disagreement": None, "density": None,
        "trace": {"mean": trace, "stderr": 0.03 * trace, "n": 32, "modules": {}},
    }  # fmt: skip
    figures = [
        *report.hessian(curvature, "model").figures,
        *report.basin({"width": basin, "log_stderr": 0.002 / basin, "n": 8}, "model").figures,
        *report.adaptive(adaptive, "model").figures,
        *report.worst_case(worst, "model").figures,
        *report.span({"eigenvalues": span}, "model").figures,
    ]
    layers = {
        name: trace / 30 * (0.2 + 1.6 * abs(math.sin(1 + 3 * i + 40 * sharp))) * (0.4 + i / 30) for i, name in enumerate(LAYERS)
    }
    subspace = Subspace(rank=5, eigenvalues=tuple(span), trace=sum(span), along={})
    return figures, Hessian(density=Density(at=tuple(at), density=tuple(density)), layers=layers, subspace=subspace)


def landscapes(names: list[str]) -> dict[str, Any]:
    """What the full probe adds to the results; invented."""
    axis = tuple(-1.2 + 0.36 * k for k in range(21))
    up = tuple(-1 + 0.2 * k for k in range(21))
    grid = tuple(-1 + 0.1 * k for k in range(21))

    def loss(x: float, y: float) -> float:
        return 0.27 + 0.05 * (x - 2.2) ** 2 + 0.09 * (y - 0.4 - 0.2 * math.sin(x)) ** 2

    heights = [[0.0 if a == b else 0.004 + 0.011 * (len(a + b) % 4) for a in names] for b in names]
    points = [Point(name=n, x=x, y=y) for n, x, y in (("base", 0, 0), ("tall-mask", 1.95, 0), ("airy-0", 2.6, 1.3))]
    return {
        "barriers": Matrix(names=names, matrix=heights),
        "plane": Plane(x=axis, y=up, loss=[[loss(x, y) for x in axis] for y in up], points=points),
        "surfaces": {
            name: Surface(
                x=grid, y=grid, loss=[[0.28 + s * (x * x + 0.6 * y * y + 0.7 * x * x * y) for x in grid] for y in grid]
            )
            for name, s in (("airy-0", 2.2), ("tall-mask", 1.3))
        },
    }


def _trace(optimizer: str, seed: int, steps: int = 300) -> Trace:
    rng = random.Random(f"{optimizer}-{seed}")
    end = TEST_LOSS[optimizer] - 0.06
    loss = [end + 1.6 * math.exp(-s / 45) + rng.gauss(0, 0.07 + 0.1 * math.exp(-s / 60)) for s in range(steps)]
    rate = [2e-3 * math.exp(-s / (90 + 20 * len(optimizer))) * math.exp(rng.gauss(0, 0.25)) + 2e-5 for s in range(steps)]
    return Trace(
        optimizer=optimizer, seed=seed, step=range(1, steps + 1), loss=[max(0.02, v) for v in loss], rate=rate,
        sigma=[rng.gauss(0, 0.1) for _ in range(steps)], trust=[rng.uniform(0.4, 0.9) for _ in range(steps)],
    )  # fmt: skip


def example_results(steps: int = 300) -> Results:
    """The results of five optimizers, four merges and every control, with invented numbers."""
    rng = random.Random(0)
    runs = [_artefact(f"{o}-0", "run", TEST_LOSS[o], SHARPNESS[o], DISTANCES[o], optimizer=o, seed=0) for o in OPTIMIZERS]
    merges = [_artefact(name, "merge", *figures) for name, figures in MERGES.items()]
    controls = [
        _artefact(
            f"{o}-0 at |tall-mask|",
            "control",
            round(TEST_LOSS[o] + 0.011 + 0.002 * i, 4),
            SHARPNESS[o] * 0.71,
            1.95,
            optimizer=o,
            seed=0,
            control="distance-matched",
            of=f"{o}-0",
        )
        for i, o in enumerate(OPTIMIZERS)
    ]
    rivals = (
        ("long-airy-0 at step 900", "loss-matched", "airy", "tall-mask", 0.3275, 0.0112),
        ("long-airy-0", "long-run", "airy", None, 0.3236, 0.0174),
        ("swa-long-airy-0", "swa", "airy", None, 0.3222, 0.0091),
        ("long-adamw-0.001-0", "adamw-long-run", "adamw", None, 0.3259, 0.0196),
        ("adamw-average-0", "adamw-average", "adamw", None, 0.3249, 0.0104),
        ("sweep-adamw-0.001-0", "adamw-sweep", "adamw", None, 0.3345, 0.0082),
        ("adamw-soup-0", "adamw-soup", "adamw", None, 0.3335, 0.0205),
        ("batch-adamw-0.003-0", "adamw-large-batch", "adamw", None, 0.3150, 0.0060),
    )
    controls += [
        _artefact(name, "control", test, sharp, 3.3, optimizer=o, seed=0, control=kind, of=of)
        for name, kind, o, of, test, sharp in rivals
    ]
    base = _artefact("base", "base", 0.6982, 0.0021, 0.0, train_accuracy=0.512, test_accuracy=0.498)
    everything = [base, *runs, *merges, *controls]
    rows = tuple(row for row, _ in everything)
    alphas = [round(0.1 * i, 1) for i in range(16)]
    curves = {
        row.name: Curve(
            alpha=alphas,
            loss=[row.loss("train") + (0.69 - row.loss("train")) * (1 - x / (1.02 + 0.02 * i)) ** 2 for x in alphas],
        )
        for i, (row, _) in enumerate([*runs, *merges])
    }
    names = [row.name for row, _ in runs]
    cosines = [[1.0 if i == j else round(0.35 + 0.3 * rng.random(), 3) for j in range(5)] for i in range(5)]
    for i in range(5):
        for j in range(i):
            cosines[i][j] = cosines[j][i]
    return Results(
        name="movie-reviews",
        created="2031-04-05T10:11:12+00:00",
        command="emomerge run movie-reviews.yaml -o out",
        recipe={"name": "movie-reviews", "runs": {"seeds": [0]}},
        recipe_yaml="name: movie-reviews\nbase: {model: small-encoder}\nruns: {steps: 300, seeds: [0]}\n",
        versions={"emomerge": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        device="cpu",
        data=Data(
            summary="reviews.tsv: 4 200 sentences in two classes", rows=Rows(train=3780, validation=210, test=210),
            classes=("bad", "good"),
        ),
        columns=united_columns([columns for _, columns in everything]),
        artefacts=rows,
        probe=ProbeFacts(
            preset="quick", data="train", radii=(0.01, 0.03, 0.1), directions=16, batches=4, batch_size=128, rows=512,
            noise_floor=1.2e-7,
        ),
        curves=curves,
        traces={f"{o}-0": _trace(o, 0, steps) for o in OPTIMIZERS},
        cosines=Cosines(names=names, matrix=cosines, sign_agreement=[[0.5 + c / 2 for c in row] for row in cosines]),
        merges=_merge_facts(names),
        verdict=_verdict(),
        selected=Selected(
            name="tall-mask", path="out/merges/tall-mask", validation_loss=0.3255,
            sentence="tall-mask has the lowest validation loss (0.3255) of 9 artefacts.",
        ),
        seconds={"base": 3.1, "runs": 41.8, "merge": 2.2, "probe": 33.0},
    )  # fmt: skip


def _merge_facts(names: list[str]) -> dict[str, MergeFacts]:
    facts = [
        MergeFacts(
            method="tall-mask", params={"reference": "mean", "k": 2, "lambda": 0.4}, runs=names, lambda_crit=0.25,
            mask_density={n: 0.5 + 0.02 * i for i, n in enumerate(names)}, kept_density=0.61, kept_energy=0.93,
            merged_norm=1.95, cosine_to_mean=0.964,
        ),
        MergeFacts(
            method="ties", params={"density": 0.2}, runs=names, kept_density=0.44, merged_norm=2.3, cosine_to_mean=0.871,
            warnings=("the kept set excludes 38 % of the largest entries of the mean",),
        ),
        MergeFacts(method="mean", runs=names, merged_norm=1.9, cosine_to_mean=1.0),
        MergeFacts(method="greedy-soup", runs=names[:3], params={"members": names[:3]}),
    ]  # fmt: skip
    return {found.method: found for found in facts}


def _evidence(against: str, what: str, estimate: float, low: float, high: float) -> Evidence:
    scale = "difference" if what == "test loss" else "log-ratio"
    return Evidence(against=against, what=what, scale=scale, estimate=estimate, low=low, high=high)


def _verdict() -> Verdict:
    differences = (
        ("long run of equal steps", -0.0021), ("AdamW with cosine, equal steps", -0.0044),
        ("average of AdamW runs", 0.0081), ("SWA of the long run", -0.0007),
    )  # fmt: skip
    in_loss = [
        _evidence("best single run", "test loss", -0.0153, -0.0240, -0.0068),
        _evidence("plain mean", "test loss", -0.0014, -0.0050, 0.0021),
        *(_evidence(rival, "test loss", m, m - 0.006, m + 0.006) for rival, m in differences),
    ]
    in_sharpness = [
        _evidence(against, what, m0 + d, m0 + d - 0.11 * w, m0 + d + 0.12 * w)
        for against, m0 in (("best single run", -0.46), ("distance-matched", -0.11), ("loss-matched", -0.3))
        for what, d, w in (
            ("gaussian σ=0.01", 0.02, 1.4), ("gaussian σ=0.03", 0.0, 1.0), ("gaussian σ=0.1", -0.03, 0.8),
            ("λmax", -0.05, 1.1), ("trace", -0.1, 0.5),
        )
    ]  # fmt: skip
    return Verdict(
        status="better and flatter",
        sentence="The merge tall-mask is better and flatter than the best single run (airy-0).",
        merge="tall-mask",
        best_single=("airy-0",),
        better=Claim(status="better", evidence=in_loss, note="bootstrap over 210 test rows"),
        flatter=Claim(status="flatter", evidence=in_sharpness, note="paired over 16 directions × 4 batches"),
        caveats=("“better”: an invented caveat",),
    )


def full_results(steps: int = 300) -> Results:
    """The same after the full probe."""
    results = example_results(steps)
    rows, columns = [], [results.columns]
    for row in results.artefacts:
        figures, hessian = full_probe(row.mean("sharpness_0.03"))
        added = {column.key: estimate for column, estimate in figures}
        rows.append(row.model_copy(update={"estimates": row.estimates | added, "hessian": hessian}))
        columns.append([*results.columns[:5], *(column for column, _ in figures)])
    return results.model_copy(
        update={
            "artefacts": tuple(rows),
            "columns": tuple(united_columns(columns)),
            "probe": results.probe.model_copy(update={"preset": "full", "adaptive_radii": (0.05, 0.1, 0.2)}),
            **landscapes([*results.cosines.names, "tall-mask"]),
        }
    )


class Editor:
    """Changed copies of results, which are immutable."""

    @staticmethod
    def row(results: Results, name: str, /, **changes: Any) -> Results:
        """Change an artefact; `estimates` are added to its own."""
        if "estimates" in changes:
            changes["estimates"] = named(results, name).estimates | changes["estimates"]
        rows = [row.model_copy(update=changes) if row.name == name else row for row in results.artefacts]
        return results.model_copy(update={"artefacts": tuple(rows)})

    @staticmethod
    def diverged(results: Results, name: str, *keys: str) -> Results:
        """Let figures of an artefact have diverged."""
        return Editor.row(results, name, estimates={key: Estimate(mean=None) for key in keys})

    @staticmethod
    def without(results: Results, *prefixes: str) -> Results:
        """Leave out the figures whose keys begin so, and the Hessian where `lambda` is left out."""
        rows = []
        for row in results.artefacts:
            kept = {key: estimate for key, estimate in row.estimates.items() if not key.startswith(prefixes)}
            hessian = None if "lambda" in prefixes else row.hessian
            rows.append(row.model_copy(update={"estimates": kept, "hessian": hessian}))
        return results.model_copy(update={"artefacts": tuple(rows)})

    @staticmethod
    def evidence(results: Results, claim: str, number: int, **changes: Any) -> Results:
        """Change one comparison behind a claim."""
        found = getattr(results.verdict, claim)
        items = [item.model_copy(update=changes) if i == number else item for i, item in enumerate(found.evidence)]
        changed = found.model_copy(update={"evidence": tuple(items)})
        return results.model_copy(update={"verdict": results.verdict.model_copy(update={claim: changed})})


def named(results: Results, name: str) -> ArtefactRow:
    return next(row for row in results.artefacts if row.name == name)


@pytest.fixture
def edit() -> type[Editor]:
    return Editor


@pytest.fixture(scope="session")
def results() -> Results:
    """The results of a quick probe."""
    return example_results(steps=40)


@pytest.fixture(scope="session")
def full() -> Results:
    """The results of a full probe."""
    return full_results(steps=40)
