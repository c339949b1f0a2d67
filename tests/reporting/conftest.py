from __future__ import annotations

import copy
import math
import random
from typing import Any

import pytest

OPTIMIZERS = ("sens", "airy", "cats", "tion", "void")
TEST_LOSS = {"sens": 0.3421, "airy": 0.3368, "cats": 0.3515, "tion": 0.3402, "void": 0.3607}
SHARPNESS = {"sens": 0.0142, "airy": 0.0131, "cats": 0.0188, "tion": 0.0139, "void": 0.0213}
DISTANCE = {"sens": 3.1, "airy": 2.9, "cats": 3.8, "tion": 3.0, "void": 4.2}
MERGES = {
    "tall-mask": (0.3215, 0.0083, 1.95),
    "ties": (0.3341, 0.0107, 2.3),
    "mean": (0.3229, 0.0086, 1.9),
    "greedy-soup": (0.3252, 0.0091, 2.1),
}


def _artefact(name: str, role: str, test: float, sharp: float, distance: float, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "role": role,
        "path": f"out/{name}",
        "optimizer": None,
        "seed": None,
        "control": None,
        "of": None,
        "train_loss": round(test - 0.06, 4),
        "train_accuracy": round(1 - test / 3 + 0.02, 4),
        "validation_loss": round(test + 0.004, 4),
        "validation_accuracy": round(1 - test / 3 - 0.002, 4),
        "test_loss": test,
        "test_accuracy": round(1 - test / 3, 4),
        "entropy": 0.21,
        "grad_norm": 0.131,
        "distance": distance,
        "cosine_to_mean": None if role == "base" else 0.91,
        "sharpness": {
            radius: {"mean": sharp * scale, "stderr": sharp * scale * 0.05, "n": 64}
            for radius, scale in (("0.01", 0.11), ("0.03", 1.0), ("0.1", 10.4))
        },
        "seconds": 8.4 if role == "run" else None,
        **more,
    }


LAYERS = [
    f"encoder.layer.{i}.{part}"
    for i in range(6)
    for part in ("attention.query", "attention.key", "attention.value", "attention.output.dense", "mlp.up", "mlp.down")
]


def full_probe(sharp: float) -> dict[str, Any]:
    """What the full probe adds to an artefact of that sharpness; invented."""
    largest, trace = 1500 * sharp, 20_000 * sharp
    at = [-0.1 * largest + 1.14 * largest * k / 200 for k in range(201)]
    nodes = [(0.0, 1.0), (0.02, 3e-3), (0.1, 2e-4), (0.35, 4e-5), (0.7, 2e-5), (1.0, 1e-5), (-0.05, 3e-4)]
    width = 0.012 * largest
    density = [
        sum(w / width * math.exp(-(((x - node * largest) / width) ** 2) / 2) for node, w in nodes) / math.sqrt(2 * math.pi)
        for x in at
    ]
    return {
        "adaptive": {
            r: {"mean": sharp * s, "stderr": sharp * s * 0.06, "n": 32} for r, s in (("0.05", 2), ("0.1", 8), ("0.2", 33))
        },
        "worst_case": {
            ball: {
                f"{radius:g}": {"mean": sharp * s * 6, "stderr": sharp * s * 0.3, "n": 4, "gradient": 0.02 * s}
                for radius, s in zip(radii, (1, 2.5, 7), strict=True)
            }
            for ball, radii in (
                ("ℓ2", (0.5, 1, 2)), ("ℓ∞", (5e-4, 1e-3, 2e-3)),
                ("ℓ2 adaptive", (0.5, 1, 2)), ("ℓ∞ adaptive", (5e-4, 1e-3, 2e-3)),
            )
        },
        "basin": {"mean": 0.01 / sharp**0.5, "stderr": 0.002, "n": 8},
        "hessian": {
            "lambda_max": largest, "lambda_min": -0.05 * largest, "trace": {"mean": trace, "stderr": 0.03 * trace, "n": 32},
            "density": {"at": at, "density": density},
            "layers": {
                name: trace / 30 * (0.2 + 1.6 * abs(math.sin(1 + 3 * i + 40 * sharp))) * (0.4 + i / 30)
                for i, name in enumerate(LAYERS)
            },
            "subspace": {"eigenvalues": [0.3 * largest / (k + 1) for k in range(5)]},
        },
    }  # fmt: skip


