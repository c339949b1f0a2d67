"""What a path holds, what two checkpoints differ in, and how far an output folder has come."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from torch import Tensor

from emomerge.adapters import artefact_of, format_of, is_adapter, open_dense, open_run
from emomerge.adapters.unsupported import family_of
from emomerge.checkpoints import Checkpoint, open_checkpoint
from emomerge.checkpoints.atomic import size
from emomerge.errors import BadInput
from emomerge.experiment.pipeline import Pipeline
from emomerge.recipe import load_recipe
from emomerge.training import holder_of
from emomerge.training.plan import round_ends

PIECE = 2**20
"""Elements compared at a time."""


def describe(path: str) -> dict[str, Any]:
    """Return kind, size and dtypes of a checkpoint, an adapter or a run directory, and what an adapter was made for."""
    place = artefact_of(path)
    form = format_of(place)
    opened = _open(path)
    unsupported = family_of(opened) if form is None else None
    infos = [opened.info(name) for name in opened]
    dtypes = Counter(str(info.dtype).removeprefix("torch.") for info in infos)
    return {
        "kind": unsupported.name if unsupported else "adapter" if form else "checkpoint", "source": path,
        "tensors": len(infos), "parameters": sum(info.numel for info in infos),
        "bytes": sum(info.nbytes for info in infos), "dtypes": dict(dtypes),
        **(form.facts(place) if form else {}), **({"to use it": unsupported.fix} if unsupported else {}),
    }  # fmt: skip


def _open(path: str) -> Checkpoint:
    """Open the tensors as they are stored: an adapter's factors, not their effect on a base."""
    place = artefact_of(path)
    if (form := format_of(place)) is not None:
        form.facts(place)  # a damaged configuration is reported before missing weights are
        return open_checkpoint(next(file for file in form.files(place) if file.suffix == ".safetensors"))
    return open_checkpoint(place if place.exists() else path)


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


def compare(path: str, other: str, *, base: str | None = None) -> dict[str, Any]:
    """What `other` differs in from `path`, tensor by tensor, the largest difference first.

    Args:
        path: a checkpoint, adapter or run directory, A.
        other: another one, B; beside a checkpoint it may be an adapter of that.
        base: what both started from: then their task vectors are compared instead of themselves. Without it two adapters are
            compared by their factors.

    Returns:
        `only_here`, `only_there`: names; `shapes`: name → both shapes where they differ; `equal`: how many tensors are the
        same; `changed`: figures of each other one; `all`: of these together. Figures: `norm` = ‖B − A‖, `relative` =
        ‖B − A‖/‖A‖, `cosine` of A and B, `sign_agreement`: of elements that are zero in neither, the share of one sign, and
        `density`: the share of elements that differ. None is what has no value.
    """
    here, there, origin = _open_pair(path, other, base)
    shared = [name for name in here if name in there]
    found: dict[str, Any] = {
        "here": path, "there": other, "base": base,
        "only_here": [name for name in here if name not in there], "only_there": [name for name in there if name not in here],
        "shapes": {}, "equal": 0, "changed": [],
    }  # fmt: skip
    total = _Comparison()
    for name in shared:
        shapes = [list(checkpoint.info(name).shape) for checkpoint in (here, there)]
        if shapes[0] != shapes[1]:
            found["shapes"][name] = shapes
            continue
        comparison = _compare(here, there, origin, name)
        if comparison is None:
            found["equal"] += 1
        else:
            found["changed"].append({"name": name, **comparison.figures()})
            total.add(comparison)
    found["changed"].sort(key=lambda row: -row["norm"])
    return {**found, "all": total.figures()}


def _open_pair(path: str, other: str, base: str | None) -> tuple[Checkpoint, Checkpoint, Checkpoint | None]:
    if base is not None:
        origin = open_dense(base)
        return open_run(origin, path), open_run(origin, other), origin
    adapters = [is_adapter(artefact_of(place)) for place in (path, other)]
    if adapters == [True, False]:
        raise BadInput("an adapter against a model", where=path, fix="name the model first, or what both started from: --base")
    here = _open(path)
    return here, (_open(other) if all(adapters) else open_run(here, other)), None


@dataclass
class _Comparison:
    """Sums over the elements of A and B, in float64."""

    elements: int = 0
    different: int = 0
    alike: int = 0
    """Elements of one sign."""
    signed: int = 0
    """Elements that are zero in neither."""
    difference: float = 0.0
    squares: tuple[float, float] = (0.0, 0.0)
    product: float = 0.0

    def add(self, other: _Comparison) -> None:
        """Take in the sums over other elements."""
        for key in ("elements", "different", "alike", "signed", "difference", "product"):
            setattr(self, key, getattr(self, key) + getattr(other, key))
        self.squares = (self.squares[0] + other.squares[0], self.squares[1] + other.squares[1])

    def figures(self) -> dict[str, float | None]:
        """See `compare`."""
        here, there = map(math.sqrt, self.squares)
        norm, both = math.sqrt(self.difference), here * there
        return {
            "norm": norm,
            "relative": norm / here if here else None,
            "cosine": max(-1.0, min(self.product / both, 1.0)) if both else None,
            "sign_agreement": self.alike / self.signed if self.signed else None,
            "density": self.different / self.elements if self.elements else None,
        }


