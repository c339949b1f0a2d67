"""What five runs cost when they share their passes: stacked, one after the other, and as five plain PEFT + AdamW loops.

    pip install torch==2.13.0 -e .
    python benchmarks/stacked_training.py                      # about 15 minutes on 2 cores; run it on a quiet machine
    python benchmarks/stacked_training.py --hidden 128 --tokens 64
    python benchmarks/stacked_training.py --out benchmarks/results/stacked_training.json     # adds to or replaces its rows

BERT of 6 layers (MiniLM's form) with LoRA of rank 8 on all linear layers, rows of 16 random tokens, float32. Every contender is
a process of its own. Printed are milliseconds of CPU for one step of all five runs, how many times less CPU and time stacked
runs take than five loops of PEFT, how many times less CPU than one after the other and what was expected, and the peak memory
of the process beside that of a single run. The base alone, frozen, with its dropout, forward and backward in one pass over the
rows of all five, is what no stack can do without: it limits how many times less CPU than PEFT there can be.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from emomerge.recipe import Recipe, parse_recipe
from emomerge.tasks import Split, TaskData
from emomerge.tasks.pretrained import TransformersTask
from emomerge.training import Context, RunSpec, planned_runs, train_locally

CONTENDERS = ("stacked", "sequential", "peft", "one", "base")
LENGTH, WARM = 16, 5
LIMITS = {(128, 16): 3.5, (128, 64): 3.5, (384, 64): 1.7}
"""How many times less CPU we hold ourselves to, against five PEFT loops; and a peak of at most 1.6 times one run's."""


class RandomSentences(TransformersTask):
    """Two classes of random tokens: the cost of training does not depend on what is learnt."""

    kind = "random"
    peft_task_type = "SEQ_CLS"

    def __init__(self, hidden: int, dropout: float) -> None:
        self.hidden, self.dropout = hidden, dropout

    def load_data(self, base: Any = None) -> TaskData:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(5, 1000, (512, LENGTH), generator=generator)
        split = Split({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2})
        return TaskData(split, split, split, ("even", "odd"), "")

    def new_model(self, base: Any, data: TaskData) -> nn.Module:
        raise NotImplementedError

    def save_processor(self, folder: str | Path) -> None:
        raise NotImplementedError

    def reload_model(self, folder: str | Path, *, trust_remote_code: bool = False) -> nn.Module:
        from transformers import BertConfig, BertForSequenceClassification

        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=1000, hidden_size=self.hidden, num_hidden_layers=6, num_attention_heads=max(1, self.hidden // 32),
            intermediate_size=4 * self.hidden, hidden_dropout_prob=self.dropout, attention_probs_dropout_prob=self.dropout,
        )  # fmt: skip
        return BertForSequenceClassification(config).eval()


def clocks() -> torch.Tensor:
    """Seconds of CPU, and of the clock on the wall."""
    return torch.tensor([time.process_time(), time.perf_counter()], dtype=torch.float64)


def our_runs(task: RandomSentences, recipe: Recipe) -> tuple[torch.Tensor, float]:
    """Seconds of a step of all runs, and how many times faster stacked runs were said to be."""
    started: dict[str, torch.Tensor] = {}
    ended: dict[str, torch.Tensor] = {}

    def on_step(spec: RunSpec, row: dict[str, Any]) -> None:
        (started if row["step"] == WARM else ended)[spec.name] = clocks()

    said: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        context = Context(recipe, Path(folder), "", Path(folder)).using(task, task.load_data())
        train_locally(context, planned_runs(recipe), on_step=on_step, say=said.append)
    expected = [float(found[1]) for line in said if (found := re.search(r"([\d.]+) times faster", line))]
    seconds = [ended[name] - started[name] for name in ended]
    total = seconds[0] if recipe.runs.parallel == "stacked" else sum(seconds, torch.zeros(2))
    return total / (recipe.runs.steps - WARM), (expected or [0.0])[0]


def peft_runs(task: RandomSentences, recipe: Recipe) -> torch.Tensor:
    """The same with PEFT and torch's fused AdamW, written as one would."""
    from peft import LoraConfig, get_peft_model

    data, total = task.load_data(), torch.zeros(2)
    for _ in recipe.runs.optimizers:
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS")
        model = get_peft_model(task.reload_model(""), config).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
        for step in range(recipe.runs.steps):
            if step == WARM:
                started = clocks()
            first = step * recipe.runs.batch_size % 448
            loss = task.loss(model, data.train.batch(range(first, first + recipe.runs.batch_size)))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        total = total + clocks() - started
    return total / (recipe.runs.steps - WARM)


