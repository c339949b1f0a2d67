"""Inputs grown by coverage through the readers of small files: `pip install atheris`, then

    python benchmarks/hostile_atheris.py -max_total_time=300 CORPUS

Every input goes to the reader that its first byte names. The options are those of libFuzzer. Anything but a value or an
`EmomergeError` in one line ends the program with the input that caused it.
"""

from __future__ import annotations

import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["emomerge", "yaml", "json"]):
    from emomerge.adapters.peft.config import read_config
    from emomerge.checkpoints.reader import read_header
    from emomerge.errors import EmomergeError
    from emomerge.files import JsonObject, parse_json, parse_yaml
    from emomerge.merging.mergekit import read_config as read_mergekit
    from emomerge.merging.record import read_record
    from emomerge.recipe import load_recipe
    from emomerge.results import Results
    from emomerge.tasks.rows import read_rows

FOLDER = Path(tempfile.mkdtemp(prefix="hostile-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))


def _file(name: str, data: bytes) -> Path:
    path = FOLDER / name
    path.write_bytes(data)
    return path


def _config(data: bytes) -> object:
    return read_config(_file("adapter_config.json", data).parent)


def _header(data: bytes) -> object:
    return read_header(_file("model.safetensors", len(data).to_bytes(8, "little") + data))


READERS: list[Callable[[bytes], object]] = [
    lambda data: parse_json(data, JsonObject, where="x"),
    lambda data: parse_yaml(data.decode(errors="surrogateescape"), what="x", where="x"),
    lambda data: read_header(_file("raw.safetensors", data)),
    _header,
    _config,
    lambda data: read_mergekit(_file("config.yaml", data)),
    lambda data: read_record(_file("merge.json", data)),
    lambda data: load_recipe(_file("recipe.yaml", data)),
    lambda data: Results.from_json(data.decode(errors="replace"), "x"),
    lambda data: list(read_rows(str(_file("rows.jsonl", data)), "train", ["text"])),
    lambda data: list(read_rows(str(_file("rows.csv", data)), "train", ["text"])),
]


def one(data: bytes) -> None:
    """Read one input."""
    if not data:
        return
    try:
        READERS[data[0] % len(READERS)](data[1:])
    except EmomergeError as error:
        assert not re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", str(error)), repr(str(error))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
