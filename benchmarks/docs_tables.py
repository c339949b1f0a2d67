"""Write the measured tables of docs/sdxl.md from benchmarks/results/.

    python benchmarks/docs_tables.py             # rewrites the parts between the markers
    python benchmarks/docs_tables.py --check     # exit status 1 if they differ from the results

Nothing is measured here: bake_images.py writes `bake_images.json`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- written by benchmarks/docs_tables.py -->", "<!-- end -->"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns but the first are right-aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def images(results: Path = RESULTS) -> str:
    """Return the table of baking and merging a checkpoint of SDXL's size."""
    found = json.loads((results / "bake_images.json").read_text(encoding="utf-8"))
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


PARTS: dict[str, Callable[[], str]] = {"docs/sdxl.md": images}


def rewritten(text: str, part: str) -> str:
    """Return a page with its generated part replaced."""
    pattern = re.escape(START) + ".*?" + re.escape(END)
    found, count = re.subn(pattern, lambda _: f"{START}\n\n{part}\n\n{END}", text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{count} parts between {START} and {END}, not one")
    return found


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a page differs")
    args = parser.parse_args()
    stale = False
    for name, part in PARTS.items():
        file = ROOT / name
        text = file.read_text(encoding="utf-8")
        wanted = rewritten(text, part())
        stale |= wanted != text
        if not args.check:
            file.write_text(wanted, encoding="utf-8")
    raise SystemExit(bool(stale and args.check))


if __name__ == "__main__":
    main()
