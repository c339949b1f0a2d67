"""Write the tables of README.md and docs/evidence.md from the results of `evidence.py`.

    python benchmarks/evidence_tables.py             # rewrites both files
    python benchmarks/evidence_tables.py --check     # exit status 1 if they differ from the results

Nothing is measured here, and no figure in these tables is typed: a test compares them with benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.table import Table

from emomerge.probing.verdict import STUDENT

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- written by benchmarks/evidence_tables.py -->", "<!-- end -->"

TASKS = {
    "mild": "FashionMNIST MLP, mild",
    "strong": "FashionMNIST MLP, strong",
    "small": "… strong, 500 rows",
    "cnn": "FashionMNIST CNN",
    "vit": "digits ViT, LoRA",
    "llama": "Python code Llama, LoRA",
    "minilm-400": "reviews MiniLM, LoRA, 400 rows",
    "minilm-4000": "reviews MiniLM, LoRA, 4,000 rows",
}
SHORT = {
    "mild": "MLP, mild shift",
    "strong": "MLP, strong shift",
    "small": "MLP, 500 rows",
    "cnn": "CNN",
    "vit": "ViT, LoRA",
    "llama": "Llama, LoRA",
    "minilm-400": "MiniLM, LoRA, 400 rows",
    "minilm-4000": "MiniLM, LoRA, 4,000 rows",
}
"""Task → its name in README.md."""
OURS = "ours"
PROCEDURES = {
    "base": "base",
    OURS: "**default: soup of rounds**",
    "best-single": "default: best of the five runs",
    "mean": "default: plain mean of the runs",
    "tall-mask": "default: tall-mask of the runs",
    "separate-best-single": "without trunk and rounds: best run",
    "separate-mean": "without trunk and rounds: plain mean",
    "paper-best-single": "the paper's procedure: best run",
    "paper-tall-mask": "the paper's procedure: tall-mask",
    "adamw-sweep": "AdamW sweep, best of five rates",
    "adamw-soup": "greedy soup of the sweep",
    "long-run": "one long run, stopped early",
    "adamw-long-run": "AdamW long run, best rate",
    "adamw-large-batch": "AdamW, five times the batch",
}
"""Row of the results → its name in the tables, in their order."""
IN_README = ("base", OURS, "best-single", "adamw-sweep", "adamw-soup", "adamw-long-run", "paper-tall-mask")
"""The rows of README.md."""
OPTIMIZERS = {
    "five": "five runs, `auto` (default)",
    "five-v3.8": "five runs, `v3.8`",
    "five-v3.9": "five runs, `v3.9`",
    "auto": "EmoSens, `auto`",
    "v3.8": "EmoSens, `v3.8`",
    "v3.9": "EmoSens, `v3.9`",
    "adamw": "AdamW, cosine",
    "prodigy": "Prodigy, cosine",
    "schedule-free": "schedule-free AdamW",
}
MERGED = {
    "rounds": "Five runs that meet every few steps (the default)",
    "separate": "Five runs that never meet",
}
"""Procedure of the table `methods` → its title."""
FACTORS = ("0.01", "0.1", "1", "10", "100")
Line = dict[str, Any]
Cells = list[list[str]]


def read(file: Path) -> list[Line]:
    """Return the latest line of every unit."""
    lines = map(json.loads, file.read_text(encoding="utf-8").splitlines() if file.exists() else [])
    return list({(line["task"], line["seed"], line["unit"]): line for line in lines}.values())


@dataclass(frozen=True)
class Estimate:
    """The mean of a value over seeds and its error; infinite if a run diverged."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def error(self) -> float | None:
        """The standard error; None for a single seed, or if a run diverged."""
        if len(self.values) == 1 or not math.isfinite(self.mean):
            return None
        return statistics.stdev(self.values) / math.sqrt(len(self.values))

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval by Student's t."""
        if self.error is None:
            return None
        half = STUDENT[min(len(self.values) - 1, len(STUDENT)) - 1] * self.error
        return self.mean - half, self.mean + half

    @property
    def sign(self) -> int:
        """-1 or 1 if the interval is off 0, else 0."""
        low, high = self.interval or (-1.0, 1.0)
        return -1 if high < 0 else 1 if low > 0 else 0

    def text(self, form: str = ".3f") -> str:
        """Mean ± standard error."""
        if not math.isfinite(self.mean):
            return "diverged"
        return number(self.mean, form) + ("" if self.error is None else f" ± {self.error:.3f}")


