"""What the full probe adds to the report: every figure there, missing, and diverged."""

import json
import math
import re

import numpy as np
import pytest

from emomerge.reporting import figures, write_report
from emomerge.reporting.curvature import MOST_LAYERS
from emomerge.reporting.kinds import KINDS, contestants, explained, kind_of
from emomerge.reporting.landscape import Map, levels
from emomerge.reporting.method import measures
from emomerge.reporting.palette import LIGHT, STEPS, mix
from emomerge.reporting.report import limits
from emomerge.reporting.table import columns, details

NEW = {"spectral-density", "layer-traces", "barriers", "plane", "surfaces"}
PARTS = ("adaptive", "worst_case", "basin", "hessian")


def quick(results):
    """The results as the quick probe leaves them."""
    for artefact in results["artefacts"]:
        for part in PARTS:
            del artefact[part]
    for part in ("barriers", "plane", "surfaces"):
        del results[part]
    return results


def named(results, name):
    return next(a for a in results["artefacts"] if a["name"] == name)


def drawn_rows(figure, *fields):
    return [row for rows in figure.spec()["datasets"].values() for row in rows if all(field in row for field in fields)]


def page_of(results, tmp_path):
    return write_report(results, tmp_path / "report.html").read_text(encoding="utf-8")


def keys(found):
    return [column.key for column in found]


def test_a_quick_probe_shows_nothing_of_it(results, tmp_path):
    page = page_of(quick(results), tmp_path)
    assert not NEW & set(figures(results))
    assert not details(results)
    assert not measures(results)
    assert keys(columns(results))[:6] == [
        "test_loss", "test_accuracy", "sharpness_0.01", "sharpness_0.03", "sharpness_0.1", "distance"
    ]  # fmt: skip
    assert "says nothing of the worst direction" in page
    for word in ("The curvature", "Secondary measures", "Hessian describes", "illustration"):
        assert word not in page


def test_the_limits_follow_what_was_measured(results):
    told = " ".join(limits(results))
    assert "worst direction" not in told
    for word in ("true one may be higher", "Hessian describes", "illustration"):
        assert word in told
    for artefact in results["artefacts"]:
        artefact["worst_case"] = {}
    assert "says nothing of the worst direction" in " ".join(limits(results))


@pytest.mark.parametrize(
    ("part", "key", "term"),
    [
        ("adaptive", "adaptive_0.1", "Adaptive"),
        ("worst_case", "worst_ℓ2_1", "Worst case"),
        ("basin", "basin", "Basin"),
        ("hessian", "trace", "Hessian"),
    ],
)
def test_each_measure_has_its_column_and_its_method_or_neither(results, part, key, term):
    assert key in keys(columns(results))
    assert term in measures(results)
    for artefact in results["artefacts"]:
        artefact[part] = None
    assert key not in keys(columns(results))
    assert term not in measures(results)


def test_the_table_holds_one_radius_and_the_details_all(results):
    assert [k for k in keys(columns(results)) if k.startswith(("worst", "adaptive"))] == [
        "adaptive_0.1", "worst_ℓ2_1", "worst_ℓ∞_0.001", "worst_ℓ2 adaptive_1", "worst_ℓ∞ adaptive_0.001"
    ]  # fmt: skip
    full = keys(details(results))
    assert sum(k.startswith("worst") for k in full) == sum(k.startswith("slope") for k in full) == 12
    assert {"adaptive_0.05", "adaptive_0.2", "lambda_min", "lambda_span"} <= set(full)


def test_methods_state_the_counts_of_the_results(results):
    told = measures(results)
    assert "in 32 directions" in told["Adaptive"]
    assert "each of 8 directions" in told["Basin"]
    assert "(32)" in told["Hessian"]
    assert told["Landscape"].endswith("the plane at 21 × 21 points; surfaces at 21 × 21 points")
    named(results, "mean")["basin"]["n"] = 4  # no longer the same for all
    assert "directions" not in measures(results)["Basin"]


