import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emomerge.errors import BadInput
from emomerge.results import SCHEMA_VERSION, ArtefactRow, Cosines, Estimate, Matrix, Results, Surface, load_results, sort_rows

numbers = st.none() | st.floats()
estimates = st.builds(
    Estimate, mean=numbers, stderr=numbers, n=st.none() | st.integers(1, 99), facts=st.dictionaries(st.text(), numbers)
)
rows = st.builds(
    ArtefactRow, name=st.text(), role=st.sampled_from(["base", "run", "merge", "control"]),
    estimates=st.dictionaries(st.text(), estimates, max_size=3),
)  # fmt: skip


@given(st.lists(rows, max_size=3))
def test_results_survive_json(artefacts):
    results = Results(name="any", artefacts=tuple(artefacts))
    text = results.to_json()
    assert Results.from_json(text, "a file") == results
    assert not {"NaN", "Infinity", "-Infinity"} & set(text.split())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_a_number_that_is_not_finite_is_none_and_is_written(value):
    row = ArtefactRow(name="a", role="run", estimates={"test_loss": Estimate(mean=value)})
    assert row.loss("test") is None
    plain = json.loads(Results(name="any", artefacts=(row,)).to_json())
    assert plain["artefacts"][0]["estimates"] == {"test_loss": {"mean": None}}


def test_a_figure_that_was_not_measured_is_none():
    row = ArtefactRow(name="a", role="run", estimates={"validation_accuracy": Estimate(mean=0.5)})
    assert (row.accuracy("validation"), row.accuracy("test"), row.loss("train")) == (0.5, None, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "cannot be read: .*results.json; found Input should be an object"),
        ("{", "cannot be read: .*results.json; found"),
        ("[" * 100_000, "cannot be read: .*results.json; found"),
        ('{"schema_version": "2", "name": "x"}', "found '2'"),
        ('{"name": "old", "artefacts": []}', f"of emomerge: .*expected schema_version {SCHEMA_VERSION}; found none"),
        (f'{{"schema_version": {SCHEMA_VERSION}, "name": 1}}', "results.json, name; found"),
        (f'{{"schema_version": {SCHEMA_VERSION}, "name": "x", "new": 1}}', "results.json, new; found"),
    ],
)  # fmt: skip
def test_damaged_results_are_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(BadInput, match=message) as error:
        load_results(tmp_path)
    assert "run the recipe again; its evaluations are remembered" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_results_are_named(tmp_path):
    with pytest.raises(BadInput, match="no results here: .*results.json"):
        load_results(tmp_path)
    (tmp_path / "results.json").write_bytes(b"\xff")
    with pytest.raises(BadInput, match="not UTF-8"):
        load_results(tmp_path)


def test_rows_in_the_order_of_reports():
    roles = ["control", "merge", "run", "base", "run"]
    found = sort_rows([ArtefactRow(name=str(i), role=role) for i, role in enumerate(roles)])
    assert [row.name for row in found] == ["3", "2", "4", "1", "0"]


@pytest.mark.parametrize(
    "build",
    [
        lambda: Matrix(names=("a", "b"), matrix=((1.0, 0.0),)),
        lambda: Cosines(names=("a",), matrix=((1.0,),), sign_agreement=((1.0, 1.0),)),
        lambda: Surface(x=(0.0, 1.0), y=(0.0,), loss=((1.0,), (1.0,))),
    ],
)  # fmt: skip
def test_tables_of_another_shape_than_their_axes_are_refused(build):
    with pytest.raises(ValueError, match="Rows and columns should be"):
        build()