class Defaults:
    """The results of the table `defaults`."""

    def __init__(self, results: Path) -> None:
        self.lines = read(results / "defaults.jsonl")
        self._rows: dict[tuple[str, str], dict[int, Line]] = {}
        for line in self.lines:
            for name, row in line["rows"].items():
                self._rows.setdefault((line["task"], name), {})[line["seed"]] = row

    @cached_property
    def tasks(self) -> list[str]:
        """The tasks that have a result of ours."""
        return [task for task in TASKS if (task, OURS) in self._rows]

    @cached_property
    def procedures(self) -> list[str]:
        """The procedures that some task has."""
        return [name for name in PROCEDURES if any((task, name) in self._rows for task in self.tasks)]

    def test(self, task: str, name: str) -> Estimate | None:
        """Return the test loss; None if it was not measured."""
        rows = self._rows.get((task, name))
        return rows and Estimate(tuple(_finite(row["test"]) for row in rows.values()))

    def difference(self, task: str, name: str) -> Estimate | None:
        """Return ours − it, paired by seed; None if no seed has both."""
        ours, rows = self._rows[task, OURS], self._rows.get((task, name), {})
        both = [seed for seed in ours if seed in rows and name != OURS]
        pairs = tuple(_finite(ours[seed]["test"]) - _finite(rows[seed]["test"]) for seed in both)
        return Estimate(pairs) if pairs else None

    def cost(self, task: str, name: str, kind: str) -> float | None:
        """Return the mean `passes` or `cpu` over the seeds."""
        rows = self._rows.get((task, name))
        return rows and statistics.fmean(row[kind] for row in rows.values())

    def relative_cost(self, name: str, kind: str) -> str:
        """Return `passes` or `cpu` as multiples of ours, over the tasks."""
        found = [self.cost(task, name, kind) for task in self.tasks]
        ours = [self.cost(task, OURS, kind) for task in self.tasks]
        ratios = [mine / its for mine, its in zip(found, ours, strict=True) if mine is not None and its]
        low, high = (f"{extreme:.2g}" for extreme in (min(ratios), max(ratios)))
        return low if low == high else f"{low} – {high}"

    def wins(self, name: str) -> str:
        """Return on how many tasks ours is lower, and on how many with an interval off 0 to either side."""
        found = [difference for task in self.tasks if (difference := self.difference(task, name))]
        lower = sum(difference.mean < 0 for difference in found)
        surely, above = (sum(difference.sign == sign for difference in found) for sign in (-1, 1))
        return f"{lower} of {len(found)} ({surely} / {above})"

    def summary(self, procedures: Sequence[str] | None = None, *, compact: bool = False) -> Cells:
        """Return a row for each procedure, a column for each task.

        Args:
            procedures: the rows; by default all that some task has.
            compact: the form of README.md: short names, no spaces around ±, no CPU time.
        """
        shown = self.procedures if procedures is None else [name for name in procedures if name in self.procedures]
        names = SHORT if compact else TASKS
        costs = ["steps, default = 1"] if compact else ["passes, default = 1", "CPU, default = 1"]
        head = ["", *(names[task] for task in self.tasks), *costs, "default lower on"]
        lowest = {task: min(e.mean for name in self.procedures if (e := self.test(task, name))) for task in self.tasks}

        def cell(task: str, name: str) -> str:
            found = self.test(task, name)
            if found is None:
                return "–"
            text = found.text().replace(" ± ", "±") if compact else found.text()
            return f"**{text}**" if found.mean == lowest[task] else text

        return [head] + [
            [
                PROCEDURES[name],
                *(cell(task, name) for task in self.tasks),
                self.relative_cost(name, "passes"),
                *([] if compact else [self.relative_cost(name, "cpu")]),
                "" if name == OURS else self.wins(name),
            ]
            for name in shown
        ]

    def details(self, task: str) -> Cells:
        """Return the table of one task."""
        rows = [["", "test loss", "default − it", "95 % interval", "passes", "CPU seconds"]]
        for name in self.procedures:
            test, difference = self.test(task, name), self.difference(task, name)
            if test is not None:
                interval = difference and difference.interval
                rows.append([
                    PROCEDURES[name],
                    test.text(),
                    difference.text("+.3f") if difference and math.isfinite(difference.mean) else "",
                    f"{number(interval[0], '+.3f')} … {number(interval[1], '+.3f')}" if interval else "",
                    f"{self.cost(task, name, 'passes') or 0:,.0f}",
                    f"{self.cost(task, name, 'cpu') or 0:,.0f}",
                ])  # fmt: skip
        return rows


