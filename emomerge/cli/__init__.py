"""The command line: one click command a verb, thin: parse, call, print."""

from __future__ import annotations

import functools
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from emomerge.cli import merge  # noqa: F401  (registers its commands)
from emomerge.cli.command import (
    command,
    engine_of,
    executor_option,
    force_option,
    json_option,
    log_option,
    main,
    out_path,
    parallel_option,
    quiet_option,
    set_option,
    setting_option,
    stacking_option,
)  # fmt: skip
from emomerge.cli.printing import console, print_results
from emomerge.errors import BadInput

if TYPE_CHECKING:
    from emomerge.training.engines import EngineName

__all__ = ["main"]


@command(
    "run",
    """
    emomerge run digits
    emomerge run recipes/movie-reviews.yaml -o out/reviews --set runs.steps=200
    emomerge run recipes/movie-reviews.yaml --executor slurm --executor-set slurm_partition=gpu
    """,
    extras=("train", "report"),
)  # fmt: skip
@click.argument("recipe")
@click.option("-o", "--out", type=out_path, help="Output folder (default: out/<name of the recipe>).")
@set_option
@click.option("--restart", "again", is_flag=True, help="Forget what the folder holds and begin anew.")
@executor_option(help="Where runs are trained and models are probed.")
@parallel_option
@stacking_option
@setting_option
@log_option
@quiet_option
@json_option
def run(recipe: str, out: Path | None, overrides: Sequence[str], again: bool, quiet: bool, as_json: bool, **where: Any) -> None:
    """Do every stage of RECIPE: base, train-all, merge, probe, report. Resumes where it was stopped.

    RECIPE is a YAML file or the name of one that comes with emomerge (see `emomerge init`).
    """
    pipeline = _pipeline(recipe, out, overrides, quiet, again=again, where=where)
    todo = _together(pipeline, pipeline.run)
    results = pipeline.results()
    if as_json:
        click.echo(json.dumps(results, indent=2))
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
)  # fmt: skip
@click.argument("recipe")
@click.option("-o", "--out", type=out_path, help="Output folder (default: out/<name of the recipe>).")
@click.option(
    "--only",
    default="",
    metavar="NAMES",
    help="Only these of the recipe's optimizers, separated by commas, such as sens,cats.",
)
@set_option
@executor_option(help="Where runs are trained and models are probed.")
@parallel_option
@stacking_option
@setting_option
@log_option
@quiet_option
@json_option
def train_all(
    recipe: str, out: Path | None, only: str, overrides: Sequence[str], quiet: bool, as_json: bool, **where: Any
) -> None:
    """Train the shallow runs of RECIPE, one for each optimizer, under identical conditions."""
    pipeline = _pipeline(recipe, out, overrides, quiet, where=where)
    chosen = [name.strip() for name in only.split(",") if name.strip()]
    for name in chosen:
        if name not in pipeline.recipe.runs.optimizers:
            raise BadInput(
                "--only names no optimizer of the recipe",
                found=name,
                expected=", ".join(pipeline.recipe.runs.optimizers),
            )
    if not _together(pipeline, functools.partial(pipeline.train_all, chosen)):
        click.echo("Nothing to do: every run is up to date.", err=as_json)
    _print_status(pipeline.space.out, as_json)


@command(
    "probe",
    """
    emomerge probe recipes/digits.yaml out/digits/merges/tall-mask out/digits/runs/sens-0 -o probed
    emomerge probe recipes/digits.yaml out/digits/merges/tall-mask -o probed --preset full --executor ray
    """,
    extras=("train",),
)  # fmt: skip
@click.argument("recipe")
@click.argument("models", nargs=-1, required=True)
@click.option("-o", "--out", type=out_path, required=True, help="Folder for the results and the ledger of evaluations.")
@click.option("--base", help="The base of the models (default: the base that `emomerge run RECIPE` made).")
@click.option("--preset", type=click.Choice(["quick", "standard", "full"]), help="How much to measure (default: the recipe's).")
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    type=click.Choice(["gaussian", "curve", "adaptive", "hessian", "basin", "barriers", "worst-case", "plane", "surface"]),
    help="Only this beside losses, gradient norm and distance; may be given again (default: what the preset holds). "
    "barriers join all MODELS; the plane goes through the base and the first two.",
)
@set_option
@executor_option(help="Who evaluates: this process, or workers, each some directions or one metric of a model.")
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
    base_folder = Path(base) if base else _default_out(parsed.name) / "base"
    engine = engine_of(out, executor, max_parallel, settings)
    results = probe_models(parsed, list(models), base_folder, out, Display(quiet=quiet), metrics or None, engine)
    if as_json:
        click.echo(json.dumps(results, indent=2))
    else:
        screen = console()
        screen.print(figures_table(results, screen.width))


@command("report", "emomerge report out/digits -o digits.html", extras=("report",))
@click.argument("folder", type=out_path)
@click.option("-o", "--out", type=out_path, help="The page to write (default: FOLDER/report.html).")
@force_option
@quiet_option
def report(folder: Path, out: Path | None, force: bool, quiet: bool) -> None:
    """Draw the report of what `emomerge run` left in FOLDER."""
    from emomerge.checkpoints import atomic
    from emomerge.experiment.pipeline import load_results
    from emomerge.reporting import write_report

    results = load_results(folder)
    if out is not None:
        atomic.refuse_existing(out, force=force)
    page = write_report(results, out or folder / "report.html")
    if not quiet:
        click.echo(str(page))


