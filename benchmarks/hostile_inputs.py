"""Mutated inputs through every reader, and every merge method on every kind of tensor: what breaks?

    python benchmarks/hostile_inputs.py --trials 800 --table table.json

A trial takes a valid sample of a reader's files, damages it, and reads it in this process. A failure is an exception other than
`EmomergeError`, a message of several lines or with escape sequences, more than 20 seconds, a temporary left behind, or NaN in
an output. A trial's damage depends only on the seed, the reader and the trial's number, and finished readers are kept in the
table, so that the same command continues.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save

from emomerge.errors import EmomergeError

SECONDS = 20
Files = Mapping[str, bytes]
Read = Callable[[Path], object]

NUMBERS = [
    0, -1, 1, 2, 7, 1.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), float("-inf"), 2**31, 2**53 + 1,
    2**63, 2**64, -(2**63),
    10**30, 10**400, True, False,
]  # fmt: skip
TEXTS = [
    "", " ", "a", ".", "..", "../../etc/passwd", "/dev/zero", "/dev/stdin", "\x00", "a\x00b",
    "\x1b[2J\x1b]0;x\x07", "\x9b31m", "[/]",
    "[bold red]x", "<script>alert(1)</script>", "\ud800", "ä\u202eb", "x" * 5000, "(a+)+b", "(", "[", "\\",
    "nan", "Infinity", "1e999",
    "!!int x", "2020-99-99", "*a", "&a", "NaN", "null", "F32", "BF16", "LORA", "auto", "-", "--force", "%s%n",
    "{0}", "${HOME}", "~",
]  # fmt: skip
CONTAINERS: list[Any] = [None, [], {}, [[]], [None], {"": None}, [1, "a"], {"a": {"b": []}}, [[1, 2], [3]]]
BYTES = [
    b"",
    b"\x00",
    b"\xff\xfe",
    b"\x1b[31m",
    b"{",
    b"[" * 3000,
    b'"',
    b"\n",
    b"\xed\xa0\x80",
    b": ",
    b"- ",
    b"&a [*a]",
    b"9" * 5000,
]


@dataclass
class Reader:
    """A valid sample of the files that something reads, and the function that reads them."""

    files: Files
    read: Read
    share: float = 1.0
    """Trials as a share of those asked for: less for slow readers."""
    folder_kinds: bool = True
    """Whether files are also replaced by folders, pipes, links and the like."""


@dataclass
class Outcome:
    """Counts of one reader."""

    trials: int = 0
    accepted: int = 0
    refused: int = 0
    slowest: float = 0.0
    """CPU seconds of the slowest trial."""
    failures: Counter[str] = field(default_factory=Counter)
    examples: dict[str, int] = field(default_factory=dict)
    """Kind of failure → the number of the first trial."""


class TooSlow(BaseException):
    """A trial took longer than SECONDS."""


def value(rng: random.Random) -> Any:
    """Draw a value that few readers expect."""
    return rng.choice([rng.choice(NUMBERS), rng.choice(TEXTS), rng.choice(CONTAINERS)])


def damaged_tree(tree: Any, rng: random.Random) -> Any:
    """Change one place of plain data: another value, a missing or a new key, a repetition, a deep nest."""
    if isinstance(tree, dict) and tree and rng.random() < 0.85:
        key = rng.choice(list(tree))
        changed = dict(tree)
        action = rng.random()
        if action < 0.6:
            changed[key] = damaged_tree(tree[key], rng)
        elif action < 0.75:
            del changed[key]
        elif action < 0.9:
            changed[rng.choice(TEXTS)] = rng.choice([tree[key], value(rng)])
        else:
            changed[f"{key}{rng.choice(TEXTS)}"] = changed.pop(key)
        return changed
    if isinstance(tree, list) and tree and rng.random() < 0.7:
        place, changed_list = rng.randrange(len(tree)), list(tree)
        if rng.random() < 0.6:
            changed_list[place] = damaged_tree(tree[place], rng)
        else:
            changed_list[place : place + rng.randrange(2)] = [value(rng)] * rng.randrange(3)
        return changed_list
    if rng.random() < 0.03:
        deep: Any = tree
        for _ in range(rng.choice([60, 300, 900])):
            deep = [deep]
        return deep
    return value(rng)


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, repeat or insert bytes."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(changed) + 1)
        action = rng.randrange(5)
        if action == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif action == 1:
            del changed[at : at + rng.choice([1, 4, 40, 4000])]
        elif action == 2:
            changed[at:at] = rng.choice(BYTES)
        elif action == 3:
            changed[at:at] = changed[at : at + rng.choice([1, 8, 64])]
        elif at + 8 <= len(changed):
            changed[at : at + 8] = rng.choice([0, 1, 2**63 - 1, 2**64 - 1, 100_000_001]).to_bytes(8, "little")
    return bytes(changed)


def damaged_file(name: str, data: bytes, rng: random.Random) -> bytes:
    """Damage a file by its format."""
    if rng.random() < 0.25:
        return damaged_bytes(data, rng)
    if name.endswith(".json"):
        return _json(damaged_tree(json.loads(data), rng))
    if name.endswith(".jsonl"):
        lines = data.splitlines()
        at = rng.randrange(len(lines))
        lines[at] = _json(damaged_tree(json.loads(lines[at]), rng))
        return b"\n".join(lines) + b"\n"
    if name.endswith(".yaml"):
        tree = damaged_tree(yaml.safe_load(data), rng)
        with contextlib.suppress(Exception):
            return yaml.safe_dump(tree, sort_keys=False).encode(errors="surrogatepass")
        return _json(tree)
    if name.endswith(".safetensors"):
        length = int.from_bytes(data[:8], "little")
        header = _json(damaged_tree(json.loads(data[8 : 8 + length]), rng))
        return len(header).to_bytes(8, "little") + header + data[8 + length :]
    return damaged_bytes(data, rng)


def _json(tree: Any) -> bytes:
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(tree).encode(errors="surrogatepass")
    finally:
        sys.set_int_max_str_digits(4300)


def damage(folder: Path, files: Files, rng: random.Random, *, folder_kinds: bool) -> None:
    """Write the sample into a folder with one file, rarely two, damaged."""
    chosen = set(rng.sample(sorted(files), min(len(files), rng.choice([1, 1, 1, 2]))))
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name not in chosen:
            path.write_bytes(data)
        elif folder_kinds and rng.random() < 0.05:
            kind = rng.randrange(5)
            if kind == 0:
                path.mkdir()
            elif kind == 1:
                os.mkfifo(path)
            elif kind == 2:
                path.symlink_to(path.name)
            elif kind == 3:
                path.symlink_to("/dev/zero")
        else:
            path.write_bytes(damaged_file(name, data, rng))


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise TooSlow in the block after some seconds of work, or six times as long in all: other programs may be busy, too."""

    def stop(*_: object) -> None:
        raise TooSlow

    timers = ((signal.SIGPROF, signal.ITIMER_PROF, seconds), (signal.SIGALRM, signal.ITIMER_REAL, 6 * seconds))
    before = [signal.signal(number, stop) for number, _, _ in timers]
    for _, timer, after in timers:
        signal.setitimer(timer, after)
    try:
        yield
    finally:
        for (number, timer, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


def attempt(read: Read, folder: Path, outcome: Outcome, number: int) -> None:
    """Read once and count what happened."""
    began, kind = time.process_time(), ""
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()) as shown, limited(SECONDS):
            read(folder)
        outcome.accepted += 1
        if effects := re.search(r"[\x00-\x08\x0e-\x1f\x7f-\x9f]", shown.getvalue()):
            kind = f"shows {effects[0]!r}"
    except EmomergeError as error:
        outcome.refused += 1
        if effects := re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", str(error)):
            kind = f"a message with {effects[0]!r}: {str(error)[:60]!r}"
    except TooSlow:
        kind = f"slower than {SECONDS} s"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "/emomerge/" in frame.filename]
        at = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
        kind = f"{type(error).__name__} at {at}: {str(error)[:80]!r}"
    left = [path.name for path in folder.rglob("*") if path.name.endswith((".tmp", ".old"))]
    if left and not kind:
        kind = f"left {re.sub(r'[0-9]+', 'N', left[0])}"
    outcome.trials += 1
    outcome.slowest = max(outcome.slowest, round(time.process_time() - began, 2))
    if kind:
        outcome.failures[kind] += 1
        outcome.examples.setdefault(kind, number)


