"""What stands between the options of `emomerge merge` and the engine: which merge they describe, doing it, writing it."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import click

from emomerge.cli.printing import print_diagnostics, print_rounding, print_truncation
from emomerge.cli.templates import open_recipe
from emomerge.errors import BadInput

if TYPE_CHECKING:
    from emomerge.merging.record import MergeRecord, Output
    from emomerge.merging.spread import Spread
    from emomerge.training.engines import Engine


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


def _evaluator(recipe: str, overrides: Sequence[str], base: Any) -> tuple[Any, list[Path]]:
    """Validation loss of any weights, by a recipe's task; and the local files that decide it."""
    from emomerge.experiment.measure import Measurer
    from emomerge.experiment.workspace import local_files
    from emomerge.tasks import make_task
    from emomerge.training import choose_device

    parsed = open_recipe(recipe, overrides)
    if base.folder is None:
        raise BadInput("--recipe needs a BASE folder with its config", found=base.source)
    task = make_task(parsed.task)
    data = task.load_data(parsed.base)
    measurer = Measurer(parsed, task, data, base, base.folder, "base", choose_device(parsed.device), None)
    return measurer.held_out_loss, local_files([recipe, *parsed.external_sources()])


def asked_for(
    base: str | None, runs: Sequence[str], weights: Sequence[float], *, config: Path | None, method: str | None,
    scale: str | None, density: float | None, lambda_: str | None, k: int | None, reference: str | None, preset: str | None,
    trim: str | None, aggregate: str | None, seed: int | None, dtype: str | None, rounding: str, max_shard_size: str,
    save_masks: bool, as_lora: str | None, energy: float | None, max_rank: int | None, allow_partial: bool,
    recipe_path: str | None, overrides: Sequence[str],
) -> MergeRecord:  # fmt: skip
    """The merge that the options describe."""
    from emomerge.merging import check_params, find_method
    from emomerge.merging.record import MergeRecord, Output, Run
    from emomerge.merging.registry import DEFAULT_METHOD

    given = {
        "weights": list(weights) or None, "scale": _number("--scale", scale), "density": density,
        "lambda_": _number("--lambda", lambda_), "k": k, "reference": reference, "preset": preset, "trim": trim,
        "aggregate": aggregate,
    }  # fmt: skip
    given = {key: value for key, value in given.items() if value is not None}
    if config is not None:
        base, runs, method, configured, dtype = _configured(config, base, method, dtype)
        given = configured | given
    if base is None or not runs:
        raise BadInput("merge needs BASE and RUNS, or --config", found="no BASE" if base is None else "no RUNS")
    method = method or DEFAULT_METHOD
    if seed is not None and (rounding == "nearest" or "seed" in find_method(method).schema.model_fields):
        given["seed"] = seed
    parameters, overrides = _split_overrides(method, overrides, recipe_path)
    written: dict[str, Any] = {
        "dtype": dtype, "rounding": rounding, "seed": seed, "max_shard_size": max_shard_size, "save_masks": save_masks,
        "as_lora": _rank(as_lora), "energy": energy, "max_rank": max_rank, "allow_partial": allow_partial,
    }  # fmt: skip
    for option in ("energy", "max_rank"):
        if written[option] is not None and as_lora != "auto":
            raise BadInput(f"--{option.replace('_', '-')} belongs to --as-lora auto", found=written[option])
    if allow_partial and as_lora is None:
        raise BadInput("--allow-partial belongs to --as-lora")
    return MergeRecord(
        method=method,
        params=check_params(method, given | parameters),
        base=base,
        runs=tuple(Run(name=run, source=run) for run in runs),
        recipe=recipe_path,
        overrides=tuple(overrides),
        output=Output(**{key: value for key, value in written.items() if value is not None}),
    )


def recorded(again: Path | None, extend: Path | None, runs: Sequence[str], weights: Sequence[float]) -> MergeRecord:
    """The merge of a record, as it was or with more runs; its inputs are checked."""
    from click.core import ParameterSource

    from emomerge.merging import find_method
    from emomerge.merging.record import read_record

    context = click.get_current_context()
    option = "--again" if again is not None else "--extend"
    manner = {"out", "force", "quiet", "as_json", "device", "executor", "settings"}
    allowed = {*manner, *(["again"] if again else ["extend", "base", "runs", "weights"])}
    for parameter in context.command.params:
        if parameter.name not in allowed and context.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE:
            raise BadInput(f"{option} takes all from the record", found=parameter.opts[-1], fix="leave that out")
    record = read_record(again or extend or "")
    record.check_inputs()
    if again is not None:
        return record
    if not runs:
        raise BadInput("--extend needs the RUNS to add", found="none")
    if not find_method(record.method).incremental:
        click.echo(f"{record.method} depends on all runs at once and makes its choices from scratch", err=True)
    return record.extended(runs, weights)


def _rank(text: str | None) -> int | str | None:
    if text is None or text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise BadInput("--as-lora is a rank or `auto`", found=repr(text))
    return int(text)


