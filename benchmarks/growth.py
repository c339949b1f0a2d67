"""Do time and memory of `emomerge run` grow as the work does? Rows, parameters and runs are doubled three times.

    python benchmarks/growth.py run            # writes benchmarks/results/growth.json; 10 minutes for each of --repeats
    python benchmarks/growth.py plot           # draws docs/growth.png and writes the section of docs/performance.md from it

Each point is one `emomerge run` on one thread in a process of its own, on images that the script draws at random; the least of
`--repeats` runs counts. A fixed part (imports, the base, the report) is the same for all sizes. What grows is read from
differences: CPU seconds and peak memory (MB) that a doubling adds, divided by the units that it adds. They should be flat.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from stacked_training import machine

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "growth.json"
PAGE = ROOT / "docs" / "performance.md"
PICTURE = ROOT / "docs" / "growth.png"
START, END = "<!-- written by benchmarks/growth.py -->", "<!-- end -->"
DOUBLINGS = 3
TOLERANCE = 0.15


@dataclass(frozen=True)
class Axis:
    """What is doubled.

    Attributes:
        unit: what is counted.
        start: its smallest number.
        per: how many units the table of the page counts as one.
        recipe: returns the changes to the recipe for a number of units.
    """

    unit: str
    start: int
    per: int
    recipe: Callable[[int], Mapping[str, Any]]


def _rows(count: int) -> Mapping[str, Any]:
    """An epoch over the rows, and all held-out rows measured."""
    return {"task": {"limit": count}, "runs": {"steps": count // 32}}


def _layers(count: int) -> Mapping[str, Any]:
    return {"base": {"prepare": {"layers": count}}}


def _seeds(count: int) -> Mapping[str, Any]:
    """Two runs for each training seed, with their merge and their probe."""
    return {"runs": {"seeds": list(range(count))}}


AXES = {
    "rows": Axis("row", 4_000, 1_000, _rows),
    "parameters": Axis("layer", 4, 1, _layers),
    "runs": Axis("training seed of two runs", 2, 1, _seeds),
}
RECIPE: Mapping[str, Any] = {
    "name": "growth",
    "base": {"prepare": {"model": "vit", "hidden": 64, "layers": 4, "patch_size": 7, "steps": 20, "batch_size": 32}},
    "task": {"kind": "image-classification", "limit": 4000, "eval_fraction": 0.3},
    "adapter": {"kind": "lora", "rank": 8, "alpha": 16},
    "runs": {
        "procedure": "paper",
        "preset": "guarded",
        "optimizers": ["sens", "cats"],
        "steps": 100,
        "batch_size": 32,
        "lr": 30,
    },
    "merge": [{"method": "mean"}],
    "controls": ["distance-matched"],
    "probe": {"preset": "quick", "batches": 2, "batch_size": 64, "directions": 4},
}


def united(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return the union of two nested mappings; the second takes precedence."""
    both = {key: united(first[key], value) for key, value in second.items() if isinstance(value, Mapping) and key in first}
    return {**first, **second, **both}


def write_images(folder: Path, rows: int) -> None:
    """Write random grey images of ten classes as IDX files."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 10, rows, dtype=np.uint8)
    images = random.integers(0, 128, (rows, 28, 28), dtype=np.uint8)
    images[np.arange(rows), labels * 2, :] = 255  # a bright line tells the class
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
        with gzip.open(folder / f"train-{name}-ubyte.gz", "wb", compresslevel=1) as file:
            file.write(header + array.tobytes())


def measure(recipe: Mapping[str, Any], folder: Path) -> dict[str, float]:
    """Run a recipe in a new process; return its CPU seconds and its peak memory in MB."""
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(dict(recipe)), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "emomerge", "run", str(file), "-o", "out", "--restart", "--quiet"]
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{file.name} failed with exit status {process.returncode}")
    return {"cpu": used.ru_utime + used.ru_stime, "memory": used.ru_maxrss * 1024 / 1e6}


def sizes(axis: Axis) -> list[int]:
    """Return the numbers of units that are measured."""
    return [axis.start << doubling for doubling in range(DOUBLINGS + 1)]


def grow(names: Sequence[str], repeats: int, folder: Path) -> dict[str, list[dict[str, float]]]:
    """Measure some axes: name → one point per size.

    All sizes are measured before any is measured again: the CPU time of the same work drifts by a quarter over minutes where
    other machines share the processor, and the least of runs that lie apart is freer of it.
    """
    write_images(folder, max(sizes(AXES["rows"])))
    recipe = united(RECIPE, {"task": {"train": str(folder / "train-images-idx3-ubyte.gz")}})
    found: dict[str, dict[int, dict[str, float]]] = {name: {} for name in names}
    for _ in range(repeats):
        for name in names:
            for count in sizes(AXES[name]):
                run = measure(united(recipe, AXES[name].recipe(count)), folder)
                least = found[name].setdefault(count, run)
                found[name][count] = {key: min(run[key], least[key]) for key in run}
                print(name, count, json.dumps(run), flush=True)
    return {name: [{"units": count, **point} for count, point in points.items()] for name, points in found.items()}


def least_of(points: Sequence[Mapping[str, float]], others: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Return the least of two measurements of the same sizes."""
    pairs = zip(points, others, strict=True)
    return [{key: one[key] if key == "units" else min(one[key], other[key]) for key in one} for one, other in pairs]


def added(points: Sequence[Mapping[str, float]], key: str) -> list[float]:
    """Return what each doubling adds for each unit that it adds."""
    pairs = itertools.pairwise(points)
    return [(after[key] - before[key]) / (after["units"] - before["units"]) for before, after in pairs]