def campaign(name: str, reader: Reader, seed: int, trials: int, *, first: int = 0) -> Outcome:
    """Run the trials of one reader."""
    outcome = Outcome()
    for number in range(first, first + max(1, round(trials * reader.share))):
        rng = random.Random(f"{seed} {name} {number}")
        with tempfile.TemporaryDirectory(prefix="hostile-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
            damage(Path(scratch), reader.files, rng, folder_kinds=reader.folder_kinds)
            attempt(reader.read, Path(scratch), outcome, number)
    return outcome


# The samples -----------------------------------------------------------------------------------------------------------


def _tensors(seed: int, *, step: float = 0.0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.layers.0.q_proj.weight": (6, 4), "model.layers.1.q_proj.weight": (6, 4), "model.norm.weight": (4,)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    generator.manual_seed(seed)
    return {name: (t + step * torch.randn(t.shape, generator=generator)).to(dtype) for name, t in base.items()}


def _plain(tree: Any) -> bytes:
    return json.dumps(tree, indent=1).encode()


BASE = save(_tensors(0), metadata={"format": "pt"})
RUNS = [save(_tensors(seed, step=0.1)) for seed in (1, 2)]
LORA = save(
    {
        f"base_model.model.model.layers.{i}.q_proj.lora_{side}.weight": torch.ones(shape)
        for i in range(2)
        for side, shape in (("A", (2, 4)), ("B", (6, 2)))
    }
)
LORA_CONFIG = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "base", "r": 2, "lora_alpha": 4, "bias": "none",
    "target_modules": ["q_proj"], "rank_pattern": {"layers.7.q_proj": 4}, "alpha_pattern": {"^layers.9": 1.5},
    "use_rslora": False,
    "fan_in_fan_out": False, "init_lora_weights": True, "modules_to_save": None, "trainable_token_indices": None,
    "target_parameters": None, "lora_dropout": 0.0, "inference_mode": True,
}  # fmt: skip
MODEL_CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 16, "max_position_embeddings": 32, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True, "torch_dtype": "float32", "rope_theta": 10000.0, "auto_map": None,
}  # fmt: skip
TOKENIZER = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "<s>"}]}
RECIPE = {
    "name": "tiny", "base": {"prepare": {"model": "vit", "hidden": 16, "layers": 1, "patch_size": 4, "steps": 20}},
    "task": {"kind": "image-classification", "train": "digits", "limit": 160, "eval_fraction": 0.5},
    "adapter": {"kind": "lora", "rank": 2, "alpha": 4}, "runs": {"steps": 6, "batch_size": 8, "preset": "v3.8",
    "lr": 20.0, "seeds": [0, 1]},
    "merge": [{"method": "ties", "density": 0.3, "scale": 0.5}, {"method": "mean"}],
    "probe": {"preset": "quick", "batches": 1, "batch_size": 32, "directions": 2},
}  # fmt: skip
MERGEKIT = {
    "merge_method": "ties", "base_model": "base", "dtype": "float32",
    "models": [{"model": f"run-{i}", "parameters": {"weight": 0.5, "density": [0.2, 0.8]}} for i in range(2)],
    "parameters": {"normalize": True, "lambda": [{"filter": "q_proj", "value": 0.5}, {"value": 1.0}]},
}  # fmt: skip


