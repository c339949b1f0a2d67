"""Mutated inputs through every reader, and every merge method on every kind of tensor: what breaks?

    python benchmarks/hostile_inputs.py --trials 800 --table table.json

A trial takes a valid sample of a reader's files, damages it, and reads it in this process. A failure is an exception other than
`EmomergeError`, a message of several lines or with escape sequences, more than 20 seconds, a temporary left behind, or NaN in
an output. A trial's damage depends only on the seed, the reader and the trial's number, and finished readers are kept in the
table, so that the same command continues.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from hostile_damage import Outcome, attempt, campaign
from hostile_samples import BASE, RECIPE, RUNS, check_output, readers, refuse

# Merge methods on every kind of tensor -----------------------------------------------------------------------------------


def odd_tensors() -> dict[str, torch.Tensor]:
    """Return one tensor of every kind that methods may meet."""
    some = torch.linspace(-1, 1, 24).view(4, 6)
    return {
        "plain": some, "zeros": torch.zeros(4, 6), "nan": torch.full((4, 6), float("nan")),
        "infinite": torch.full((4, 6), float("inf")),
        "huge": some * 3e38, "tiny": some * 1e-40, "float16 at its end": (some * 65504).half(), "empty": torch.zeros(0, 6),
        "0-d": torch.tensor(0.5), "one element": torch.ones(1), "integer": torch.arange(6),
        "boolean": torch.tensor([True, False]),
        "complex": torch.ones(4, dtype=torch.complex64), "fp8": some.to(torch.float8_e4m3fn), "float64": some.double(),
        "bfloat16": some.bfloat16(), "5-d": torch.ones(2, 1, 2, 1, 2), "row": some[:1], "column": some[:, :1],
    }  # fmt: skip


def method_trials(
    *, methods: Mapping[str, Any], counts: tuple[int, ...] = (1, 2, 13), unmoved: tuple[bool, ...] = (False, True)
) -> Outcome:
    """Merge each kind of tensor with every method: a finite output and valid JSON, or one line."""
    outcome, number = Outcome(), 0
    for method in methods:
        for kind, tensor in odd_tensors().items():
            for count in counts:
                for same in unmoved:
                    attempt(
                        lambda folder, a=(method, tensor, count, same): _merge_odd(folder, *a),
                        Path("/nonexistent"),
                        outcome,
                        number,
                    )
                    for failure, first in outcome.examples.items():
                        if first == number:
                            print(f"{method}, {kind}, {count} runs{', unmoved' * same}: {failure}", file=sys.stderr)
                    number += 1
    return outcome


def _merge_odd(_: Path, method: str, tensor: torch.Tensor, count: int, same: bool) -> None:
    from emomerge.checkpoints import MemoryCheckpoint, write_checkpoint
    from emomerge.files import to_json
    from emomerge.merging import merge

    def moved(run: int) -> torch.Tensor:
        if same or not tensor.dtype.is_floating_point:
            return tensor.clone()
        return (tensor.double() * (1 + 0.1 * run) + 0.01 * run).to(tensor.dtype)

    base = MemoryCheckpoint({"a.weight": tensor, "b.weight": torch.ones(3, 3)}, source="base")
    runs = [
        MemoryCheckpoint({"a.weight": moved(run), "b.weight": torch.eye(3) * run}, source=f"run {run}")
        for run in range(1, count + 1)
    ]
    losses = {"held_out_loss": lambda _: 0.5, "run_losses": [0.1 * (1 + run) for run in range(count)]}
    merged = merge(base, runs, method=method, scale=1.0, **losses)
    with tempfile.TemporaryDirectory(prefix="hostile-") as scratch:
        write_checkpoint(merged, Path(scratch) / "out")
        check_output(Path(scratch) / "out")
    json.loads(to_json(merged.diagnostics()), parse_constant=refuse)


# Processes that are killed, compete or differ in their surroundings -----------------------------------------------------

TINY = {
    **RECIPE,
    "base": {"prepare": {"model": "vit", "hidden": 16, "layers": 1, "patch_size": 4, "steps": 20, "learning_rate": 0.01}},
    "runs": {"procedure": "paper", "preset": "guarded", "steps": 6, "batch_size": 8, "checkpoint_every": 2, "lr": 20.0},
}


def in_child(function: Callable[[], int]) -> int:
    """Call a function in a copy of this process; return its id."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    status = 70
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        status = function()
    finally:
        os._exit(status)


