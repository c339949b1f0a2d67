"""Write the measured parts of documentation pages from benchmarks/results/: tables, and sentences with figures.

    python benchmarks/docs_tables.py             # rewrites the parts between the markers
    python benchmarks/docs_tables.py --check     # exit status 1 if they differ from the results

Nothing is measured here: `bake_images.py`, `probe_memory.py --out` and `probe_vs_peers.py --out` write results of their names.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
END = "<!-- end -->"
Results = Mapping[str, Any]
PEERS = {
    "emomerge": ("emomerge",),
    "hessian-eigenthings by differences": tuple(f"hessian-eigenthings, finite difference{how}" for how in ("", ", by hand")),
    "… unaided": ("hessian-eigenthings, finite difference, by residual",),
    "… by double backward": tuple(f"hessian-eigenthings, autograd{how}" for how in ("", ", by hand")),
    "curvlinops": ("curvlinops",),
    "PyHessian": ("PyHessian",),
}
"""Column of the table of `probe_vs_peers.py` → the ways that it takes the cheapest of."""


def start(name: str) -> str:
    """Return the line before a part."""
    return f"<!-- written by benchmarks/docs_tables.py: {name} -->"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns but the first are right-aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def images(found: Results) -> str:
    """Return the table of baking and merging a checkpoint of SDXL's size."""
    body = table(
        ["", "by the clock", "as a multiple of the copy", "CPU time", "private memory, peak"],
        [
            [name, f"{best['seconds']:.0f} s", f"{found['times a copy'][name]:.1f} ×", f"{best['cpu']:.0f} s",
             f"{best['memory']:.2f} GB"]
            for name, best in found["best"].items()
        ],
    )  # fmt: skip
    copies = [each["seconds"] for each in found["runs"]["copy"]]
    return (
        f"{body}\n\n{found['machine']}, {found['threads']} threads; the fastest of {len(copies)} measurements each. The copy "
        f"itself took {min(copies):.0f} to {max(copies):.0f} s. {found['parameters'] / 1e9:.2f} B parameters in "
        f"{found['tensors']:,} tensors."
    )


def perturbing(found: Results) -> str:
    """Return what `probe_memory.py` found."""
    grown = {row["way"]: f"{row['grown']:.1f} ×" for row in found["rows"]}
    return (
        f"This takes {grown['kept']} the model's memory more, against {grown['in place']} for weights that are moved in place. "
        "The tensors of\nmodels above 256 MiB are made anew for every module as it runs, which "
        f"takes {grown['redrawn']} (`benchmarks/probe_memory.py`)."
    )


def hessian(found: Results) -> str:
    """Return the table of `probe_vs_peers.py`, what it means, and the memory."""
    times: Results = found["times"]
    one, *_ = times.values()
    rows = [
        [f"{kind}: {job}", *marked([cell(results, ways, job) for ways in PEERS.values()])]
        for kind, results in ((kind.upper().replace("VIT", "ViT"), results) for kind, results in times.items())
        for job in ("λmax", "trace", "all")
    ]
    peers = ", ".join(f"{name} {number}" for name, number in one["peers"].items())
    return "\n\n".join(
        [
            "CPU seconds on two batches of 256 images (`benchmarks/probe_vs_peers.py`): λmax to "
            f"{100 * one['within']:g} %; the trace with the\nstandard error of {one['probes']} plain probes; “all” is both "
            "with λmin and density.",
            table(["", *PEERS], rows),
            f"{where(one)}, one thread, median of {one['rounds']} rounds; {peers}.",
            memory(found["memory"]),
        ]
    )


def cell(results: Results, ways: Sequence[str], job: str) -> float | str:
    """Return the CPU seconds of the cheapest way that finds λmax as well as asked, or by how much the best one misses it."""
    rows = [row for row in results["rows"] if row["name"] in ways and row["job"] == job]
    off = {row["name"]: abs((row["largest"] or results["largest"]) / results["largest"] - 1) for row in rows}
    hits: list[float] = [row["cpu"] for row in rows if off[row["name"]] <= results["within"]]
    if hits:
        return min(hits)
    return f"λmax misses by {100 * min(off.values()):.1f} %" if rows else ""


def marked(cells: Sequence[float | str]) -> list[str]:
    """Return the cells of a row as text, the least bold."""
    least = min(value for value in cells if not isinstance(value, str))
    texts = [value if isinstance(value, str) else f"{value:.2f}" if value < 10 else f"{value:.1f}" for value in cells]
    return [f"**{text}**" if value == least else text for value, text in zip(cells, texts, strict=True)]


def memory(found: Results) -> str:
    """Return the sentence about the peak of 30 Lanczos vectors with a trace, by either kind of product."""
    peaks = [{row["what"]: row["peak"] for row in results["rows"]} for results in found.values()]
    ours, exact = (max(of[how] / of["training step"] for of in peaks) for how in ("finite-difference", "autograd"))
    return (
        f"With 30 Lanczos vectors, the peak memory of emomerge's process is up to {ours:.1f} times that of a training\n"
        f'step (`--memory`), with `hvp="autograd"` up to {exact:.1f} times.'
    )


def where(results: Results) -> str:
    """Return where something was measured; a busy machine is named."""
    busy = ", busy with other work" if results["load"] > 1.5 else ""
    return f"{results['machine']}{busy}, torch {results['torch']}"


PARTS: dict[str, tuple[str, Callable[[Results], str]]] = {
    "bake_images": ("docs/sdxl.md", images),
    "probe_memory": ("docs/performance.md", perturbing),
    "probe_vs_peers": ("docs/performance.md", hessian),
}
"""Name of the marker and of the results → the page and what writes the part."""


def pages(results: Path = RESULTS) -> dict[Path, str]:
    """Return the content that each page should have."""
    found: dict[Path, str] = {}
    for name, (page, write) in PARTS.items():
        file = ROOT / page
        text = found.get(file) or file.read_text(encoding="utf-8")
        part = write(json.loads((results / f"{name}.json").read_text(encoding="utf-8")))
        found[file] = rewritten(text, name, part)
    return found


def rewritten(text: str, name: str, part: str) -> str:
    """Return a page with a generated part replaced."""
    pattern = re.escape(start(name)) + ".*?" + re.escape(END)
    found, count = re.subn(pattern, lambda _: f"{start(name)}\n\n{part}\n\n{END}", text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{count} parts between {start(name)} and {END}, not one")
    return found


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a page differs")
    args = parser.parse_args()
    stale = {file: text for file, text in pages().items() if file.read_text(encoding="utf-8") != text}
    if args.check and stale:
        raise SystemExit(f"stale: {', '.join(file.name for file in stale)}")
    for file, text in stale.items():
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
