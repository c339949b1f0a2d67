"""report.html: one self-contained page that works without a network, and its figures as PNG files."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue

from emomerge.extras import needed_by
from emomerge.reporting.advice import next_steps
from emomerge.reporting.figure import Figure
from emomerge.reporting.figures import draw_figures, sections
from emomerge.reporting.figures.forest import evidence
from emomerge.reporting.kinds import explained_controls
from emomerge.reporting.method import cautions, measures, worst_case_radii
from emomerge.reporting.palette import DARK, LIGHT, colour_of
from emomerge.reporting.table import artefacts, as_csv, filled_columns
from emomerge.reporting.text import duration, fixed, percent, short, unit
from emomerge.results import TRUNK, Results

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup


@cache
def environment() -> Environment:
    """Return the template environment, which escapes everything for HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    made = Environment(
        loader=PackageLoader("emomerge.reporting", "."),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "anchor": lambda title: title.lower().replace(" ", "-"),
        "short": short,
        "percent": percent,
        "duration": duration,
    }
    return made


def write_report(results: Results, out: str | Path, *, png_dir: Path | None = None) -> Path:
    """Write the page of an experiment.

    Args:
        results: the results; the page leaves out parts that were not measured.
        out: path of the page.
        png_dir: folder for the figures as PNG files; an existing one is replaced.

    Returns:
        `out`.

    Raises:
        MissingExtra: the extra `report` is not installed.
    """
    from emomerge.checkpoints import atomic  # imported here because it imports torch, which cards and tables do not need

    with needed_by("the report"):
        drawn = draw_figures(results)
        atomic.write_text(out, _page(results, drawn))
        if png_dir is not None:
            with atomic.new_folder(png_dir, force=True) as folder:
                for name, figure in drawn.items():
                    (folder / f"{name}.png").write_bytes(figure.png())
    return Path(out)


def _page(results: Results, drawn: Mapping[str, Figure]) -> str:
    verdict = results.verdict
    claims = {"better": verdict.better, "flatter": verdict.flatter} if verdict else {}
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            results=results,
            tone=_tone(verdict.status) if verdict else "",
            claims={name: (claim, _tone(claim.status)) for name, claim in claims.items()},
            evidence={"better": evidence(results, "better"), "flatter": evidence(results, "flatter")},
            sections=sections(drawn.keys()),
            **drawn_parts(drawn),
            rows=[(row, colour_of(row)) for row in artefacts(results)],
            tables={"columns": filled_columns(results, "table"), "details": filled_columns(results, "details")},
            controls=explained_controls(results),
            measures=measures(results),
            merges=_merges(results),
            limits=limits(results),
            steps=next_steps(results),
            contents=contents(results, drawn),
            downloads={
                "csv": as_link("text/csv", as_csv(results)),
                "json": as_link("application/json", results.model_dump_json()),
            },
            unit=unit(results),
            light=LIGHT,
            dark=DARK,
        )
    )


def drawn_parts(drawn: Mapping[str, Figure]) -> dict[str, Any]:
    """Return what a template needs to show figures: `figures`, `stills`, `specs` and the library that draws them, `vega`."""
    return {
        "figures": drawn,
        "stills": {name: _still(figure) for name, figure in drawn.items()},
        "specs": {name: _specs(figure) for name, figure in drawn.items()},
        "vega": _script_safe(_vega()) if drawn else "",
    }


def contents(results: Results, drawn: Mapping[str, Figure]) -> list[str]:
    """Return the titles of the sections that the page has, in its order."""
    figures = [(section.before_table, section.title) for section in sections(drawn.keys()) if section.title]
    parts = {
        "All figures": bool(results.artefacts),
        "Samples": results.samples is not None,
        **{title: True for before, title in figures if not before},
        "The merges": bool(results.merges),
        "How it was measured": True,
        "Limitations": True,
    }
    return [title for before, title in figures if before] + [title for title, there in parts.items() if there]


