"""report.html: one self-contained page that works without a network, and its figures as PNG."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emomerge.reporting.figure import Figure, Results
from emomerge.reporting.figures import figures
from emomerge.reporting.forest import evidence
from emomerge.reporting.kinds import explained
from emomerge.reporting.method import cautions, measures
from emomerge.reporting.palette import DARK, LIGHT, colour_of
from emomerge.reporting.table import artefacts, columns, details, worst_case_radii
from emomerge.reporting.text import duration, finite, fixed, percent, short, unit

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup


@cache
def environment() -> Environment:
    """Templates, with everything escaped in HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    made = Environment(
        loader=PackageLoader("emomerge.reporting", "."),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"short": short, "percent": percent, "duration": duration}
    return made


def write_report(results: Results, out: str | Path, *, png_dir: Path | None = None) -> Path:
    """Render the page of some results.

    Args:
        results: content of results.json; parts that are missing are left out of the page.
        out: the page.
        png_dir: where to put each figure as PNG too; a folder that is there is replaced.

    Returns:
        `out`.
    """
    from emomerge.checkpoints import atomic  # late: it brings torch, which drawing does not need

    drawn = figures(results)
    verdict = results.get("verdict") or {}
    page = (
        environment()
        .get_template("report.html.j2")
        .render(
            results={key: value for key, value in results.items() if value is not None},
            verdict=verdict,
            tone=_tone(verdict.get("status")),
            tones={claim: _tone((verdict.get(claim) or {}).get("status")) for claim in ("better", "flatter")},
            evidence={claim: evidence(results, claim) for claim in ("better", "flatter")},
            figures=drawn,
            stills={name: _still(figure) for name, figure in drawn.items()},
            specs={name: _specs(figure) for name, figure in drawn.items()},
            vega=_script_safe(_vega()) if drawn else "",
            rows=[{**artefact, "colour": colour_of(artefact)} for artefact in artefacts(results)],
            tables={"columns": columns(results), "details": details(results)},
            controls=explained(results),
            measures=measures(results),
            merges=_merges(results),
            limits=limits(results),
            unit=unit(results),
            light=LIGHT,
            dark=DARK,
        )
    )
    atomic.write_text(out, page)
    if png_dir is not None:
        with atomic.new_folder(png_dir, force=True) as folder:
            for name, figure in drawn.items():
                (folder / f"{name}.png").write_bytes(figure.png())
    return Path(out)


def limits(results: Results) -> list[str]:
    """What the figures cannot say, beyond the caveats that stand beside the verdict."""
    found = []
    data, probe = results.get("data") or {}, results.get("probe") or {}
    caveats = " ".join((results.get("verdict") or {}).get("caveats") or [])
    seeds = {a.get("seed") for a in artefacts(results) if a.get("role") == "run"} - {None}
    if 0 < len(seeds) < 3 and "training seed" not in caveats:
        found.append(
            f"Trained with {len(seeds)} seed{'s' if len(seeds) > 1 else ''}: the intervals hold measurement error only, not "
            "the spread between trainings."
        )
    rows = (data.get("rows") or {}).get("test")
    best = max((a for a in (finite(row.get("test_accuracy")) for row in artefacts(results)) if a is not None), default=None)
    if rows and best is not None and data.get("classes"):  # tokens of a row are no independent labels
        margin = fixed(196 * math.sqrt(max(best * (1 - best), 0) / rows), 1)
        found.append(f"With {short(rows)} test rows, an accuracy of {percent(best)} is known to ± {margin} percentage points.")
    if any(a.get("sharpness") for a in artefacts(results)):
        found.append(
            f"Sharpness is the average over random directions on {short(probe.get('rows'))} rows of the "
            f"{probe.get('data', 'probed')} data"
            + ("." if worst_case_radii(results) else "; it says nothing of the worst direction.")
        )
    if any(a.get("sharpness") and a.get("entropy") is not None for a in artefacts(results)):
        found.append("The curvature of cross-entropy falls as predictions grow confident: compare the entropy of all figures.")
    found += cautions(results)
    found.append("One base and one data set: whether the finding carries over to others takes their own experiments.")
    return found


def _tone(status: object) -> str:
    """The colour of a status: good, bad or unclear."""
    words = str(status)
    return "bad" if "refuted" in words else "good" if words in ("better", "flatter", "better and flatter") else "unclear"


def _merges(results: Results) -> list[dict[str, Any]]:
    """The diagnostics of every merge, in print."""
    return [
        {
            "label": label,
            "parameters": "; ".join(
                f"{key} {_value(value)}"
                for key, value in {**(facts.get("params") or {}), **(facts.get("chosen") or {})}.items()
                if value is not None
            ),
            "lambda_crit": short(facts.get("lambda_crit")),
            "masks": _span([v for v in map(finite, (facts.get("mask_density") or {}).values()) if v is not None]),
            "kept_density": percent(facts.get("kept_density")),
            "kept_energy": percent(facts.get("kept_energy")),
            "cosine": fixed(facts.get("cosine_to_mean"), 3),
            "norm": short(facts.get("merged_norm", facts.get("norm"))),
            "warnings": [str(w).rstrip(".") for w in facts.get("warnings") or []],
        }
        for label, facts in (results.get("merges") or {}).items()
    ]


def _value(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_value, value))
    return short(value) if finite(value) is not None else str(value)


def _span(values: list[float]) -> str:
    if not values:
        return "–"
    low, high = percent(min(values), 0), percent(max(values), 0)
    return low if low == high else f"{low.removesuffix(' %')}–{high}"


def _still(figure: Figure) -> Markup:
    """The picture that stands in the page until a script replaces it; Vega escapes its texts."""
    from markupsafe import Markup

    return Markup(figure.svg())


def _specs(figure: Figure) -> Mapping[str, Any]:
    """The layouts of a figure, and the data of all of them: they are named by their content and mostly the same."""
    layouts = {"wide": figure.spec()} | ({"narrow": figure.spec(narrow=True)} if figure.narrow is not None else {})
    datasets: dict[str, Any] = {}
    for spec in layouts.values():
        datasets |= spec.pop("datasets", {})
    return {**layouts, "datasets": datasets}


def _script_safe(text: str) -> Markup:
    """A script whose strings cannot end the element it stands in."""
    from markupsafe import Markup

    return Markup(re.sub(r"<(?=/script|!--)", r"\\x3C", text, flags=re.IGNORECASE))


@cache
def _vega() -> str:
    """vega, vega-lite and vega-embed as one script that sets `window.vegaEmbed`."""
    import vl_convert

    script: str = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub forgets the default
    return script
