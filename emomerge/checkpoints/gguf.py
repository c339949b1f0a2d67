"""Image and video models in GGUF (version 2 or 3) as models in bfloat16: each tensor is dequantized on demand.

The header is read here, within its bounds; the package `gguf` knows the sizes of the types and their numbers.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from emomerge import watch
from emomerge.checkpoints.checkpoint import Checkpoint, StoredFile, TensorInfo
from emomerge.errors import BadInput
from emomerge.extras import needed_by

MAGIC = b"GGUF"
UNQUANTIZED = "give the model in safetensors that it was quantized from"
_LARGEST_HEADER, _MOST_TENSORS = 2**26, 10**6
_LLAMA = re.compile(r"blk\.\d+\..+|token_embd\.weight")
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_TEXT, _LIST = 8, 9
_PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}  # fmt: skip
_SHAPE = "comfy.gguf.orig_shape."
"""The key of the shape of a tensor that was flattened, because GGUF has at most four dimensions."""


class Stored(NamedTuple):
    """Where and how a tensor is stored.

    Args:
        kind: its type in GGUF, such as "Q4_K".
        offset: position in the file of its first byte.
        nbytes: its size in the file.
        rows: its shape in the file, rows of the codes last.
        info: shape and dtype as a tensor.
    """

    kind: str
    offset: int
    nbytes: int
    rows: tuple[int, ...]
    info: TensorInfo


class GgufCheckpoint(Checkpoint):
    """The tensors of a GGUF file, dequantized to float32 on demand; `info` reports bfloat16 for what is stored as codes."""

    def __init__(self, path: Path, tensors: Mapping[str, Stored], identity: watch.Identity, *, source: str) -> None:
        self._tensors = {name: tensors[name] for name in sorted(tensors)}
        self._identity = identity
        self.source, self.folder, self.paths = source, path.parent, (path,)
        self.file = StoredFile(path, tuple(tensors), {})

    def names(self) -> tuple[str, ...]:
        """Return all tensor names, sorted."""
        return tuple(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype from the header."""
        return self._tensors[name].info

    @property
    def kind(self) -> str:
        """What the tensors are stored as, with counts, for display."""
        counts = Counter(stored.kind for stored in self._tensors.values())
        return "GGUF, " + ", ".join(f"{count} × {kind}" for kind, count in counts.most_common())

    def __getitem__(self, name: str) -> Tensor:
        stored, path = self._tensors[name], self.paths[0]
        if not stored.nbytes:
            return torch.empty(stored.info.shape, dtype=stored.info.dtype)
        with path.open("rb") as file:
            watch.require_same(path, self._identity, os.fstat(file.fileno()))
            file.seek(stored.offset)
            data = file.read(stored.nbytes)
        if stored.kind in _PLAIN:
            return torch.frombuffer(bytearray(data), dtype=_PLAIN[stored.kind]).reshape(stored.info.shape)
        with needed_by(f"reading {path}"):
            from gguf import GGMLQuantizationType
            from gguf.quants import dequantize

        codes = np.frombuffer(data, np.uint8).reshape(*stored.rows[:-1], -1)
        numbers = dequantize(codes, GGMLQuantizationType[stored.kind])
        return torch.from_numpy(np.ascontiguousarray(numbers, np.float32)).reshape(stored.info.shape)


def open_gguf(path: Path, *, source: str) -> GgufCheckpoint:
    """Open a GGUF file without reading its data.

    Raises:
        BadInput: it is damaged, of llama.cpp, or has a type without numbers.
        MissingExtra: the package `gguf` is not installed.
    """
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        identity = watch.identity_of(status)
        watch.note(path, identity)
        cursor = _Cursor(file, path, status.st_size)
        tensors, texts = cursor.header()
        fields = {cursor.text(): cursor.value() for _ in range(texts)}
        entries = [cursor.entry() for _ in range(tensors)]
        begin = file.tell()
    if any(_LLAMA.fullmatch(name) for name, *_ in entries):
        raise BadInput("a GGUF file of llama.cpp, which has names of its own", where=path, fix=UNQUANTIZED)
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 2**20:
        raise cursor.damaged("general.alignment is not a size")
    begin += -begin % alignment
    found: dict[str, Stored] = {}
    for name, dimensions, kind, offset in entries:
        if name in found:
            raise cursor.damaged(f"two tensors {name}")
        found[name] = _stored(name, dimensions, kind, begin + offset, fields, cursor)
    return GgufCheckpoint(path, found, identity, source=source)


