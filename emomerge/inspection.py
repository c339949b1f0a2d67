"""What a path holds, what two checkpoints differ in, and how far an output folder has come."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor

from emomerge.adapters import open_run
from emomerge.checkpoints import Checkpoint, open_checkpoint
from emomerge.checkpoints.atomic import size
from emomerge.errors import BadInput
from emomerge.training.runs import RunDir


def describe(path: str) -> dict[str, Any]:
    """Kind, size and dtypes of a checkpoint or adapter; what an adapter was made for."""
    place = Path(path)
    if (place / "run.json").is_file():
        run = RunDir(place)
        if run.state.get("state") != "done":
            raise BadInput(
                "the run has no result yet", where=place, found=run.state.get("state"), fix="run its recipe to the end"
            )
        return {**describe(str(run.artefact)), "run": run.state["name"], "optimizer": run.state["optimizer"]}
    adapter: dict[str, Any] = {}
    if (place / "adapter_config.json").is_file():
        config = json.loads((place / "adapter_config.json").read_text(encoding="utf-8"))
        shown = (
            "peft_type",
            "r",
            "lora_alpha",
            "use_rslora",
            "target_modules",
            "modules_to_save",
            "base_model_name_or_path",
        )
        adapter = {key: config[key] for key in shown if config.get(key)}
        place = place / "adapter_model.safetensors"
    checkpoint = open_checkpoint(place if adapter else path)
    infos = [checkpoint.info(name) for name in checkpoint]
    dtypes = Counter(str(info.dtype).removeprefix("torch.") for info in infos)
    return {
        "kind": "adapter" if adapter else "checkpoint", "source": path, "tensors": len(infos),
        "parameters": sum(info.numel for info in infos), "bytes": sum(info.nbytes for info in infos), "dtypes": dict(dtypes),
        **adapter,
    }  # fmt: skip


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
    """What `other` (a checkpoint, or an adapter of `path`) differs in from `path`, tensor by tensor.

    Returns:
        `only_here`, `only_there`: names; `shapes`: name → both shapes where they differ; `equal`: how many tensors are the
        same; `changed`: for each other one ‖difference‖, it relative to ‖here‖, and the cosine between both.
    """
    here = open_checkpoint(path)
    there = open_run(here, other)
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
    runs = []
    for place in sorted((folder / "runs").glob("*/run.json")):
        run = RunDir(place.parent)
        last = max(run.metrics(), key=lambda row: int(row["step"]), default={})
        state = run.state
        runs.append(
            {key: state.get(key) for key in ("name", "state", "steps", "error")}
            | {"step": last.get("step", 0), "loss": last.get("loss"), "rate": last.get("rate")}
        )
    stages = sorted(stamp.stem for stamp in (folder / "stamps").glob("*.json") if stamp.stem != "fingerprints")
    return {"folder": str(folder), "runs": runs, "stages": stages}


def show_status(found: dict[str, Any]) -> Table:
    """`status_of` for people."""
    table = Table(title=found["folder"], caption="stages done: " + (", ".join(found["stages"]) or "none"))
    for heading in ("run", "state", "step", "loss", "emoPulse", ""):
        table.add_column(heading, justify="right" if heading in ("step", "loss", "emoPulse") else "left")
    for run in found["runs"]:
        loss, rate = (f"{run[key]:{form}}" if run[key] is not None else "–" for key, form in (("loss", ".4f"), ("rate", ".2e")))
        table.add_row(run["name"], run["state"], f"{run['step']}/{run['steps']}", loss, rate, run["error"] or "")
    return table