@command(
    "inspect",
    """
    emomerge inspect out/digits/base out/digits/runs/sens-0
    emomerge inspect run-a run-b --base base --top 10
    """,
)  # fmt: skip
@click.argument("path")
@click.argument("other", required=False)
@click.option("--base", help="What PATH and OTHER started from: compare their task vectors instead of their weights.")
@click.option("--top", type=click.IntRange(min=0), default=40, show_default=True, help="Tensors to show; 0 shows all.")
@quiet_option
@json_option
def inspect(path: str, other: str | None, base: str | None, top: int, quiet: bool, as_json: bool) -> None:
    """Say what PATH is (a checkpoint or an adapter); with OTHER, tensor by tensor what differs, the largest first."""
    from emomerge.cli.inspection import compare, describe, show_comparison, show_description

    if other is None:
        if base is not None:
            raise BadInput("--base belongs to a comparison", found=base, fix="name two paths")
        described = describe(path)
        click.echo(json.dumps(described, indent=2)) if as_json else console().print(show_description(described))
    else:
        compared = compare(path, other, base=base)
        click.echo(json.dumps(compared, indent=2)) if as_json else console().print(show_comparison(compared, top=top))


@command("status", "emomerge status out/digits --watch")
@click.argument("folder", type=out_path)
@click.option("--watch", is_flag=True, help="Show it live, as long as anybody works in FOLDER.")
@quiet_option
@json_option
def status(folder: Path, watch: bool, quiet: bool, as_json: bool) -> None:
    """A table of the runs and stages in FOLDER: how far they are, and which machine and process trains each run."""
    if watch and not as_json:
        from emomerge.cli.inspection import watch_status

        watch_status(folder, console())
    else:
        _print_status(folder, as_json)


@command("init", "emomerge init movie-reviews -o my-recipe.yaml")
@click.argument("template", default="digits")
@click.option("-o", "--out", type=out_path, help="Where to write it (default: <template>.yaml).")
@force_option
@quiet_option
def init(template: str, out: Path | None, force: bool, quiet: bool) -> None:
    """Write a commented recipe to start from: digits, movie-reviews, fashion-mnist, causal-lm, flow-fashion or autoencoder."""
    from emomerge.checkpoints import atomic
    from emomerge.cli.templates import template_file

    source = template_file(template)
    target = out or Path(f"{template}.yaml")
    files = {source: target}
    if source.with_suffix(".py").exists():  # of a custom task
        files[source.with_suffix(".py")] = target.with_name(f"{template}.py")
    for place in files.values():
        atomic.refuse_existing(place, force=force)
    for original, place in files.items():
        atomic.write_text(place, original.read_text(encoding="utf-8"))
    if not quiet:
        click.echo(f"{target}: run it with `emomerge run {shlex.quote(str(target))}`")


# Shared by the commands.


def _default_out(name: str) -> Path:
    return Path("out") / name


def _pipeline(
    recipe: str, out: Path | None, overrides: Sequence[str], quiet: bool, *, where: dict[str, Any], again: bool = False
) -> Any:
    if trackers := where.pop("trackers"):
        overrides = [*overrides, f"runs.log_with=[{', '.join(trackers)}]"]
    if parallel := where.pop("parallel"):
        overrides = [*overrides, f"runs.parallel={parallel}"]
    from emomerge.cli.templates import open_recipe
    from emomerge.experiment.pipeline import Pipeline
    from emomerge.progress import Display
    from emomerge.training import join_ranks

    parsed = open_recipe(recipe, overrides)

    folder = out or _default_out(parsed.name)
    if folder.exists() and not folder.is_dir():
        raise BadInput("the output folder is a file", where=folder, fix="choose another -o")
    command = shlex.join(["emomerge", *sys.argv[1:]])
    engine, ranks = engine_of(folder, **where), join_ranks()
    if ranks is not None:
        if engine is not None:
            raise BadInput("torchrun and --executor both spread the work", fix="use one of them")
        parsed = ranks.recipe(parsed)
    follows = ranks is not None and not ranks.leads
    display = Display(quiet=quiet or follows)
    pipeline = Pipeline(parsed, folder, display=display, command=command, engine=engine, ranks=ranks)
    if again and folder.exists() and not follows:
        pipeline.restart()
    return pipeline


def _together(pipeline: Any, function: Callable[[], bool]) -> bool:
    """What the first of several ranks does, or the only process; all others take part in it, and end with it."""
    ranks = pipeline.ranks
    if ranks is None:
        return function()
    if not ranks.leads:
        pipeline.follow()
        ranks.leave()
    done = function()
    ranks.announce(None)
    return done


def _print_status(folder: Path, as_json: bool) -> None:
    from emomerge.cli.inspection import show_status, status_of

    found = status_of(folder)
    click.echo(json.dumps(found, indent=2)) if as_json else console().print(show_status(found))
