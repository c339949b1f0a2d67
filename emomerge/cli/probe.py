"""The commands `probe` and `report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from emomerge.cli.command import (
    command,
    default_out,
    engine_of,
    executor_option,
    force_option,
    json_option,
    out_path,
    parallel_option,
    quiet_option,
    set_option,
    setting_option,
)  # fmt: skip
from emomerge.cli.completion import complete_metrics, complete_recipes
from emomerge.cli.printing import console, print_json
from emomerge.errors import BadInput, shown

if TYPE_CHECKING:
    from emomerge.training.engines import EngineName


@command(
    "probe",
    """
    emomerge probe recipes/digits.yaml out/digits/merges/tall-mask out/digits/runs/sens-0 -o probed
    emomerge probe recipes/digits.yaml out/digits/merges/tall-mask -o probed --preset full --executor ray
    """,
    extras=("train",),
    resumes=True,
)  # fmt: skip
@click.argument("recipe", shell_complete=complete_recipes)
@click.argument("models", nargs=-1, required=True)
@click.option("-o", "--out", type=out_path, required=True, help="Folder for the results and the ledger of evaluations.")
@click.option("--base", help="The base of the models (default: the base that `emomerge run RECIPE` made).")
@click.option("--preset", type=click.Choice(["quick", "standard", "full"]), help="How much to measure (default: the recipe's).")
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    metavar="NAME",
    shell_complete=complete_metrics,
    help="Measure only this metric, in addition to losses, distance and, unless the preset is quick, gradient norm; "
    "repeatable (default: those of the recipe). "
    "Metrics that compare models probe the first MODEL and compare it with the others.",
)
@set_option
@executor_option(help="Where models are measured: in this process, or split over workers by metric and direction.")
@parallel_option
@setting_option
@quiet_option
@json_option
def probe(
    recipe: str, models: Sequence[str], out: Path, base: str | None, preset: str | None, metrics: Sequence[str],
    overrides: Sequence[str], executor: EngineName, max_parallel: int | None, settings: Sequence[str], quiet: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Measure MODELS (checkpoints, adapters or run directories) on RECIPE's data: losses and sharpness."""
    from emomerge.cli.templates import open_recipe
    from emomerge.experiment.assessment import probe_models
    from emomerge.progress import Display
    from emomerge.reporting import figures_table

    parsed = open_recipe(recipe, [*overrides, *([f"probe.preset={preset}"] if preset else [])])
    base_folder = Path(base) if base else default_out(parsed.name) / "base"
    engine = engine_of(out, executor, max_parallel, settings)
    display = Display(quiet=quiet)
    results = probe_models(parsed, list(models), base_folder, out, display, metrics or None, engine, workers=max_parallel)
    if as_json:
        click.echo(results.to_json(), nl=False)
    else:
        screen = console()
        screen.print(figures_table(results, screen.width))


@command(
    "report",
    """
    emomerge report out/digits -o digits.html
    emomerge report out/digits out/other-seed -o comparison.html
    """,
    extras=("report",),
)  # fmt: skip
@click.argument("folders", nargs=-1, required=True, type=out_path, metavar="FOLDER...")
@click.option("-o", "--out", type=out_path, help="Output file (default: FOLDER/report.html; of several: comparison.html).")
@force_option
@quiet_option
@json_option
def report(folders: Sequence[Path], out: Path | None, force: bool, quiet: bool, as_json: bool) -> None:
    """Write the report of the results that `emomerge run` wrote to FOLDER; of several FOLDERs, compare them.

    Experiments that were measured on the same test rows are ranked, with intervals; others are shown apart, with the reason.
    """
    from emomerge.checkpoints import atomic
    from emomerge.reporting import next_steps, write_report
    from emomerge.results import load_results

    if len(folders) > 1:
        _compare(folders, out or Path("comparison.html"), force=force, quiet=quiet, as_json=as_json)
        return
    folder = folders[0]
    results = load_results(folder)
    if out is not None:
        atomic.refuse_existing(out, force=force)
    page = write_report(results, out or folder / "report.html")
    if as_json:
        verdict, selected = results.verdict, results.selected
        said = {"verdict": verdict and verdict.sentence, "selected": selected and selected.sentence}
        print_json({"out": str(page), "name": results.name, **said, "advice": next_steps(results)})
    elif not quiet:
        click.echo(shown(page))


def _compare(folders: Sequence[Path], out: Path, *, force: bool, quiet: bool, as_json: bool) -> None:
    """Write the page that compares the experiments in folders, and print the table."""
    from emomerge.checkpoints import atomic
    from emomerge.reporting.comparison import compare, comparison_table, write_comparison
    from emomerge.results import load_results

    if len({folder.resolve() for folder in folders}) < len(folders):
        raise BadInput("a folder is named twice", found=", ".join(map(str, folders)))
    atomic.refuse_existing(out, force=force)
    short = len({folder.resolve().name for folder in folders}) == len(folders)
    found = compare({folder.resolve().name if short else str(folder): load_results(folder) for folder in folders})
    write_comparison(found, out)
    if as_json:
        print_json({**found.model_dump(mode="json"), "out": str(out)})
        return
    screen = console()
    for group in found.groups:
        screen.print(comparison_table(group))
    for line in [*found.advice, *found.notes]:
        screen.print(line, markup=False, highlight=False, soft_wrap=True)
    if not quiet:
        click.echo(shown(out))