def command(*arguments: object) -> int:
    """Run a command in this process; return its exit status."""
    from click.testing import CliRunner

    from emomerge.cli import main as commands

    result = CliRunner().invoke(commands, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code


def killed_trials(seed: int, trials: int) -> Outcome:
    """Kill train-all at random moments, by SIGKILL and SIGTERM in turn; it must end with the same weights when repeated."""
    with tempfile.TemporaryDirectory(prefix="hostile-") as scratch:
        recipe, whole, outcome = Path(scratch) / "tiny.yaml", Path(scratch) / "whole", Outcome()
        recipe.write_text(yaml.safe_dump(TINY))
        train = ("train-all", recipe, "--quiet", "-o")
        command(*train, whole)
        wanted = _trained(whole)
        began = time.perf_counter()
        os.waitpid(in_child(lambda: command(*train, Path(scratch) / "again")), 0)
        duration = time.perf_counter() - began
        for number in range(trials):
            rng, out = random.Random(f"{seed} killed {number}"), Path(scratch) / str(number)
            shutil.copytree(whole, out, ignore=shutil.ignore_patterns("runs", "runs.json"))
            child = in_child(lambda out=out: command(*train, out))
            time.sleep(rng.uniform(0.0, duration))
            os.kill(child, signal.SIGKILL if number % 2 else signal.SIGTERM)
            os.waitpid(child, 0)

            def repeat(_: Path, out: Path = out) -> None:
                if command(*train, out) or _trained(out) != wanted:
                    raise AssertionError("not the weights of a run that was left alone")

            attempt(repeat, out, outcome, number)
            shutil.rmtree(out)
    return outcome


def _trained(out: Path) -> dict[str, str]:
    from emomerge.training import RunDir

    return {
        folder.name: str(RunDir(folder).state.get("sha256")) for folder in sorted((out / "runs").iterdir()) if folder.is_dir()
    }


def competing_trials(name: str, trials: int) -> Outcome:
    """Give a command twice on one folder at once: each succeeds or says in one line that the other is working there."""
    outcome = Outcome()
    with tempfile.TemporaryDirectory(prefix="hostile-") as scratch:
        recipe = Path(scratch) / "tiny.yaml"
        recipe.write_text(yaml.safe_dump({**TINY, "merge": [{"method": "mean"}], "controls": []}))
        command(name, recipe, "--quiet", "-o", Path(scratch) / "whole")
        wanted = _trained(Path(scratch) / "whole")
        for number in range(trials):
            out = Path(scratch) / str(number)

            def both(_: Path, out: Path = out) -> None:
                children = [in_child(lambda: command(name, recipe, "--quiet", "-o", out)) for _ in range(2)]
                ends = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
                if ends not in ([0, 0], [0, 2]) or _trained(out) != wanted or command(name, recipe, "--quiet", "-o", out):
                    raise AssertionError(f"exit statuses {ends}")
                if name == "run" and not (out / "report.html").is_file():
                    raise AssertionError("no report")

            attempt(both, out, outcome, number)
    return outcome


def surroundings_trials() -> Outcome:
    """Merge with several hash seeds and thread counts: the bytes are the same."""
    import subprocess

    outcome, seen = Outcome(), set()
    with tempfile.TemporaryDirectory(prefix="hostile-") as scratch:
        folder = Path(scratch)
        for name, data in {"base": BASE, "run-0": RUNS[0], "run-1": RUNS[1]}.items():
            (folder / f"{name}.safetensors").write_bytes(data)
        line = [
            "merge",
            "base.safetensors",
            "run-0.safetensors",
            "run-1.safetensors",
            "--method",
            "dare-ties",
            "--density",
            "0.5",
        ]
        for number, (hash_seed, threads) in enumerate((("0", "1"), ("1", "2"), ("4242", "3"))):

            def once(_: Path, hash_seed: str = hash_seed, threads: str = threads, out: str = f"out-{number}") -> None:
                more = {"PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": threads}
                call = [sys.executable, "-m", "emomerge", *line, "-o", out]
                subprocess.run(call, cwd=folder, env={**os.environ, **more}, check=True, capture_output=True)
                seen.add((folder / out / "model.safetensors").read_bytes())
                if len(seen) > 1:
                    raise AssertionError("other bytes")

            attempt(once, folder, outcome, number)
    return outcome


def main() -> None:
    """Run the campaign and print its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trials", type=int, default=500, help="trials per reader (default: 500)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", help="only this part of the table; repeatable")
    parser.add_argument("--table", type=Path, help="JSON file that keeps finished readers and is continued")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table: dict[str, Any] = json.loads(options.table.read_text()) if options.table and options.table.exists() else {}

    def finish(name: str, outcome: Outcome) -> None:
        table[name] = {"trials": outcome.trials, "accepted": outcome.accepted, "refused": outcome.refused,
                       "slowest_s": outcome.slowest, "failures": dict(outcome.failures),
                       "examples": outcome.examples}  # fmt: skip
        print(f"{name}: {json.dumps(table[name])}", flush=True)
        if options.table:
            options.table.write_text(json.dumps({"seed": options.seed, **table}, indent=1) + "\n")

    from emomerge.merging import METHODS

    parts: dict[str, Callable[[], Outcome]] = {
        name: lambda name=name, reader=reader: campaign(name, reader, options.seed, options.trials)
        for name, reader in readers().items()
    }
    parts["merge methods"] = lambda: method_trials(methods=METHODS)
    parts["train-all killed"] = lambda: killed_trials(options.seed, 30)
    parts["two train-all in one folder"] = lambda: competing_trials("train-all", 10)
    parts["two run in one folder"] = lambda: competing_trials("run", 10)
    parts["hash seeds and threads"] = surroundings_trials
    for name, run in parts.items():
        if name not in table and (not options.only or name in options.only):
            finish(name, run())


if __name__ == "__main__":
    main()
