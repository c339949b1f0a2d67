"""The commands `run` and `train-all`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from emomerge.cli.command import (
    command,
    default_out,
    engine_of,
    executor_option,
    json_option,
    log_option,
    out_path,
    parallel_option,
    quiet_option,
    set_option,
    setting_option,
    stacking_option,
)  # fmt: skip
from emomerge.cli.completion import complete_recipes
from emomerge.cli.inspect import print_status
from emomerge.cli.printing import console, print_json, print_results
from emomerge.cli.recent import remember
from emomerge.errors import BadInput

if TYPE_CHECKING:
    from emomerge.experiment.pipeline import Pipeline
    from emomerge.training.engines import EngineName


@dataclass(frozen=True)
class Options:
    """Options shared by `run` and `train-all`, named as click passes them."""

    overrides: tuple[str, ...]
    executor: EngineName
    max_parallel: int | None
    settings: tuple[str, ...]
    parallel: str | None
    trackers: tuple[str, ...]
    quiet: bool

    @property
    def recipe_fields(self) -> list[str]:
        """All overrides of recipe fields, including those with a dedicated option."""
        trackers = [f"runs.log_with=[{', '.join(self.trackers)}]"] if self.trackers else []
        parallel = [f"runs.parallel={self.parallel}"] if self.parallel else []
        return [*self.overrides, *trackers, *parallel]


@command(
    "run",
    """
    emomerge run digits
    emomerge run recipes/movie-reviews.yaml -o out/reviews --set runs.steps=200
    emomerge run digits --dry-run
    emomerge run recipes/movie-reviews.yaml --executor slurm --executor-set slurm_partition=gpu
    """,
    extras=("train", "report"),
    resumes=True,
)  # fmt: skip
@click.argument("recipe", shell_complete=complete_recipes)
@click.option("-o", "--out", type=out_path, help="Output folder (default: out/<name of the recipe>).")
@set_option
@click.option("--restart", "again", is_flag=True, help="Delete the output of an earlier run and start from scratch.")
@click.option("--dry-run", "dry", is_flag=True, help="Show the stages, their steps, and what of them is done; do nothing.")
@executor_option(help="Where runs are trained and models are measured.")
@parallel_option
@stacking_option
@setting_option
@log_option
@quiet_option
@json_option
def run(recipe: str, out: Path | None, again: bool, dry: bool, as_json: bool, **options: Any) -> None:
    """Run all stages of RECIPE: base, train-all, merge, probe, report. Resumes an interrupted run.

    RECIPE is a YAML file or the name of a recipe that ships with emomerge (see `emomerge init`).
    """
    pipeline = open_pipeline(recipe, out, Options(**options), restart=again and not dry)
    if dry:
        _print_outline(pipeline, as_json)
        return
    todo = on_all_ranks(pipeline, pipeline.run)
    results = pipeline.results()
    if as_json:
        click.echo(results.to_json(), nl=False)
        return
    if not todo:
        click.echo("Nothing to do: every stage is up to date.")
    print_results(results, pipeline.space.report)


@command(
    "train-all",
    """
    emomerge train-all recipes/movie-reviews.yaml --only sens,cats
    emomerge train-all recipes/movie-reviews.yaml --max-parallel 5
    emomerge train-all recipes/movie-reviews.yaml --executor ray --executor-set num_gpus=1
    """,
    extras=("train",),
    resumes=True,
)  # fmt: skip
@click.argument("recipe", shell_complete=complete_recipes)
@click.option("-o", "--out", type=out_path, help="Output folder (default: out/<name of the recipe>).")
@click.option(
    "--only",
    default="",
    metavar="NAMES",
    help="Train only these of the recipe's optimizers, separated by commas, such as sens,cats.",
)
@set_option
@executor_option(help="Where runs are trained.")
@parallel_option
@stacking_option
@setting_option
@log_option
@quiet_option
@json_option
def train_all(recipe: str, out: Path | None, only: str, as_json: bool, **options: Any) -> None:
    """Train the shallow runs of RECIPE, one per optimizer, under identical conditions."""
    pipeline = open_pipeline(recipe, out, Options(**options))
    chosen = [name.strip() for name in only.split(",") if name.strip()]
    for name in chosen:
        if name not in pipeline.recipe.runs.optimizers:
            expected = ", ".join(pipeline.recipe.runs.optimizers)
            raise BadInput("--only names no optimizer of the recipe", found=name, expected=expected)
    if not on_all_ranks(pipeline, lambda: pipeline.train_all(chosen)):
        click.echo("Nothing to do: every run is up to date.", err=as_json)
    print_status(pipeline.space.out, as_json)


def _print_outline(pipeline: Pipeline, as_json: bool) -> None:
    from emomerge.experiment.outline import outline_table

    found = pipeline.plan()
    if as_json:
        print_json(found)
    else:
        console().print(outline_table(found))


def open_pipeline(recipe: str, out: Path | None, options: Options, *, restart: bool = False) -> Pipeline:
    """Return the pipeline of a recipe in its output folder, emptied if `restart` is set."""
    from emomerge.cli.templates import open_recipe
    from emomerge.experiment.pipeline import Pipeline
    from emomerge.progress import Display
    from emomerge.training import join_ranks

    parsed = open_recipe(recipe, options.recipe_fields)
    folder = out or default_out(parsed.name)
    if folder.exists() and not folder.is_dir():
        raise BadInput("the output folder is a file", where=folder, fix="choose another -o")
    line = shlex.join(["emomerge", *sys.argv[1:]])
    engine, ranks = engine_of(folder, options.executor, options.max_parallel, options.settings), join_ranks()
    if ranks is not None:
        if engine is not None:
            raise BadInput("torchrun and --executor both distribute the work", fix="use one of them")
        parsed = ranks.recipe(parsed)
    follows = ranks is not None and not ranks.leads
    remember(folder)
    display = Display(quiet=options.quiet or follows)
    pipeline = Pipeline(parsed, folder, display=display, command=line, engine=engine, ranks=ranks, workers=options.max_parallel)
    if restart and folder.exists() and not follows:
        pipeline.restart()
    return pipeline


def on_all_ranks(pipeline: Pipeline, function: Callable[[], bool]) -> bool:
    """Call a function on the first rank or in the only process; other ranks take part in its training, then exit as well."""
    ranks = pipeline.ranks
    if ranks is None:
        return function()
    if not ranks.leads:
        pipeline.follow()
        ranks.leave()
    done = function()
    ranks.announce(None)
    return done
