"""Write the tables of docs/performance.md about optimizers and runs in one pass from the stored results.

    python benchmarks/training_tables.py             # rewrites the parts between the markers
    python benchmarks/training_tables.py --check     # exit status 1 if they differ from the results

Nothing is measured here: `optimizer_step.py --out` and `stacked_training.py --out` write benchmarks/results/. Without compiled
rules:

    EMOMERGE_NATIVE=0 python benchmarks/optimizer_step.py --threads 1 --out benchmarks/results/optimizer_step_uncompiled.json
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stacked_training import LIMITS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
END = "<!-- end -->"


def start(name: str) -> str:
    """Return the line before a table."""
    return f"<!-- written by benchmarks/training_tables.py: {name} -->"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns but the first are right-aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def optimizers(results: Mapping[str, Any]) -> str:
    """Return the table of `optimizer_step.py`: ratios to torch's fused AdamW on one thread, and bytes of state."""
    rows = [row for row in results["rows"] if row["threads"] == 1]
    ratios = {(row["set"], row["name"]): row["ratio"] for row in rows}
    names = [name for name in dict.fromkeys(row["name"] for row in rows) if name != "AdamW fused"]
    names.sort(key=lambda name: not name.startswith("Emo"))
    sets = list(dict.fromkeys(row["set"] for row in rows))
    state = {row["name"]: row["bytes"] for row in rows if row["set"] == sets[0]}
    body = [[size, *(f"{ratios[size, name]:.2f}" for name in names)] for size in sets]
    body.append([f"bytes of state, {sets[0]}", *(f"{state[name]:.1f}" for name in names)])
    return f"{table(['', *names], body)}\n\n{where(results)}, one thread, median of {results['rounds']} rounds."


def uncompiled(results: Mapping[str, Any]) -> str:
    """Return the sentence about `optimizer_step.py` without a compiler."""
    signs = ("EmoAiry", "EmoCats", "EmoTion", "EmoVoid")
    ratios = [row["ratio"] for row in results["rows"] if row["name"] in signs and row["threads"] == 1]
    return (
        "The four sign rules are compiled by the machine's C compiler on first use; without one (or with EMOMERGE_NATIVE=0) "
        f"they use\ntorch's operations, at {min(ratios):.1f} to {max(ratios):.1f} times fused AdamW."
    )


def stacked(results: Mapping[str, Any]) -> str:
    """Return the table of `stacked_training.py`: CPU of five PEFT loops over that of the stack, and the peak over one run's."""
    found = {(row["hidden"], row["tokens"]): row for row in results["rows"]}
    widths, tokens = (sorted({key[number] for key in found}) for number in (0, 1))

    def cell(key: tuple[int, int]) -> str:
        if (row := found.get(key)) is None:
            return "not measured"
        less = row["peft"]["cpu"] / row["stacked"]["cpu"]
        missed = f" (goal {LIMITS[key]})" if less < LIMITS.get(key, 0.0) else ""
        missed += f" of at most {row['peft']['cpu'] / row['base']['cpu']:.1f}" if "base" in row else ""
        return f"{less:.1f}{missed}, {row['stacked']['rss'] / row['one']['rss']:.1f} ×"

    body = [[f"{count:,}", *(cell((width, count)) for width in widths)] for count in tokens]
    head = ["tokens of a run's batch", *(f"width {width}" for width in widths)]
    dropout = " and ".join(f"{value:g}" for value in sorted({row["dropout"] for row in found.values()}))
    places = sorted({f"{where(row)}, {row['threads']} thread{'s' * (row['threads'] > 1)}" for row in found.values()})
    return f"{table(head, body)}\n\nBERT of 6 layers, dropout {dropout}. {'; '.join(places)}."


def where(results: Mapping[str, Any]) -> str:
    """Return where something was measured; a busy machine is named."""
    busy = ", busy with other work" if results["load"] > 1.5 else ""
    return f"{results['machine']}{busy}, torch {results['torch']}"


PARTS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "optimizer_step": optimizers,
    "optimizer_step_uncompiled": uncompiled,
    "stacked_training": stacked,
}
"""Name of the marker and of the results → what writes the part."""


def page(text: str, results: Path = RESULTS) -> str:
    """Return docs/performance.md with its parts written from the results."""
    for name, write in PARTS.items():
        stored = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
        pattern = re.escape(start(name)) + ".*?" + re.escape(END)
        part = f"{start(name)}\n\n{write(stored)}\n\n{END}"
        text, count = re.subn(pattern, lambda _, part=part: part, text, flags=re.DOTALL)  # type: ignore[misc]
        if count != 1:
            raise SystemExit(f"{PAGE.name} has {count} places for {name}, not one")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if the page differs")
    options = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    written = page(text)
    if written == text:
        return
    print(f"{'differs' if options.check else 'written'}: {PAGE.relative_to(ROOT)}")
    if options.check:
        raise SystemExit(1)
    PAGE.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
