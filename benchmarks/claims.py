"""Does it hold? The claims of the paper and of its README, each measured by one command, with a control that could refute it.

    apt-get install dataset-fashion-mnist                # or --fashion FOLDER with the four IDX files
    pip install '.[demo,peers]'
    python benchmarks/claims.py --list                   # the claims, their verdicts and what is not measured yet
    python benchmarks/claims.py fashion regret           # measure some; without names, all
    python benchmarks/claims.py --quick                  # a tenth of the steps, one seed, few arms; decides nothing
    python benchmarks/claims.py --tables                 # docs/claims.md and its figures from the results; measures nothing

Each finished unit (a setting with a seed) is one line of JSON in benchmarks/results/claims/NAME.jsonl; the same command
continues where it was stopped, and a kill costs one unit for each process. All choices, such as the rate of a rival, are made
on validation data; verdicts are read from test data by the rule of each claim. Processes compute with one thread.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import sys
import threading
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from claims_core import CLAIMS, FASHION, Effort, Store
from claims_page import FIGURES, PAGE, draw, page, summary, summary_table
from evidence import append, machine
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from emomerge import __version__

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "claims"


def load_claims() -> None:
    """Import every module `claims_*.py`; each registers its claims."""
    for file in sorted(HERE.glob("claims_*.py")):
        importlib.import_module(file.stem)


def verdicts(results: Path) -> str:
    """Return the table of verdicts in Markdown."""
    load_claims()
    return summary(results)


def measure(name: str, arm: dict[str, Any], seed: int, effort: Effort, file: Path) -> str | None:
    """Measure one unit in this process and append it to the results. Return what went wrong, if anything did."""
    torch.set_num_threads(1)
    load_claims()
    claim, started = CLAIMS[name], time.process_time()
    torch.manual_seed(seed)
    try:
        figures = claim.measure(arm, seed, effort)
    except Exception:  # the other units are measured all the same
        return f"{name}, {arm}, seed {seed}: {traceback.format_exc(limit=-4)}"
    line = {
        "key": claim.key(arm, seed), "arm": arm, "seed": seed, "figures": figures,
        "cpu": round(time.process_time() - started, 2), "emomerge": __version__, "torch": torch.__version__,
        "machine": machine(),
    }  # fmt: skip
    append(file, json.loads(json.dumps(line, allow_nan=False)))
    return None


def end_with(parent: int) -> None:
    """End this worker once its parent is gone, as after a kill: nobody would collect what it measures."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run(names: list[str], effort: Effort, results: Path, jobs: int) -> list[str]:
    """Measure the missing units of claims. Return the errors of those that could not be measured."""
    todo = []
    for name in names:
        known = Store(results / f"{name}.jsonl").lines
        todo += [(name, arm, seed) for arm, seed in CLAIMS[name].planned(effort) if CLAIMS[name].key(arm, seed) not in known]
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # for the workers, before they import torch
    failed = []
    context = multiprocessing.get_context("spawn")
    with (
        Progress(*columns, console=Console(stderr=True)) as progress,
        ProcessPoolExecutor(jobs, mp_context=context, initializer=end_with, initargs=(os.getpid(),)) as pool,
    ):
        line = progress.add_task("units", total=len(todo))
        waiting = {
            pool.submit(measure, name, dict(arm), seed, effort, results / f"{name}.jsonl"): name for name, arm, seed in todo
        }
        for done in as_completed(waiting):
            progress.update(line, advance=1, description=waiting[done])
            if (error := done.result()) is not None:
                failed.append(error)
                progress.console.print(error, markup=False)
    return failed


def write_documents(results: Path = RESULTS) -> None:
    """Write docs/claims.md and its figures."""
    PAGE.write_text(page(results), encoding="utf-8")
    for name, claim in CLAIMS.items():
        store = Store(results / f"{name}.jsonl")
        if claim.figure is not None and not store.missing(claim):
            draw(claim.figure(store.units(claim)), FIGURES / f"{name}.png")


def main() -> None:
    load_claims()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"the claims; by default all of {', '.join(CLAIMS)}")
    parser.add_argument("--list", action="store_true", help="show verdicts; measure nothing")
    parser.add_argument("--tables", action="store_true", help="write docs/claims.md and its figures; measure nothing")
    parser.add_argument("--quick", action="store_true", help="a short form in --cache, which decides nothing")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--fashion", type=Path, default=FASHION, help="folder of the IDX files of FashionMNIST")
    parser.add_argument(
        "--cache", type=Path, default=Path("out/claims"), help="folder for bases, and for the results of --quick"
    )
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in CLAIMS]
    if unknown:
        parser.error(f"no claim has the name {', '.join(unknown)}; there are {', '.join(CLAIMS)}")
    effort = Effort(args.quick, args.fashion.absolute(), args.cache.absolute())
    results = effort.cache / "quick" if args.quick else RESULTS
    failed: list[str] = []
    if not args.list and not args.tables:
        failed = run(args.names or list(CLAIMS), effort, results, args.jobs)
    if args.tables:
        write_documents(results)
    if not args.quick:
        Console().print(summary_table(results))
    if failed:
        sys.exit(f"{len(failed)} units could not be measured")


if __name__ == "__main__":
    main()