class _Cursor:
    """Reads a header, and refuses whatever leads out of the file."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self._file, self.path, self._size = file, path, size
        self._left = min(size, _LARGEST_HEADER)

    def damaged(self, why: str) -> BadInput:
        return BadInput("a GGUF file that cannot be read", where=self.path, found=why, fix=UNQUANTIZED)

    def bytes(self, count: int) -> bytes:
        self._left -= count
        data = self._file.read(count) if self._left >= 0 else b""
        if len(data) < count:
            raise self.damaged("it ends within its header, or that is too large")
        return data

    def number(self, pattern: str) -> Any:
        return struct.unpack(pattern, self.bytes(struct.calcsize(pattern)))[0]

    def text(self) -> str:
        data = self.bytes(self.number("<Q"))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged("a text that is not UTF-8") from None

    def header(self) -> tuple[int, int]:
        if self.bytes(4) != MAGIC or self.number("<I") not in (2, 3):
            raise self.damaged("another version than 2 or 3")
        tensors, texts = self.number("<Q"), self.number("<Q")
        if max(tensors, texts) > _MOST_TENSORS:
            raise self.damaged(f"{tensors} tensors and {texts} fields")
        return tensors, texts

    def value(self, kind: int | None = None) -> Any:
        kind = self.number("<I") if kind is None else kind
        if kind == _TEXT:
            return self.text()
        if kind == _LIST:
            inner, count = self.number("<I"), self.number("<Q")
            if inner != _TEXT and inner not in _NUMBERS:
                raise self.damaged(f"a list of the type {inner}")
            if inner in _NUMBERS:  # all at once: a vocabulary's scores are many
                data = self.bytes(count * struct.calcsize(_NUMBERS[inner]))
                return [number for (number,) in struct.iter_unpack(_NUMBERS[inner], data)]
            return [self.text() for _ in range(min(count, self._left))]
        if kind not in _NUMBERS:
            raise self.damaged(f"a field of the type {kind}")
        return self.number(_NUMBERS[kind])

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name, count = self.text(), self.number("<I")
        if count > 8:
            raise self.damaged(f"{name} has {count} dimensions")
        dimensions = tuple(self.number("<Q") for _ in range(count))
        return name, dimensions[::-1], self.number("<I"), self.number("<Q")

    def within(self, end: int) -> bool:
        return end <= self._size


def _stored(
    name: str, dimensions: tuple[int, ...], number: int, offset: int, fields: Mapping[str, Any], cursor: _Cursor
) -> Stored:
    """Return how a tensor is stored, after a check that it lies in the file."""
    with needed_by("reading GGUF files"):
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    try:
        kind = GGMLQuantizationType(number)
        block, size = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise cursor.damaged(f"{name} is of the unknown type {number}") from None
    count = math.prod(dimensions)
    if count >= 2**60 or (dimensions or (1,))[-1] % block:
        raise cursor.damaged(f"{name} of the shape {dimensions} as {kind.name}")
    nbytes = count // block * size
    if not cursor.within(offset + nbytes):
        raise cursor.damaged(f"{name} ends after the end of the file")
    shape = dimensions
    if (given := fields.get(_SHAPE + name)) is not None:
        if not isinstance(given, list) or any(type(each) is not int or each < 0 for each in given) or math.prod(given) != count:
            raise cursor.damaged(f"{_SHAPE}{name} is not the shape of {count} numbers")
        shape = tuple(given)
    if kind.name not in _PLAIN and not _has_numbers(kind):
        raise BadInput("a GGUF type that is not dequantized", where=f"{cursor.path}, {name}", found=kind.name, fix=UNQUANTIZED)
    return Stored(kind.name, offset, nbytes, dimensions, TensorInfo(_PLAIN.get(kind.name, torch.bfloat16), shape))


@cache
def _has_numbers(kind: Any) -> bool:
    """Return whether the package can dequantize a type."""
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
