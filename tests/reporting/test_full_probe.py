"""What the full probe adds to the report: every figure there, missing, and diverged."""

import json
import math
import re

import numpy as np
import pytest

from emomerge.controls import CONTROLS
from emomerge.reporting import draw_figures, write_report
from emomerge.reporting.figures import FIGURES
from emomerge.reporting.figures.curvature import MOST_LAYERS, _brief
from emomerge.reporting.figures.landscape import Map, levels
from emomerge.reporting.kinds import SYMBOLS, contestants, explained_controls, kind_of
from emomerge.reporting.labels import text_width
from emomerge.reporting.method import measures
from emomerge.reporting.palette import LIGHT, STEPS, mix
from emomerge.reporting.report import limits
from emomerge.reporting.table import filled_columns
from emomerge.results import Estimate, Matrix, Surface

NEW = {"spectral-density", "layer-traces", "barriers", "plane", "surfaces"}


def named(full, name):
    return next(row for row in full.artefacts if row.name == name)


def drawn_rows(figure, *fields):
    return [row for rows in figure.spec()["datasets"].values() for row in rows if all(field in row for field in fields)]


def page_of(full, tmp_path):
    return write_report(full, tmp_path / "report.html").read_text(encoding="utf-8")


def by_key(results, view):
    return {filled.column.key: filled for filled in filled_columns(results, view)}


def keys(results, view="table"):
    return [*by_key(results, view)]


def test_a_quick_probe_shows_nothing_of_it(results, tmp_path):
    page = page_of(results, tmp_path)
    assert not NEW & set(draw_figures(results))
    assert not keys(results, "details")
    assert not measures(results)
    assert keys(results)[:6] == [
        "test_loss", "test_accuracy", "sharpness_0.01", "sharpness_0.03", "sharpness_0.1", "distance"
    ]  # fmt: skip
    assert "says nothing about the worst direction" in page
    for word in ("<h2>The curvature", "Secondary measures", "Hessian describes", "illustration"):
        assert word not in page


def test_the_limits_follow_what_was_measured(full, edit):
    told = " ".join(limits(full))
    assert "worst direction" not in told
    for word in ("true one may be higher", "Hessian describes", "illustration"):
        assert word in told
    assert "says nothing about the worst direction" in " ".join(limits(edit.without(full, "worst", "slope")))


@pytest.mark.parametrize(
    ("prefixes", "key", "term"),
    [
        (("adaptive",), "adaptive_0.1", "Adaptive"),
        (("worst", "slope"), "worst_ℓ2_1", "Worst case"),
        (("basin",), "basin", "Basin"),
        (("lambda", "trace"), "trace", "Hessian"),
    ],
)
def test_each_measure_has_its_column_and_its_method_or_neither(full, edit, prefixes, key, term):
    assert key in keys(full)
    assert term in measures(full)
    full = edit.without(full, *prefixes)
    assert key not in keys(full)
    assert term not in measures(full)


def test_the_table_holds_one_radius_and_the_details_all(full):
    assert [k for k in keys(full) if k.startswith(("worst", "adaptive"))] == [
        "adaptive_0.1", "worst_ℓ2_1", "worst_ℓ∞_0.001", "worst_ℓ2 adaptive_1", "worst_ℓ∞ adaptive_0.001"
    ]  # fmt: skip
    found = keys(full, "details")
    assert sum(k.startswith("worst") for k in found) == sum(k.startswith("slope") for k in found) == 12
    assert {"adaptive_0.05", "adaptive_0.2"} <= set(found)
    assert found[-2:] == ["lambda_min", "lambda_span"]


def test_methods_state_the_counts_of_the_results(full, edit):
    told = measures(full)
    assert "in 32 directions" in told["Adaptive"]
    assert "each of 8 directions" in told["Basin"]
    assert "(32)" in told["Hessian"]
    assert told["Landscape"].endswith("the plane at 21 × 21 points; surfaces at 21 × 21 points")
    full = edit.row(full, "mean", estimates={"basin": Estimate(mean=0.1, n=4)})  # no longer the same for all
    assert "directions" not in measures(full)["Basin"]


def test_wide_basins_and_low_curvature_win(full):
    table, names = by_key(full, "table"), [row.name for row in full.artefacts]
    for key in ("lambda_max", "trace", "basin", "worst_ℓ2_1", "adaptive_0.1"):
        assert [names[i] for i in table[key].best] == ["tall-mask"]
    assert not any(filled.best for key, filled in by_key(full, "details").items() if key.startswith(("slope", "lambda")))