def base_alone(task: RandomSentences, recipe: Recipe) -> torch.Tensor:
    """Forward and backward passes of the frozen base over the rows of all runs, as far as adapters on all layers need them."""
    data, rows = task.load_data(), recipe.runs.batch_size * len(recipe.runs.optimizers)
    model: Any = task.reload_model("").train().requires_grad_(False)
    first = model.bert.encoder.layer[0].attention.self
    for layer in (first.query, first.key, first.value):  # adapters begin here: nothing before needs gradients
        layer.register_forward_hook(lambda module, given, made: made.requires_grad_())
    for step in range(recipe.runs.steps):
        if step == WARM:
            started = clocks()
        begin = step * rows % (512 - rows)
        task.loss(model, data.train.batch(range(begin, begin + rows))).backward()
    return (clocks() - started) / (recipe.runs.steps - WARM)


def contend(name: str, hidden: int, tokens: int, steps: int, dropout: float) -> None:
    """One contender in this process; prints its figures."""
    warnings.simplefilter("ignore")
    task = RandomSentences(hidden, dropout)
    runs = {"procedure": "paper", "steps": steps, "batch_size": tokens // LENGTH, "checkpoint_every": steps}
    runs["parallel"] = "stacked" if name == "stacked" else "sequential"
    if name == "one":
        runs["optimizers"] = ["sens"]
    section = {"kind": "text-classification", "train": "none"}
    recipe = parse_recipe({"name": "b", "base": {"model": "none"}, "task": section, "adapter": {"kind": "lora"}, "runs": runs})
    others = {"peft": peft_runs, "base": base_alone}
    seconds, expected = (others[name](task, recipe), 0.0) if name in others else our_runs(task, recipe)
    print(
        json.dumps(
            {
                "cpu": float(seconds[0]),
                "wall": float(seconds[1]),
                "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                "expected": expected,
            }
        )
    )


def measure(hidden: int, tokens: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Contender → seconds of a step and peak memory in MB: the best of the rounds."""
    found: dict[str, dict[str, float]] = {}
    for _ in range(options.rounds):
        for name in CONTENDERS:
            arguments = [name, hidden, tokens, options.steps, options.dropout]
            command = [sys.executable, __file__, "--contender", *map(str, arguments)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            figures = json.loads(output.splitlines()[-1])
            found[name] = {key: min(value, found.get(name, figures)[key]) for key, value in figures.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 128, 384, 768])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 64, 256, 1024], help="of one run's batch")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--out", type=Path, help="JSON file that the figures are added to")
    parser.add_argument("--contender", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        name, hidden, tokens, steps, dropout = options.contender
        contend(name, int(hidden), int(tokens), int(steps), float(dropout))
        return
    heads = (
        "hidden", "tokens a run", "stacked", "sequential", "PEFT", "base alone", "less CPU", "at most", "less time",
        "than sequential", "expected", "peak MB", "of one run",
    )  # fmt: skip
    title = f"CPU of a step of five runs in ms, threads: {torch.get_num_threads()}, dropout {options.dropout:g}"
    console = Console(width=140)
    for hidden in options.hidden:
        table = Table(*heads, title=title)
        for tokens in options.tokens:
            found = measure(hidden, tokens, options)
            table.add_row(str(hidden), str(tokens), *cells(found, LIMITS.get((hidden, tokens))))
            if options.out:
                store(options.out, {"hidden": hidden, "tokens": tokens, "dropout": options.dropout, **found})
        console.print(table)


def store(file: Path, row: dict[str, Any]) -> None:
    """Add a row to a JSON file, or replace the row of the same sizes."""
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    key = "hidden", "tokens", "dropout"
    rows = [each for each in rows if any(each[name] != row[name] for name in key)]
    row |= {"machine": machine(), "threads": torch.get_num_threads(), "load": os.getloadavg()[0], "torch": torch.__version__}
    rows = sorted([*rows, row], key=lambda each: [each[name] for name in key])
    file.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")


def machine() -> str:
    """The processor and its number of cores."""
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return f"{(models or [platform.processor() or platform.machine()])[0]}, {os.cpu_count()} cores"


def cells(found: dict[str, dict[str, float]], limit: float | None) -> list[str]:
    stacked, peft = found["stacked"], found["peft"]
    ratio, faster, memory = peft["cpu"] / stacked["cpu"], peft["wall"] / stacked["wall"], stacked["rss"] / found["one"]["rss"]
    kept = "" if limit is None else f" ({limit} {'kept' if ratio >= limit else 'MISSED'})"
    cpu = [f"{1000 * found[name]['cpu']:.1f}" for name in ("stacked", "sequential", "peft", "base")]
    than_ours = f"{found['sequential']['cpu'] / stacked['cpu']:.2f}", f"{stacked['expected']:.1f}"
    most = f"{peft['cpu'] / found['base']['cpu']:.2f}"
    return [*cpu, f"{ratio:.2f}{kept}", most, f"{faster:.2f}", *than_ours, f"{stacked['rss']:.0f}", f"{memory:.2f}"]


if __name__ == "__main__":
    main()
