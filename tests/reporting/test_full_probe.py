"""What the full probe adds to the report: every figure there, missing, and diverged."""

import json
import math
import re

import numpy as np
import pytest

from emomerge.reporting import figures, write_report
from emomerge.reporting.curvature import MOST_LAYERS, _brief
from emomerge.reporting.figures import FIGURES
from emomerge.reporting.kinds import KINDS, contestants, explained, kind_of
from emomerge.reporting.labels import text_width
from emomerge.reporting.landscape import Map, levels
from emomerge.reporting.method import measures
from emomerge.reporting.palette import LIGHT, STEPS, mix
from emomerge.reporting.report import limits
from emomerge.reporting.table import columns, details

NEW = {"spectral-density", "layer-traces", "barriers", "plane", "surfaces"}


def named(full, name):
    return next(a for a in full["artefacts"] if a["name"] == name)


def drawn_rows(figure, *fields):
    return [row for rows in figure.spec()["datasets"].values() for row in rows if all(field in row for field in fields)]


def page_of(full, tmp_path):
    return write_report(full, tmp_path / "report.html").read_text(encoding="utf-8")


def keys(found):
    return [column.key for column in found]


def test_a_quick_probe_shows_nothing_of_it(results, tmp_path):
    page = page_of(results, tmp_path)
    assert not NEW & set(figures(results))
    assert not details(results)
    assert not measures(results)
    assert keys(columns(results))[:6] == [
        "test_loss", "test_accuracy", "sharpness_0.01", "sharpness_0.03", "sharpness_0.1", "distance"
    ]  # fmt: skip
    assert "says nothing of the worst direction" in page
    for word in ("<h2>The curvature", "Secondary measures", "Hessian describes", "illustration"):
        assert word not in page


def test_the_limits_follow_what_was_measured(full):
    told = " ".join(limits(full))
    assert "worst direction" not in told
    for word in ("true one may be higher", "Hessian describes", "illustration"):
        assert word in told
    for artefact in full["artefacts"]:
        artefact["worst_case"] = {}
    assert "says nothing of the worst direction" in " ".join(limits(full))


@pytest.mark.parametrize(
    ("part", "key", "term"),
    [
        ("adaptive", "adaptive_0.1", "Adaptive"),
        ("worst_case", "worst_ℓ2_1", "Worst case"),
        ("basin", "basin", "Basin"),
        ("hessian", "trace", "Hessian"),
    ],
)
def test_each_measure_has_its_column_and_its_method_or_neither(full, part, key, term):
    assert key in keys(columns(full))
    assert term in measures(full)
    for artefact in full["artefacts"]:
        artefact[part] = None
    assert key not in keys(columns(full))
    assert term not in measures(full)


def test_the_table_holds_one_radius_and_the_details_all(full):
    assert [k for k in keys(columns(full)) if k.startswith(("worst", "adaptive"))] == [
        "adaptive_0.1", "worst_ℓ2_1", "worst_ℓ∞_0.001", "worst_ℓ2 adaptive_1", "worst_ℓ∞ adaptive_0.001"
    ]  # fmt: skip
    full = keys(details(full))
    assert sum(k.startswith("worst") for k in full) == sum(k.startswith("slope") for k in full) == 12
    assert {"adaptive_0.05", "adaptive_0.2", "lambda_min", "lambda_span"} <= set(full)


def test_methods_state_the_counts_of_the_results(full):
    told = measures(full)
    assert "in 32 directions" in told["Adaptive"]
    assert "each of 8 directions" in told["Basin"]
    assert "(32)" in told["Hessian"]
    assert told["Landscape"].endswith("the plane at 21 × 21 points; surfaces at 21 × 21 points")
    named(full, "mean")["basin"]["n"] = 4  # no longer the same for all
    assert "directions" not in measures(full)["Basin"]


