"""The output folder of a recipe: its paths, the stamps of its stages, and a lock against other processes.

A completed stage is stamped with the hash of its inputs and the sizes of its files. A stage whose stamp matches is skipped.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from pydantic import BaseModel, ConfigDict

from emomerge.checkpoints import atomic
from emomerge.errors import BadInput
from emomerge.files import read_json_or
from emomerge.numerics.hashing import digest
from emomerge.recipe import Recipe
from emomerge.training.plan import RunSpec
from emomerge.training.run_dir import sizes_agree
from emomerge.training.work import Work


class _Stamp(BaseModel):
    """The facts of a stamp that every stage has, of the types that are written; others are kept as they are."""

    model_config = ConfigDict(extra="allow")

    inputs: str = ""
    sizes: dict[str, int] = {}
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    trained: list[RunSpec] = []
    """Of the stage `controls`."""
    work: Work | None = None
    """Of the stage `base`."""


class _Fingerprint(BaseModel):
    """The hash of an input, with its size and modification time."""

    seen: list[int]
    sha256: str


class Workspace:
    """Paths and stamps of one output folder.

    out/
      recipe.yaml    base/    runs/<run>/    merges/<merge>/    evaluations.jsonl    results.json    report.html    figures/
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.base = out / "base"
        self.runs = out / "runs"
        self.merges = out / "merges"
        self.ledger = out / "evaluations.jsonl"
        self.results = out / "results.json"
        self.report = out / "report.html"
        self.recipe = out / "recipe.yaml"
        self.figures = out / "figures"
        self.slurm = out / "slurm"
        self._stamps = out / "stamps"
        self._paths = self._stamps / "paths.json"
        self._fingerprints = self._stamps / "fingerprints.json"
        self._memory: dict[str, dict[str, Any]] = {}
        self._lock: TextIO | None = None

    def stamp(self, stage: str) -> dict[str, Any]:
        """Return the stamp of a completed stage; empty if there is none."""
        return read_json_or(self._stamps / f"{stage}.json", _Stamp, _Stamp()).model_dump(exclude_unset=True)

    def is_done(self, stage: str, inputs: str) -> bool:
        """Return whether the stage was completed from these inputs and its files still have their sizes."""
        stamp = self.stamp(stage)
        return stamp.get("inputs") == inputs and sizes_agree(self.out, stamp.get("sizes", {}))

    def write_stamp(self, stage: str, inputs: str, files: list[Path], **facts: Any) -> None:
        """Stamp a stage as complete."""
        sizes = {str(file.relative_to(self.out)): file.stat().st_size for file in files}
        atomic.write_json(self._stamps / f"{stage}.json", {"inputs": inputs, "sizes": sizes, **facts})

    def paths(self) -> dict[str, str]:
        """Return the absolute paths in the folder's recipe, and how the recipe that it was made from gives them."""
        return read_json_or(self._paths, dict[str, str], {})

    def remember(self, paths: dict[str, str]) -> None:
        """Write down paths (see `paths`), and the hashes of all inputs that were read."""
        atomic.write_json(self._paths, paths)
        atomic.write_json(self._fingerprints, self._memory)

    def forget(self, stage: str) -> None:
        """Remove a stage's stamp, so that it is done again."""
        (self._stamps / f"{stage}.json").unlink(missing_ok=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder while the block runs, and remove it afterwards if it is empty, with the folders made for it.

        Raises:
            BadInput: another process holds the lock.
        """
        atomic.refuse_no_disk(self.out)
        made = [folder for folder in self.out.parents if not folder.exists()]
        with atomic.translate_os_error(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            self._lock = lock = (self.out / ".lock").open("w")
        with lock, self._held(lock):
            try:
                yield
            finally:  # while holding the lock: another process may be about to write to the folder
                if [place.name for place in self.out.iterdir()] == [".lock"]:
                    shutil.rmtree(self.out)
                    with contextlib.suppress(OSError):  # something else is there by now
                        for folder in made:
                            folder.rmdir()

    def let_go(self) -> None:
        """Close the lock in a copy of the process that holds it, which would otherwise hold it beyond that one's end."""
        if self._lock is not None:
            self._lock.close()

    def is_busy(self) -> bool:
        """Return whether a process is working in the folder."""
        if not (self.out / ".lock").exists():
            return False
        with (self.out / ".lock").open("r") as lock:
            try:
                with self._held(lock):
                    return False
            except BadInput:
                return True

    @contextlib.contextmanager
    def _held(self, lock: TextIO) -> Iterator[None]:
        try:
            import fcntl
        except ImportError:  # no file locks on this system; files are still replaced atomically
            yield
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadInput(
                "another emomerge is working here", where=self.out, fix="wait for it, or choose another -o"
            ) from None
        yield

    def clear(self) -> None:
        """Remove the files of an earlier run and nothing else. Raises BadInput if this is not an output folder."""
        if not any(place.name != ".lock" for place in self.out.iterdir()):
            return
        if not self.recipe.is_file():
            raise BadInput(
                "not an output folder of emomerge", where=self.out, expected="recipe.yaml in it", fix="choose another -o"
            )
        for folder in (self.base, self.runs, self.merges, self._stamps, self.figures, self.slurm):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (self.ledger, self.results, self.report, self.recipe):
            file.unlink(missing_ok=True)

    def input_hash(self, recipe: Recipe) -> str:
        """Return the hash of all external inputs: data files and a local base model."""
        return digest([self._fingerprint(Path(source).expanduser()) or source for source in recipe.external_sources()])

    def _fingerprint(self, path: Path) -> str | None:
        """Return the content hash of a file or folder; None if there is none, as for a Hub id.

        Hashes are cached with size and modification time, so that a large base is read once.
        """
        if not path.exists():
            return None
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        if not self._memory:
            kept = read_json_or(self._fingerprints, dict[str, _Fingerprint], {})
            self._memory = {name: known.model_dump() for name, known in kept.items()}
        found, memory = {}, self._memory
        for file in files:
            status = file.stat()
            seen = [status.st_size, status.st_mtime_ns]
            known = memory.get(str(file.absolute()))
            if known is None or known["seen"] != seen:
                known = {"seen": seen, "sha256": atomic.sha256(file)}
                memory[str(file.absolute())] = known
            found[file.relative_to(path).as_posix()] = known["sha256"]
        return digest(found)


def local_files(sources: Iterable[str]) -> list[Path]:
    """Return the files at or below those sources that are local paths."""
    places = [place for source in sources if (place := Path(source).expanduser()).exists()]
    return [file for place in places for file in (files_below(place) if place.is_dir() else [place])]


def files_below(folder: Path) -> list[Path]:
    """Return every file below a folder, sorted."""
    return sorted(file for file in folder.rglob("*") if file.is_file())


@contextlib.contextmanager
def stopwatch() -> Iterator[dict[str, float]]:
    """Measure the duration and the CPU time of a block, available as `seconds` and `cpu_seconds` after it."""
    started, measured = (time.perf_counter(), time.process_time()), {"seconds": 0.0, "cpu_seconds": 0.0}
    try:
        yield measured
    finally:
        measured["seconds"] = time.perf_counter() - started[0]
        measured["cpu_seconds"] = time.process_time() - started[1]
