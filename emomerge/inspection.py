"""What a path holds, what two checkpoints differ in, and how far an output folder has come."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor

from emomerge.adapters import artefact_of, open_run
from emomerge.checkpoints import Checkpoint, open_checkpoint
from emomerge.checkpoints.atomic import size
from emomerge.errors import BadInput
from emomerge.pipeline import Pipeline
from emomerge.recipe import load_recipe


def describe(path: str) -> dict[str, Any]:
    """Kind, size and dtypes of a checkpoint, an adapter or a run directory; what an adapter was made for."""
    config = _adapter_config(artefact_of(path))
    opened = _open(path)
    infos = [opened.info(name) for name in opened]
    dtypes = Counter(str(info.dtype).removeprefix("torch.") for info in infos)
    return {
        "kind": "adapter" if config else "checkpoint", "source": path, "tensors": len(infos),
        "parameters": sum(info.numel for info in infos), "bytes": sum(info.nbytes for info in infos), "dtypes": dict(dtypes),
        **{key: config[key] for key in _ADAPTER_FACTS if config.get(key)},
    }  # fmt: skip


_ADAPTER_FACTS = ("peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "modules_to_save", "base_model_name_or_path")


def _open(path: str) -> Checkpoint:
    """The tensors as they are stored: an adapter's factors, not what they do to a base."""
    place = artefact_of(path)
    if (place / "adapter_config.json").is_file():
        return open_checkpoint(place / "adapter_model.safetensors")
    return open_checkpoint(place if place.exists() else path)


def _adapter_config(folder: Path) -> dict[str, Any]:
    file = folder / "adapter_config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput("the adapter's configuration is not JSON", where=file, found=error) from None
    if not isinstance(config, dict):
        raise BadInput("the adapter's configuration is no mapping", where=file, found=type(config).__name__)
    return config


def show_description(found: dict[str, Any]) -> Table:
    """`describe` for people."""
    table = Table(show_header=False, box=None)
    for key, value in found.items():
        if key == "bytes":
            value = size(value)
        elif key == "dtypes":
            value = ", ".join(f"{count} × {dtype}" for dtype, count in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        table.add_row(key, f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))
    return table


def compare(path: str, other: str) -> dict[str, Any]:
    """What `other` differs in from `path`, tensor by tensor: two checkpoints, two adapters, or a base and its adapter.

    Returns:
        `only_here`, `only_there`: names; `shapes`: name → both shapes where they differ; `equal`: how many tensors are the
        same; `changed`: for each other one ‖difference‖, it relative to ‖here‖, and the cosine between both.
    """
    here = _open(path)
    both_adapters = _adapter_config(artefact_of(path)) and _adapter_config(artefact_of(other))
    there = _open(other) if both_adapters else open_run(here, other)
    shared = [name for name in here if name in there]
    shapes = {
        n: [list(here.info(n).shape), list(there.info(n).shape)] for n in shared if here.info(n).shape != there.info(n).shape
    }
    found: dict[str, Any] = {
        "here": path, "there": other,
        "only_here": [name for name in here if name not in there], "only_there": [name for name in there if name not in here],
        "shapes": shapes, "equal": 0, "changed": [],
    }  # fmt: skip
    for name in shared:
        if name in shapes:
            continue
        row = _difference(here, there, name)
        if row is None:
            found["equal"] += 1
        else:
            found["changed"].append(row)
    return found


def _difference(here: Checkpoint, there: Checkpoint, name: str) -> dict[str, Any] | None:
    delta = there.delta(name, here)
    if delta is None or not bool(delta.any()):
        return None
    old = here[name].double()
    new = old + delta.double()
    norm, size_ = _norm(delta.double()), _norm(old)
    both = size_ * _norm(new)
    return {
        "name": name, "norm": norm, "relative": norm / size_ if size_ else None,
        "cosine": float((old * new).sum()) / both if both else None,
    }  # fmt: skip


def _norm(tensor: Tensor) -> float:
    return math.sqrt(float(tensor.square().sum()))


def show_comparison(found: dict[str, Any]) -> Table:
    """`compare` for people."""
    table = Table(title=f"{found['there']} against {found['here']}: {found['equal']} tensors equal")
    for heading in ("tensor", "‖difference‖", "relative", "cosine"):
        table.add_column(heading, justify="left" if heading == "tensor" else "right", overflow="fold")
    for row in found["changed"]:
        shown = [f"{row[key]:.4g}" if row[key] is not None else "–" for key in ("norm", "relative", "cosine")]
        table.add_row(row["name"], *shown)
    for name, (here, there) in found["shapes"].items():
        table.add_row(name, f"shape {here} against {there}", "", "")
    for key, words in (("only_here", "only in the first"), ("only_there", "only in the second")):
        for name in found[key]:
            table.add_row(name, words, "", "")
    return table


def status_of(folder: Path) -> dict[str, Any]:
    """Runs and stages of an output folder, as far as they have come."""
    if not (folder / "recipe.yaml").is_file():
        raise BadInput("not an output folder of emomerge", where=folder, expected="a folder with recipe.yaml")
    pipeline = Pipeline(load_recipe(folder / "recipe.yaml"), folder)
    busy = pipeline.space.is_busy()
    long = [pipeline.long_run(spec) for spec in pipeline.specs]  # one of them, once somebody began it
    runs = []
    for spec in [*pipeline.specs, *(spec for spec in long if pipeline.run_dir(spec).state)]:
        run = pipeline.run_dir(spec)
        last = max(run.metrics(), key=lambda row: int(row["step"]), default={})
        state = "done" if pipeline.run_is_done(spec) else run.state.get("state", "waiting")
        if state == "running" and not busy:
            state = "stopped"
        runs.append(
            {"name": spec.name, "state": state, "steps": spec.steps, "error": run.state.get("error")}
            | {"step": last.get("step", 0), "loss": last.get("loss"), "rate": last.get("rate")}
        )
    return {"folder": str(folder), "busy": busy, "runs": runs, "stages": pipeline.stages()}


def show_status(found: dict[str, Any]) -> Table:
    """`status_of` for people."""
    table = Table(
        title=found["folder"],
        caption="stages: " + ", ".join(f"{stage} {'done' if done else 'to do'}" for stage, done in found["stages"].items()),
    )
    for heading in ("run", "state", "step", "loss", "emoPulse", ""):
        table.add_column(heading, justify="right" if heading in ("step", "loss", "emoPulse") else "left")
    for run in found["runs"]:
        loss, rate = (f"{run[key]:{form}}" if run[key] is not None else "–" for key, form in (("loss", ".4f"), ("rate", ".2e")))
        table.add_row(run["name"], run["state"], f"{run['step']}/{run['steps']}", loss, rate, run["error"] or "")
    return table
