"""Write the tables of docs/performance.md about merging from the stored results.

    python benchmarks/merge_tables.py             # rewrites the file
    python benchmarks/merge_tables.py --check     # exit status 1 if it differs from the results

The results in benchmarks/results/ come from `merge_vs_mergekit.py --store`, `--store-sizes` and `merge_adapters.py --store`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
END = "<!-- end -->"


def start(name: str) -> str:
    """The line before a table."""
    return f"<!-- written by benchmarks/merge_tables.py: {name} -->"


def mergers(results: Mapping[str, Any]) -> str:
    """The table of `merge_vs_mergekit.py`."""
    lines = ["| | by the clock | as a multiple of the copy | CPU time | memory, peak |", "|---|---:|---:|---:|---:|"]
    floor = next(row["seconds"] for row in results["rows"] if row["way"] == "copy")
    for row in results["rows"]:
        shown = {"copy": "reading all and writing one with safetensors"}.get(row["way"], row["way"])
        seconds, times = row["seconds"], row["seconds"] / floor
        lines.append(f"| {shown} | {seconds:.1f} s | {times:.1f} × | {row['cpu']:.1f} s | {row['peak GB']:.2f} GB |")
    return "\n".join([*lines, "", f"{results['rows'][0]['millions']:.0f} M parameters. {_where(results)}"])


def sizes(results: Mapping[str, Any]) -> str:
    """The sentence and the picture of `merge_vs_mergekit.py` over sizes."""
    small, large = (pick(row["millions"] for row in results["rows"]) for pick in (min, max))
    ours = [row for row in results["rows"] if row["way"] != "copy"]
    first, last = ([row["peak GB"] for row in ours if row["millions"] == size] for size in (small, large))
    return (
        f"From {small:.0f} to {large:.0f} M parameters, the peak of a merge of five runs grows from {max(first):.1f} to "
        f"{max(last):.1f} GB:\n\n![Peak memory of merges of {small:.0f} to {large:.0f} million parameters](merge-sizes.png)"
        f"\n\n{_where(results)}"
    )


def adapters(results: Mapping[str, Any]) -> str:
    """The table of `merge_adapters.py`."""
    lines = ["| | by the clock | memory, peak | written |", "|---|---:|---:|---:|"]
    for row in results["rows"]:
        lines.append(f"| {row['way']} | {row['seconds']:.0f} s | {row['peak GB']:.1f} GB | {row['written GB']:.1f} GB |")
    return "\n".join([*lines, "", _where(results)])


def _where(results: Mapping[str, Any]) -> str:
    """Where it was measured; a busy machine is named."""
    busy = ", while it was busy with other work" if results.get("load", 0) > 1.5 else ""
    return f"{results['machine']}{busy}; torch {results['versions']['torch']}."


TABLES: dict[str, tuple[str, str, Callable[[Mapping[str, Any]], str]]] = {
    "merge_vs_mergekit": ("docs/performance.md", "merge_vs_mergekit.json", mergers),
    "merge_adapters": ("docs/performance.md", "merge_adapters.json", adapters),
    "merge_sizes": ("docs/performance.md", "merge_sizes.json", sizes),
}
"""Name of the marker → file, results and what writes the table."""


def files(results: Path = RESULTS) -> dict[Path, str]:
    """Return the content that each file should have."""
    found: dict[Path, str] = {}
    for name, (file, source, write) in TABLES.items():
        path, stored = ROOT / file, results / source
        text = found.get(path) or path.read_text(encoding="utf-8")
        if stored.exists():
            table = write(json.loads(stored.read_text(encoding="utf-8")))
            pattern = re.compile(re.escape(start(name)) + ".*?" + re.escape(END), re.DOTALL)
            text, count = pattern.subn(lambda _: f"{start(name)}\n\n{table}\n\n{END}", text)  # noqa: B023
            if count != 1:
                raise SystemExit(f"{file} has {count} places for the table {name}")
        found[path] = text
    return found


def main() -> None:
    """Write the files, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a file differs from the results")
    options = parser.parse_args()
    stale = {path: text for path, text in files().items() if path.read_text(encoding="utf-8") != text}
    if options.check and stale:
        raise SystemExit(f"stale: {', '.join(path.name for path in stale)}")
    for path, text in stale.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
