"""Damage to valid files, and the trial of reading them: what `hostile_inputs.py` does to every reader."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
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

import yaml

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
