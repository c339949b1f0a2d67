"""The merge stages: one model per merge of the recipe and training seed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

from emomerge.checkpoints import RoundingLoss, write_checkpoint
from emomerge.errors import BadInput
from emomerge.experiment.cards import merge_card
from emomerge.experiment.experiment import Experiment
from emomerge.experiment.measure import Artefact
from emomerge.experiment.workspace import local_files
from emomerge.files import to_json
from emomerge.merging import check_params, find_method, merge
from emomerge.merging.record import MergeRecord, Output, Run, as_json
from emomerge.recipe import Merge, Recipe


def check_merge(recipe: Recipe, spec: Merge) -> None:
    """Check a merge of a recipe before anything is trained.

    Raises:
        BadInput: the method does not have these parameters, merges another number of models, or needs files of runs.
    """
    check_params(spec.method, spec.params)
    method = find_method(spec.method)
    count = len(recipe.runs.kept_rounds if spec.of == "rounds" else recipe.runs.optimizers)
    if method.exact_runs not in (None, count):
        raise BadInput(f"{spec.method} merges exactly {method.exact_runs} {spec.of}", where=f"merge {spec.label}", found=count)
    if spec.of == "rounds" and not method.run_files.keys() <= spec.params.keys():
        fix = f"leave out `of`, or give {', '.join(f'`{key}`' for key in method.run_files)}"
        raise BadInput(f"{spec.method} reads files that only runs have", where=f"merge {spec.label}", fix=fix)


def write_merge(experiment: Experiment, spec: Merge, seed: int) -> None:
    """Merge the runs or the kept rounds of a training seed and write the model, its record and its card."""
    name = experiment.merge_name(spec, seed)
    inputs = experiment.merge_stamp(spec, seed)
    artefacts = experiment.merged_artefacts(spec, seed)
    merged = merge(
        experiment.base, [a.checkpoint for a in artefacts], method=spec.method, names=[a.name for a in artefacts],
        held_out_loss=experiment.measurer.held_out_loss,
        run_losses=[experiment.measurer.loss(a, "validation") for a in artefacts],
        **spec.params,
    )  # fmt: skip

    loss = RoundingLoss(experiment.base)

    def extra_files() -> dict[str, str]:
        decided_by = local_files([str(experiment.space.recipe), *experiment.recipe.external_sources()])
        asked = _merge_record(experiment, spec, artefacts).with_hashes(decided_by).written_to(experiment.space.merges / name)
        record = as_json(asked, rounding_loss=loss.figures(), diagnostics=merged.diagnostics())
        record |= {"name": name, "of": spec.of, "dtype": spec.dtype, "inputs": inputs, "emomerge": version("emomerge")}
        return {"merge.json": to_json(record) + "\n", "README.md": merge_card(experiment, name, record)}

    write_checkpoint(
        merged,
        experiment.space.merges / name,
        dtype=spec.dtype,
        loss=loss,
        files_from=experiment.space.base,
        extra_files=extra_files,
        hashed=False,
        force=True,
    )


def _merge_record(experiment: Experiment, spec: Merge, artefacts: Sequence[Artefact]) -> MergeRecord:
    """Return the record that `emomerge merge --again` repeats."""
    runs = tuple(Run(name=a.name, source=str(a.path)) for a in artefacts)
    return MergeRecord(
        method=spec.method, params=spec.params, base=str(experiment.space.base), runs=runs, recipe=str(experiment.space.recipe),
        output=Output(dtype=spec.dtype),
    )  # fmt: skip


def merge_note(experiment: Experiment, name: str) -> str:
    """Return the main diagnostics of a written merge, for the progress display."""
    diagnostics = experiment.merge_record(name)["diagnostics"]
    shown = [
        ("scale", diagnostics["params"].get("scale")), ("kept", diagnostics.get("kept_density")),
        ("cos(τ, mean)", diagnostics.get("cosine_to_mean")),
    ]  # fmt: skip
    return "   ".join(f"{key} {value:.3g}" for key, value in shown if isinstance(value, (int, float)))