def test_wide_basins_and_low_curvature_win(results):
    by_key = {column.key: column for column in columns(results)}
    names = [a["name"] for a in results["artefacts"]]
    for key in ("lambda_max", "trace", "basin", "worst_ℓ2_1", "adaptive_0.1"):
        assert [names[i] for i in by_key[key].best] == ["tall-mask"]
    assert not any(column.best for column in details(results) if column.key.startswith(("slope", "lambda")))


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf])
def test_diverged_figures_are_named_and_sort_last(results, tmp_path, nothing):
    merge, single = named(results, "tall-mask"), named(results, "airy-0")
    row = next(i for i, a in enumerate(results["artefacts"]) if a is merge)
    merge["basin"]["mean"] = merge["adaptive"]["0.1"]["mean"] = nothing
    merge["worst_case"]["ℓ2"]["1"].update(mean=nothing, gradient=nothing)
    merge["hessian"].update(lambda_max=nothing, trace={"mean": nothing}, subspace={"eigenvalues": [nothing]})
    merge["hessian"]["density"]["density"] = [nothing] * 201
    single["hessian"]["layers"]["encoder.layer.5.mlp.up"] = nothing
    results["plane"]["loss"][0][0] = results["surfaces"]["airy-0"]["loss"][3][3] = nothing
    results["barriers"]["matrix"][0][1] = results["barriers"]["matrix"][1][0] = nothing
    found = {column.key: column for column in (*columns(results), *details(results))}
    for key in ("lambda_max", "trace", "adaptive_0.1", "worst_ℓ2_1", "slope_ℓ2_1", "lambda_span"):
        assert found[key].cells[row] == "diverged"
        assert found[key].values[row] == math.inf
        assert row not in found[key].best
    assert found["basin"].values[row] == -math.inf
    drawn = figures(results)
    assert "Diverged and not drawn: tall-mask." in drawn["spectral-density"].caption
    assert "one diverged: 1 layers" in drawn["layer-traces"].caption
    assert "∞" in drawn["barriers"].svg()
    assert "infinite" in drawn["barriers"].alt
    for name in ("plane", "surfaces"):
        assert "Grey: the loss diverged." in drawn[name].caption
        assert ">diverged</text>" in drawn[name].svg()
    page_of(results, tmp_path)


@pytest.mark.parametrize("change", [
    lambda r: r["plane"].update(loss=[[None] * 21] * 21),
    lambda r: r["plane"].update(loss=r["plane"]["loss"][:-1]),
    lambda r: r["plane"].update(x=[]),
])  # fmt: skip
def test_a_plane_without_points_is_no_figure(results, change):
    change(results)
    assert "plane" not in figures(results)


def test_one_artefact_alone_has_its_spectrum(results, tmp_path):
    results["artefacts"] = [named(results, "tall-mask")]
    results["verdict"] = None
    drawn = figures(results)
    assert "spectral-density" in drawn
    assert "layer-traces" not in drawn
    page_of(results, tmp_path)


def test_without_a_verdict_the_lowest_validation_loss_is_compared(results):
    merge, single = contestants(results)
    assert (merge["name"], single["name"]) == ("tall-mask", "airy-0")
    results["verdict"] = None
    named(results, "ties")["validation_loss"] = 0.1
    named(results, "void-0")["validation_loss"] = 0.1
    named(results, "mean")["validation_loss"] = math.nan
    merge, single = contestants(results)
    assert (merge["name"], single["name"]) == ("ties", "void-0")


def test_spectra_are_those_of_the_contest(results):
    figure = figures(results)["spectral-density"]
    text = figure.svg()
    for name in ("tall-mask", "airy-0", "airy-0 at |tall-mask|", "long-airy-0 at step 900"):
        assert f">{name}, λmax" in text
    assert "cats-0" not in text
    assert not any(row["y"] is not None and row["y"] < 1e-8 for row in drawn_rows(figure, "x", "y"))


def test_layers_are_the_largest_and_keep_the_model_s_order(results):
    figure = figures(results)["layer-traces"]
    rows = [row for row in drawn_rows(figure, "layer", "name") if row["name"] == "tall-mask"]
    layers = named(results, "tall-mask")["hessian"]["layers"]
    assert len(rows) == MOST_LAYERS < len(layers)
    assert [row["layer"] for row in rows] == [name for name in layers if name in {row["layer"] for row in rows}]
    single = named(results, "airy-0")["hessian"]["layers"]
    largest = {name: max(layers[name], single[name]) for name in layers}
    left = [largest[name] for name in layers if name not in {row["layer"] for row in rows}]
    assert min(largest[row["layer"]] for row in rows) >= max(left)
    assert all((row["outcome"] == "good") == (row["merge"] < row["single"]) for row in rows)


