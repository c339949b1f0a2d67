"""The command line: one click command a verb, thin: parse, call, print.

Exit status: 0 done, 1 a failure inside the work, 2 bad input. Heavy libraries are imported inside the commands, so that
`--help` answers at once.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from emomerge.cli.printing import console, print_results, print_rounding
from emomerge.errors import BadInput, EmomergeError

if TYPE_CHECKING:
    from emomerge.training.engines import Engine, EngineName

out_path = click.Path(path_type=Path)
DTYPES = click.Choice(["base", "float32", "bfloat16", "float16"])


class Verb(click.Command):
    """A command whose help ends with an example."""

    def __init__(self, *args: Any, example: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.example = example

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Print the example as it is typed."""
        if self.example:
            with formatter.section("Example"):
                for line in self.example.strip().splitlines():
                    formatter.write_text(line.strip())


def _fail(error: EmomergeError) -> NoReturn:
    click.echo(f"emomerge: {error}", err=True)
    sys.exit(error.exit_status)


@contextlib.contextmanager
def _explained(where: Path) -> Iterator[None]:
    """`translate_os_error`, imported, and torch with it, only where there is an error."""
    try:
        yield
    except Exception:
        from emomerge.checkpoints.atomic import translate_os_error

        with translate_os_error(where):
            raise


def _guard(function: Callable[..., None]) -> Callable[..., None]:
    """Every expected error becomes one line and its exit status."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            with _explained(kwargs.get("out") or Path.cwd()):
                function(*args, **kwargs)
        except EmomergeError as error:
            _fail(error)
        except KeyboardInterrupt:
            click.echo("emomerge: interrupted; the same command resumes", err=True)
            sys.exit(130)

    return guarded


def _verb(group: click.Group, name: str, example: str) -> Callable[[Callable[..., None]], click.Command]:
    def decorate(function: Callable[..., None]) -> click.Command:
        return group.command(name, cls=Verb, example=example)(_guard(function))

    return decorate


quiet_option = click.option("--quiet", is_flag=True, help="Show nothing but errors and results.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print figures as JSON on the standard output.")
set_option = click.option("--set", "overrides", multiple=True, metavar="KEY.SUB=VALUE", help="Override a field of the recipe.")
stacking_option = click.option(
    "--parallel",
    type=click.Choice(["auto", "stacked", "sequential"]),
    help="All adapters in one pass over the base, or one run after the other (default: the recipe's runs.parallel).",
)
rounding_option = click.option(
    "--rounding",
    type=click.Choice(["nearest", "stochastic"]),
    default="nearest",
    show_default=True,
    help="To bfloat16 and float16: to the nearest value, or up or down at random, exact in the mean (see --seed).",
)
executor_option = functools.partial(
    click.option, "--executor", type=click.Choice(["local", "ray", "slurm"]), default="local", show_default=True
)
parallel_option = click.option(
    "--max-parallel", type=click.IntRange(min=1), help="Workers at a time (default: local one, elsewhere all)."
)
setting_option = click.option(
    "--executor-set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="What the executor shall know: num_gpus=1 for Ray's tasks; slurm_partition=gpu, timeout_min=60 for submitit.",
)
log_option = click.option(
    "--log-with",
    "trackers",
    multiple=True,
    type=click.Choice(["tensorboard", "wandb", "trackio"]),
    help="Log every step there as well; short for --set runs.log_with=[…].",
)
force_option = click.option("--force", is_flag=True, help="Replace an output that exists.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="emomerge")
def main() -> None:
    """Train five short runs with loss-driven learning rates, merge them into one model, and measure what that brings.

    Start with `emomerge run digits`, which needs no download.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is imported


