"""The page in headless Chromium: no errors, no requests, accessible by axe-core's rules, and readable on any screen."""

from __future__ import annotations

import base64
import csv
import html
import importlib.util
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from losses import with_losses

from emomerge.reporting import write_report
from emomerge.reporting.comparison import compare, write_comparison

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
PROBE = """
<script>
window.found = {errors: [], overflow: [], small: []};
addEventListener("error", event => found.errors.push(String(event.message)));
const log = console.error; console.error = (...what) => { found.errors.push(what.join(" ")); log(...what); };
</script>
"""
REPORT = """
<script>
const all = [...document.querySelectorAll("body *")], size = element => parseFloat(getComputedStyle(element).fontSize);
const named = element => element.tagName + " " + element.getAttribute("class") + " " + size(element);
addEventListener("load", () => setTimeout(async () => {
  found.overflow = all.filter(element => !element.closest(".scroll, .chart, pre, script, style"))
    .filter(element => element.getBoundingClientRect().right > innerWidth + 1).map(named);
  const visible = all.filter(element => element.getClientRects().length && element.textContent.trim());
  found.small = [...new Set(visible.filter(element => size(element) < 12).map(named))];
  found.table = document.querySelector(".figures table").scrollWidth;
  found.requests = performance.getEntriesByType("resource").map(entry => entry.name).filter(name => !name.startsWith("data:"));
  const serious = violation => ["serious", "critical"].includes(violation.impact);
  if (window.axe) found.axe = (await axe.run()).violations.filter(serious)
    .map(violation => violation.id + ": " + violation.nodes.slice(0, 3).map(node => node.html.slice(0, 120)).join(" | "));
  const done = document.createElement("pre");
  done.id = "found";
  done.textContent = JSON.stringify(found);
  document.body.append(done);
}, 500));
</script>
"""


def axe() -> str:
    """The script of axe-core, which a package of its Python bindings contains."""
    found = importlib.util.find_spec("axe_core_python")
    if found is None:
        return ""
    text = (Path(found.origin).parent / "axe.min.js").read_text(encoding="utf-8")
    return "<script>" + text.replace("</script", "<\\/script") + "</script>"


def look(page: Path, width: int, folder: Path, *flags: str) -> dict:
    """What a browser of this width finds on a page."""
    text = page.read_text(encoding="utf-8").replace("<head>", f"<head>{PROBE}", 1)
    probed = folder / f"probed-{width}.html"
    before, _, after = text.rpartition("</body>")
    probed.write_text(f"{before}{axe()}{REPORT}</body>{after}", encoding="utf-8")
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000",
        f"--window-size={width},900", f"--user-data-dir={folder / 'profile'}", *flags, "--dump-dom", f"file://{probed}",
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True).stdout
    return json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', shown, re.DOTALL)[1]))


@pytest.fixture(scope="module", params=["report", "comparison"])
def page(request, full, tmp_path_factory):
    """The page of one experiment, and one that compares three, one of them on other rows."""
    out = tmp_path_factory.mktemp("page") / f"{request.param}.html"
    if request.param == "report":
        return write_report(full, out)
    shifts = {"out/first": (0.0, "r"), "out/second": (0.2, "r"), "out/third": (0.001, "r"), "out/elsewhere": (0.0, "s")}
    return write_comparison(
        compare({name: with_losses(full, shift, rows=r, labels=r) for name, (shift, r) in shifts.items()}), out
    )


@needs_chromium
@pytest.mark.parametrize(("width", "flags"), [(1280, ()), (500, ()), (1280, ("--blink-settings=preferredColorScheme=0",))])
def test_the_page_in_a_browser(page, tmp_path, width, flags):
    found = look(page, width, tmp_path, *flags)
    assert not found["errors"]
    assert not found["requests"]
    assert not found["overflow"]
    assert not found["small"], "no text is smaller than 12 px"
    assert not found.get("axe"), "axe-core's serious and critical rules"
    if width == 1280:
        assert found["table"] <= 1280, "the main table fits before all columns are asked for"


def test_downloads_equal_the_results(full, tmp_path):
    page = write_report(full, tmp_path / "report.html")
    links = dict(
        re.findall(r'download="[^"]*\.(csv|json)" href="data:[a-z/]+;base64,([^"]+)"', page.read_text(encoding="utf-8"))
    )
    decoded = {kind: base64.b64decode(text).decode() for kind, text in links.items()}
    assert json.loads(decoded["json"]) == full.model_dump(mode="json")
    rows = {row["artefact"]: row for row in csv.DictReader(io.StringIO(decoded["csv"]))}
    assert list(rows) and len(rows) == len(full.artefacts)
    for artefact in full.artefacts:
        for column in full.columns:
            entry = artefact.estimates.get(column.key)
            if column.key in rows[artefact.name] and entry is not None and entry.mean is not None:
                assert float(rows[artefact.name][column.key]) == entry.mean
                if entry.stderr is not None:
                    assert float(rows[artefact.name][f"{column.key}_stderr"]) == entry.stderr
