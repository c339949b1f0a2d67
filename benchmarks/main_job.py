"""The main job, `emomerge run RECIPE`, of two checkouts in alternation: CPU seconds, wall time, and whether the figures agree.

    python benchmarks/main_job.py run BEFORE AFTER --recipe digits --repeats 3     # writes benchmarks/results/main_job.json
    python benchmarks/main_job.py table                                            # writes the section of docs/performance.md

BEFORE and AFTER are folders of checkouts. Both run with the environment as it is. CPU seconds include child processes. Matrix
products sum in another order with another number of threads, and training multiplies such differences. Figures are therefore
compared with a run of BEFORE on one thread as well (OMP_NUM_THREADS=1), which shows what the code itself changes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "main_job.json"
PAGE = ROOT / "docs" / "performance.md"
START, END = "<!-- written by benchmarks/main_job.py -->", "<!-- end of the main job -->"
TIMES = {"seconds", "cpu_seconds", "created", "command", "versions", "path", "recipe", "recipe_yaml", "downloads"}
"""Fields of results.json that are not figures of models, or are times."""


def measure(checkout: Path, recipe: str, out: Path, threads: int | None = None) -> dict[str, float]:
    """Run the main job of a checkout into a folder; return its wall time and CPU seconds, those of its children included."""
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "emomerge", "run", recipe, "-o", str(out), "--quiet"]
    subprocess.run(command, check=True, env=environment, cwd=out.parent, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {"wall": wall, "cpu": cpu}


def figures(found: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of results.json by their place, except times."""
    if isinstance(found, Mapping):
        for key, value in found.items():
            if key not in TIMES:
                yield from figures(value, f"{name}.{key}" if name else key)
    elif isinstance(found, list):
        for index, value in enumerate(found):
            label = value.get("name", index) if isinstance(value, Mapping) else index
            yield from figures(value, f"{name}[{label}]")
    elif isinstance(found, int | float) and not isinstance(found, bool) and "cpu_seconds" not in name:
        yield name, float(found)


def difference(before: Any, after: Any) -> dict[str, Any]:
    """Return how the figures of two results differ: how many are in both, equal, or in one only, and the largest difference.

    Differences are relative to the larger figure, or absolute for figures below one.
    """
    one, other = dict(figures(before)), dict(figures(after))
    apart = {
        name: abs(one[name] - other[name]) / max(1.0, abs(one[name]), abs(other[name])) for name in one.keys() & other.keys()
    }
    worst = max(apart, key=lambda name: (apart[name], name), default=None)
    return {
        "figures": len(apart),
        "equal": sum(value == 0 for value in apart.values()),
        "only_before": len(one.keys() - other.keys()),
        "only_after": len(other.keys() - one.keys()),
        "largest": 0.0 if worst is None else apart[worst],
        "where": worst,
        "loss": max((apart[name] for name in apart if name.endswith("_loss.mean")), default=0.0),
    }


def compare(before: Path, after: Path, recipe: str, repeats: int, scratch: Path) -> dict[str, Any]:
    """Measure both checkouts in alternation and compare their figures."""
    runs: list[dict[str, Any]] = []
    results: dict[str, Any] = {}
    order = [("before", before, None), ("after", after, None)] * repeats + [("before, one thread", before, 1)]
    for number, (which, checkout, threads) in enumerate(order):
        out = scratch / f"{number}"
        runs.append({"which": which, **measure(checkout, recipe, out, threads)})
        print(json.dumps(runs[-1]), flush=True)
        results[which] = json.loads((out / "results.json").read_text(encoding="utf-8"))
    return {
        "recipe": Path(recipe).stem,
        "machine": {"cpu": _processor(), "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0]},
        "versions": results["after"]["versions"],
        "runs": runs,
        "difference": difference(results["before"], results["after"]),
        "difference_one_thread": difference(results["before, one thread"], results["after"]),
    }


def ratios(found: Mapping[str, Any], key: str) -> list[float]:
    """Return after/before of every pair of runs."""
    of = {which: [run[key] for run in found["runs"] if run["which"] == which] for which in ("before", "after")}
    return [new / old for old, new in zip(of["before"], of["after"], strict=True)]


def section(found: Mapping[str, Any] | None) -> str:
    """Return the section of the page."""
    if found is None:
        return "Not measured yet (`benchmarks/main_job.py`)."
    medians = {
        which: {key: statistics.median(run[key] for run in found["runs"] if run["which"] == which) for key in ("cpu", "wall")}
        for which in ("before", "after")
    }
    rows = [f"| {title} | {_pair(found, key, medians)} |" for title, key in (("CPU", "cpu"), ("wall", "wall"))]
    pairs, machine = len(ratios(found, "cpu")), found["machine"]
    same = found["difference_one_thread"]
    largest, loss, apart = (f"{value:.1g}" for value in (same["largest"], same["loss"], found["difference"]["loss"]))
    return "\n".join(
        [
            f"`emomerge run {found['recipe']}`, before and after in {pairs} pair{'s' if pairs > 1 else ''} of runs on "
            f"{machine['cores']} cores of {machine['cpu']} (`benchmarks/main_job.py`).",
            "CPU seconds include workers; medians, and the range of the ratio over the pairs:",
            "",
            "| | before | after | after / before |",
            "|---|---:|---:|---:|",
            *rows,
            "",
            "Fused layers and optimizers sum in another order, and so does another number of threads; training multiplies",
            f"such differences of last bits. Of {same['figures']:,} figures of results.json, {same['equal']:,} are to the bit",
            f"those of the code before on one thread; losses differ by up to {loss}, any figure by up to {largest} (relative;",
            f"absolute below 1). From the code before with the threads that it took, losses differ by up to {apart}.",
            "Small models now get one thread on every machine.",
        ]
    )


def _pair(found: Mapping[str, Any], key: str, medians: Mapping[str, Mapping[str, float]]) -> str:
    """Return the cells of a row: medians before and after, and the ratio with its range."""
    all_ratios = ratios(found, key)
    ratio = f"{statistics.median(all_ratios):.2f} ({min(all_ratios):.2f}–{max(all_ratios):.2f})"
    return f"{medians['before'][key]:.0f} s | {medians['after'][key]:.0f} s | {ratio}"


def write_section(page: Path, text: str) -> bool:
    """Replace the section between the markers, or add it at the end. Return whether the page has changed."""
    old = page.read_text(encoding="utf-8")
    if START in old:
        head, _, rest = old.partition(START)
        new = f"{head}{START}\n{text}\n{END}{rest.partition(END)[2]}"
    else:
        new = f"{old.rstrip()}\n\n## The main job\n\n{START}\n{text}\n{END}\n"
    page.write_text(new, encoding="utf-8")
    return new != old


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def load() -> dict[str, Any] | None:
    """Return the results; None if nothing was measured."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else None


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("before", type=Path)
    run.add_argument("after", type=Path)
    run.add_argument("--recipe", default="digits")
    run.add_argument("--repeats", type=int, default=3)
    run.add_argument("-o", "--out", type=Path, default=RESULTS)
    commands.add_parser("table")
    given = parser.parse_args()
    if given.command == "run":
        recipe = str(Path(given.recipe).resolve()) if Path(given.recipe).exists() else given.recipe
        with tempfile.TemporaryDirectory() as scratch:
            found = compare(given.before, given.after, recipe, given.repeats, Path(scratch))
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(section(found))
    else:
        print("changed" if write_section(PAGE, section(load())) else "unchanged")


if __name__ == "__main__":
    main()