def merge_record(
    record: MergeRecord, out: Path, digest: Callable[[Path], str], *, device: str, engine: Engine | None, force: bool,
    quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Do what a record says, and write it with the record completed."""
    from concurrent.futures import ThreadPoolExecutor

    from emomerge import merging
    from emomerge.adapters import open_dense
    from emomerge.checkpoints import atomic
    from emomerge.merging import find_method
    from emomerge.merging.masks import mask_files, require_masks
    from emomerge.merging.record import as_json as completed
    from emomerge.merging.spread import Spread

    output = record.output
    for what, wanted in (("--save-masks", output.save_masks), ("--as-lora", output.as_lora is not None)):
        if wanted and out.suffix == ".safetensors":
            raise BadInput(f"{what} writes a folder", found=f"-o {out}")
    if output.save_masks and output.as_lora is not None:
        raise BadInput("--save-masks belongs to a model, not to an adapter", found="--as-lora")
    if output.save_masks:
        require_masks(find_method(record.method))
    atomic.refuse_existing(out, force=force)
    base = open_dense(record.base)
    evaluator, read = (None, []) if record.recipe is None else _evaluator(record.recipe, record.overrides, base)
    sources = [run.source for run in record.runs]
    if device != "cpu":
        from emomerge.training import choose_device

        device = str(choose_device(device))
    merged = merging.merge(base, sources, method=record.method, held_out_loss=evaluator, device=device, **record.params)
    record = record.named(merged.runs)
    with ThreadPoolExecutor(1) as beside:
        hashed = beside.submit(record.with_hashes, read, digest)
        beside.submit(import_module, "emomerge.reporting.card")  # its template engine, while tensors are merged
        found: dict[str, Any] = {}

        def papers(facts: dict[str, Any]) -> dict[str, str]:
            found.update(completed(hashed.result(), **facts, diagnostics=merged.diagnostics()))
            return {"merge.json": json.dumps(found, indent=2) + "\n", "README.md": _merge_card(found, out)}

        if output.as_lora is not None:
            _write_lora(merged, merged.base, out, output, rank=output.as_lora, force=force, quiet=quiet, papers=papers)
        else:
            files = mask_files(merged) if output.save_masks else {}
            title = f"merge {record.method}"
            by = Spread(merged, engine) if engine is not None else None
            write_model(
                merged, merged.base, out, title, output, force=force, quiet=quiet, papers=papers, beside=files, shards_by=by
            )
        if not found:  # one file holds no papers, but one may ask for the figures
            papers({})
    if as_json:
        click.echo(json.dumps({**found, "out": str(out)}, indent=2))
        return
    print_truncation(found.get("adapter"), record)
    print_diagnostics(found["diagnostics"])
    print_rounding(found.get("rounding_loss"))
    click.echo(str(out))


def write_model(
    checkpoint: Any, base: Any, out: Path, title: str, output: Output, *, force: bool, quiet: bool,
    papers: Callable[[dict[str, Any]], dict[str, str]], beside: Mapping[str, Any] = MappingProxyType({}),
    shards_by: Spread | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write a model; return what rounding took from it."""
    from emomerge.checkpoints import RoundingLoss, write_checkpoint
    from emomerge.progress import Display

    display, loss = Display(quiet=quiet), RoundingLoss(base)
    with display.live():
        line = display.line(title, len(checkpoint))
        write_checkpoint(
            checkpoint, out, dtype=output.dtype, rounding=output.rounding, seed=output.seed, loss=loss,
            max_shard_size=output.max_shard_size, files_from=base.folder,
            beside=beside, extra_files=lambda: papers({"rounding_loss": loss.figures()}),
            force=force, progress=lambda name, _: line.add(1, name), shards_by=shards_by,
        )  # fmt: skip
    return loss.figures()


def _write_lora(
    merged: Any, base: Any, out: Path, output: Output, *, rank: int | Literal["auto"], force: bool, quiet: bool,
    papers: Callable[[dict[str, Any]], dict[str, str]],
) -> None:  # fmt: skip
    """Write an adapter instead of a model."""
    from emomerge.merging.lora import truncate
    from emomerge.progress import Display

    display = Display(quiet=quiet)
    with display.live():
        line = display.line("adapter", len(merged))
        truncated = truncate(
            merged, base, rank=rank, energy=output.energy, max_rank=output.max_rank,
            allow_partial=output.allow_partial, progress=lambda name, _: line.add(1, name),
        )  # fmt: skip
    dtype = "float32" if output.dtype == "base" else output.dtype
    truncated.adapter().write(out, dtype=dtype, extra_files=papers({"adapter": truncated.figures()}), force=force)


def only_a_card(context: dict[str, Any]) -> dict[str, str]:
    """The model card, where nothing else goes beside the weights."""
    return {"README.md": _card(context)}


def _merge_card(record: dict[str, Any], out: Path) -> str:
    context = {**record, "title": out.stem, "name": out.stem, "params": record["diagnostics"]["params"]}
    if "adapter" in record:
        about = f"A LoRA adapter that holds {record['adapter']['energy']:.2%} of the squared length of the merged task vector."
        context |= {"library_name": "peft", "about": about}
    return _card(context)


def _card(context: dict[str, Any]) -> str:
    from importlib.metadata import version

    from emomerge.reporting import model_card

    return model_card({**context, "command": shlex.join(["emomerge", *sys.argv[1:]]), "version": version("emomerge")})