def landscape(names: list[str]) -> dict[str, Any]:
    """What the full probe adds to the results; invented."""
    axis = [-1.2 + 0.36 * k for k in range(21)]
    grid = [-1 + 0.1 * k for k in range(21)]

    def loss(x: float, y: float) -> float:
        return 0.27 + 0.05 * (x - 2.2) ** 2 + 0.09 * (y - 0.4 - 0.2 * math.sin(x)) ** 2

    return {
        "barriers": {
            "names": names,
            "matrix": [[0.0 if a == b else 0.004 + 0.011 * (len(a + b) % 4) for a in names] for b in names],
        },
        "plane": {
            "x": axis, "y": [-1 + 0.2 * k for k in range(21)],
            "loss": [[loss(x, -1 + 0.2 * k) for x in axis] for k in range(21)],
            "points": [
                {"name": n, "x": x, "y": y} for n, x, y in (("base", 0, 0), ("tall-mask", 1.95, 0), ("airy-0", 2.6, 1.3))
            ],
        },
        "surfaces": {
            name: {
                "x": grid, "y": grid,
                "loss": [[0.28 + s * (x * x + 0.6 * y * y + 0.7 * x * x * y) for x in grid] for y in grid],
            }
            for name, s in (("airy-0", 2.2), ("tall-mask", 1.3))
        },
    }  # fmt: skip


def _trace(optimizer: str, seed: int, steps: int = 300) -> dict[str, Any]:
    rng = random.Random(f"{optimizer}-{seed}")
    end = TEST_LOSS[optimizer] - 0.06
    loss = [end + 1.6 * math.exp(-s / 45) + rng.gauss(0, 0.07 + 0.1 * math.exp(-s / 60)) for s in range(steps)]
    rate = [2e-3 * math.exp(-s / (90 + 20 * len(optimizer))) * math.exp(rng.gauss(0, 0.25)) + 2e-5 for s in range(steps)]
    return {
        "optimizer": optimizer,
        "seed": seed,
        "step": list(range(1, steps + 1)),
        "loss": [max(0.02, v) for v in loss],
        "rate": rate,
        "sigma": [rng.gauss(0, 0.1) for _ in range(steps)],
        "trust": [rng.uniform(0.4, 0.9) for _ in range(steps)],
    }


