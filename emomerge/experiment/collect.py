"""The probe stage: measure all artefacts and collect the content of results.json."""

from __future__ import annotations

import base64
import datetime
import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

from emomerge.experiment.assessment import Contestants, assess, measure_ahead
from emomerge.experiment.control_runs import control_artefacts, trained_so_far
from emomerge.experiment.experiment import Experiment
from emomerge.experiment.measure import Artefact
from emomerge.reporting import png
from emomerge.results import Cosines, Data, MergeFacts, Results, Rows, Samples, Trace
from emomerge.tasks import Images, Texts
from emomerge.training import Engine, RunSpec


def collect_results(experiment: Experiment, engine: Engine | None = None) -> Results:
    """Measure all artefacts and judge the first merge; return the content of results.json.

    Args:
        experiment: an experiment whose runs, controls and merges are complete.
        engine: starts workers for the measurements; None measures in this process.
    """
    contestants = _contestants(experiment, experiment.trained_controls)
    merges = contestants.merges[experiment.recipe.merge[0].label]
    assessed = assess(experiment.recipe, experiment.measurer, contestants, display=experiment.display, engine=engine)
    return assessed.model_copy(
        update={
            **_heading(experiment),
            "samples": _samples(experiment, [contestants.base, contestants.best[0], merges[0]]),
            "traces": _traces(experiment),
            "cosines": _cosines(experiment),
            "merges": {name: _merge_facts(experiment.merge_record(name)) for name in experiment.merge_names},
        }
    )


def measure_so_far(experiment: Experiment) -> Iterator[None]:
    """Measure, piece by piece, what there is before all controls are trained; the probe then finds it in the ledger.

    Args:
        experiment: an experiment whose runs and merges are complete.
    """
    contestants = _contestants(experiment, trained_so_far(experiment))
    yield from measure_ahead(experiment.recipe, experiment.measurer, contestants)


def _contestants(experiment: Experiment, trained: Sequence[RunSpec]) -> Contestants:
    """Return all artefacts of an experiment, of whose controls some have been trained."""
    seeds = experiment.recipe.runs.seeds
    controls = control_artefacts(experiment, trained)
    return Contestants(
        base=experiment.base_artefact,
        runs=[experiment.run_artefact(spec) for spec in experiment.specs],
        merges={spec.label: [experiment.merge_artefact(spec, seed) for seed in seeds] for spec in experiment.recipe.merge},
        best=[experiment.run_artefact(experiment.best_run(seed)) for seed in seeds],
        snapshots=controls.pop("snapshots"),
        controls=controls,
    )


def _heading(experiment: Experiment) -> dict[str, Any]:
    """Return facts about the recipe, the machine and the data."""
    packages = ("emomerge", "torch", "transformers", "peft", "numpy")
    data = experiment.data
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": experiment.command,
        "recipe": experiment.as_written.model_dump(mode="json"),
        "recipe_yaml": experiment.recipe_yaml,
        "versions": {"python": platform.python_version()} | {package: version(package) for package in packages},
        "device": str(experiment.device),
        "data": Data(
            summary=data.summary,
            rows=Rows(train=len(data.train), validation=len(data.validation), test=len(data.test)),
            classes=tuple(data.classes),
            unit=experiment.task.unit,
        ),
    }


def _samples(experiment: Experiment, artefacts: Sequence[Artefact]) -> Samples | None:
    """Return samples that some artefacts generate, for generative tasks."""
    made = {}
    for artefact in artefacts:
        experiment.measurer.load(artefact)
        made[artefact.name] = experiment.task.samples(experiment.measurer.model)
    texts = {name: samples for name, samples in made.items() if isinstance(samples, Texts)}
    if texts:
        first = texts["base"]
        of_artefact = {name: tuple(samples.texts) for name, samples in texts.items()}
        return Samples(about=first.about, prompts=tuple(first.prompts), texts=of_artefact)
    images = {name: samples for name, samples in made.items() if isinstance(samples, Images)}
    if not images:
        return None
    shown = {name: base64.b64encode(png(samples.picture.numpy())).decode() for name, samples in images.items()}
    return Samples(about=images["base"].about, images=shown)


def _traces(experiment: Experiment) -> dict[str, Trace]:
    """Return the metrics of every step of every run."""
    columns = ("step", "loss", "rate", "sigma", "trust")
    traces = {}
    for spec in experiment.specs:
        rows = list(experiment.run_dir(spec).metrics())
        steps = {column: tuple(row[column] for row in rows) for column in columns}
        traces[spec.name] = Trace(optimizer=spec.optimizer, seed=spec.seed, **steps)
    return traces


def _cosines(experiment: Experiment) -> Cosines | None:
    """Return the pairwise cosines of the runs' task vectors, which are the same for every merge of a seed's runs."""
    merge = next((spec for spec in experiment.recipe.merge if spec.of == "runs"), None)
    if merge is None:
        return None
    diagnostics = experiment.merge_record(experiment.merge_name(merge, experiment.recipe.runs.seeds[0]))["diagnostics"]
    return Cosines(names=diagnostics["runs"], matrix=diagnostics["cosines"], sign_agreement=diagnostics["sign_agreement"])


def _merge_facts(record: dict[str, Any]) -> MergeFacts:
    """Return the diagnostics of a merge; records of earlier versions do not say what was merged, which were runs."""
    return MergeFacts.model_validate({"of": record.get("of", "runs"), **record["diagnostics"]})


def seconds_of_stages(experiment: Experiment) -> dict[str, float]:
    """Return the seconds that base, runs and merges took."""
    return {
        "base": experiment.space.stamp("base").get("seconds", 0.0),
        "runs": sum(experiment.run_dir(spec).state["seconds"] for spec in [*experiment.trunks, *experiment.specs]),
        "merge": sum(experiment.space.stamp(f"merge-{name}").get("seconds", 0.0) for name in experiment.merge_names),
    }