def test_what_a_measurement_found_stands_with_its_meaning(full, edit):
    finding = "3 of 8 widths lie outside 0.001 … 10"
    full = edit.row(full, "ties", estimates={"basin": Estimate(mean=0.1, finding=finding)})
    assert by_key(full, "table")["basin"].meaning.endswith(f"; ties: {finding}")


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf])
def test_diverged_figures_are_named_and_sort_last(full, edit, tmp_path, nothing):
    gone = ("lambda_max", "trace", "adaptive_0.1", "worst_ℓ2_1", "slope_ℓ2_1", "lambda_span")
    estimates = {key: Estimate(mean=nothing) for key in (*gone, "basin")}
    hessian, layers = named(full, "tall-mask").hessian, named(full, "airy-0").hessian.layers
    full = edit.row(full, "tall-mask", estimates=estimates, hessian=hessian.model_copy(update={"density": None}))
    layers = layers | {"encoder.layer.5.mlp.up": None}
    full = edit.row(full, "airy-0", hessian=hessian.model_copy(update={"layers": layers}))
    names, matrix = full.barriers.names, [list(row) for row in full.barriers.matrix]
    matrix[0][1] = matrix[1][0] = nothing
    plane = full.plane.model_copy(update={"loss": with_hole(full.plane, nothing)})
    surface = full.surfaces["airy-0"]
    surfaces = full.surfaces | {"airy-0": Surface(x=surface.x, y=surface.y, loss=with_hole(surface, nothing))}
    changes = {"barriers": Matrix(names=names, matrix=matrix), "plane": plane, "surfaces": surfaces}
    full = full.model_copy(update=changes)
    found, row = by_key(full, "table") | by_key(full, "details"), [a.name for a in full.artefacts].index("tall-mask")
    for key in gone:
        assert found[key].cells[row] == "diverged"
        assert found[key].values[row] == math.inf
        assert row not in found[key].best
    assert found["basin"].values[row] == -math.inf
    drawn = draw_figures(full)
    assert "Diverged and not drawn: tall-mask." in drawn["spectral-density"].caption
    assert "one diverged: 1 layers" in drawn["layer-traces"].caption
    assert "∞" in drawn["barriers"].svg()
    assert "infinite" in drawn["barriers"].alt
    for name in ("plane", "surfaces"):
        assert "Grey: the loss diverged." in drawn[name].caption
        assert ">diverged</text>" in drawn[name].svg()
    if nothing is None:
        page_of(full, tmp_path)


def with_hole(surface, nothing):
    rows = [list(row) for row in surface.loss]
    rows[3][3] = nothing
    return Surface(x=surface.x, y=surface.y, loss=rows).loss


@pytest.mark.parametrize(
    "change",
    [
        {"loss": ((None,) * 21,) * 21},
        {"loss": ((0.5,) * 21,) * 20},
        {"x": ()},
        {"y": (0.5,) * 21},
    ],
)
def test_a_plane_without_points_is_no_figure(full, change):
    full = full.model_copy(update={"plane": full.plane.model_copy(update=change)})
    assert "plane" not in draw_figures(full)


def test_one_artefact_alone_has_its_spectrum(full, tmp_path):
    full = full.model_copy(update={"artefacts": (named(full, "tall-mask"),), "verdict": None})
    drawn = draw_figures(full)
    assert "spectral-density" in drawn
    assert "layer-traces" not in drawn
    page_of(full, tmp_path)


def test_without_a_verdict_the_lowest_validation_loss_is_compared(full, edit):
    merge, single = contestants(full)
    assert (merge.name, single.name) == ("tall-mask", "airy-0")
    full = full.model_copy(update={"verdict": None})
    for name in ("ties", "void-0"):
        full = edit.row(full, name, estimates={"validation_loss": Estimate(mean=0.1)})
    full = edit.diverged(full, "mean", "validation_loss")
    merge, single = contestants(full)
    assert (merge.name, single.name) == ("ties", "void-0")


def test_spectra_are_those_of_the_contest(full):
    figure = FIGURES["spectral-density"].draw(full)
    text = figure.svg()
    for name in ("tall-mask", "airy-0", "airy-0 at |tall-mask|", "long-airy-0 at step 900"):
        assert f">{name}, λmax" in text
    assert "cats-0" not in text
    assert not any(row["y"] is not None and row["y"] < 1e-8 for row in drawn_rows(figure, "x", "y"))


def test_layers_are_the_largest_and_keep_the_model_s_order(full):
    figure = FIGURES["layer-traces"].draw(full)
    rows = [row for row in drawn_rows(figure, "layer", "name") if row["name"] == "tall-mask"]
    layers = named(full, "tall-mask").hessian.layers
    assert len(rows) == MOST_LAYERS < len(layers)
    assert [row["layer"] for row in rows] == [name for name in layers if name in {row["layer"] for row in rows}]
    single = named(full, "airy-0").hessian.layers
    largest = {name: max(layers[name], single[name]) for name in layers}
    left = [largest[name] for name in layers if name not in {row["layer"] for row in rows}]
    assert min(largest[row["layer"]] for row in rows) >= max(left)
    assert all((row["outcome"] == "good") == (row["merge"] < row["single"]) for row in rows)


def test_long_layer_names_stay_apart():
    layers = [f"model.tower.blocks.{i}.attention.self_attention.output_projection" for i in range(12)]
    shown = _brief(layers, 110)
    assert len(set(shown)) == 12
    assert all(name.startswith(f"{i}.") and name.endswith("projection") for i, name in enumerate(shown))
    assert max(map(text_width, shown)) <= 110
    assert _brief(["a.only.layer"], 110) == ["a.only.layer"]