def example_results(steps: int = 300) -> dict[str, Any]:
    """What one `emomerge run` of five optimizers, four merges and every control writes, with invented numbers."""
    rng = random.Random(0)
    runs = [_artefact(f"{o}-0", "run", TEST_LOSS[o], SHARPNESS[o], DISTANCE[o], optimizer=o, seed=0) for o in OPTIMIZERS]
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
    )
    controls += [
        _artefact(name, "control", test, sharp, 3.3, optimizer=o, seed=0, control=kind, of=of)
        for name, kind, o, of, test, sharp in rivals
    ]
    base = _artefact("base", "base", 0.6982, 0.0021, 0.0, train_accuracy=0.512, test_accuracy=0.498, cosine_to_mean=None)
    alphas = [round(0.1 * i, 1) for i in range(16)]
    curves = {
        a["name"]: {
            "alpha": alphas,
            "loss": [a["train_loss"] + (0.69 - a["train_loss"]) * (1 - x / (1.02 + 0.02 * i)) ** 2 for x in alphas],
        }
        for i, a in enumerate([*runs, *merges])
    }
    names = [a["name"] for a in runs]
    cosines = [[1.0 if i == j else round(0.35 + 0.3 * rng.random(), 3) for j in range(5)] for i in range(5)]
    for i in range(5):
        for j in range(i):
            cosines[i][j] = cosines[j][i]
    return {
        "name": "movie-reviews",
        "created": "2031-04-05T10:11:12+00:00",
        "command": "emomerge run movie-reviews.yaml -o out",
        "recipe": {"name": "movie-reviews", "runs": {"seeds": [0]}},
        "recipe_yaml": "name: movie-reviews\nbase: {model: small-encoder}\nruns: {steps: 300, seeds: [0]}\n",
        "versions": {"emomerge": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "device": "cpu",
        "data": {
            "summary": "reviews.tsv: 4 200 sentences in two classes",
            "rows": {"train": 3780, "validation": 210, "test": 210},
            "classes": ["bad", "good"],
        },
        "artefacts": [base, *runs, *merges, *controls],
        "probe": {
            "preset": "quick",
            "data": "train",
            "radii": [0.01, 0.03, 0.1],
            "directions": 16,
            "batches": 4,
            "batch_size": 128,
            "rows": 512,
            "noise_floor": 1.2e-7,
        },
        "curves": curves,
        "traces": {f"{o}-0": _trace(o, 0, steps) for o in OPTIMIZERS},
        "cosines": {
            "names": names,
            "matrix": cosines,
            "sign_agreement": [[0.5 + c / 2 for c in row] for row in cosines],
        },
        "merges": {
            "tall-mask": {
                "method": "tall-mask",
                "params": {"reference": "mean", "k": 2, "lambda": 0.4},
                "runs": names,
                "lambda_crit": 0.25,
                "mask_density": {n: 0.5 + 0.02 * i for i, n in enumerate(names)},
                "kept_density": 0.61,
                "kept_energy": 0.93,
                "norm": 1.95,
                "cosine_to_mean": 0.964,
                "warnings": [],
                "chosen": {"scale": 1.1, "by": "validation loss"},
            },
            "ties": {
                "method": "ties",
                "params": {"density": 0.2},
                "runs": names,
                "kept_density": 0.44,
                "norm": 2.3,
                "cosine_to_mean": 0.871,
                "warnings": ["the kept set excludes 38 % of the largest entries of the mean"],
            },
            "mean": {"method": "mean", "params": {}, "runs": names, "norm": 1.9, "cosine_to_mean": 1.0, "warnings": []},
            "greedy-soup": {"method": "greedy-soup", "params": {}, "runs": names[:3], "chosen": {"runs": names[:3]}},
        },
        "verdict": {
            "status": "better and flatter",
            "sentence": "The merge tall-mask is better and flatter than the best single run (airy-0).",
            "merge": "tall-mask",
            "best_single": ["airy-0"],
            "better": {
                "status": "better",
                "evidence": [
                    {"against": "best single run", "what": "test loss", "estimate": -0.0153, "low": -0.0240, "high": -0.0068},
                    {"against": "plain mean", "what": "test loss", "estimate": -0.0014, "low": -0.0050, "high": 0.0021},
                    *(
                        {"against": rival, "what": "test loss", "estimate": m, "low": m - 0.006, "high": m + 0.006}
                        for rival, m in (
                            ("long run of equal steps", -0.0021),
                            ("AdamW with cosine, equal steps", -0.0044),
                            ("average of AdamW runs", 0.0081),
                            ("SWA of the long run", -0.0007),
                        )
                    ),
                ],
                "note": "bootstrap over 210 test rows",
            },
            "flatter": {
                "status": "flatter",
                "evidence": [
                    {"against": against, "what": what, "estimate": m, "low": m - 0.11 * w, "high": m + 0.12 * w}
                    for against, m0 in (("best single run", -0.46), ("distance-matched", -0.11), ("loss-matched", -0.3))
                    for what, m, w in (
                        *(
                            (f"gaussian σ={r}", m0 + d, w)
                            for r, d, w in ((0.01, 0.02, 1.4), (0.03, 0.0, 1.0), (0.1, -0.03, 0.8))
                        ),
                        ("λmax", m0 - 0.05, 1.1),
                        ("trace", m0 - 0.1, 0.5),
                    )
                ],
                "note": "paired over 16 directions × 4 batches",
            },
            "caveats": ["“better”: an invented caveat"],
        },
        "selected": {
            "name": "tall-mask",
            "path": "out/merges/tall-mask",
            "validation_loss": 0.3255,
            "sentence": "tall-mask has the lowest validation loss (0.3255) of 9 artefacts.",
        },
        "seconds": {"base": 3.1, "runs": 41.8, "merge": 2.2, "probe": 33.0},
    }


def full_results(steps: int = 300) -> dict[str, Any]:
    """The same after the full probe."""
    results = example_results(steps)
    for artefact in results["artefacts"]:
        artefact |= full_probe(artefact["sharpness"]["0.03"]["mean"])
    results["probe"]["preset"] = "full"
    return results | landscape([*results["cosines"]["names"], "tall-mask"])


@pytest.fixture(scope="session")
def _example() -> dict[str, Any]:
    return example_results(steps=40)


@pytest.fixture
def results(_example: dict[str, Any]) -> dict[str, Any]:
    """A fresh copy that a test may change."""
    return copy.deepcopy(_example)


@pytest.fixture(scope="session")
def _full_example() -> dict[str, Any]:
    return full_results(steps=40)


@pytest.fixture
def full(_full_example: dict[str, Any]) -> dict[str, Any]:
    """A fresh copy of the results of a full probe."""
    return copy.deepcopy(_full_example)
