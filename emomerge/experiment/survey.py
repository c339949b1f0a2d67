"""Measure all artefacts of an experiment, each in as many directions as the verdict needs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from emomerge.experiment.measure import Artefact, Measured, Measurer
from emomerge.experiment.meter import Meter
from emomerge.experiment.workers import measure_in_workers
from emomerge.probing.balance import balanced
from emomerge.probing.registry import Metric
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

    Those that the verdict judges are measured in all directions of the recipe, the others in `other_directions` of these,
    chosen by what was found for the former (see `balanced`). Equal weights are measured once.

    Args:
        measurer: measures artefacts; afterwards its meter shows what it measures on the same line.
        artefacts: all artefacts.
        metrics: name → metrics of the artefact.
        judged: names of the artefacts that the verdict compares in sharpness.
        display: shows progress.
        engine: starts workers; None measures in this process.
        later: forward passes that will be made afterwards.
    """
    distinct = {artefact.name for artefact in measurer.distinct(artefacts)}
    keys = {measurer.key(artefact) for artefact in artefacts if artefact.name in judged}
    closely = [artefact for artefact in artefacts if measurer.key(artefact) in keys]
    others = [artefact for artefact in artefacts if measurer.key(artefact) not in keys]
    found: dict[str, Measured] = {}
    meter = None
    for group in (closely, others):
        known = [found[artefact.name] for artefact in closely if artefact.name in found]
        chosen = {a.name: [_sampled(measurer, metric, known) for metric in metrics[a.name]] for a in group}
        if engine is not None:
            most: dict[str, Sequence[Metric]] = {}
            for artefact in group:
                most[measurer.key(artefact)] = max(most.get(measurer.key(artefact), ()), chosen[artefact.name], key=len)
            wanted = [(artefact, most[measurer.key(artefact)]) for artefact in group if artefact.name in distinct]
            measure_in_workers(engine, measurer, wanted, display)
        if meter is None:
            passes = [measurer.passes_of(a, metrics[a.name]) for a in closely]
            passes += [
                measurer.passes_of(a, [metric.in_few(measurer.recipe.probe) for metric in metrics[a.name]]) for a in others
            ]
            meter = measurer.meter = Meter(display.line("probe", round(sum(passes) + later)))
        found |= {artefact.name: measurer.probe(artefact, chosen[artefact.name]) for artefact in group}
    return {artefact.name: found[artefact.name] for artefact in artefacts}


def _sampled(measurer: Measurer, metric: Metric, known: Sequence[Measured]) -> Metric:
    """Return a metric in a balanced sample of its directions, or as it is if too little is known."""
    few = metric.in_few(measurer.recipe.probe)
    if few.sample is None or not known or not all(metric.name in measured.series for measured in known):
        return metric
    means = [measured.series[metric.name] @ measured.weights[metric.name] for measured in known]
    return replace(metric, sample=balanced([of.reshape(-1, of.shape[-1]) for of in means], len(few.sample)))