def test_wide_basins_and_low_curvature_win(full):
    by_key = {column.key: column for column in columns(full)}
    names = [a["name"] for a in full["artefacts"]]
    for key in ("lambda_max", "trace", "basin", "worst_ℓ2_1", "adaptive_0.1"):
        assert [names[i] for i in by_key[key].best] == ["tall-mask"]
    assert not any(column.best for column in details(full) if column.key.startswith(("slope", "lambda")))


def test_what_a_measurement_found_stands_with_its_meaning(full):
    named(full, "ties")["basin"]["finding"] = "3 of 8 widths lie outside 0.001 … 10"
    (basin,) = (column for column in columns(full) if column.key == "basin")
    assert basin.meaning.endswith("; ties: 3 of 8 widths lie outside 0.001 … 10")


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf])
def test_diverged_figures_are_named_and_sort_last(full, tmp_path, nothing):
    merge, single = named(full, "tall-mask"), named(full, "airy-0")
    row = next(i for i, a in enumerate(full["artefacts"]) if a is merge)
    merge["basin"]["mean"] = merge["adaptive"]["0.1"]["mean"] = nothing
    merge["worst_case"]["ℓ2"]["1"].update(mean=nothing, gradient=nothing)
    merge["hessian"].update(lambda_max=nothing, trace={"mean": nothing}, subspace={"eigenvalues": [nothing]})
    merge["hessian"]["density"] = nothing and {"at": [nothing] * 9, "density": [nothing] * 9}
    single["hessian"]["layers"]["encoder.layer.5.mlp.up"] = nothing
    full["plane"]["loss"][0][0] = full["surfaces"]["airy-0"]["loss"][3][3] = nothing
    full["barriers"]["matrix"][0][1] = full["barriers"]["matrix"][1][0] = nothing
    found = {column.key: column for column in (*columns(full), *details(full))}
    for key in ("lambda_max", "trace", "adaptive_0.1", "worst_ℓ2_1", "slope_ℓ2_1", "lambda_span"):
        assert found[key].cells[row] == "diverged"
        assert found[key].values[row] == math.inf
        assert row not in found[key].best
    assert found["basin"].values[row] == -math.inf
    drawn = figures(full)
    assert "Diverged and not drawn: tall-mask." in drawn["spectral-density"].caption
    assert "one diverged: 1 layers" in drawn["layer-traces"].caption
    assert "∞" in drawn["barriers"].svg()
    assert "infinite" in drawn["barriers"].alt
    for name in ("plane", "surfaces"):
        assert "Grey: the loss diverged." in drawn[name].caption
        assert ">diverged</text>" in drawn[name].svg()
    if nothing is None:  # as written by the pipeline
        page_of(full, tmp_path)


@pytest.mark.parametrize("change", [
    lambda r: r["plane"].update(loss=[[None] * 21] * 21),
    lambda r: r["plane"].update(loss=r["plane"]["loss"][:-1]),
    lambda r: r["plane"].update(x=[]),
    lambda r: r["plane"].update(y=[0.5] * 21),
])  # fmt: skip
def test_a_plane_without_points_is_no_figure(full, change):
    change(full)
    assert "plane" not in figures(full)


def test_one_artefact_alone_has_its_spectrum(full, tmp_path):
    full["artefacts"] = [named(full, "tall-mask")]
    full["verdict"] = None
    drawn = figures(full)
    assert "spectral-density" in drawn
    assert "layer-traces" not in drawn
    page_of(full, tmp_path)


def test_without_a_verdict_the_lowest_validation_loss_is_compared(full):
    merge, single = contestants(full)
    assert (merge["name"], single["name"]) == ("tall-mask", "airy-0")
    full["verdict"] = None
    named(full, "ties")["validation_loss"] = 0.1
    named(full, "void-0")["validation_loss"] = 0.1
    named(full, "mean")["validation_loss"] = math.nan
    merge, single = contestants(full)
    assert (merge["name"], single["name"]) == ("ties", "void-0")


