"""Output folders of `emomerge run`: those around the current folder, and those that were used last, wherever they are."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

DEPTH, MOST = 3, 2000
"""How deep below the current folder is searched, and how many folders are looked into."""
KEPT = 10


def is_output(folder: Path) -> bool:
    """Return whether a folder is the output of a recipe."""
    return (folder / "recipe.yaml").is_file() and (folder / "stamps").is_dir()


def remember(folder: Path) -> None:
    """Note that an output folder is used; a home that cannot be written is no reason to fail."""
    with contextlib.suppress(OSError):
        file, known = _file(), str(folder.absolute())
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [known, *(line for line in _lines() if line != known)][:KEPT]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogateescape")


def find_outputs(start: Path) -> list[Path]:
    """Return output folders, most recently changed first: the one that holds `start`, or those below it, or those used last."""
    around = next((folder for folder in (start, *start.absolute().parents) if is_output(folder)), None)
    found = [around] if around else list(_below(start)) or [Path(line) for line in _lines() if is_output(Path(line))]
    return sorted(found, key=_changed, reverse=True)


def _below(start: Path) -> Iterator[Path]:
    waiting, looked = [(start, 0)], 0
    while waiting and looked < MOST:
        folder, depth = waiting.pop(0)
        looked += 1
        if is_output(folder):
            yield folder
        elif depth < DEPTH:
            with contextlib.suppress(OSError):
                inside = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
                waiting += [(folder / name, depth + 1) for name in inside if not name.startswith((".", "__"))]


def _changed(folder: Path) -> float:
    times = [0.0]
    for file in (folder, *folder.glob("*.json*"), *folder.glob("runs/*/metrics.jsonl"), *folder.glob("stamps/*")):
        with contextlib.suppress(OSError):
            times.append(file.stat().st_mtime)
    return max(times)


def _file() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "emomerge/outputs"


def _lines() -> list[str]:
    with contextlib.suppress(OSError, RuntimeError):
        return _file().read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    return []