def test_long_layer_names_stay_apart_on_a_telephone(results):
    prefix = "model.vision_tower.backbone.blocks."
    for artefact in results["artefacts"]:
        artefact["hessian"]["layers"] = {f"{prefix}{i}.attention.self_attention.output_projection": 1.0 for i in range(9)}
    (axis,) = re.findall(r'\[".*?\]', json.dumps(figures(results)["layer-traces"].spec(narrow=True)).replace('\\"', '"'))[:1]
    shown = json.loads(axis.replace("\\\\", "\\"))
    assert len(set(shown)) == 9
    assert not any(name.startswith("model") for name in shown)


def test_every_kind_of_control_has_its_mark_and_its_explanation(results, tmp_path):
    kinds = {kind_of(a) for a in results["artefacts"] if a["role"] == "control"}
    assert kinds == set(explained(results)) == set(KINDS) - {"base", "run", "merge", "control"}
    assert len({kind.shape for name, kind in KINDS.items() if name != "control"}) == len(KINDS) - 1
    drawn = {row["name"]: row["kind"] for row in drawn_rows(figures(results)["loss-sharpness"], "label")}
    assert drawn["adamw-average-0"] == "adamw-average"
    page = page_of(results, tmp_path)
    for kind in kinds:
        assert f"<dt>{kind}</dt><dd>" in page
    named(results, "adamw-average-0")["control"] = "of some other kind"
    assert kind_of(named(results, "adamw-average-0")) == "control"
    page_of(results, tmp_path)


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


def test_surfaces_share_their_levels(results):
    maps = [Map.of(held) for held in results["surfaces"].values()]
    edges = levels(maps)
    first, second = ({row["step"] for row in m.bands(edges, 300)} for m in maps)
    assert STEPS[-1] in first  # the steeper one
    assert len(maps[0].bands(edges, 300)) != len(maps[1].bands(edges, 300))
    assert first | second == set(STEPS)


def test_a_flat_plane_has_one_step(results):
    results["plane"]["loss"] = [[0.7] * 21 for _ in range(21)]
    figure = figures(results)["plane"]
    assert {row["step"] for row in drawn_rows(figure, "step")} == {STEPS[0]}
    assert "≤ 0.7" in figure.svg()


def test_small_barriers_stay_pale(results):
    results["barriers"] = {"names": ["a", "b"], "matrix": [[0, 1e-5], [1e-5, 0]]}
    cells = drawn_rows(figures(results)["barriers"], "strength")
    assert max(cell["strength"] for cell in cells) < 0.01
    results["barriers"]["matrix"] = [[0, 2.0], [2.0, 0]]
    cells = drawn_rows(figures(results)["barriers"], "strength")
    assert max(cell["strength"] for cell in cells) == pytest.approx(0.85)


def test_the_evidence_may_be_curvature(results):
    assert "curvature" in figures(results)["flatter"].svg()
    results["verdict"]["flatter"]["evidence"] = [
        e for e in results["verdict"]["flatter"]["evidence"] if e["what"] not in ("λmax", "trace")
    ]
    assert "curvature" not in figures(results)["flatter"].svg()


def test_steps_of_colour_go_from_paper_to_full():
    assert mix("#000000", "#ff8000", 0.5) == "#804000"
    darkness = [sum(int(LIGHT[step][i : i + 2], 16) for i in (1, 3, 5)) for step in STEPS]
    assert darkness == sorted(darkness, reverse=True)


def test_layouts_share_their_data(results, tmp_path):
    page = page_of(results, tmp_path)
    specs = json.loads(re.search(r'<figure id="plane">.*?<script type="application/json">(.*?)</script>', page, re.S)[1])
    assert not {"datasets"} & {key for layout in ("wide", "narrow") for key in specs[layout]}

    def names(part):
        if isinstance(part, dict):
            own = {part["data"]["name"]} if "name" in part.get("data", {}) else set()
            return own.union(*map(names, part.values()))
        return set().union(*map(names, part)) if isinstance(part, list) else set()

    assert names(specs["wide"]) | names(specs["narrow"]) == set(specs["datasets"])