class Rates:
    """The results of the table `rates`, and those of the five runs in `defaults`."""

    def __init__(self, results: Path) -> None:
        self.lines = read(results / "rates.jsonl")
        self._defaults = Defaults(results)

    @cached_property
    def tasks(self) -> list[str]:
        """The tasks that have results."""
        return [task for task in TASKS if any(line["task"] == task for line in self.lines)]

    def losses(self, task: str, optimizer: str) -> dict[str, Estimate]:
        """Return factor → test loss."""
        if optimizer == "five":
            found = self._defaults.test(task, OURS)
            return {"1": found} if found else {}
        lines = [line for line in self.lines if (line["task"], line["unit"]) == (task, optimizer)]
        return {
            factor: Estimate(tuple(_finite(line["losses"][factor][1]) for line in lines))
            for factor in FACTORS
            if lines and all(factor in line["losses"] for line in lines)
        }

    def same_bits(self) -> tuple[str, list[str], bool] | None:
        """Return a task with several `lr` for `auto`, these, and whether all gave the same weights; None if there is none."""
        lines = [line for line in self.lines if line["unit"] == "auto" and len(line["losses"]) > 1]
        if not lines:
            return None
        same = all(len({json.dumps(value) for value in line["sha256"].values()}) == 1 for line in lines)
        return lines[0]["task"], list(lines[0]["sha256"]), same

    def summary(self) -> Cells:
        """Return the table of best losses and ratios: a row for each optimizer, a column for each task."""
        rows = [["", *(TASKS[task] for task in self.tasks)]]
        for optimizer, title in OPTIMIZERS.items():
            cells = [ratio(self.losses(task, optimizer)) for task in self.tasks]
            if any(cell != "–" for cell in cells):
                rows.append([title, *cells])
        return rows

    def details(self, task: str) -> Cells:
        """Return the table of one task: a column for each factor."""
        rows = [["", *(f"{factor} ×" for factor in FACTORS)]]
        for optimizer, title in OPTIMIZERS.items():
            losses = self.losses(task, optimizer)
            if losses:
                same = optimizer in ("five", "auto")  # `lr` has no effect
                rows.append([title, *(losses[f if f in losses and not same else "1"].text() for f in FACTORS)])
        return rows


class Methods:
    """The results of the table `methods`."""

    REFERENCE = "mean-of-runs"

    def __init__(self, results: Path) -> None:
        self.lines = read(results / "methods.jsonl")

    @cached_property
    def tasks(self) -> list[str]:
        """The tasks that have results."""
        return [task for task in TASKS if any(line["task"] == task for line in self.lines)]

    def values(self, procedure: str, task: str, merge: str) -> dict[int, float]:
        """Return seed → test loss."""
        lines = [line for line in self.lines if (line["task"], line["unit"]) == (task, procedure)]
        return {line["seed"]: _finite(line["losses"][merge][1]) for line in lines if merge in line["losses"]}

    def difference(self, procedure: str, task: str, merge: str) -> Estimate | None:
        """Return a merge − the plain mean of the runs, paired by seed."""
        found, reference = (self.values(procedure, task, name) for name in (merge, self.REFERENCE))
        pairs = tuple(found[seed] - reference[seed] for seed in found if seed in reference)
        return Estimate(pairs) if pairs else None

    def summary(self, procedure: str) -> Cells:
        """Return a row for each merge, a column for each task."""
        tasks = [task for task in self.tasks if self.values(procedure, task, self.REFERENCE)]
        merges = list(dict.fromkeys(m for line in self.lines if line["unit"] == procedure for m in line["losses"]))
        rows = [["merge", *(TASKS[task] for task in tasks), "lower than the mean on"]]
        for merge in merges:
            values = [self.values(procedure, task, merge) for task in tasks]
            cells = [Estimate(tuple(found.values())).text() if found else "–" for found in values]
            differences = [d for task in tasks if (d := self.difference(procedure, task, merge))]
            lower = sum(d.mean < 0 for d in differences)
            surely, above = (sum(d.sign == sign for d in differences) for sign in (-1, 1))
            compared = "" if merge == self.REFERENCE else f"{lower} of {len(differences)} ({surely} / {above})"
            rows.append([merge.replace("-of-", " of "), *cells, compared])
        return rows


