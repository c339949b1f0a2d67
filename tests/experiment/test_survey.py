"""Which directions artefacts are measured in, equal weights, and the progress of measurements."""

from types import SimpleNamespace

import numpy as np
import pytest

from emomerge import recipe
from emomerge.experiment.measure import Measured
from emomerge.experiment.meter import Meter
from emomerge.experiment.survey import survey
from emomerge.probing.balance import balanced
from emomerge.probing.registry import METRICS

WEIGHTS = np.array([0.25, 0.75])
METRIC = METRICS["gaussian"]


class Line:
    def __init__(self):
        self.notes, self.done = [], 0.0

    def add(self, amount, note=None):
        self.done += amount
        self.notes.append(note)


class Fake:
    """A measurer whose artefacts have given sharpness (radii, directions, units), and that notes what is asked of it."""

    def __init__(self, values, **section):
        self.values, self.recipe = values, SimpleNamespace(probe=recipe.Probe(**section))
        self.asked, self.meter = [], None

    def key(self, artefact):
        return artefact.hash

    def distinct(self, artefacts):
        return [*{artefact.hash: artefact for artefact in reversed(artefacts)}.values()]

    def passes_of(self, artefact, metrics):
        return sum(metric.passes(metric.options_of(self.recipe.probe), 1) for metric in metrics)

    def probe(self, artefact, metrics):
        options = metrics[0].options_of(self.recipe.probe)
        directions = [*options["directions"]] if metrics[0].sample else None
        self.asked.append((artefact.name, directions))
        at = [self.recipe.probe.radii.index(radius) for radius in options["radii"]]
        with self.meter.part(self.passes_of(artefact, metrics), artefact.name):
            found = self.values[artefact.hash][at][:, slice(None) if directions is None else directions]
        measured = Measured(artefact, ([], []))
        measured.series, measured.weights = {"gaussian": found}, {"gaussian": WEIGHTS}
        return measured


def artefacts(*names):
    return [SimpleNamespace(name=name, hash=name.rstrip("'")) for name in names]


def surveyed(fake, names, judged, line, engine=None):
    display = SimpleNamespace(line=lambda title, total: setattr(line, "total", total) or line)
    models = artefacts(*names)
    metrics = {model.name: [METRIC] for model in models}
    return survey(fake, models, metrics, judged, display=display, engine=engine, later=7)


def test_the_others_are_measured_at_the_middle_radius_in_directions_that_are_typical_of_the_judged():
    rng, line = np.random.default_rng(0), Line()
    values = {name: rng.gamma(2, 1, (3, 12, 2)) for name in ("base", "run", "merge", "matched")}
    fake = Fake(values, directions=12, other_directions=3)
    found = surveyed(fake, ["base", "run", "merge", "run'", "matched"], {"merge", "run'"}, line)
    assert list(found) == ["base", "run", "merge", "run'", "matched"]
    expected = list(balanced([(values[name] @ WEIGHTS)[1:2] for name in ("merge", "run")], 3))
    assert fake.asked == [("run", None), ("merge", None), ("run'", None), ("base", expected), ("matched", expected)]
    assert found["matched"].series["gaussian"].shape == (1, 3, 2)
    assert line.total == line.done + 7 == 3 * (2 * 3 * 12) + 2 * (2 * 1 * 3) + 7


@pytest.mark.parametrize("section", [{"directions": 3}, {"directions": 8, "other_directions": 8}])
def test_few_directions_are_measured_of_all(section):
    fake = Fake({name: np.ones((3, 8, 2)) for name in ("run", "merge")}, **section)
    surveyed(fake, ["run", "merge"], {"merge"}, Line())
    assert fake.asked == [("merge", None), ("run", None)]


def test_without_a_verdict_all_directions_are_measured_of_all():
    fake = Fake({name: np.ones((3, 16, 2)) for name in ("a", "b")}, directions=16)
    surveyed(fake, ["a", "b"], {"a", "b"}, Line())
    assert fake.asked == [("a", None), ("b", None)]


def test_a_meter_shows_passes_as_they_are_made_and_never_more_than_were_announced():
    line = Line()
    meter = Meter(line)
    meter.add(5)  # between parts nothing is shown
    with meter.part(10, "a"):
        meter.add(3)
        assert line.done == 3
    assert line.done == 10  # the rest was remembered
    with meter.part(2, "b"):
        meter.add(3)
        assert line.done == 12
    with pytest.raises(KeyError), meter.part(4, "c"):
        meter.add(1)
        raise KeyError
    assert line.done == 13 and line.notes == ["a", "a", "b", "c"]
    Meter().add(1)


def test_the_bar_begins_when_workers_have_ended(monkeypatch):
    line, events = Line(), []
    fake = Fake({name: np.ones((3, 12, 2)) for name in ("run", "merge")}, directions=12, other_directions=3)
    fake.meter = Meter()
    monkeypatch.setattr("emomerge.experiment.survey.measure_in_workers", lambda *given: events.append(hasattr(line, "total")))
    surveyed(fake, ["run", "merge"], {"merge"}, line, engine=object())
    assert events == [False, False]
    assert line.total == line.done + 7 == 2 * 1 * 3 + 7  # what was measured by workers is not counted again
