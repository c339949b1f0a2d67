"""report.html: one self-contained page that works without a network, and its figures as PNG."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from emomerge.checkpoints import atomic
from emomerge.reporting.figures import figures
from emomerge.reporting.table import artefacts, columns
from emomerge.reporting.text import duration, percent, short

STATUS_CLASS = {"better": "good", "flatter": "good", "better and flatter": "good", "refuted": "bad"}


@cache
def environment() -> Environment:
    """Templates, with everything escaped in HTML."""
    made = Environment(
        loader=PackageLoader("emomerge.reporting", "."),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"short": short, "percent": percent, "duration": duration}
    return made


def write_report(results: Mapping[str, Any], out: str | Path, *, png_dir: Path | None = None) -> Path:
    """Render the page of some results.

    Args:
        results: content of results.json; parts that are missing are left out of the page.
        out: the page.
        png_dir: where to put each figure as PNG too.

    Returns:
        `out`.
    """
    drawn = figures(results)
    charts = {name: figure.chart.to_dict() for name, figure in drawn.items()}
    verdict = results.get("verdict") or {}
    page = (
        environment()
        .get_template("report.html.j2")
        .render(
            results=results,
            verdict=verdict,
            status=STATUS_CLASS.get(str(verdict.get("status")), "open"),
            figures=drawn,
            charts=json.dumps(charts).replace("<", "\\u003c"),
            vega=_script_safe(_vega()) if charts else "",
            rows=artefacts(results),
            columns=columns(results),
            merges=results.get("merges") or {},
            probe=results.get("probe") or {},
            data=results.get("data") or {},
        )
    )
    atomic.write_text(out, page)
    if png_dir is not None:
        _write_pngs(charts, png_dir)
    return Path(out)


def _script_safe(text: str) -> str:
    """A script whose strings cannot end the element it stands in."""
    return re.sub(r"<(?=/script|!--)", r"\\x3C", text, flags=re.IGNORECASE)


@cache
def _vega() -> str:
    """vega, vega-lite and vega-embed as one script that sets `window.vegaEmbed`."""
    import vl_convert

    script: str = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub forgets the default
    return script


def _write_pngs(charts: Mapping[str, Any], folder: Path) -> None:
    import vl_convert

    with atomic.new_folder(folder, force=True) as temporary:
        for name, chart in charts.items():
            (temporary / f"{name}.png").write_bytes(vl_convert.vegalite_to_png(json.dumps(chart), scale=2))