def test_spectra_are_those_of_the_contest(full):
    figure = FIGURES["spectral-density"](full)
    text = figure.svg()
    for name in ("tall-mask", "airy-0", "airy-0 at |tall-mask|", "long-airy-0 at step 900"):
        assert f">{name}, λmax" in text
    assert "cats-0" not in text
    assert not any(row["y"] is not None and row["y"] < 1e-8 for row in drawn_rows(figure, "x", "y"))


def test_layers_are_the_largest_and_keep_the_model_s_order(full):
    figure = FIGURES["layer-traces"](full)
    rows = [row for row in drawn_rows(figure, "layer", "name") if row["name"] == "tall-mask"]
    layers = named(full, "tall-mask")["hessian"]["layers"]
    assert len(rows) == MOST_LAYERS < len(layers)
    assert [row["layer"] for row in rows] == [name for name in layers if name in {row["layer"] for row in rows}]
    single = named(full, "airy-0")["hessian"]["layers"]
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


def test_every_kind_of_control_has_its_mark_and_its_explanation(results, tmp_path):
    kinds = {kind_of(a) for a in results["artefacts"] if a["role"] == "control"}
    assert kinds == set(explained(results)) == set(KINDS) - {"base", "run", "merge", "control"}
    assert len({kind.shape for name, kind in KINDS.items() if name != "control"}) == len(KINDS) - 1
    drawn = {row["name"]: row["kind"] for row in drawn_rows(FIGURES["loss-sharpness"](results), "label")}
    assert drawn["adamw-average-0"] == "adamw-average"
    page = page_of(results, tmp_path)
    for kind in kinds:
        assert f"<dt>{kind}</dt><dd>" in page
    named(results, "adamw-average-0")["control"] = "of some other kind"
    assert kind_of(named(results, "adamw-average-0")) == "control"
    assert "loss-sharpness" in figures(results)


def test_a_map_puts_every_point_into_its_step():
    axis = np.linspace(-1, 1, 9)
    held = {"x": axis.tolist(), "y": axis.tolist(), "loss": (axis[:, None] ** 2 + 2 * axis**2 + 0.3).tolist()}
    found = Map.of(held)
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
    maps = [Map.of(held) for held in full["surfaces"].values()]
    edges = levels(maps)
    first, second = ({row["step"] for row in m.bands(edges, 300)} for m in maps)
    assert STEPS[-1] in first  # the steeper one
    assert len(maps[0].bands(edges, 300)) != len(maps[1].bands(edges, 300))
    assert first | second == set(STEPS)


def test_a_flat_plane_has_one_step(full):
    full["plane"]["loss"] = [[0.7] * 21 for _ in range(21)]
    figure = FIGURES["plane"](full)
    assert {row["step"] for row in drawn_rows(figure, "step")} == {STEPS[0]}
    assert "≤ 0.7" in figure.svg()


def test_small_barriers_stay_pale(full):
    full["barriers"] = {"names": ["a", "b"], "matrix": [[0, 1e-5], [1e-5, 0]]}
    cells = drawn_rows(FIGURES["barriers"](full), "strength")
    assert max(cell["strength"] for cell in cells) < 0.01
    full["barriers"]["matrix"] = [[0, 2.0], [2.0, 0]]
    cells = drawn_rows(FIGURES["barriers"](full), "strength")
    assert max(cell["strength"] for cell in cells) == pytest.approx(0.85)


def test_the_evidence_may_be_curvature(results):
    assert "curvature" in FIGURES["flatter"](results).svg()
    results["verdict"]["flatter"]["evidence"] = [
        e for e in results["verdict"]["flatter"]["evidence"] if e["what"] not in ("λmax", "trace")
    ]
    assert "curvature" not in FIGURES["flatter"](results).svg()


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


@pytest.mark.parametrize("name", ["barriers", "plane", "surfaces"])
@pytest.mark.parametrize("nothing", [None, {}])
def test_a_landscape_that_was_not_measured_is_no_figure(full, name, nothing):
    full[name] = nothing
    assert FIGURES[name](full) is None