def ratio(losses: Mapping[str, Estimate]) -> str:
    """Return the lowest loss over the factors, and the highest as a multiple of it."""
    if not losses:
        return "–"
    means = [estimate.mean for estimate in losses.values()]
    worst = max(means) / min(means)
    return f"{min(means):.3f}, × {worst:.2f}" if math.isfinite(worst) else f"{min(means):.3f}, diverges"


def _finite(value: float | None) -> float:
    return math.inf if value is None else value


def number(value: float, form: str) -> str:
    """Return a number with a true minus sign."""
    return format(value, form).replace("-", "−")


def markdown(cells: Cells) -> str:
    """Return a table in Markdown; the first row is its head."""
    head, *rows = cells
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def conditions(lines: Iterable[Line]) -> str:
    """Return seeds, versions and machines in one sentence."""
    lines = list(lines)
    counts = Counter((line["task"], line["unit"]) for line in lines)
    low, high = min(counts.values()), max(counts.values())
    seeds = f"{high} training seed{'s' if high > 1 else ''}" if low == high else f"{low} to {high} training seeds"
    versions = " and ".join(sorted({f"emomerge {line['emomerge']} on torch {line['torch']}" for line in lines}))
    machines = " and ".join(sorted({f"{line['machine']['cpu']}, {line['machine']['cores']} cores" for line in lines}))
    return f"{seeds}; {versions}; {machines}, one thread"


def sentences(defaults: Defaults) -> str:
    """Return what the table says about the claims, wins and losses alike."""
    found = []
    for name in ("best-single", "adamw-sweep", "adamw-soup", "long-run", "adamw-long-run", "adamw-large-batch"):
        differences = {task: d for task in defaults.tasks if (d := defaults.difference(task, name))}
        if differences:
            lost = [f"{TASKS[task].removeprefix('… ')} ({d.text('+.3f')})" for task, d in differences.items() if d.mean > 0]
            title = PROCEDURES[name].removeprefix("default: ")
            found.append(
                f"- against *{title}*: lower on {defaults.wins(name)}" + (f"; higher on {', '.join(lost)}" if lost else "")
            )
    return "\n".join(found)


EMPTY = "*No results yet: `python benchmarks/evidence.py defaults` measures them.*"


def readme_block(results: Path) -> str:
    """Return the part of README.md between the markers."""
    defaults = Defaults(results)
    if not defaults.tasks:
        return EMPTY
    return "\n\n".join([
        markdown(defaults.summary(IN_README, compact=True)),
        f"Mean ± standard error ({conditions(defaults.lines)}); bold: the lowest of all rows of [the evidence]"
        "(docs/evidence.md). Last column: tasks on which the default is lower; in brackets, those where the 95 % interval of "
        "the paired difference is wholly below / above 0.",
    ])  # fmt: skip