def _materialised(checkpoint: Any) -> None:
    for name in checkpoint:
        checkpoint[name]


def _read_header(folder: Path) -> None:
    from emomerge.checkpoints import open_checkpoint
    from emomerge.cli.inspection import compare, describe, show_comparison, show_description
    from emomerge.cli.printing import console

    path = folder / "model.safetensors"
    _materialised(open_checkpoint(path))
    console().print(show_description(describe(str(path))))
    console().print(show_comparison(compare(str(path), str(folder / "other.safetensors"))))


def _read_folder(folder: Path) -> None:
    from emomerge.checkpoints import open_checkpoint, write_checkpoint

    opened = open_checkpoint(folder / "base")
    _materialised(opened)
    write_checkpoint(opened, folder / "out", files_from=opened.folder)
    _check_output(folder / "out")


def _check_output(out: Path) -> None:
    from safetensors.torch import load_file

    for file in out.rglob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
                raise AssertionError(f"NaN in the output: {name}")


def _bake(folder: Path) -> None:
    from emomerge import adapters
    from emomerge.cli.inspection import describe
    from emomerge.files import to_json

    _materialised(adapters.bake(folder / "base", folder / "adapter"))
    json.loads(to_json(describe(str(folder / "adapter"))), parse_constant=_refuse)


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} in JSON")