def spread(values: Sequence[float]) -> float:
    """Return the largest deviation from the mean, relative to it."""
    mean = sum(values) / len(values)
    return max(abs(value - mean) for value in values) / abs(mean) if mean else 0.0


def section(found: Mapping[str, Any] | None) -> str:
    """Return the section of the page."""
    if found is None:
        return "Not measured yet (`benchmarks/growth.py`)."
    lines = [
        "| | units | CPU | memory, peak | CPU added for each unit | memory added for each unit |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, points in found["points"].items():
        per = AXES[name].per
        new = {key: [f"{value * per:.2f}" for value in added(points, key)] for key in ("cpu", "memory")}
        title = f"{name}; {f'{per:,} {_plural(AXES[name].unit)}' if per > 1 else f'a {AXES[name].unit}'}"
        for number, point in enumerate(points):
            cells = [f"{point['units'] / per:g}", f"{point['cpu']:.1f} s", f"{point['memory']:.0f} MB"]
            more = [f"{new['cpu'][number - 1]} s", f"{new['memory'][number - 1]} MB"] if number else ["", ""]
            lines.append(f"| {' | '.join([title if not number else '', *cells, *more])} |")
    apart = ", ".join(f"{100 * spread(added(points, 'cpu')):.0f} % ({name})" for name, points in found["points"].items())
    repeats, busy = found["repeats"], ", busy with other work" if found["load"] > 1.5 else ""
    least = "one run each" if repeats == 1 else f"the least of {repeats} runs or more"
    return "\n".join(
        [
            *lines,
            "",
            f"The CPU seconds that a unit adds deviate from their mean over the doublings by at most {apart}.",
            f"{found['machine']}{busy}, torch {found['torch']}, one thread, {least}.",
            "",
            f"![CPU seconds and peak memory over rows, parameters and runs; dashed, a straight line]({PICTURE.name})",
        ]
    )


def page(text: str, found: Mapping[str, Any] | None) -> str:
    """Return the page with its section written from the results."""
    pattern = re.escape(START) + ".*?" + re.escape(END)
    text, count = re.subn(pattern, lambda _: f"{START}\n\n{section(found)}\n\n{END}", text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{PAGE.name} has {count} places for the section, not one")
    return text


def load() -> dict[str, Any] | None:
    """Return the results; None if nothing was measured."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else None


def plot(found: Mapping[str, Sequence[Mapping[str, float]]], out: Path) -> None:
    """Draw CPU seconds and peak memory of every point, with the straight line from the first point to the last."""
    import altair as alt
    import vl_convert

    charts = []
    for key, title in (("cpu", "CPU seconds"), ("memory", "peak memory, MB")):
        row = []
        for name, points in found.items():
            data = alt.InlineData(values=[dict(point) for point in points])
            x = alt.X(
                "units:Q",
                title=name if _plural(AXES[name].unit) == name else f"{name} ({_plural(AXES[name].unit)})",
                axis=alt.Axis(values=[p["units"] for p in points]),
            )
            y = alt.Y(f"{key}:Q", title=title, scale=alt.Scale(zero=True))
            line = alt.Chart(alt.InlineData(values=[dict(points[0]), dict(points[-1])])).mark_line(
                strokeDash=[4, 3], color="#888"
            )
            dots = alt.Chart(data).mark_point(filled=True, size=60, color="#1f5fa8")
            row.append(alt.layer(line.encode(x=x, y=y), dots.encode(x=x, y=y)).properties(width=200, height=140))
        charts.append(alt.hconcat(*row))
    png = vl_convert.vegalite_to_png(alt.vconcat(*charts).to_dict(validate=False), scale=2)
    out.write_bytes(bytes(png))


def _plural(unit: str) -> str:
    head, space, rest = unit.partition(" of ")
    return f"{head}s{space}{rest}"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--only", choices=AXES, action="append")
    run.add_argument("--repeats", type=int, default=2)
    run.add_argument("--add", action="store_true", help="keep the least of these and of the runs that are stored in --out")
    run.add_argument("-o", "--out", type=Path, default=RESULTS)
    commands.add_parser("plot")
    given = parser.parse_args()
    if given.command == "plot":
        if (stored := load()) is not None:
            plot(stored["points"], PICTURE)
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), stored), encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() as folder:
        found = grow(given.only or list(AXES), given.repeats, Path(folder))
    facts = {"machine": machine(), "load": os.getloadavg()[2], "torch": version("torch"), "repeats": given.repeats}
    if given.add:
        before = json.loads(given.out.read_text(encoding="utf-8"))
        if (before["machine"], before["torch"]) != (facts["machine"], facts["torch"]):
            raise SystemExit(f"{given.out.name} was measured elsewhere: leave out --add")
        found = {name: least_of(points, before["points"].get(name, points)) for name, points in found.items()}
        found = {**before["points"], **found}
        facts["repeats"] = before["repeats"] + (0 if given.only else given.repeats)  # of the axis with the fewest
    per_unit: dict[str, dict[str, Any]] = {
        name: {key: {"added": added(points, key), "spread": spread(added(points, key))} for key in ("cpu", "memory")}
        for name, points in found.items()
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({**facts, "points": found, "per_unit": per_unit}, indent=1) + "\n", encoding="utf-8")
    for name, of_axis in per_unit.items():
        flat = of_axis["cpu"]["spread"]
        print(f"{name}: CPU seconds per unit flat within {flat:.0%} ({'met' if flat <= TOLERANCE else 'not met'})")


if __name__ == "__main__":
    main()