def document(results: Path) -> str:
    """Return docs/evidence.md."""
    from claims import verdicts  # which imports this module

    defaults, rates = Defaults(results), Rates(results)
    parts = [
        "# Evidence",
        f"{START}\n\nAll of this file is written by `benchmarks/evidence_tables.py` from `benchmarks/results/`; how it was "
        "measured is described in `benchmarks/evidence.py` and `benchmarks/claims.py`.",
        "## The paper's claims",
        "A verdict for each claim of the paper and its README, with the command that measures it; its control, table and "
        "figure are [on a page of their own](claims.md).",
        verdicts(results / "claims"),
        "## The defaults and their rivals",
        f"Test loss, mean ± standard error ({conditions(defaults.lines)}). Differences are paired by seed; intervals are those "
        "of Student's t. CPU seconds include choosing by validation loss."
        if defaults.tasks
        else EMPTY,
    ]
    if defaults.tasks:
        parts += [
            markdown(defaults.summary()),
            "Bold: the lowest. Last column: on how many tasks the default is lower, and in brackets on how many the 95 % "
            "interval of the paired difference is below / above 0. Long runs and large batches are the best of three rates.",
            sentences(defaults),
        ]
    for task in defaults.tasks:
        parts += [f"### {full_name(task)}", markdown(defaults.details(task))]
    parts.append("## How much the rate matters")
    if not rates.tasks:
        return "\n\n".join([*parts, EMPTY.replace("defaults", "rates"), *merge_methods(results), END]) + "\n"
    parts += [
        "The lowest test loss over 0.01, 0.1, 1, 10 and 100 times an optimizer's default rate, and the highest as a multiple "
        f"of it (means of {conditions(rates.lines)}).",
        markdown(rates.summary()),
    ]
    checked = rates.same_bits()
    if checked:
        task, factors, same = checked
        found = "the same bits" if same else "DIFFERENT weights"
        parts.append(
            f"With `auto`, `lr` has no effect: on *{full_name(task)}*, `lr` {', '.join(factors)} gave {found}. Elsewhere it "
            "was trained once, and the figure stands for all five."
        )
    for task in rates.tasks:
        parts += [f"### {full_name(task)}", markdown(rates.details(task))]
    return "\n\n".join([*parts, *merge_methods(results), END]) + "\n"


def merge_methods(results: Path) -> list[str]:
    """Return the part of docs/evidence.md on merge methods, by paragraph."""
    methods = Methods(results)
    parts = ["## Merge methods"]
    if not methods.tasks:
        return [*parts, EMPTY.replace("defaults", "methods")]
    parts.append(
        f"Test loss of different merges of the same runs, mean ± standard error ({conditions(methods.lines)}). `of rounds` are "
        "merges of the means that were kept of the default procedure's rounds. Last column: on how many tasks a merge is lower "
        "than the plain mean of the runs, and in brackets on how many the 95 % interval of the paired difference is below / "
        "above 0."
    )
    for procedure, title in MERGED.items():
        if len(cells := methods.summary(procedure)) > 1:
            parts += [f"### {title}", markdown(cells)]
    return parts


def full_name(task: str) -> str:
    """Return a task's name without the reference to the column before it."""
    return TASKS[task].replace("…", "FashionMNIST MLP,")


def rewritten(readme: str, results: Path) -> str:
    """Return README.md with the part between the markers written from the results."""
    block = f"{START}\n\n{readme_block(results)}\n\n{END}"
    found, count = re.subn(re.escape(START) + ".*?" + re.escape(END), lambda _: block, readme, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"README.md has {count} parts between {START} and {END}, not one")
    return found


def files(results: Path = RESULTS) -> dict[Path, str]:
    """Return each file and what it should contain."""
    readme = ROOT / "README.md"
    return {readme: rewritten(readme.read_text(encoding="utf-8"), results), ROOT / "docs" / "evidence.md": document(results)}


def terminal(table: str, results: Path) -> list[Table]:
    """Return rich tables of `defaults`, `rates` or `methods`."""
    if table == "methods":
        found = [(title, Methods(results).summary(procedure)) for procedure, title in MERGED.items()]
        return [_rich(title, cells) for title, cells in found if len(cells) > 1]
    made: Defaults | Rates = Defaults(results) if table == "defaults" else Rates(results)
    if not made.tasks:
        return []
    details: Callable[[str], Cells] = made.details
    shown: list[tuple[str, Cells]] = [(full_name(task), details(task)) for task in made.tasks]
    return [_rich(title, cells) for title, cells in [*shown, (table, made.summary())]]


def _rich(title: str, cells: Sequence[Sequence[str]]) -> Table:
    head, *rows = cells
    table = Table(title=title)
    for number_, name in enumerate(head):
        table.add_column(name, justify="left" if number_ == 0 else "right")
    for row in rows:
        table.add_row(*(cell.replace("**", "") for cell in row))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a file differs")
    args = parser.parse_args()
    stale = {file: text for file, text in files().items() if not file.exists() or file.read_text(encoding="utf-8") != text}
    for file, text in stale.items():
        print(f"{'differs' if args.check else 'written'}: {file.relative_to(ROOT)}")
        if not args.check:
            file.write_text(text, encoding="utf-8")
    raise SystemExit(bool(stale and args.check))


if __name__ == "__main__":
    main()