def _build_model(folder: Path) -> None:
    from emomerge.adapters.naming import BaseNames
    from emomerge.checkpoints import open_checkpoint

    names = BaseNames(open_checkpoint(folder / "base"))
    _ = names.config, names.model, names.without_conv1d
    names.find("model.layers.0.q_proj.weight")
    names.find("layers.0.q_proj.weight")


def _load_recipe(folder: Path) -> None:
    from emomerge.numerics.hashing import digest
    from emomerge.recipe import load_recipe

    recipe = load_recipe(folder / "recipe.yaml", ["runs.steps=7"])
    digest(recipe)
    yaml.safe_dump(recipe.model_dump(mode="json"))


def _set_recipe(folder: Path) -> None:
    from emomerge.recipe import load_recipe

    load_recipe(folder / "recipe.yaml", (folder / "set.txt").read_text(errors="replace").splitlines())


def _mergekit(folder: Path) -> None:
    from emomerge.merging.mergekit import read_config

    with contextlib.chdir(folder):
        read_config(folder / "config.yaml")


def _record(folder: Path) -> None:
    from emomerge.cli.write import merge_card
    from emomerge.merging import merge
    from emomerge.merging.record import read_record

    with contextlib.chdir(folder):
        record = read_record(folder / "merge.json")
        record.check_inputs()
        merged = merge(record.base, [run.source for run in record.runs], method=record.method, **record.params)
        _materialised(merged)
        facts = {**record.model_dump(mode="json"), "diagnostics": merged.diagnostics()}
        merge_card(facts, folder / "out")


def _reconstruct(folder: Path) -> None:
    from emomerge.checkpoints import open_checkpoint
    from emomerge.merging import masks

    base = open_checkpoint(folder / "base" / "model.safetensors")
    _materialised(masks.reconstruct(folder, "run-0", base))


def _status(folder: Path) -> None:
    from emomerge.cli.printing import console
    from emomerge.cli.status import show_status, status_of
    from emomerge.files import to_json

    found = status_of(folder)
    console().print(show_status(found))
    json.loads(to_json(found), parse_constant=_refuse)


def _results(folder: Path) -> None:
    from emomerge.cli.printing import print_results
    from emomerge.reporting import Card, model_card
    from emomerge.results import load_results

    results = load_results(folder)
    print_results(results, folder / "report.html")
    card = model_card(Card(title=results.name, results=results, recipe_yaml=results.recipe_yaml, command=results.command))
    card.encode()


def _page(folder: Path) -> None:
    from emomerge.reporting import write_report
    from emomerge.results import load_results

    page = write_report(load_results(folder), folder / "report.html").read_text()
    if re.search(r"<script>alert", page):
        raise AssertionError("a name became an element of the page")


def _tables(folder: Path) -> None:
    from emomerge.tasks.rows import read_rows

    for name in ("rows.csv", "rows.tsv", "rows.jsonl"):
        for row in read_rows(str(folder / name), "train", ["text", "label"]):
            [str(cell).encode(errors="backslashreplace") for cell in row.cells]


def _images(folder: Path) -> None:
    from emomerge.tasks.images import _read_idx

    _read_idx(folder / "images", dims=3)
    _read_idx(folder / "labels.gz", dims=1)


