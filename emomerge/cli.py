"""The command line: one click command a verb, thin: parse, call, print.

Exit status: 0 done, 1 a failure inside the work, 2 bad input. Heavy libraries are imported inside the commands, so that
`--help` answers at once.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from emomerge.errors import BadInput, EmomergeError

out_path = click.Path(path_type=Path)


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


def _guard(function: Callable[..., None]) -> Callable[..., None]:
    """Every expected error becomes one line and its exit status."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        from emomerge.checkpoints.atomic import translate_os_error

        try:
            with translate_os_error(kwargs.get("out") or Path.cwd()):
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
force_option = click.option("--force", is_flag=True, help="Replace an output that exists.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="emomerge")
def main() -> None:
    """Train five short runs with loss-driven learning rates, merge them into one model, and measure what that brings.

    Start with `emomerge run digits`, which needs no download.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@_verb(
    main, "run",
    """
    emomerge run digits
    emomerge run recipes/movie-reviews.yaml -o out/reviews --set runs.steps=200
    """,
)  # fmt: skip
@click.argument("recipe")
@click.option("-o", "--out", type=out_path, help="Output folder (default: out/<name of the recipe>).")
@set_option
@click.option("--restart", "again", is_flag=True, help="Forget what the folder holds and begin anew.")
@quiet_option
@json_option
def run(recipe: str, out: Path | None, overrides: Sequence[str], again: bool, quiet: bool, as_json: bool) -> None:
    """Do every stage of RECIPE: base, train-all, merge, probe, report. Resumes where it was stopped.

    RECIPE is a YAML file or the name of one that comes with emomerge (see `emomerge init`).
    """
    pipeline = _pipeline(recipe, out, overrides, quiet, again=again)
    todo = pipeline.run()
    results = pipeline.results()
    if as_json:
        click.echo(json.dumps(results, indent=2))
        return
    if not todo:
        click.echo("Nothing to do: every stage is up to date.")
    _print_results(results, pipeline.space.report)


@_verb(main, "train-all", "emomerge train-all recipes/movie-reviews.yaml --only sens,cats")
@click.argument("recipe")
@click.option("-o", "--out", type=out_path, help="Output folder (default: out/<name of the recipe>).")
@click.option(
    "--only",
    default="",
    metavar="NAMES",
    help="Only these optimizers, separated by commas: sens, airy, cats, tion, void.",
)
@set_option
@quiet_option
@json_option
def train_all(recipe: str, out: Path | None, only: str, overrides: Sequence[str], quiet: bool, as_json: bool) -> None:
    """Train the shallow runs of RECIPE, one for each optimizer, under identical conditions."""
    pipeline = _pipeline(recipe, out, overrides, quiet)
    chosen = [name.strip() for name in only.split(",") if name.strip()]
    for name in chosen:
        if name not in pipeline.recipe.runs.optimizers:
            raise BadInput(
                "--only names no optimizer of the recipe",
                found=name,
                expected=", ".join(pipeline.recipe.runs.optimizers),
            )
    if not pipeline.train_all(chosen):
        click.echo("Nothing to do: every run is up to date.", err=as_json)
    _print_status(pipeline.space.out, as_json)


@_verb(main, "bake", "emomerge bake out/digits/base out/digits/runs/sens-0/adapter -o baked.safetensors")
@click.argument("base")
@click.argument("adapter")
@click.option("-o", "--out", type=out_path, required=True, help="A folder, or one file ending in .safetensors.")
@click.option("--dtype", type=click.Choice(["base", "float32", "bfloat16", "float16"]), default="base", show_default=True)
@click.option("--max-shard-size", default="5GB", show_default=True)
@click.option(
    "--allow-unmatched",
    is_flag=True,
    help="Warn about adapter tensors that BASE has no place for, instead of refusing.",
)
@force_option
@quiet_option
def bake(
    base: str, adapter: str, out: Path, dtype: str, max_shard_size: str, allow_unmatched: bool, force: bool, quiet: bool
) -> None:
    """Write BASE with ADAPTER merged into its weights: computed in float32, rounded once."""
    from emomerge import adapters
    from emomerge.checkpoints import open_checkpoint

    opened = open_checkpoint(base)
    baked = adapters.bake(opened, adapter, allow_unmatched=allow_unmatched)
    record = {"title": out.stem, "about": f"`{adapter}` merged into the weights of its base.", "base": base}
    _write(
        baked, opened, out, "bake", dtype=dtype, max_shard_size=max_shard_size, force=force, quiet=quiet,
        papers=lambda: {"README.md": _card(record)},
    )  # fmt: skip
    click.echo(str(out))


@_verb(
    main, "merge",
    """
    emomerge merge base runs/sens-0 runs/airy-0 runs/cats-0 --method tall-mask -o merged
    emomerge merge base run-a run-b --method ties --density 0.3 -o merged.safetensors
    emomerge merge base run-a run-b --method slerp --set 't=[0.2, 0.8]' -o merged
    emomerge merge --config mergekit.yaml -o merged
    """,
)  # fmt: skip
@click.argument("base", required=False)
@click.argument("runs", nargs=-1)
@click.option("--config", type=out_path, help="A mergekit configuration, instead of BASE, RUNS and --method.")
@click.option("--method", help="How to merge (default: tall-mask): any of the methods below.")
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
@click.option("--seed", type=int, help="dare, della: of the random masks.")
@click.option("--dtype", type=click.Choice(["base", "float32", "bfloat16", "float16"]), help="What is written (default: base).")
@click.option("--max-shard-size", default="5GB", show_default=True)
@click.option("--recipe", "recipe_path", help="A recipe whose validation data decides what is `auto`, and greedy-soup.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="A parameter of the method, in YAML: one number, a list spread over the layers, or a list of {filter, value}; "
    "with --recipe also a field of the recipe.",
)
@force_option
@quiet_option
@json_option
def merge(
    base: str | None, runs: Sequence[str], config: Path | None, method: str | None, out: Path, weights: Sequence[float],
    scale: str | None, density: float | None, lambda_: str | None, k: int | None, reference: str | None,
    preset: str | None, trim: str | None, aggregate: str | None, seed: int | None, dtype: str | None,
    max_shard_size: str, recipe_path: str | None, overrides: Sequence[str], force: bool, quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Merge RUNS (dense checkpoints, adapters or run directories) into BASE.

    Methods: mean, task-arithmetic, greedy-soup, fisher; ties, dare-linear, dare-ties, della, della-linear, breadcrumbs,
    breadcrumbs-ties, sce; tall-mask; model-stock, slerp, nuslerp, karcher, multislerp; tsv, iso-c.
    """
    from emomerge import merging
    from emomerge.checkpoints import open_checkpoint

    given = {
        "weights": list(weights) or None, "scale": _number("--scale", scale), "density": density,
        "lambda_": _number("--lambda", lambda_), "k": k, "reference": reference, "preset": preset, "trim": trim,
        "aggregate": aggregate, "seed": seed,
    }  # fmt: skip
    given = {key: value for key, value in given.items() if value is not None}
    if config is not None:
        base, runs, method, configured, dtype = _configured(config, base, method, dtype)
        given = configured | given
    if base is None or not runs:
        raise BadInput("merge needs BASE and RUNS, or --config", found="no BASE" if base is None else "no RUNS")
    method = method or "tall-mask"
    parameters, overrides = _split_overrides(method, overrides, recipe_path)
    params = merging.check_params(method, given | parameters)
    opened = open_checkpoint(base)
    evaluator = None if recipe_path is None else _evaluator(recipe_path, overrides, opened)
    merged = merging.merge(opened, list(runs), method=method, held_out_loss=evaluator, **params)
    record = {"method": method, "params": params, "base": base, "runs": [{"name": run, "source": run} for run in runs]}

    def papers() -> dict[str, str]:
        return _merge_papers(record, merged.diagnostics(), out)

    _write(
        merged,
        opened,
        out,
        f"merge {method}",
        dtype=dtype or "base",
        max_shard_size=max_shard_size,
        force=force,
        quiet=quiet,
        papers=papers,
    )
    diagnostics = merged.diagnostics()
    if as_json:
        click.echo(json.dumps({**record, "out": str(out), "diagnostics": diagnostics}, indent=2))
        return
    _print_diagnostics(diagnostics)
    click.echo(str(out))


@_verb(main, "probe", "emomerge probe recipes/digits.yaml out/digits/merges/tall-mask out/digits/runs/sens-0 -o probed")
@click.argument("recipe")
@click.argument("models", nargs=-1, required=True)
@click.option("-o", "--out", type=out_path, required=True, help="Folder for the results and the ledger of evaluations.")
@click.option("--base", help="The base of the models (default: the base that `emomerge run RECIPE` made).")
@click.option("--preset", type=click.Choice(["quick"]), help="How much to measure.")
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    type=click.Choice(["gaussian", "curve"]),
    help="Only this beside losses, gradient norm and distance; may be given twice (default: both).",
)
@set_option
@quiet_option
@json_option
def probe(
    recipe: str, models: Sequence[str], out: Path, base: str | None, preset: str | None, metrics: Sequence[str],
    overrides: Sequence[str], quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Measure MODELS (checkpoints, adapters or run directories) on RECIPE's data: losses and sharpness."""
    from emomerge.measure import METRICS, probe_models
    from emomerge.progress import Display
    from emomerge.reporting import figures_table

    settings = [*overrides, *([f"probe.preset={preset}"] if preset else [])]
    parsed = _load(recipe, settings)
    base_folder = Path(base) if base else _default_out(parsed.name) / "base"
    results = probe_models(parsed, list(models), base_folder, out, Display(quiet=quiet), metrics or METRICS)
    if as_json:
        click.echo(json.dumps(results, indent=2))
    else:
        _console().print(figures_table(results))


@_verb(main, "report", "emomerge report out/digits -o digits.html")
@click.argument("folder", type=out_path)
@click.option("-o", "--out", type=out_path, help="The page to write (default: FOLDER/report.html).")
@force_option
@quiet_option
def report(folder: Path, out: Path | None, force: bool, quiet: bool) -> None:
    """Draw the report of what `emomerge run` left in FOLDER."""
    from emomerge.checkpoints import atomic
    from emomerge.pipeline import load_results
    from emomerge.reporting import write_report

    results = load_results(folder)
    if out is not None:
        atomic.refuse_existing(out, force=force)
    page = write_report(results, out or folder / "report.html")
    if not quiet:
        click.echo(str(page))


@_verb(main, "inspect", "emomerge inspect out/digits/base out/digits/runs/sens-0")
@click.argument("path")
@click.argument("other", required=False)
@quiet_option
@json_option
def inspect(path: str, other: str | None, quiet: bool, as_json: bool) -> None:
    """Say what PATH is (a checkpoint or an adapter); with OTHER, tensor by tensor what differs."""
    from emomerge.inspection import compare, describe, show_comparison, show_description

    if other is None:
        described = describe(path)
        click.echo(json.dumps(described, indent=2)) if as_json else _console().print(show_description(described))
    else:
        compared = compare(path, other)
        click.echo(json.dumps(compared, indent=2)) if as_json else _console().print(show_comparison(compared))


@_verb(main, "status", "emomerge status out/digits")
@click.argument("folder", type=out_path)
@quiet_option
@json_option
def status(folder: Path, quiet: bool, as_json: bool) -> None:
    """A table of the runs and stages in FOLDER."""
    _print_status(folder, as_json)


@_verb(main, "init", "emomerge init movie-reviews -o my-recipe.yaml")
@click.argument("template", default="digits")
@click.option("-o", "--out", type=out_path, help="Where to write it (default: <template>.yaml).")
@force_option
@quiet_option
def init(template: str, out: Path | None, force: bool, quiet: bool) -> None:
    """Write a commented recipe to start from: digits, movie-reviews or fashion-mnist."""
    from emomerge.checkpoints import atomic

    text = _template(template).read_text(encoding="utf-8")
    target = out or Path(f"{template}.yaml")
    atomic.refuse_existing(target, force=force)
    atomic.write_text(target, text)
    if not quiet:
        click.echo(f"{target}: run it with `emomerge run {shlex.quote(str(target))}`")


# Shared by the commands.


def _templates() -> dict[str, Path]:
    """Name → file of the recipes that come with emomerge (in the package, or beside it in a checkout)."""
    package = Path(__file__).parent
    folders = [package / "recipes", package.parent / "recipes"]
    return {file.stem: file for folder in folders if folder.is_dir() for file in sorted(folder.glob("*.yaml"))}


def _template(name: str) -> Path:
    known = _templates()
    if name not in known:
        raise BadInput("no such recipe comes with emomerge", found=name, expected=", ".join(sorted(known)))
    return known[name]


def _load(recipe: str, overrides: Sequence[str]) -> Any:
    from emomerge.recipe import load_recipe

    known = _templates()
    path = known[recipe] if recipe in known and not Path(recipe).exists() else Path(recipe)
    return load_recipe(path, overrides)


def _default_out(name: str) -> Path:
    return Path("out") / name


def _pipeline(recipe: str, out: Path | None, overrides: Sequence[str], quiet: bool, *, again: bool = False) -> Any:
    parsed = _load(recipe, overrides)
    from emomerge.pipeline import Pipeline
    from emomerge.progress import Display

    folder = out or _default_out(parsed.name)
    if folder.exists() and not folder.is_dir():
        raise BadInput("the output folder is a file", where=folder, fix="choose another -o")
    pipeline = Pipeline(parsed, folder, display=Display(quiet=quiet), command=shlex.join(["emomerge", *sys.argv[1:]]))
    if again and folder.exists():
        pipeline.restart()
    return pipeline


def _number(option: str, text: str | None) -> float | str | None:
    if text is None or text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise BadInput(f"{option} is a number or `auto`", found=repr(text)) from None


def _configured(
    config: Path, base: str | None, method: str | None, dtype: str | None
) -> tuple[str, Sequence[str], str, dict[str, Any], str]:
    """Base, runs, method, parameters and dtype of a mergekit configuration; a dtype that is given counts."""
    from emomerge.merging.mergekit import read_config

    if base is not None or method is not None:
        raise BadInput("--config says what is merged, and how", found=base or f"--method {method}", fix="leave that out")
    merge = read_config(config)
    return merge.base, merge.runs, merge.method, merge.params, dtype or merge.dtype


def _split_overrides(method: str, overrides: Sequence[str], recipe: str | None) -> tuple[dict[str, Any], list[str]]:
    """Those of `--set` that are parameters of the method, as data, and those that are fields of the recipe."""
    import yaml

    from emomerge.merging import find_method

    known = {field.alias or name for name, field in find_method(method).schema.model_fields.items()}
    parameters, others = {}, []
    for override in overrides:
        key, sign, text = override.partition("=")
        if sign and (key in known or recipe is None):
            try:
                parameters[key] = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise BadInput("--set wants KEY=VALUE in YAML", where=key, found=error) from None
        elif recipe is None:
            raise BadInput("--set wants KEY=VALUE", found=repr(override))
        else:
            others.append(override)
    return parameters, others


def _evaluator(recipe: str, overrides: Sequence[str], base: Any) -> Any:
    """Validation loss of any weights, by a recipe's task."""
    from emomerge.measure import Measurer, choose_device
    from emomerge.tasks import make_task

    parsed = _load(recipe, overrides)
    if base.folder is None:
        raise BadInput("--recipe needs a BASE folder with its config", found=base.source)
    task = make_task(parsed.task)
    data = task.load_data(parsed.base)
    return Measurer(parsed, task, data, base, base.folder, "base", choose_device(parsed.device), None).held_out_loss


def _write(
    checkpoint: Any, base: Any, out: Path, title: str, *, dtype: str, max_shard_size: str, force: bool, quiet: bool,
    papers: Callable[[], dict[str, str]] | None = None,
) -> None:  # fmt: skip
    from emomerge.checkpoints import write_checkpoint
    from emomerge.progress import Display

    display = Display(quiet=quiet)
    with display.live():
        line = display.line(title, len(checkpoint))
        write_checkpoint(
            checkpoint, out, dtype=dtype, max_shard_size=max_shard_size, files_from=base.folder, extra_files=papers or {},
            force=force, progress=lambda name, _: line.add(1, name),
        )  # fmt: skip


def _merge_papers(record: dict[str, Any], diagnostics: dict[str, Any], out: Path) -> dict[str, str]:
    context = {**record, "title": out.stem, "name": out.stem, "diagnostics": diagnostics, "params": diagnostics["params"]}
    return {"merge.json": json.dumps({**record, "diagnostics": diagnostics}, indent=2) + "\n", "README.md": _card(context)}


def _card(context: dict[str, Any]) -> str:
    from importlib.metadata import version

    from emomerge.reporting import model_card

    return model_card({**context, "command": shlex.join(["emomerge", *sys.argv[1:]]), "version": version("emomerge")})


def _console() -> Any:
    from rich.console import Console

    return Console()


def _print_results(results: dict[str, Any], report: Path) -> None:
    from emomerge.reporting import figures_table

    console = _console()
    console.print(figures_table(results))
    for name, warning in ((name, w) for name, facts in results["merges"].items() for w in facts.get("warnings", [])):
        console.print(f"Warning, {name}: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    console.print(results["verdict"]["sentence"], style="bold", markup=False, highlight=False, soft_wrap=True)
    for caveat in results["verdict"]["caveats"]:
        console.print(f"  {caveat}", markup=False, highlight=False, soft_wrap=True)
    if results["selected"]:
        console.print(results["selected"]["sentence"], markup=False, highlight=False, soft_wrap=True)
    click.echo(f"Report: {report}")


def _print_diagnostics(diagnostics: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for key, value in diagnostics.items():
        if isinstance(value, (int, float, str)):
            table.add_row(key, f"{value:.4g}" if isinstance(value, float) else str(value))
        elif isinstance(value, dict):
            shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in value.items())
            table.add_row(key, shown)
    _console().print(table)
    for warning in diagnostics.get("warnings", []):
        click.echo(f"Warning: {warning}", err=True)


def _print_status(folder: Path, as_json: bool) -> None:
    from emomerge.inspection import show_status, status_of

    found = status_of(folder)
    click.echo(json.dumps(found, indent=2)) if as_json else _console().print(show_status(found))