@_verb(
    main, "run",
    """
    emomerge run digits
    emomerge run recipes/movie-reviews.yaml -o out/reviews --set runs.steps=200
    emomerge run recipes/movie-reviews.yaml --executor slurm --executor-set slurm_partition=gpu
    """,
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


@_verb(
    main, "train-all",
    """
    emomerge train-all recipes/movie-reviews.yaml --only sens,cats
    emomerge train-all recipes/movie-reviews.yaml --max-parallel 5
    emomerge train-all recipes/movie-reviews.yaml --executor ray --executor-set num_gpus=1
    """,
)  # fmt: skip
@click.argument("recipe")
@click.option("-o", "--out", type=out_path, help="Output folder (default: out/<name of the recipe>).")
@click.option(
    "--only",
    default="",
    metavar="NAMES",
    help="Only these optimizers, separated by commas: sens, airy, cats, tion, void.",
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


@_verb(
    main, "bake",
    """
    emomerge bake out/digits/base out/digits/runs/sens-0/adapter -o baked.safetensors
    emomerge bake base run --dtype bfloat16 --rounding stochastic --seed 1 -o baked
    """,
)  # fmt: skip
@click.argument("base")
@click.argument("adapter")
@click.option("-o", "--out", type=out_path, required=True, help="A folder, or one file ending in .safetensors.")
@click.option("--dtype", type=DTYPES, default="base", show_default=True)
@rounding_option
@click.option("--seed", type=int, default=0, show_default=True, help="Of stochastic rounding.")
@click.option("--max-shard-size", default="5GB", show_default=True)
@click.option(
    "--allow-unmatched",
    is_flag=True,
    help="Warn about adapter tensors that BASE has no place for, instead of refusing.",
)
@force_option
@quiet_option
def bake(
    base: str, adapter: str, out: Path, dtype: str, rounding: str, seed: int, max_shard_size: str, allow_unmatched: bool,
    force: bool, quiet: bool,
) -> None:  # fmt: skip
    """Write BASE with ADAPTER merged into its weights: computed in float32, rounded once."""
    from emomerge import adapters
    from emomerge.checkpoints import open_checkpoint
    from emomerge.cli.merge_command import only_a_card, write_model
    from emomerge.merging.record import Output

    opened = open_checkpoint(base)
    baked = adapters.bake(opened, adapter, allow_unmatched=allow_unmatched)
    context = {"title": out.stem, "about": f"`{adapter}` merged into the weights of its base.", "base": base}
    output = Output(dtype=dtype, rounding=rounding, seed=seed, max_shard_size=max_shard_size)
    lost = write_model(baked, opened, out, "bake", output, force=force, quiet=quiet, papers=lambda _: only_a_card(context))
    if not quiet:
        print_rounding(lost)
    click.echo(str(out))


@_verb(
    main, "merge",
    """
    emomerge merge base runs/sens-0 runs/airy-0 runs/cats-0 --method tall-mask -o merged
    emomerge merge base run-a run-b --method ties --density 0.3 -o merged.safetensors
    emomerge merge base run-a run-b --method slerp --set 't=[0.2, 0.8]' -o merged
    emomerge merge base run-a run-b --dtype bfloat16 --rounding stochastic --seed 1 -o merged
    emomerge merge base run-a run-b --method mean --as-lora auto --energy 0.99 -o adapter
    emomerge merge base run-a run-b --save-masks -o merged
    emomerge merge --config mergekit.yaml -o merged
    emomerge merge --again merged/merge.json -o same
    emomerge merge --extend merged run-c -o of-three
    """,
)  # fmt: skip
@click.argument("base", required=False)
@click.argument("runs", nargs=-1)
@click.option("--config", type=out_path, help="A mergekit configuration, instead of BASE, RUNS and --method.")
@click.option("--again", type=out_path, metavar="MERGE.JSON", help="Repeat the merge that this records, instead of all else.")
@click.option(
    "--extend", type=out_path, metavar="FOLDER", help="Repeat the merge in FOLDER with RUNS besides its own; no BASE."
)
@click.option("--method", help="How to merge (default: tall-mask): any of the methods above.")
@click.option("-o", "--out", type=out_path, required=True, help="A folder, or one file ending in .safetensors.")
@click.option("--weight", "weights", type=float, multiple=True, help="Weight of a run; give one for each run, in their order.")
@click.option("--scale", help="Factor on the merged task vector, or `auto` (needs --recipe).")
@click.option("--density", type=float, help="ties, dare, della, breadcrumbs: the share of each task vector that is kept.")
@click.option("--lambda", "lambda_", help="tall-mask: λ, or `auto` (needs --recipe).")
@click.option("--k", type=int, help="tall-mask: runs that must agree on a weight.")
@click.option("--reference", type=click.Choice(["mean", "sum", "ties"]), help="tall-mask: what the masks are measured against.")
@click.option("--preset", type=click.Choice(["paper", "mergekit", "peft"]), help="ties: whose reading of the method.")
@click.option("--trim", type=click.Choice(["global", "tensor", "touched"]), help="ties: over what the density is taken.")
@click.option("--aggregate", help="ties, dare, della, breadcrumbs: mean, sum, count or max of agreeing weights.")
@click.option("--seed", type=int, help="dare, della: of the random masks; --rounding stochastic: of its draws (default: 0).")
@click.option("--dtype", type=DTYPES, help="What is written (default: base; of an adapter float32).")
@rounding_option
@click.option("--max-shard-size", default="5GB", show_default=True)
@click.option(
    "--save-masks",
    is_flag=True,
    help="tall-mask: keep each run's mask and their reference in OUT/masks, for `emomerge reconstruct`.",
)
@click.option(
    "--as-lora",
    metavar="RANK|auto",
    help="Write a PEFT adapter of this rank instead of a model; auto: of the smallest that captures --energy, by layer.",
)
@click.option("--energy", type=float, help="--as-lora auto: share of each layer's squared length (default: 0.99).")
@click.option("--max-rank", type=int, help="--as-lora auto: the largest rank (default: 256).")
@click.option("--allow-partial", is_flag=True, help="--as-lora: leave out and list what no adapter holds: biases, norms, …")
@click.option("--recipe", "recipe_path", help="A recipe; its validation data decides what is `auto`, greedy-soup, positioning.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="A parameter of the method, in YAML: one number, a list spread over the layers, or a list of {filter, value}; "
    "with --recipe also a field of the recipe.",
)
@click.option("--device", default="cpu", show_default=True, help="Where tensors are merged: cpu, cuda, auto …")
@executor_option(help="Who writes the files, where --max-shard-size makes several: this process, or a worker each.")
@setting_option
@force_option
@quiet_option
@json_option
def merge(
    out: Path, base: str | None, runs: Sequence[str], again: Path | None, extend: Path | None, weights: Sequence[float],
    device: str, executor: EngineName, settings: Sequence[str], force: bool, quiet: bool, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Merge RUNS (dense checkpoints, adapters or run directories) into BASE.

    Methods: mean, task-arithmetic, greedy-soup, positioning, fisher; ties, dare-linear, dare-ties, della, della-linear,
    breadcrumbs, breadcrumbs-ties, sce; tall-mask; model-stock, slerp, nuslerp, karcher, multislerp; tsv, iso-c.
    """
    from emomerge.numerics.hashing import Digests, weight_files

    given = [*([base] if base else []), *runs]
    digest = Digests(file for source in given for file in weight_files(source))  # while torch is being imported
    from emomerge.cli.merge_command import asked_for, merge_record, recorded

    if again is not None or extend is not None:
        record = recorded(again, extend, given, weights)
    else:
        record = asked_for(base, runs, weights, **options)
    engine = _engine(out.parent, executor, None, settings) if settings or executor != "local" else None
    merge_record(record, out, digest, device=device, engine=engine, force=force, quiet=quiet, as_json=as_json)


@_verb(
    main, "reconstruct",
    """
    emomerge merge base runs/sens-0 runs/cats-0 --method tall-mask --save-masks -o merged
    emomerge reconstruct merged sens-0 -o sens-0-again
    """,
)  # fmt: skip
@click.argument("folder", type=out_path)
@click.argument("run")
@click.option("-o", "--out", type=out_path, required=True, help="A folder, or one file ending in .safetensors.")
@click.option("--dtype", type=DTYPES, default="base", show_default=True)
@rounding_option
@click.option("--seed", type=int, default=0, show_default=True, help="Of stochastic rounding.")
@click.option("--max-shard-size", default="5GB", show_default=True)
@force_option
@quiet_option
def reconstruct(
    folder: Path, run: str, out: Path, dtype: str, rounding: str, seed: int, max_shard_size: str, force: bool, quiet: bool
) -> None:
    """Turn the masks that `merge --save-masks` left in FOLDER back into the single run RUN: base + mask ⊙ reference."""
    from emomerge.checkpoints import open_checkpoint
    from emomerge.cli.merge_command import only_a_card, write_model
    from emomerge.merging import masks
    from emomerge.merging.record import Output, read_record

    record = read_record(folder)
    record.check_base()
    base = open_checkpoint(record.base)
    rebuilt = masks.reconstruct(folder, run, base)
    context = {"title": out.stem, "about": f"{run}, reconstructed from the masks in {folder}.", "base": record.base}
    output = Output(dtype=dtype, rounding=rounding, seed=seed, max_shard_size=max_shard_size)
    write_model(
        rebuilt, base, out, f"reconstruct {run}", output, force=force, quiet=quiet, papers=lambda _: only_a_card(context)
    )
    click.echo(str(out))


@_verb(
    main, "probe",
    """
    emomerge probe recipes/digits.yaml out/digits/merges/tall-mask out/digits/runs/sens-0 -o probed
    emomerge probe recipes/digits.yaml out/digits/merges/tall-mask -o probed --preset full --executor ray
    """,
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
    engine = _engine(out, executor, max_parallel, settings)
    results = probe_models(parsed, list(models), base_folder, out, Display(quiet=quiet), metrics or None, engine)
    if as_json:
        click.echo(json.dumps(results, indent=2))
    else:
        screen = console()
        screen.print(figures_table(results, screen.width))


@_verb(main, "report", "emomerge report out/digits -o digits.html")
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


@_verb(
    main, "inspect",
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


@_verb(main, "status", "emomerge status out/digits --watch")
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


@_verb(main, "init", "emomerge init movie-reviews -o my-recipe.yaml")
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
    engine, ranks = _engine(folder, **where), join_ranks()
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


def _engine(folder: Path, executor: EngineName, max_parallel: int | None, settings: Sequence[str]) -> Engine | None:
    import yaml

    from emomerge.experiment.workspace import Workspace
    from emomerge.training import open_engine

    given = {}
    for setting in settings:
        key, sign, text = setting.partition("=")
        if not sign:
            raise BadInput("--executor-set wants KEY=VALUE", found=repr(setting))
        given[key] = yaml.safe_load(text)
    return open_engine(executor, max_parallel=max_parallel, settings=given, folder=Workspace(folder).slurm)


def _print_status(folder: Path, as_json: bool) -> None:
    from emomerge.cli.inspection import show_status, status_of

    found = status_of(folder)
    click.echo(json.dumps(found, indent=2)) if as_json else console().print(show_status(found))