def _command(folder: Path) -> None:
    from click.testing import CliRunner

    from emomerge.cli import main

    arguments = (folder / "arguments.txt").read_text(errors="replace").split("\n")
    with contextlib.chdir(folder):
        result = CliRunner().invoke(main, [*arguments, "-o", "out"], catch_exceptions=False)
    if result.exit_code == 0 and "--json" in arguments:
        json.loads(result.stdout, parse_constant=_refuse)
    if result.exit_code not in (0, 2):
        raise AssertionError(f"exit status {result.exit_code}: {result.output[-80:]}")
    if result.exit_code == 2 and (folder / "out").exists():
        raise AssertionError("an output in spite of an error")
    _check_output(folder / "out")
    if result.exit_code:
        raise EmomergeError(result.stderr.strip().splitlines()[-1])


def _results_sample() -> dict[str, Any]:
    names = ["base", "sens-0", "cats-0", "mean"]
    figure = {"mean": 0.5, "stderr": 0.01, "n": 4}
    keys = {"validation_loss": "loss", "test_loss": "test", "test_accuracy": "accuracy", "distance": "distance"}
    return {
        "schema_version": 2, "name": "tiny", "command": "emomerge run tiny", "recipe_yaml": "name: tiny\n", "device": "cpu",
        "data": {"summary": "80 rows", "rows": {"train": 80, "validation": 40, "test": 40}, "classes": ["a", "b"]},
        "columns": [{"key": key, "title": title, "meaning": title, "better": "lower"} for key, title in keys.items()],
        "artefacts": [
            {"name": name, "role": "base" if name == "base" else "merge" if name == "mean" else "run", "seed": 0,
             "optimizer": name.partition("-")[0], "estimates": dict.fromkeys(keys, figure)} for name in names
        ],
        "curves": {"sens-0": {"alpha": [0.0, 0.5, 1.0], "loss": [0.9, 0.7, 0.6]}},
        "barriers": {"names": names[1:3], "matrix": [[0.0, 0.1], [0.1, 0.0]]},
        "cosines": {"names": names[1:3], "matrix": [[1.0, 0.4], [0.4, 1.0]], "sign_agreement": [[1.0, 0.6], [0.6, 1.0]]},
        "traces": {"sens-0": {"optimizer": "sens", "seed": 0, "step": [1, 2], "loss": [0.9, 0.8], "rate": [0.1, 0.2]}},
        "merges": {"mean": {"method": "mean", "runs": names[1:3], "kept_density": 0.9, "warnings": ["w"],
        "params": {"scale": 1.0}}},
        "selected": {"name": "mean", "path": "m", "validation_loss": 0.5, "sentence": "Use mean.", "kind": "model"},
        "samples": {"about": "texts", "prompts": ["p"], "texts": {"base": ["t"], "mean": ["u"]}},
        "seconds": {"base": 1.0},
    }  # fmt: skip


