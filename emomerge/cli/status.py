"""The progress in an output folder: its runs, its stages, and the processes working in it."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from emomerge.errors import BadInput
from emomerge.experiment.control_runs import possible_controls
from emomerge.experiment.pipeline import Pipeline
from emomerge.recipe import load_recipe
from emomerge.training import holder_of
from emomerge.training.plan import round_ends


def status_of(folder: Path) -> dict[str, Any]:
    """Return the state of the runs and stages of an output folder."""
    if not (folder / "recipe.yaml").is_file():
        raise BadInput("not an output folder of emomerge", where=folder, expected="a folder with recipe.yaml")
    pipeline = Pipeline(load_recipe(folder / "recipe.yaml"), folder)
    runs, ends = [], round_ends(pipeline.recipe.runs)
    controls = [spec for spec in possible_controls(pipeline) if pipeline.run_dir(spec).state]
    for spec in [*pipeline.trunks, *pipeline.specs, *controls]:
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
    return {"folder": str(folder), "busy": busy, "runs": runs, "stages": pipeline.status()}


def show_status(found: dict[str, Any]) -> Table:
    """Return the table that shows a status."""
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
    """Show the status and update it every `every` seconds until no process works in the folder."""
    found = status_of(folder)
    with Live(show_status(found), console=console, auto_refresh=False) as live:
        while found["busy"]:
            time.sleep(every)
            found = status_of(folder)
            live.update(show_status(found), refresh=True)