def _compare(here: Checkpoint, there: Checkpoint, origin: Checkpoint | None, name: str) -> _Comparison | None:
    """The sums of one tensor; None where both are the same."""
    if origin is None:
        difference, a = there.delta(name, here), here[name]
    else:
        a, b = (_displacement(checkpoint, origin, name) for checkpoint in (here, there))
        difference = b.double() - a.double()
    if difference is None:
        return None
    total = _Comparison()
    for x, moved in zip(a.flatten().split(PIECE), difference.flatten().split(PIECE), strict=True):
        one, change = x.double(), moved.double()
        two = one + change
        signs = one.sign() * two.sign()
        total.add(
            _Comparison(
                len(one), int(change.count_nonzero()), int((signs > 0).sum()), int(signs.count_nonzero()),
                float(change @ change), (float(one @ one), float(two @ two)), float(one @ two),
            )
        )  # fmt: skip
    return total if total.different else None


def _displacement(checkpoint: Checkpoint, origin: Checkpoint, name: str) -> Tensor:
    """τ of a tensor; one that the base lacks starts from zero."""
    if name not in origin or origin.info(name).shape != checkpoint.info(name).shape:
        return checkpoint[name]
    delta = checkpoint.delta(name, origin)
    return torch.zeros_like(checkpoint[name]) if delta is None else delta


def show_comparison(found: dict[str, Any], *, top: int = 0) -> Table:
    """`compare` for people; only so many tensors, or all where `top` is 0."""
    what = f"{found['there']} against {found['here']}" + (f", both from {found['base']}" if found["base"] else "")
    table = Table(title=f"{what}: {len(found['changed'])} tensors differ, {found['equal']} are equal")
    figures = {"norm": "‖B − A‖", "relative": "/‖A‖", "cosine": "cosine", "sign_agreement": "signs agree", "density": "differ"}
    table.add_column("tensor", overflow="fold")
    for heading in figures.values():
        table.add_column(heading, justify="right")
    shown = found["changed"][: top or None]
    rows = [{"name": "all of these", **found["all"]}, *shown] if found["changed"] else []
    for row in rows:
        numbers = [row[key] for key in figures]
        plain = [f"{number:.4g}" if number is not None else "–" for number in numbers[:3]]
        shares = [f"{number:.1%}" if number is not None else "–" for number in numbers[3:]]
        table.add_row(row["name"], *plain, *shares)
    if len(shown) < len(found["changed"]):
        table.add_row(f"… and {len(found['changed']) - len(shown)} more with smaller differences")
    for name, (here, there) in found["shapes"].items():
        table.add_row(name, f"shape {here} against {there}")
    for key, words in (("only_here", "only in the first"), ("only_there", "only in the second")):
        for name in found[key]:
            table.add_row(name, words)
    return table


def status_of(folder: Path) -> dict[str, Any]:
    """Runs and stages of an output folder, as far as they have come."""
    if not (folder / "recipe.yaml").is_file():
        raise BadInput("not an output folder of emomerge", where=folder, expected="a folder with recipe.yaml")
    pipeline = Pipeline(load_recipe(folder / "recipe.yaml"), folder)
    runs, ends = [], round_ends(pipeline.recipe.runs)
    for spec in [*pipeline.specs, *(spec for spec in pipeline.possible_rivals() if pipeline.run_dir(spec).state)]:
        run = pipeline.run_dir(spec)
        last = max(run.metrics(), key=lambda row: int(row["step"]), default={})
        state = "done" if pipeline.run_is_done(spec) else run.state.get("state", "waiting")
        holder = None if state == "done" else holder_of(run.path)
        if holder is not None:
            state = "running"
        elif state == "running":
            state = "stopped"
        rounds = (
            {"round": 1 + sum(last.get("step", 0) > end for end in ends), "rounds": len(ends)} if spec.role == "run" else {}
        )
        runs.append(
            {"name": spec.name, "state": state, "steps": spec.steps, "error": run.state.get("error")}
            | {"step": last.get("step", 0), "loss": last.get("loss"), "rate": last.get("rate")}
            | rounds
            | {"worker": None if holder is None else asdict(holder)}
        )
    busy = pipeline.space.is_busy() or any(run["worker"] for run in runs)
    return {"folder": str(folder), "busy": busy, "runs": runs, "stages": pipeline.stages()}


def show_status(found: dict[str, Any]) -> Table:
    """`status_of` for people."""
    table = Table(
        title=found["folder"],
        caption="stages: " + ", ".join(f"{stage} {'done' if done else 'to do'}" for stage, done in found["stages"].items()),
    )
    for heading in ("run", "state", "step", "loss", "emoPulse", "worker", ""):
        table.add_column(heading, justify="right" if heading in ("step", "loss", "emoPulse") else "left")
    for run in found["runs"]:
        loss, rate = (f"{run[key]:{form}}" if run[key] is not None else "–" for key, form in (("loss", ".4f"), ("rate", ".2e")))
        where = f", round {run['round']} of {run['rounds']}" if run.get("rounds", 1) > 1 and run["state"] != "done" else ""
        worker = "{host} {pid}, {heartbeat:.0f} s ago".format(**run["worker"]) if run["worker"] else ""
        steps = f"{run['step']}/{run['steps']}"
        table.add_row(run["name"], run["state"] + where, steps, loss, rate, worker, run["error"] or "")
    return table


def watch_status(folder: Path, console: Console, every: float = 1.0) -> None:
    """Show `status_of` until nobody works in the folder, looking again every so many seconds."""
    found = status_of(folder)
    with Live(show_status(found), console=console, auto_refresh=False) as live:
        while found["busy"]:
            time.sleep(every)
            found = status_of(folder)
            live.update(show_status(found), refresh=True)