def test_every_kind_of_control_has_its_mark_and_its_explanation(results, edit, tmp_path):
    kinds = {row.control for row in results.artefacts if row.role == "control"}
    assert kinds == set(explained_controls(results)) == set(CONTROLS)
    marks = [symbol.shape for kind, symbol in SYMBOLS.items() if kind != "control"]
    assert len(set(marks)) == len(marks)
    drawn = {row["name"]: row["kind"] for row in drawn_rows(FIGURES["loss-sharpness"].draw(results), "label")}
    assert drawn["adamw-average-0"] == "adamw-average"
    page = page_of(results, tmp_path)
    for kind in kinds:
        assert f"<dt>{kind}</dt><dd>" in page
    results = edit.row(results, "adamw-average-0", control="of some other kind")
    assert kind_of(named(results, "adamw-average-0")) == "control"
    assert "loss-sharpness" in draw_figures(results)


def test_a_map_puts_every_point_into_its_step():
    axis = np.linspace(-1, 1, 9)
    loss = axis[:, None] ** 2 + 2 * axis**2 + 0.3
    found = Map.of(Surface(x=axis.tolist(), y=axis.tolist(), loss=loss.tolist()))
    edges = levels([found])
    assert edges == sorted(set(edges))
    assert len(edges) == len(STEPS) - 1
    painted = {}
    for band in found.bands(edges, 400):  # later ones paint over earlier ones
        for x in np.arange(0.005, 1, 0.01):
            for y in (0.005, 0.255, 0.505, 0.995):
                if band["x"] <= x < band["x2"] and band["y"] <= y < band["y2"]:
                    painted[round(x, 3), y] = STEPS.index(band["step"])
    assert len(painted) == 400
    for (x, y), step in painted.items():
        loss = 2 * (2 * x - 1) ** 2 + (2 * y - 1) ** 2 + 0.3
        assert abs(step - np.searchsorted(edges, loss)) <= 1
    assert painted[0.505, 0.505] == 0
    assert painted[0.005, 0.005] == len(STEPS) - 1


def test_surfaces_share_their_levels(full):
    maps = [Map.of(surface) for surface in full.surfaces.values()]
    edges = levels(maps)
    first, second = ({row["step"] for row in m.bands(edges, 300)} for m in maps)
    assert STEPS[-1] in first  # the steeper one
    assert len(maps[0].bands(edges, 300)) != len(maps[1].bands(edges, 300))
    assert first | second == set(STEPS)


def test_a_flat_plane_has_one_step(full):
    full = full.model_copy(update={"plane": full.plane.model_copy(update={"loss": ((0.7,) * 21,) * 21})})
    figure = FIGURES["plane"].draw(full)
    assert {row["step"] for row in drawn_rows(figure, "step")} == {STEPS[0]}
    assert "≤ 0.7" in figure.svg()


def test_small_barriers_stay_pale(full):
    full = full.model_copy(update={"barriers": Matrix(names=("a", "b"), matrix=((0, 1e-5), (1e-5, 0)))})
    cells = drawn_rows(FIGURES["barriers"].draw(full), "strength")
    assert max(cell["strength"] for cell in cells) < 0.01
    full = full.model_copy(update={"barriers": Matrix(names=("a", "b"), matrix=((0, 2.0), (2.0, 0)))})
    cells = drawn_rows(FIGURES["barriers"].draw(full), "strength")
    assert max(cell["strength"] for cell in cells) == pytest.approx(0.85)


def test_the_evidence_may_be_curvature(results):
    assert "curvature" in FIGURES["flatter"].draw(results).svg()
    flatter = results.verdict.flatter
    gaussian = tuple(e for e in flatter.evidence if e.what not in ("λmax", "trace"))
    verdict = results.verdict.model_copy(update={"flatter": flatter.model_copy(update={"evidence": gaussian})})
    results = results.model_copy(update={"verdict": verdict})
    assert "curvature" not in FIGURES["flatter"].draw(results).svg()


def test_steps_of_colour_go_from_paper_to_full():
    assert mix("#000000", "#ff8000", 0.5) == "#804000"
    darkness = [sum(int(LIGHT[step][i : i + 2], 16) for i in (1, 3, 5)) for step in STEPS]
    assert darkness == sorted(darkness, reverse=True)


def test_layouts_share_their_data(full, tmp_path):
    page = page_of(full, tmp_path)
    specs = json.loads(re.search(r'<figure id="plane">.*?<script type="application/json">(.*?)</script>', page, re.S)[1])
    assert not {"datasets"} & {key for layout in ("wide", "narrow") for key in specs[layout]}

    def names(part):
        if isinstance(part, dict):
            own = {part["data"]["name"]} if "name" in part.get("data", {}) else set()
            return own.union(*map(names, part.values()))
        return set().union(*map(names, part)) if isinstance(part, list) else set()

    assert names(specs["wide"]) | names(specs["narrow"]) == set(specs["datasets"])


@pytest.mark.parametrize(("name", "absent"), [("barriers", None), ("plane", None), ("surfaces", {})])
def test_a_landscape_that_was_not_measured_is_no_figure(full, name, absent):
    assert FIGURES[name].draw(full.model_copy(update={name: absent})) is None