def limits(results: Results) -> list[str]:
    """Return the limits of the figures, in addition to the verdict's caveats."""
    rows, data, probe = results.artefacts, results.data, results.probe
    found = []
    seeds = {row.seed for row in rows if row.role == "run"} - {None}
    caveats = " ".join(results.verdict.caveats) if results.verdict else ""
    if 0 < len(seeds) < 3 and "training seed" not in caveats:
        found.append(
            f"Trained with {len(seeds)} seed{'s' if len(seeds) > 1 else ''}: the intervals cover measurement error only, not "
            "the variation between training runs."
        )
    best = max((accuracy for row in rows if (accuracy := row.accuracy("test")) is not None), default=None)
    if data and best is not None and data.classes:  # the tokens of a row are not independent labels
        margin = fixed(196 * math.sqrt(max(best * (1 - best), 0) / data.rows.test), 1)
        known = f"an accuracy of {percent(best)} is known to ± {margin} percentage points"
        found.append(f"With {short(data.rows.test)} test rows, {known}.")
    shaken = {row.name for row in rows if any(key.startswith("sharpness_") for key in row.estimates)}
    if probe and shaken:
        found.append(
            f"Sharpness is the average over random directions on {short(probe.rows)} rows of the {probe.data} data"
            + ("." if worst_case_radii(results) else "; it says nothing about the worst direction.")
        )
    if any(row.name in shaken and row.mean("entropy") is not None for row in rows):
        found.append("The curvature of cross-entropy falls as predictions become confident: compare the entropies as well.")
    found += cautions(results)
    found.append("One base and one data set: whether the findings carry over to others needs further experiments.")
    return found


def _tone(status: str) -> str:
    """Return the tone of a status: good, bad or unclear."""
    return "bad" if status == "refuted" else "unclear" if status == "not shown" else "good"


def _merges(results: Results) -> list[dict[str, Any]]:
    """Return the formatted diagnostics of every merge."""
    return [
        {
            "label": label,
            "parameters": "; ".join(
                [f"of {len(facts.runs) - (TRUNK in facts.runs)} rounds"] * (facts.of == "rounds")
                + [f"{key} {_value(v)}" for key, v in facts.params.items() if v is not None]
            ),
            "lambda_crit": short(facts.lambda_crit),
            "masks": _span([density for density in facts.mask_density.values() if density is not None]),
            "kept_density": percent(facts.kept_density),
            "kept_energy": percent(facts.kept_energy),
            "cosine": fixed(facts.cosine_to_mean, 3),
            "norm": short(facts.merged_norm),
            "warnings": [warning.rstrip(".") for warning in facts.warnings],
        }
        for label, facts in results.merges.items()
    ]


def _value(value: JsonValue) -> str:
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return short(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def _span(values: Sequence[float]) -> str:
    if not values:
        return "–"
    low, high = percent(min(values), 0), percent(max(values), 0)
    return low if low == high else f"{low.removesuffix(' %')}–{high}"


def _still(figure: Figure) -> Markup:
    """Return the static image that the page shows until a script replaces it; Vega escapes its texts."""
    from markupsafe import Markup

    return Markup(figure.svg())


def _specs(figure: Figure) -> Mapping[str, Any]:
    """Return the layouts of a figure and their data, which are named by content and mostly shared."""
    layouts = {"wide": figure.spec()} | ({"narrow": figure.spec(narrow=True)} if figure.narrow is not None else {})
    datasets: dict[str, Any] = {}
    for spec in layouts.values():
        datasets |= spec.pop("datasets", {})
    return {**layouts, "datasets": datasets}


def as_link(kind: str, text: str) -> str:
    """Return an address that holds a file itself."""
    return f"data:{kind};base64,{base64.b64encode(text.encode()).decode()}"


def _script_safe(text: str) -> Markup:
    """Escape a script so that its strings cannot close the enclosing element."""
    from markupsafe import Markup

    return Markup(re.sub(r"<(?=/script|!--)", r"\\x3C", text, flags=re.IGNORECASE))


@cache
def _vega() -> str:
    """Return vega, vega-lite and vega-embed as one script that sets `window.vegaEmbed`.

    Bundling them takes more than a second, so the script is kept on disk, after its SHA-256.
    """
    import vl_convert

    from emomerge.native import cache_folder, is_private  # imported here because it imports torch

    folder = cache_folder()
    kept = folder / f"vega-{version('vl-convert-python')}.js" if folder else None
    if kept is not None and is_private(kept):
        known, _, script = kept.read_text(encoding="utf-8", errors="replace").partition("\n")
        if hashlib.sha256(script.encode()).hexdigest() == known:
            return script
    made: str = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub lacks the default
    if kept is not None:
        text = f"{hashlib.sha256(made.encode()).hexdigest()}\n{made}"
        with contextlib.suppress(OSError), tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
            new = Path(scratch) / kept.name
            new.write_text(text, encoding="utf-8")
            new.chmod(0o600)
            new.replace(kept)
    return made
