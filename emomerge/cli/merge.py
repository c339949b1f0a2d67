"""The commands that merge runs: merge, reconstruct."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from emomerge.cli.command import (
    DTYPES,
    Command,
    command,
    engine_of,
    executor_option,
    fail,
    force_option,
    json_option,
    out_path,
    quiet_option,
    rounding_option,
    setting_option,
)
from emomerge.cli.completion import complete_methods
from emomerge.cli.printing import print_diagnostics, print_json, print_rounding, print_truncation
from emomerge.cli.templates import open_recipe
from emomerge.cli.write import Destination, card_only, header_of, merge_card, write_adapter, write_model
from emomerge.errors import BadInput, shown
from emomerge.watch import watched_inputs

if TYPE_CHECKING:
    from emomerge.checkpoints import Checkpoint
    from emomerge.experiment.measure import Measurer
    from emomerge.merging.record import MergeRecord, Output
    from emomerge.training.engines import Engine, EngineName


class MergeCommand(Command):
    """A command that suggests --set if a parameter of a merge method is given as an option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments; suggest --set for unknown options that are parameters of a method."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            from emomerge.merging import METHODS

            name = error.option_name.lstrip("-").replace("-", "_")
            if any(parameter.name == name for method in METHODS.values() for parameter in method.parameters):
                what = "a parameter of a merge method is not an option"
                found = BadInput(what, found=error.option_name, fix=f"write `--set {name}=VALUE`")
                fail(found, as_json="--json" in ctx.args or "--json" in args)
            raise