def readers() -> dict[str, Reader]:
    """Return every reader by name."""
    runs = {f"run-{i}/model.safetensors": data for i, data in enumerate(RUNS)}
    model = {"base/model.safetensors": BASE, "base/config.json": _plain(MODEL_CONFIG)}
    adapter = {"adapter/adapter_config.json": _plain(LORA_CONFIG), "adapter/adapter_model.safetensors": LORA}
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {name: f"model-0000{1 + (i > 1)}-of-00002.safetensors" for i, name in enumerate(sorted(_tensors(0)))},
    }
    names = sorted(_tensors(0))
    shards = {
        f"base/model-0000{n}-of-00002.safetensors": save({k: _tensors(0)[k] for k in some})
        for n, some in ((1, names[:2]), (2, names[2:]))
    }
    parts = {
        "base/model_index.json": _plain({"_class_name": "P", "unet": ["d", "U"], "tokenizer": ["t", "T"]}),
        "base/unet/config.json": b"{}", "base/unet/diffusion_pytorch_model.safetensors": BASE,
        "base/tokenizer/vocab.json": b"{}",
    }  # fmt: skip
    tokenizer = {
        "base/tokenizer.json": _plain(TOKENIZER), "base/tokenizer_config.json": _plain({"eos_token": "a", "auto_map": {}}),
        "base/modules.json": _plain([{"idx": 0, "path": "", "type": "t"}, {"idx": 1, "path": "1_P", "type": "t"}]),
        "base/generation_config.json": _plain({"eos_token_id": 1}),
    }  # fmt: skip
    masks = {name: torch.full((2, -(-tensor.numel() // 8)), 255, dtype=torch.uint8) for name, tensor in _tensors(0).items()}
    masked = {
        "masks/masks.safetensors": save(masks, metadata={"runs": '["run-0", "run-1"]', "bits": "little"}),
        "masks/reference.safetensors": save(_tensors(3)),
    }
    finished = {
        "recipe.yaml": yaml.safe_dump(RECIPE).encode(),
        "runs/sens-0/run.json": _plain({"state": "done", "inputs": "x", "step": 6, "sizes": {"a": 1}, "artefact": "adapter"}),
        "runs/sens-0/metrics.jsonl": b"".join(_plain_line({"step": i, "loss": 0.5, "rate": 0.1}) for i in range(3)),
        "runs/cats-0/run.json": _plain({"state": "failed", "error": "x", "inputs": None}),
        "stamps/base.json": _plain({"inputs": "x", "sizes": {"base/config.json": 2}, "sha256": "y"}),
        "stamps/controls.json": _plain({"inputs": "x", "sizes": {}, "trained": []}),
        "stamps/fingerprints.json": _plain({"/x": {"seen": [1, 2], "sha256": "y"}}),
        "evaluations.jsonl": _plain_line(
            {"model": "m", "data": "d", "metric": "loss", "radius": 0, "direction": 0, "batch": 0}
        ),
    }
    from emomerge.numerics.hashing import sha256

    with tempfile.TemporaryDirectory() as scratch:
        for name, data in {"b": BASE, "0": RUNS[0], "1": RUNS[1]}.items():
            (Path(scratch) / name).write_bytes(data)
        hashes = {name: {"model.safetensors": sha256(Path(scratch) / name)} for name in ("b", "0", "1")}
    record = {
        "method": "ties", "params": {"density": 0.2, "scale": 1.0}, "base": "base", "base_sha256": hashes["b"], "recipe": None,
        "runs": [{"name": f"run-{i}", "source": f"run-{i}", "sha256": hashes[str(i)]} for i in range(2)], "overrides": [],
        "further_sha256": {}, "output": {"dtype": "base", "seed": 0, "max_shard_size": "5GB", "as_lora": None},
    }  # fmt: skip
    table = {
        "rows.csv": b'text,label\n"a, b",x\nc,y\n', "rows.tsv": b"text\tlabel\na\tx\nc\ty\n",
        "rows.jsonl": b'{"text": "a", "label": "x"}\n{"text": "b", "label": 1}\n',
    }  # fmt: skip
    import gzip

    idx = {
        "images": bytes([0, 0, 8, 3]) + b"\0\0\0\x02" * 3 + bytes(8),
        "labels.gz": gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 2, 1, 0])),
    }
    merge_line = "merge\nbase/model.safetensors\nrun-0\nrun-1\n--method\nties\n--density\n0.3\n--weight\n1\n--weight\n2"
    bake_line = "bake\nbase\nadapter\n--dtype\nbfloat16\n--max-shard-size\n1GB\n--quiet"
    commands = [
        f"{merge_line}\n--json", f"{merge_line}\n--max-shard-size\n100", bake_line,
        "merge\nbase/model.safetensors\nrun-0\nrun-1\n--method\nslerp\n--set\nt=[0.2, 0.8]\n--json",
        "merge\nbase/model.safetensors\nrun-0\nrun-1\n--method\nmean\n--as-lora\n2\n--allow-partial\n--scale\n0.5\n--json",
        "merge\nbase/model.safetensors\nrun-0\nrun-1\n--save-masks\n--set\nlambda=0.3\n--json",
    ]  # fmt: skip
    lines = {
        f"command line {i}": Reader(
            {**model, **runs, **adapter, "arguments.txt": line.encode()}, _command, 0.15, folder_kinds=False
        )
        for i, line in enumerate(commands, start=1)
    }
    return {
        "one file": Reader({"model.safetensors": BASE, "other.safetensors": RUNS[0]}, _read_header),
        "sharded folder": Reader({**shards, "base/model.safetensors.index.json": _plain(index)}, _read_folder),
        "folder of parts": Reader(parts, _read_folder),
        "configuration and tokenizer": Reader({**model, **tokenizer, "base/1_P/config.json": b"{}"}, _read_folder),
        "adapter": Reader({**model, **adapter}, _bake),
        "adapter configuration": Reader({"adapter/adapter_config.json": adapter["adapter/adapter_config.json"]}, _with(
            {"base/model.safetensors": BASE, "adapter/adapter_model.safetensors": LORA}, _bake)),
        "model of a configuration": Reader({"base/config.json": _plain(MODEL_CONFIG)}, _with(
            {"base/model.safetensors": BASE}, _build_model), 0.5),
        "recipe": Reader({"recipe.yaml": yaml.safe_dump(RECIPE, sort_keys=False).encode()}, _load_recipe),
        "settings of a recipe": Reader(
            {"recipe.yaml": yaml.safe_dump(RECIPE).encode(), "set.txt": b"runs.steps=3\nmerge.0.density=[0.1, 0.2]\n"},
            _set_recipe, 0.5, folder_kinds=False),
        "mergekit configuration": Reader({"config.yaml": yaml.safe_dump(MERGEKIT, sort_keys=False).encode()}, _with(
            {**runs, **model}, _mergekit)),
        "record of a merge": Reader({"merge.json": _plain(record)}, _with({**runs, **model}, _record), 0.5),
        "masks": Reader(masked, _with(model, _reconstruct)),
        "output folder": Reader(finished, _status, 0.5),
        "results": Reader({"results.json": _plain(_results_sample())}, _results),
        "page": Reader({"results.json": _plain(_results_sample())}, _page, 0.05),
        "data tables": Reader(table, _tables),
        "image data": Reader(idx, _images),
        **lines,
    }  # fmt: skip


def _plain_line(tree: Any) -> bytes:
    return json.dumps(tree).encode() + b"\n"


def _with(files: Files, read: Read) -> Read:
    """Return a reader that finds these files undamaged beside its own."""

    def reads(folder: Path) -> object:
        for name, data in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not os.path.lexists(path):
                path.write_bytes(data)
        return read(folder)

    return reads


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
        _check_output(Path(scratch) / "out")
    json.loads(to_json(merged.diagnostics()), parse_constant=_refuse)


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
        began = time.perf_counter()
        command(*train, whole)
        duration, wanted = time.perf_counter() - began, _trained(whole)
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


def competing_trials(trials: int) -> Outcome:
    """Start two `train-all` on one folder at once: each succeeds or says in one line that the other is working there."""
    outcome = Outcome()
    with tempfile.TemporaryDirectory(prefix="hostile-") as scratch:
        recipe = Path(scratch) / "tiny.yaml"
        recipe.write_text(yaml.safe_dump(TINY))
        command("train-all", recipe, "--quiet", "-o", Path(scratch) / "whole")
        wanted = _trained(Path(scratch) / "whole")
        for number in range(trials):
            out = Path(scratch) / str(number)

            def both(_: Path, out: Path = out) -> None:
                children = [in_child(lambda: command("train-all", recipe, "--quiet", "-o", out)) for _ in range(2)]
                ends = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
                if ends not in ([0, 0], [0, 2]) or _trained(out) != wanted:
                    raise AssertionError(f"exit statuses {ends}")

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
    parts["two train-all in one folder"] = lambda: competing_trials(5)
    parts["hash seeds and threads"] = surroundings_trials
    for name, run in parts.items():
        if name not in table and (not options.only or name in options.only):
            finish(name, run())


if __name__ == "__main__":
    main()
