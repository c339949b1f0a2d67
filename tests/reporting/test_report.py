import math
import re
import struct
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from markupsafe import escape
from rich.console import Console

from emomerge.errors import MissingExtra
from emomerge.reporting import Card, draw_figures, figures_table, model_card, write_report
from emomerge.reporting.figures import FIGURES
from emomerge.reporting.figures.forest import evidence
from emomerge.reporting.report import limits
from emomerge.reporting.table import filled_columns
from emomerge.results import ArtefactRow, Column, Estimate, Results

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


def test_the_page_is_whole_and_needs_no_network(full, tmp_path):
    page = render(full, tmp_path)
    text, links = parse(page)
    assert all(link.startswith(("#", "data:")) for link in links)
    anchors = {link[1:] for link in links if link.startswith("#")}
    assert anchors and anchors <= set(re.findall(r'<section id="([^"]+)"', page))
    markup = re.sub(r"<script>.*?</script>", "", page, flags=re.S)  # Vega's own code names addresses it does not load
    assert not re.search(r"@import|url\(", markup)
    assert set(re.findall(r"https?://[^\"' <)]+", markup)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert full.verdict.sentence in text
    assert full.selected.sentence in text
    for row in full.artefacts:
        assert row.name in text
    for warning in full.merges["ties"].warnings:
        assert warning in text
    for figure in draw_figures(full).values():
        assert figure.title in text
        assert escape(figure.alt) in page
    assert "name: movie-reviews" in page
    assert full.verdict.caveats[0] in text
    assert len(page) < 3_000_000


def test_every_figure_is_drawn_and_is_a_real_png(full, tmp_path):
    write_report(full, tmp_path / "report.html", png_dir=tmp_path / "png")
    files = sorted(file.stem for file in (tmp_path / "png").iterdir())
    assert files == sorted(FIGURES)
    for file in (tmp_path / "png").iterdir():
        data = file.read_bytes()
        assert data.startswith(b"\x89PNG\r\n")
        width, height = struct.unpack(">II", data[16:24])
        assert 400 < width < 4000
        assert 200 < height < 4000


def test_equal_results_give_equal_pages(results, tmp_path):
    assert render(results, tmp_path) == render(Results.from_json(results.to_json(), "a file"), tmp_path)


def test_hostile_names_stay_text(full, edit, tmp_path):
    evil = "</script><script>alert(1)</script><!-- <b>"
    layers = {evil: 2.0, "'] + alert(1) + ['": 1.0}
    for row in full.artefacts:
        full = edit.row(full, row.name, hessian=row.hessian.model_copy(update={"layers": layers}))
    full = edit.row(edit.row(full, "sens-0", name=evil), "tall-mask", name=evil)
    points = tuple(point.model_copy(update={"name": evil}) for point in full.plane.points)
    full = full.model_copy(
        update={
            "verdict": full.verdict.model_copy(update={"merge": evil, "sentence": evil}),
            "barriers": full.barriers.model_copy(update={"names": (evil, *full.barriers.names[1:])}),
            "plane": full.plane.model_copy(update={"points": points}),
            "surfaces": {evil: full.surfaces["tall-mask"]},
            "recipe_yaml": evil,
            "name": evil,
        }
    )
    page = render(full, tmp_path)
    text, _ = parse(page)
    assert "<script>alert" not in page
    assert evil in text
    assert len(re.findall(r"<script>", page)) == 2


@pytest.mark.parametrize(
    "part", ["curves", "traces", "cosines", "merges", "verdict", "selected", "probe", "data", "seconds", "recipe_yaml"]
)
def test_missing_parts_are_left_out(results, tmp_path, part):
    absent = Results.model_fields[part].get_default(call_default_factory=True)
    text, _ = parse(render(results.model_copy(update={part: absent}), tmp_path))
    whole, _ = parse(render(results, tmp_path))
    assert len(text) < len(whole)


def test_no_results_at_all_give_a_page(tmp_path):
    text, _ = parse(render(Results(name="nothing"), tmp_path))
    assert "Limitations" in text


def test_unknown_and_diverged_figures(results, edit, tmp_path):
    results = edit.row(edit.diverged(results, "sens-0", "sharpness_0.1", "test_loss"), "airy-0", estimates={})
    results = edit.evidence(results, "flatter", 0, estimate=None, low=None, high=None)
    text, _ = parse(render(results, tmp_path))
    assert "diverged" in text
    assert "not comparable" in text


def test_one_artefact_alone(results, tmp_path):
    text, _ = parse(render(results.model_copy(update={"artefacts": results.artefacts[:1]}), tmp_path))
    assert results.artefacts[0].name in text


def test_a_new_metric_is_shown_everywhere(results, edit, tmp_path):
    column = Column(key="roughness", title="roughness", meaning="an invented figure", better="higher")
    results = results.model_copy(update={"columns": (*results.columns, column)})
    for number, row in enumerate(results.artefacts[:-1]):
        results = edit.row(results, row.name, estimates={"roughness": Estimate(mean=1 + number / 8, stderr=0.25)})
    text, _ = parse(render(results, tmp_path))
    assert "roughness" in text and "an invented figure" in text and "1.12 ± 0.25" in text
    assert "roughness" in card(results=results) and "1.12 ± 0.25" in card(results=results)
    console = Console(width=500, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115 - a sink
    console.print(figures_table(results, 300))
    assert "roughness" in console.export_text()
    (filled,) = (c for c in filled_columns(results, "table") if c.column.key == "roughness")
    assert [results.artefacts[i].name for i in filled.best] == ["greedy-soup"]
    assert filled.cells[-1] == "–"


def test_artefacts_in_one_point_have_a_picture_too(results, edit):
    for row in results.artefacts:
        same = {key: Estimate(mean=1e-3, stderr=1e-19) for key in row.estimates if key.startswith("sharpness")}
        results = edit.row(results, row.name, estimates=same | {"test_loss": Estimate(mean=0.3)})
    assert draw_figures(results)["loss-sharpness"].png().startswith(b"\x89PNG")


def test_a_far_point_does_not_squeeze_the_rest_and_shows_its_numbers(results, edit):
    results = edit.row(results, "base", estimates={"test_loss": Estimate(mean=9.0)})
    figure = draw_figures(results)["loss-sharpness"]
    assert "drawn at its edge, with their figures: base." in figure.caption
    assert "base ↑ sharpness 0.0021, loss 9" in figure.svg()
    heights = [row["y"] for rows in figure.spec()["datasets"].values() for row in rows if "label" in row]
    assert max(heights) < 0.5


def test_every_point_is_labelled_on_a_desk_and_on_a_telephone(results):
    figure = draw_figures(results)["loss-sharpness"]
    for narrow in (False, True):
        shown = {
            row["name"]: row["shown"]
            for rows in figure.spec(narrow=narrow)["datasets"].values()
            for row in rows
            if "label" in row
        }
        assert shown == {row.name: True for row in results.artefacts}


def test_evidence_keeps_its_sign_and_its_scale(results, edit):
    better, flatter = evidence(results, "better"), evidence(results, "flatter")
    assert [row["outcome"] for row in better][:2] == ["good", "unclear"]
    assert better[0]["figures"] == "−0.0153 [−0.0240, −0.0068]"
    assert flatter[1]["estimate"] == pytest.approx(math.exp(-0.46))
    assert flatter[1]["figures"] == "×0.63 [0.57, 0.71]"
    results = edit.evidence(results, "better", 0, low=0.1, high=0.3, estimate=0.2)
    assert evidence(results, "better")[0]["outcome"] == "bad"


@pytest.mark.parametrize(
    ("status", "tone"),
    [("better and flatter", "good"), ("better", "good"), ("flatter", "good"), ("refuted", "bad"), ("not shown", "unclear")],
)
def test_the_verdict_wears_the_colour_of_its_status(results, tmp_path, status, tone):
    results = results.model_copy(update={"verdict": results.verdict.model_copy(update={"status": status})})
    assert f'class="verdict {tone}"' in render(results, tmp_path)


def test_the_best_is_marked_among_runs_and_merges_only(results):
    by_key = {filled.column.key: filled for filled in filled_columns(results, "table")}
    names = [row.name for row in results.artefacts]
    for key in ("test_loss", "test_accuracy", "sharpness_0.03"):
        assert [names[i] for i in by_key[key].best] == ["tall-mask"]
    assert not by_key["distance"].best


def test_few_seeds_and_few_rows_are_told(results):
    told = " ".join(limits(results))
    assert "Trained with 1 seed" in told
    assert "With 210 test rows" in told
    caveats = ("1 training seed: the intervals hold measurement error only",)
    results = results.model_copy(update={"verdict": results.verdict.model_copy(update={"caveats": caveats})})
    assert "Trained with" not in " ".join(limits(results))


def test_long_and_many_traces_stay_light(results):
    trace = results.traces["sens-0"]
    steps = {"step": tuple(range(2400)), "loss": trace.loss * 60, "rate": trace.rate * 60}
    results = results.model_copy(update={"traces": {f"sens-{seed}": trace.model_copy(update=steps) for seed in range(15)}})
    drawn = draw_figures(results)["training-loss"].spec()
    assert all(len(rows) <= 202 for rows in drawn["datasets"].values())
    assert sum(row.get("label") == "sens" for rows in drawn["datasets"].values() for row in rows) == 1


def test_the_terminal_table(results):
    console = Console(width=90, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115 - a sink
    console.print(figures_table(results))
    shown = console.export_text()
    for row in results.artefacts:
        assert row.name in shown
    assert "σ=0.03" in shown
    assert "0.3215" in shown


@pytest.mark.parametrize(("width", "last"), [(70, "σ=0.03"), (80, "distance"), (100, "width"), (300, "width")])
def test_the_terminal_table_keeps_within_the_width(full, width, last):
    console = Console(width=500, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115 - a sink
    console.print(figures_table(full, width))
    shown = console.export_text()
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= min(width, 100)
    assert "…" not in shown
    assert shown.splitlines()[3].split()[-2] == last


def card(**known):
    diagnostics = {"method": "tall-mask", "runs": ["sens-0"], "lambda_crit": 0.25, "warnings": ["too little is kept"]}
    runs = [{"name": "sens-0", "source": "runs/sens-0", "sha256": {"adapter_model.safetensors": "ab12"}}]
    shared = {
        "title": "reviews, tall-mask", "name": "tall-mask", "base": "some/base", "method": "tall-mask", "params": {"k": 2},
        "runs": runs, "diagnostics": diagnostics, "command": "emomerge run x.yaml", "recipe_yaml": "name: x\n",
        "version": "0.1.0",
    }  # fmt: skip
    return model_card(Card.model_validate(shared | known))


def test_the_model_card(results):
    text = card(results=results)
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == "some/base"
    assert "emomerge" in yaml.safe_load(front)["tags"]
    for word in ("tall-mask", "too little is kept", "ab12", "λ\\_crit", "emomerge run x.yaml"):
        assert word in body
    rows = [line for line in body.splitlines() if line.startswith("| ")]
    assert len({line.count("|") for line in rows}) == 1
    assert sum(line.startswith("| **tall-mask**") for line in rows) == 1
    assert not any("at |tall-mask|" in line for line in rows)


def test_the_model_card_is_the_recorded_one(results):
    diagnostics = {
        "method": "tall-mask", "runs": ["sens-0"], "lambda_crit": 0.25, "kept_density": 0.123456, "merged_norm": 1.5,
        "mask_density": {"sens-0": 0.5, "x": 0.25}, "warnings": ["too little is kept.", "b"],
    }  # fmt: skip
    runs = [
        {"name": "sens-0", "source": "runs/sens-0", "sha256": {"adapter_model.safetensors": "ab12", "b": "cd"}},
        {"name": "a|b", "sha256": "ff"},
        {"name": "c"},
    ]
    text = card(
        results=results, diagnostics=diagnostics, runs=runs, about="About *this*.", license="mit", library_name="x",
        params={"k": 2, "lambda": 0.43219, "weights": [0.5, 0.25], "x": None},
        files={"model.safetensors": "aa", "other": "bb"}, recipe_yaml="name: x\nb: 1\n",
    )  # fmt: skip
    assert text == (Path(__file__).parent / "model_card.md").read_text(encoding="utf-8")


def test_a_local_base_is_no_hub_id_and_missing_parts_are_left_out():
    text = model_card(Card(title="t", base="/somewhere/base", method="mean"))
    assert "base_model" not in text.split("---")[1]
    assert "## Runs" not in text
    assert "## Figures" not in text


def test_hostile_names_are_text_in_the_card_too():
    evil = "a|b `c` <script>\n# x"
    row = ArtefactRow(name=evil, role="merge", estimates={"test_loss": Estimate(mean=0.5)})
    column = Column(key="test_loss", title=evil, meaning="")
    text = model_card(
        Card(
            title=evil, name=evil, method=evil, recipe_yaml="```\n# no heading", license=evil,
            runs=[{"name": evil, "source": evil, "sha256": "ab"}],
            results=Results(name=evil, artefacts=(row,), columns=(column,)),
        )
    )  # fmt: skip
    front, body = text.split("---\n", 2)[1:]
    assert yaml.safe_load(front)["license"] == evil
    plain = re.sub(r"(`+).+?\1|\\.", "", body)
    assert "<script>" not in plain
    assert [line for line in plain.splitlines() if line.startswith("#")] == [
        line for line in plain.splitlines() if re.match(r"#+ [A-Za]", line)
    ]
    assert "    # no heading" in body


def test_an_adapter_is_peft_s_and_outputs_are_hashed():
    text = model_card(Card(method="mean", about="One run.", files={"adapter_model.safetensors": "ffee"}))
    assert "\nOne run.\n" in text
    assert yaml.safe_load(text.split("---\n")[1])["library_name"] == "peft"
    assert "`ffee`" in text


def test_cards_and_tables_need_no_drawing_packages():
    code = (
        "import sys; from emomerge.reporting import Card, figures_table, model_card; from emomerge.results import Results;"
        "model_card(Card(title='t')); figures_table(Results(name='x'));"
        "assert not {'jinja2', 'markupsafe', 'altair', 'vl_convert', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_report_without_its_extra_says_so(results, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "altair", None)
    with pytest.raises(MissingExtra, match=r"emomerge\[report\]"):
        write_report(results, tmp_path / "report.html")


def test_an_interval_open_to_one_side(results, edit, tmp_path):
    results = edit.evidence(results, "flatter", 0, estimate=-0.5, low=None, high=-0.2)
    results = edit.evidence(results, "flatter", 1, estimate=0.4, low=-0.1, high=None)
    text, _ = parse(render(results, tmp_path))
    assert "×0.61 [0, 0.82]" in text
    assert "×1.49 [0.90, ∞]" in text