@command(
    "merge",
    """
    emomerge merge base runs/sens-0 runs/airy-0 runs/cats-0 --method tall-mask -o merged
    emomerge merge base run-a run-b --method ties --density 0.3 -o merged.safetensors
    emomerge merge base run-a run-b run-c --set lambda=0.3 --set k=1 -o merged
    emomerge merge base run-a run-b --method slerp --set 't=[0.2, 0.8]' -o merged
    emomerge merge base run-a run-b --dtype bfloat16 --rounding stochastic --seed 1 -o merged
    emomerge merge base run-a run-b --method mean --as-lora auto --energy 0.99 -o adapter
    emomerge merge sd_xl_base_1.0.safetensors tuned.safetensors --method mean --as-lora 32 --format kohya -o lora.safetensors
    emomerge merge base run-a run-b --save-masks -o merged
    emomerge merge --again merged/merge.json -o same
    emomerge merge --extend merged run-c -o of-three
    emomerge merge --config mergekit.yaml -o merged
    """,
    cls=MergeCommand,
)  # fmt: skip
@click.argument("base", required=False)
@click.argument("runs", nargs=-1)
@click.option("--config", type=out_path, help="A mergekit configuration instead of BASE, RUNS and --method.")
@click.option("--again", type=out_path, metavar="MERGE.JSON", help="Repeat the merge of this record exactly.")
@click.option("--extend", type=out_path, metavar="FOLDER", help="Repeat the merge in FOLDER with RUNS added; takes no BASE.")
@click.option(
    "--method",
    metavar="NAME",
    shell_complete=complete_methods,
    help="The merge method; `emomerge methods` lists all and names the default.",
)
@click.option("-o", "--out", type=out_path, required=True, help="A folder, or one file ending in .safetensors.")
@click.option("--weight", "weights", type=float, multiple=True, help="Weight of a run; repeat for every run, in order.")
@click.option("--scale", metavar="NUMBER|auto", help="Factor on the merged task vector; auto requires --recipe.")
@click.option("--density", type=float, help="Share of each task vector to keep, for methods that drop elements.")
@click.option("--seed", type=int, help="Seed of a method's random masks and of --rounding stochastic (default: 0).")
@click.option("--dtype", type=DTYPES, help="Dtype of the output (default: the base's; float32 for an adapter).")
@rounding_option
@click.option("--max-shard-size", default="5GB", show_default=True)
@click.option(
    "--save-masks",
    is_flag=True,
    help="Save the masks of the individual runs in OUT/masks for `emomerge reconstruct`, if the method has masks.",
)
@click.option(
    "--as-lora",
    metavar="RANK|auto",
    help="Write an adapter of this rank instead of a model; auto: for each layer the smallest rank that captures --energy.",
)
@click.option(
    "--format",
    type=click.Choice(["kohya", "diffusers", "peft"]),
    help="--as-lora: a file of sd-scripts or diffusers, for image models (their default: kohya), or a PEFT folder.",
)
@click.option("--energy", type=float, help="--as-lora auto: share of each layer's squared length to capture (default: 0.99).")
@click.option("--max-rank", type=int, help="--as-lora auto: the largest rank (default: 256).")
@click.option("--allow-partial", is_flag=True, help="--as-lora: leave out and list tensors that fit into no adapter.")
@click.option(
    "--recipe",
    "recipe_path",
    help="Recipe whose validation data gives the held-out loss, for `auto` and methods that need it.",
)
@click.option(
    "--reestimate",
    is_flag=True,
    help="Estimate the running statistics of batch norm for the merged weights, on the recipe's training data.",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="A parameter of the method, in YAML (see `emomerge methods NAME`): a value, a list spread over the layers, or a list "
    "of {filter, value}; with --recipe also a field of the recipe.",
)
@click.option("--device", default="cpu", show_default=True, help="Device to merge on: cpu, cuda, auto …")
@executor_option(help="With several files (--max-shard-size), write them in this process or in one worker per file.")
@setting_option
@force_option
@quiet_option
@json_option
@watched_inputs()
def merge(
    out: Path, base: str | None, runs: Sequence[str], again: Path | None, extend: Path | None, weights: Sequence[float],
    device: str, executor: EngineName, settings: Sequence[str], force: bool, quiet: bool, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Merge RUNS (dense checkpoints, adapters or run directories) into BASE.

    `emomerge methods` lists the merge methods; `emomerge methods NAME` describes one and its parameters.
    """
    from emomerge.adapters.formats import weight_files
    from emomerge.numerics.hashing import Digests

    given = [*([base] if base else []), *runs]
    recorded = as_json or out.suffix != ".safetensors"  # a single file has no record that would hold the hashes
    files = [file for source in given for file in weight_files(source)] if recorded else []
    digest = Digests(files)  # concurrently with the import of torch
    if again is not None or extend is not None:
        record = recorded_merge(again, extend, given, weights)
    else:
        record = MergeOptions(base, runs, weights, **options).record()
    engine = engine_of(out.parent, executor, None, settings) if settings or executor != "local" else None
    found = write_merge(record, Destination(out, force, quiet), digest if recorded else None, device, engine)
    if as_json:
        print_json({**found, "out": str(out)})
        return
    print_truncation(found.get("adapter"), record)
    print_diagnostics(found["diagnostics"])
    print_rounding(found.get("rounding_loss"))
    click.echo(shown(out))


@command(
    "reconstruct",
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
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of stochastic rounding.")
@click.option("--max-shard-size", default="5GB", show_default=True)
@force_option
@quiet_option
@json_option
@watched_inputs()
def reconstruct(
    folder: Path, run: str, out: Path, dtype: str, rounding: str, seed: int, max_shard_size: str, force: bool, quiet: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Restore a single RUN from the masks that `merge --save-masks` wrote to FOLDER: base + mask ⊙ reference."""
    from emomerge.adapters import open_dense
    from emomerge.merging import masks
    from emomerge.merging.record import Output, read_record

    record = read_record(folder)
    record.check_base()
    base = open_dense(record.base)
    rebuilt = masks.reconstruct(folder, run, base)
    output = Output(dtype=dtype, rounding=rounding, seed=seed, max_shard_size=max_shard_size)
    texts = card_only(title=out.stem, about=f"{run}, reconstructed from the masks in {folder}.", base=record.base)
    lost = write_model(rebuilt, base, Destination(out, force, quiet), output, title=f"reconstruct {run}", texts=texts)
    if as_json:
        print_json({"out": str(out), "run": run, "rounding_loss": lost})
    else:
        click.echo(shown(out))


@dataclass(frozen=True)
class MergeOptions:
    """The options of `emomerge merge` that describe a merge, as given by the user."""

    base: str | None
    runs: Sequence[str]
    weights: Sequence[float]
    config: Path | None
    method: str | None
    scale: str | None
    density: float | None
    seed: int | None
    dtype: str | None
    rounding: str
    max_shard_size: str
    save_masks: bool
    as_lora: str | None
    format: str | None
    energy: float | None
    max_rank: int | None
    allow_partial: bool
    recipe_path: str | None
    reestimate: bool
    overrides: Sequence[str]

    def record(self) -> MergeRecord:
        """Return the record of the merge that the options describe."""
        from emomerge.merging import check_params, find_method
        from emomerge.merging.record import MergeRecord, Run
        from emomerge.merging.registry import DEFAULT_METHOD

        base, runs, method, dtype, params = self.base, self.runs, self.method, self.dtype, {}
        if self.config is not None:
            from emomerge.merging.mergekit import read_config

            if base is not None or method is not None:
                found = base or f"--method {method}"
                raise BadInput("--config replaces BASE, RUNS and --method", found=found, fix="leave that out")
            configured = read_config(self.config)
            base, runs, method, params = configured.base, configured.runs, configured.method, configured.params
            dtype = dtype or configured.dtype
        if base is None or not runs:
            raise BadInput("merge needs BASE and RUNS, or --config", found="no BASE" if base is None else "no RUNS")
        method = method or DEFAULT_METHOD
        schema = find_method(method).schema
        given = {"weights": list(self.weights) or None, "scale": _value("--scale", self.scale), "density": self.density}
        if self.rounding == "nearest" or "seed" in schema.model_fields:
            given["seed"] = self.seed
        known = {field.alias for field in schema.model_fields.values()}
        set_params, overrides = _split_overrides(known, self.overrides, self.recipe_path)
        return MergeRecord(
            method=method,
            params=check_params(method, params | {k: v for k, v in given.items() if v is not None} | set_params),
            base=base,
            runs=tuple(Run(name=run, source=run) for run in runs),
            recipe=self.recipe_path,
            overrides=tuple(overrides),
            output=self._output(dtype),
        )

    def _output(self, dtype: str | None) -> Output:
        """Return the options for writing the merge."""
        from emomerge.merging.record import Output

        for option, value in (("--energy", self.energy), ("--max-rank", self.max_rank)):
            if value is not None and self.as_lora != "auto":
                raise BadInput(f"{option} belongs to --as-lora auto", found=value)
        if self.format is not None and self.as_lora is None:
            raise BadInput("--format belongs to --as-lora", found=self.format)
        if self.allow_partial and self.as_lora is None:
            raise BadInput("--allow-partial belongs to --as-lora")
        if self.reestimate and self.recipe_path is None:
            raise BadInput("--reestimate needs training data", fix="give a recipe with --recipe")
        written = {
            "dtype": dtype, "rounding": self.rounding, "seed": self.seed, "max_shard_size": self.max_shard_size,
            "save_masks": self.save_masks, "as_lora": _rank(self.as_lora), "format": self.format, "energy": self.energy,
            "max_rank": self.max_rank, "allow_partial": self.allow_partial, "reestimate": self.reestimate,
        }  # fmt: skip
        return Output.model_validate({key: value for key, value in written.items() if value is not None})


def _split_overrides(known: set[str | None], overrides: Sequence[str], recipe: str | None) -> tuple[dict[str, Any], list[str]]:
    """Split the values of --set into parameters of the method, which are parsed, and overrides of the recipe."""
    parameters, others = {}, []
    for override in overrides:
        key, sign, text = override.partition("=")
        if sign and (key in known or recipe is None):
            parameters[key] = _value(f"--set {key}", text)
        elif recipe is None:
            raise BadInput("--set takes KEY=VALUE", found=repr(override))
        else:
            others.append(override)
    return parameters, others


def _value(option: str, text: str | None) -> Any:
    """Parse the value of an option as YAML."""
    from emomerge.files import parse_yaml

    return None if text is None else parse_yaml(text, what="not a value in YAML", where=option)


def _rank(text: str | None) -> int | str | None:
    if text is None or text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise BadInput("--as-lora takes a rank or `auto`", found=repr(text))
    return int(text)


def recorded_merge(again: Path | None, extend: Path | None, runs: Sequence[str], weights: Sequence[float]) -> MergeRecord:
    """Return the record to repeat or to extend by further runs, after checking its inputs."""
    from emomerge.merging import find_method
    from emomerge.merging.record import read_record

    context = click.get_current_context()
    option = "--again" if again is not None else "--extend"
    allowed = {"out", "force", "quiet", "as_json", "device", "executor", "settings"}
    allowed |= {"again"} if again else {"extend", "base", "runs", "weights"}
    for parameter in context.command.params:
        if parameter.name not in allowed and context.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE:
            raise BadInput(f"{option} repeats what the record says", found=parameter.opts[-1], fix="leave that out")
    record = read_record(again or extend or "")
    record.check_inputs()
    if again is not None:
        return record
    if not runs:
        raise BadInput("--extend needs the RUNS to add", found="none")
    if not find_method(record.method).incremental:
        click.echo(f"{record.method} depends on all runs at once and makes its choices from scratch", err=True)
    return record.extended(runs, weights)


def write_merge(
    record: MergeRecord, destination: Destination, digest: Callable[[Path], str] | None, device: str, engine: Engine | None
) -> dict[str, Any]:
    """Merge as described by a record, write the result and return the content of merge.json; no hashes without `digest`."""
    from emomerge import merging
    from emomerge.adapters import open_dense
    from emomerge.files import to_json
    from emomerge.merging.masks import mask_files
    from emomerge.merging.record import as_json
    from emomerge.merging.shards import ShardWriter

    _check_output(record, destination)
    output, base = record.output, open_dense(record.base)
    measurer, read = (None, []) if record.recipe is None else _measurer(record.recipe, record.overrides, base)
    loss = None if measurer is None else measurer.held_out_loss
    if device != "cpu":
        from emomerge.training import choose_device

        device = str(choose_device(device))
    sources = [run.source for run in record.runs]
    merged = merging.merge(base, sources, method=record.method, held_out_loss=loss, device=device, **record.params)
    if measurer is not None and output.reestimate:
        merged.set_statistics(measurer.batch_norm_statistics(merged))
    record = record.named(merged.runs).written_to(destination.out)
    found: dict[str, Any] = {}
    with ThreadPoolExecutor(1) as background:
        hashed = background.submit(record.with_hashes, read, digest) if digest is not None else None
        background.submit(import_module, "emomerge.reporting")  # for the model card, concurrently with the merge

        def texts(facts: dict[str, Any]) -> dict[str, str]:
            found.update(as_json(record if hashed is None else hashed.result(), **facts, diagnostics=merged.diagnostics()))
            return {"merge.json": to_json(found) + "\n", "README.md": merge_card(found, destination.out)}

        if output.as_lora is not None:
            write_adapter(merged, destination, output, texts=texts)
        else:
            side_files = mask_files(merged) if output.save_masks else {}
            shards_by = ShardWriter(merged, engine) if engine is not None else None
            title = f"merge {record.method}"
            how = {"merge": record.model_dump(mode="json", include={"method", "params"})}
            write_model(
                merged, merged.base, destination, output, title=title, texts=texts, side_files=side_files, shards_by=shards_by,
                metadata=header_of(merged.base, destination.out, [{"run": source} for source in sources], how),
            )  # fmt: skip
        if not found:  # a single file has no text files, but --json prints the facts
            texts({})
    return found


def _check_output(record: MergeRecord, destination: Destination) -> None:
    """Raise BadInput for an output that cannot be written, before any work starts."""
    from emomerge.checkpoints import atomic
    from emomerge.merging import find_method
    from emomerge.merging.masks import require_masks

    output, out = record.output, destination.out
    folders = {"--save-masks": output.save_masks, "--as-lora --format peft": output.format == "peft"}
    for option, wanted in folders.items():
        if wanted and out.suffix == ".safetensors":
            raise BadInput(f"{option} writes a folder", found=f"-o {out}")
    if output.save_masks:
        if output.as_lora is not None:
            raise BadInput("--save-masks belongs to a model, not to an adapter", found="--as-lora")
        require_masks(find_method(record.method))
    atomic.refuse_existing(out, force=destination.force)


def _measurer(recipe: str, overrides: Sequence[str], base: Checkpoint) -> tuple[Measurer, list[Path]]:
    """Return what measures weights on the data of a recipe's task, and the local files it depends on."""
    from emomerge.experiment.measure import Measurer
    from emomerge.experiment.workspace import local_files
    from emomerge.training import Context

    parsed = open_recipe(recipe, overrides)
    if base.folder is None:
        raise BadInput("--recipe needs a BASE folder with its config", found=base.source)
    return Measurer(Context(parsed, base.folder, "base"), None), local_files([recipe, *parsed.external_sources()])
