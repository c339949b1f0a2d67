"""Measure all artefacts of an experiment, each in as many directions as the verdict needs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from emomerge.experiment.measure import Artefact, Measured, Measurer
from emomerge.experiment.meter import Meter
from emomerge.experiment.workers import measure_in_pieces, measure_in_workers
from emomerge.probing.balance import balanced
from emomerge.probing.registry import Metric, middle_of
from emomerge.progress import Display
from emomerge.training import Engine


def survey(
    measurer: Measurer,
    artefacts: Sequence[Artefact],
    metrics: Mapping[str, Sequence[Metric]],
    judged: Collection[str],
    *,
    display: Display,
    engine: Engine | None = None,
    later: float = 0.0,
) -> dict[str, Measured]:
    """Measure artefacts on their own; return name → results, in their order.

    Those that the verdict judges are measured in all directions of the recipe and at all radii, the others at the middle
    radius in `other_directions` of these, chosen by what was found for the former (see `balanced`). Equal weights are measured
    once.

    Args:
        measurer: measures artefacts; afterwards its meter shows what it measures on the same line.
        artefacts: all artefacts.
        metrics: name → metrics of the artefact.
        judged: names of the artefacts that the verdict compares in sharpness.
        display: shows progress.
        engine: starts workers; None measures in this process.
        later: forward passes that will be made afterwards.
    """
    groups = _Groups(measurer, artefacts, metrics, judged)
    found: dict[str, Measured] = {}
    meter = None
    for group in (groups.closely, groups.others):
        chosen = groups.metrics_of(group, found)
        if engine is not None:
            measure_in_workers(engine, measurer, groups.jobs(group, chosen), display)
        if meter is None and (engine is None or group is groups.others):  # the bar's time is not the workers'
            passes = groups.passes_of(group) if engine is not None else groups.passes
            meter = measurer.meter = Meter(display.line("probe", round(passes + later)))
        found |= {artefact.name: measurer.probe(artefact, chosen[artefact.name]) for artefact in group}
    return {artefact.name: found[artefact.name] for artefact in artefacts}


def survey_in_pieces(
    measurer: Measurer,
    artefacts: Sequence[Artefact],
    metrics: Mapping[str, Sequence[Metric]],
    judged: Collection[str],
    *,
    complete: bool,
) -> Iterator[None]:
    """Do what `survey` does in this process, yielding after each piece; a later survey finds it in the ledger.

    Args:
        measurer: measures artefacts.
        artefacts: the artefacts that there are by now.
        metrics: name → metrics of the artefact.
        judged: names of the artefacts that the verdict compares in sharpness.
        complete: whether these are all that it will compare. If not, the others are left out, as their directions depend on it.
    """
    groups = _Groups(measurer, artefacts, metrics, judged)
    yield
    found: dict[str, Measured] = {}
    for group in (groups.closely, groups.others) if complete else (groups.closely,):
        chosen = groups.metrics_of(group, found)
        for artefact, wanted in groups.jobs(group, chosen):
            yield from measure_in_pieces(measurer, artefact, wanted)
        found |= {artefact.name: measurer.probe(artefact, chosen[artefact.name]) for artefact in group}
        yield


class _Groups:
    """The artefacts of a survey: those that the verdict judges, and the others."""

    def __init__(
        self,
        measurer: Measurer,
        artefacts: Sequence[Artefact],
        metrics: Mapping[str, Sequence[Metric]],
        judged: Collection[str],
    ) -> None:
        self._measurer, self._metrics = measurer, metrics
        self._distinct = {artefact.name for artefact in measurer.distinct(artefacts)}
        keys = {measurer.key(artefact) for artefact in artefacts if artefact.name in judged}
        self.closely = [artefact for artefact in artefacts if measurer.key(artefact) in keys]
        self.others = [artefact for artefact in artefacts if measurer.key(artefact) not in keys]

    def metrics_of(self, group: Sequence[Artefact], found: Mapping[str, Measured]) -> dict[str, list[Metric]]:
        """Return name → metrics of a group, in the directions that what was found of the judged artefacts suggests."""
        known = [found[artefact.name] for artefact in self.closely if artefact.name in found]
        return {a.name: [_sampled(self._measurer, metric, known) for metric in self._metrics[a.name]] for a in group}

    def jobs(
        self, group: Sequence[Artefact], chosen: Mapping[str, Sequence[Metric]]
    ) -> list[tuple[Artefact, Sequence[Metric]]]:
        """Return the distinct artefacts of a group, with all metrics of those that are equal to them."""
        most: dict[str, Sequence[Metric]] = {}
        for artefact in group:
            key = self._measurer.key(artefact)
            most[key] = max(most.get(key, ()), chosen[artefact.name], key=len)
        return [(artefact, most[self._measurer.key(artefact)]) for artefact in group if artefact.name in self._distinct]

    @property
    def passes(self) -> float:
        """The cost in forward passes, with the others in few directions."""
        return self.passes_of(self.closely) + self.passes_of(self.others)

    def passes_of(self, group: Sequence[Artefact]) -> float:
        """Return the cost of one of the groups."""
        measurer, metrics = self._measurer, self._metrics
        if group is self.others:
            metrics = {a.name: [metric.in_few(measurer.recipe.probe) for metric in metrics[a.name]] for a in group}
        return sum(measurer.passes_of(a, metrics[a.name]) for a in group)


def _sampled(measurer: Measurer, metric: Metric, known: Sequence[Measured]) -> Metric:
    """Return a metric in a balanced sample of its directions, or as it is if too little is known."""
    few = metric.in_few(measurer.recipe.probe)
    if few.sample is None or not known or not all(metric.name in measured.series for measured in known):
        return metric
    means = [measured.series[metric.name] @ measured.weights[metric.name] for measured in known]
    if few.middle:
        radii = [*metric.options_of(measurer.recipe.probe)["radii"]]
        means = [of[[radii.index(middle_of(radii))]] for of in means]
    return replace(few, sample=balanced([of.reshape(-1, of.shape[-1]) for of in means], len(few.sample)))
