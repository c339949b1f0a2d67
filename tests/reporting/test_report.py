import json
import re
import struct
from html.parser import HTMLParser

import pytest
import yaml
from rich.console import Console

from emomerge.reporting import figures, figures_table, model_card, write_report

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Balanced(HTMLParser):
    """Checks that elements nest, and gathers text, attributes and ids."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)


def parse(page):
    parser = Balanced()
    parser.feed(page)
    assert not parser.open
    return " ".join(" ".join(parser.text).split()), parser.links


def render(results, tmp_path):
    return write_report(results, tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_page_is_whole_and_needs_no_network(results, tmp_path):
    page = render(results, tmp_path)
    text, links = parse(page)
    assert not links
    assert not re.search(r"@import|url\(\s*['\"]?http", page)
    assert results["verdict"]["sentence"] in text
    assert results["selected"]["sentence"] in text
    for artefact in results["artefacts"]:
        assert artefact["name"] in text
    for warning in results["merges"]["ties"]["warnings"]:
        assert warning in text
    for figure in figures(results).values():
        assert figure.title in text
        assert figure.alt in page
    assert "name: movie-reviews" in page
    assert "hessian was not measured" in text.lower()


def test_every_figure_is_drawn_and_is_a_real_png(results, tmp_path):
    write_report(results, tmp_path / "report.html", png_dir=tmp_path / "png")
    files = sorted(file.stem for file in (tmp_path / "png").iterdir())
    assert files == sorted(["tradeoff", "evidence", "curves", "traces", "cosines"])
    for file in (tmp_path / "png").iterdir():
        data = file.read_bytes()
        assert data.startswith(b"\x89PNG\r\n")
        width, height = struct.unpack(">II", data[16:24])
        assert 400 < width < 4000
        assert 200 < height < 4000


def test_equal_results_give_equal_pages(results, tmp_path):
    assert render(results, tmp_path) == render(json.loads(json.dumps(results)), tmp_path)


def test_hostile_names_stay_text(results, tmp_path):
    evil = "</script><script>alert(1)</script><!-- <b>"
    results["artefacts"][1]["name"] = evil
    results["verdict"]["sentence"] = evil
    results["recipe_yaml"] = evil
    results["name"] = evil
    page = render(results, tmp_path)
    text, _ = parse(page)
    assert "<script>alert" not in page
    assert evil in text
    assert len(re.findall(r"<script>", page)) == 3


@pytest.mark.parametrize(
    "part", ["curves", "traces", "cosines", "merges", "verdict", "selected", "probe", "data", "seconds", "recipe_yaml"]
)
def test_missing_parts_are_left_out(results, tmp_path, part):
    del results[part]
    parse(render(results, tmp_path))
    results[part] = None
    parse(render(results, tmp_path))


def test_unknown_and_diverged_figures(results, tmp_path):
    base, *others = results["artefacts"]
    base["test_loss"] = None
    others[0]["sharpness"]["0.1"] = {"mean": None, "stderr": None, "n": 16}
    others[1]["sharpness"] = {}
    results["verdict"]["flatter"]["evidence"][0].update(estimate=None, low=None, high=None)
    text, _ = parse(render(results, tmp_path))
    assert "diverged" in text


def test_one_artefact_alone(results, tmp_path):
    results["artefacts"] = results["artefacts"][:1]
    assert "tradeoff" not in figures(results)
    parse(render(results, tmp_path))


def test_artefacts_in_one_point_have_a_picture_too(results):
    for artefact in results["artefacts"]:
        artefact["test_loss"] = 0.3
        for entry in artefact["sharpness"].values():
            entry.update(mean=1e-3, stderr=1e-19)
    assert "tradeoff" in figures(results)


def test_a_distant_base_is_named_but_not_drawn(results):
    results["artefacts"][0]["test_loss"] = 9.0
    caption = figures(results)["tradeoff"].caption
    assert "Not shown: the base, at loss 9" in caption


def test_the_terminal_table(results):
    console = Console(width=90, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115 - a sink
    console.print(figures_table(results))
    shown = console.export_text()
    for artefact in results["artefacts"]:
        assert artefact["name"] in shown
    assert "σ=0.03" in shown
    assert "0.3215" in shown


def card(**context):
    return model_card(
        {
            "title": "reviews, tall-mask", "name": "tall-mask", "base": "some/base", "method": "tall-mask", "params": {"k": 2},
            "runs": [{"name": "sens-0", "source": "runs/sens-0", "sha256": {"adapter_model.safetensors": "ab12"}}],
            "diagnostics": {"lambda_crit": 0.25, "warnings": ["too little is kept"]}, "command": "emomerge run x.yaml",
            "recipe_yaml": "name: x\n", "version": "0.1.0",
        }
        | context
    )  # fmt: skip


def test_the_model_card(results):
    text = card(figures=results["artefacts"])
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == "some/base"
    assert "emomerge" in yaml.safe_load(front)["tags"]
    for word in ("tall-mask", "too little is kept", "ab12", "λ" if "λ" in body else "lambda_crit", "emomerge run x.yaml"):
        assert word in body
    rows = [line for line in body.splitlines() if line.startswith("| ")]
    assert len({line.count("|") for line in rows}) == 1
    assert sum(line.startswith("| **tall-mask**") for line in rows) == 1
    assert not any("at |tall-mask|" in line for line in rows)


def test_a_local_base_is_no_hub_id_and_missing_parts_are_left_out():
    text = model_card({"title": "t", "base": "/somewhere/base", "method": "mean"})
    assert "base_model" not in text.split("---")[1]
    assert "## Runs" not in text
    assert "## Figures" not in text
