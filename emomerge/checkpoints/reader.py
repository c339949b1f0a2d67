"""Opening safetensors checkpoints lazily: one file, a folder (sharded or not, of one or several parts), a Hub id."""

from __future__ import annotations

import contextlib
import difflib
import math
import mmap
import os
import re
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, Field
from torch import Tensor

from emomerge import guard, watch
from emomerge.checkpoints import gguf
from emomerge.checkpoints.checkpoint import Checkpoint, StoredFile, TensorInfo
from emomerge.checkpoints.parts import MODEL_INDEX, MODULES, STEMS, PartsCheckpoint, part_folders
from emomerge.errors import BadInput
from emomerge.extras import needed_by
from emomerge.files import JsonObject, check_type, parse_json, read_json

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtype names of the safetensors format."""
if hasattr(torch, "float8_e8m0fnu"):  # since torch 2.7
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu

_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.spm", "*.codes", "*.jinja", "*.tiktoken", "LICENSE*"]
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_TO_CONVERT = (
    "convert it where you trust it: safetensors.torch.save_file({name: tensor.contiguous().clone() for name, tensor in "
    "torch.load(file, weights_only=True).items()}, 'model.safetensors', {'format': 'pt'})"
)
_GGUF = "a GGUF file"
_INDEX = ".safetensors.index.json"
_NOT_SAFETENSORS = "not a safetensors file"
_LARGEST_HEADER = 100_000_000  # the format's own limit
_Size = Annotated[int, Field(ge=0, lt=2**63)]


class _Entry(BaseModel):
    """A tensor in the header of a safetensors file."""

    dtype: str
    shape: Annotated[list[_Size], Field(max_length=64)]  # torch has no tensors of more dimensions
    data_offsets: Annotated[list[_Size], Field(min_length=2, max_length=2)]


class _Index(BaseModel):
    """The index of a checkpoint of several files."""

    weight_map: dict[str, str]


class Header(NamedTuple):
    """The header of a safetensors file."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    offsets: dict[str, int]
    """Position in the file of the first byte of each tensor."""
    identity: watch.Identity
    mapped: bool = True
    """Whether the file may be mapped; otherwise tensors are read."""


class SafetensorsCheckpoint(Checkpoint):
    """Tensors of one or several safetensors files, read on demand.

    Each tensor is a memory map of its own, released together with it: its pages belong to the system's cache and
    do not stay in the process while other tensors of the file are in use. Where a command could not survive that a mapped
    file is truncated (see `guard`), tensors are read instead.

    Args:
        files: the file that holds each tensor.
        headers: the header of each of those files.
    """

    def __init__(self, files: Mapping[str, Path], headers: Mapping[Path, Header], *, source: str, folder: Path | None) -> None:
        self._files = {name: files[name] for name in sorted(files)}
        self._names = tuple(self._files)
        self._headers = headers
        self.paths = tuple(sorted(headers))
        self.source = source
        self.folder = folder
        if len(self.paths) == 1 and self.paths[0].stem not in STEMS and not (self.paths[0].parent / "config.json").is_file():
            (header,) = headers.values()
            order = sorted(self._names, key=lambda name: (header.offsets[name], header.tensors[name].nbytes))
            self.file = StoredFile(self.paths[0], tuple(order), header.metadata)

    def names(self) -> tuple[str, ...]:
        """Return all tensor names, sorted."""
        return self._names

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype from the file's header."""
        return self._headers[self._files[name]].tensors[name]

    def __getitem__(self, name: str) -> Tensor:
        path, info = self._files[name], self.info(name)
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=info.dtype)
        offset = self._headers[path].offsets[name]
        data = (_mapped if self._headers[path].mapped else _read)(path, self._headers[path], offset, info.nbytes)
        if offset % info.dtype.itemsize:  # the format does not guarantee alignment
            data = data.copy()
        return torch.from_numpy(data).view(info.dtype).view(info.shape)


def _mapped(path: Path, header: Header, start: int, size: int) -> NDArray[np.uint8]:
    """Return bytes of a file, in private pages: changes to them never reach the file."""
    before = start % mmap.ALLOCATIONGRANULARITY
    with _opened(path, header) as file:
        pages = mmap.mmap(file.fileno(), before + size, access=mmap.ACCESS_COPY, offset=start - before)
    if hasattr(mmap, "MADV_WILLNEED"):
        pages.madvise(mmap.MADV_WILLNEED)  # read all of it ahead
    return np.frombuffer(pages, np.uint8, size, before)


def _read(path: Path, header: Header, start: int, size: int) -> NDArray[np.uint8]:
    """Read bytes of a file."""
    data = np.empty(size, np.uint8)
    with _opened(path, header) as file:
        file.seek(start)
        if file.readinto(data.data) != size:
            raise watch.changed(path)
    return data


@contextlib.contextmanager
def _opened(path: Path, header: Header) -> Iterator[BufferedReader]:
    """Open a file, if it is still the one with this header."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise watch.changed(path, error.strerror) from None
    with file:
        watch.require_same(path, header.identity, os.fstat(file.fileno()))
        yield file


def open_checkpoint(source: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Open weights without reading their data.

    Args:
        source: a `.safetensors` file, a `.safetensors.index.json` or a GGUF file of an image model; a folder with one of these;
            a folder of several parts (see `checkpoints.parts`); or a Hub id.
        revision: the branch, tag or commit of a Hub id.

    Raises:
        BadInput: nothing is there, or it is damaged, a pickle, or an index that does not match its files.
        MissingExtra: `source` is a Hub id and huggingface_hub is not installed.
    """
    path = Path(source)
    try:
        is_folder = path.is_dir()
    except OSError as error:  # such as a name that is too long
        raise BadInput("no such checkpoint", where=source, found=error.strerror, fix="check the path") from None
    if is_folder:
        return _open_folder(path, source=str(source))
    if path.is_file() and path.name.endswith(_INDEX):
        return _open_index(path, source=str(source))
    if path.is_file():
        if _begins(path) == gguf.MAGIC:
            return gguf.open_gguf(path, source=str(source))
        return _open_files([path], source=str(source), folder=path.parent)
    return _open_folder(_from_hub(str(source), revision), source=str(source))


def _begins(path: Path) -> bytes:
    """Return the first four bytes of a file."""
    with path.open("rb") as file:
        return file.read(4)


def lasting_name(source: str | Path) -> str:
    """Return a name of a model that means the same in every working directory: an absolute path, or a Hub id."""
    path = Path(source)
    if path.is_file() and (path.parent / "config.json").is_file():
        path = path.parent
    return str(path.resolve()) if path.exists() else str(source)


def read_header(path: Path) -> Header:
    """Return names, shapes, dtypes and metadata of a safetensors file, after checks that need no data.

    Raises:
        BadInput: the file is missing, truncated, a pickle or not a safetensors file.
    """
    if not path.is_file():
        raise BadInput("no such file", where=path)
    with path.open("rb") as file:
        identity = watch.identity_of(os.fstat(file.fileno()))
        watch.note(path, identity)
        total = identity[2]
        start = file.read(8)
        if start.startswith(gguf.MAGIC):
            raise BadInput(_GGUF, where=path, expected="safetensors")
        _refuse_pickle(path, start)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > _LARGEST_HEADER:
            raise _not_safetensors(path, "its first 8 bytes are not the length of a header")
        text = file.read(length)
    if len(text) < length:
        raise _truncated(path, 8 + length, total)
    header = parse_json(text, JsonObject, where=path, what=_NOT_SAFETENSORS)
    metadata = check_type(header.pop("__metadata__", None) or {}, dict[str, str], where=path, what=_NOT_SAFETENSORS)
    entries = check_type(header, dict[str, _Entry], where=path, what=_NOT_SAFETENSORS)
    tensors = {name: _info(path, name, entry) for name, entry in entries.items()}
    extent = _extent(path, entries)
    if 8 + length + extent != total:
        raise _truncated(path, 8 + length + extent, total)
    offsets = {name: 8 + length + entry.data_offsets[0] for name, entry in entries.items()}
    return Header(tensors, metadata, offsets, identity, guard.is_safe_to_map())


def inside(folder: Path, name: str, *, named_by: Path) -> Path:
    """Return the path of `name` in `folder`, for a name that was read from a file.

    Symbolic links may point into the folder or, in the Hub's cache (`snapshots/<commit>`), into its `blobs`.

    Args:
        folder: the folder that the file must be in.
        name: the name, which is not trusted.
        named_by: the file that contains the name, for the message.

    Raises:
        BadInput: the name leads out of the folder.
    """
    path = folder / name
    try:
        real, root = path.resolve(), folder.resolve()
        path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, a loop of links
        raise BadInput("a file name that cannot be used", where=named_by, found=f"{name}: {error}") from None
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    plain = name and not Path(name).is_absolute() and ".." not in Path(name).parts and "\\" not in name
    if not plain or not any(real.is_relative_to(parent) for parent in allowed):
        raise BadInput("a file name leads out of its folder", where=named_by, expected=f"a file inside {folder}", found=name)
    return path


def _info(path: Path, name: str, entry: _Entry) -> TensorInfo:
    if entry.dtype not in DTYPES:
        raise BadInput("a tensor of an unknown dtype", where=f"{path}, {name}", found=entry.dtype)
    info = TensorInfo(DTYPES[entry.dtype], tuple(entry.shape))
    if math.prod(size for size in info.shape if size) >= 2**63:
        raise _not_safetensors(path, f"{name} has a shape that no tensor can have")
    begin, end = entry.data_offsets
    if end - begin != info.nbytes:
        raise _not_safetensors(path, f"the extent of {name} does not match its shape")
    return info


def _extent(path: Path, entries: Mapping[str, _Entry]) -> int:
    """Return the bytes of all tensors. Raises BadInput if they overlap or leave gaps, which the format forbids."""
    extent = 0
    for (begin, end), name in sorted((entry.data_offsets, name) for name, entry in entries.items()):
        if begin != extent:
            raise _not_safetensors(path, f"{name} {'overlaps the tensor before it' if begin < extent else 'follows a gap'}")
        extent = end
    return extent


def _open_folder(folder: Path, *, source: str) -> Checkpoint:
    if parts := {name: _open_folder(folder / name, source=f"{source}/{name}") for name in _weighted_parts(folder)}:
        if (folder / MODULES).is_file() and any(folder.glob("*.safetensors*")):  # its first module lies in the folder itself
            parts[""] = _open_weights(folder, source=source)
        return PartsCheckpoint(parts, source=source, folder=folder)
    return _open_weights(folder, source=source)


def _open_weights(folder: Path, *, source: str) -> Checkpoint:
    """Open the weights that lie in the folder itself."""
    indices = sorted(folder.glob(f"*{_INDEX}"))
    if usual := [path for path in indices if path.name == f"{STEMS[0]}{_INDEX}"]:  # beside Mistral's consolidated one
        indices = usual
    weights = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("."))
    variants = all(path.name.startswith(STEMS[1]) for path in weights)
    plain = [path for path in weights if path.stem == STEMS[0] or (path.stem == STEMS[1] and variants)]
    if plain:  # preferred to an index and to variants such as model.fp16.safetensors, as in transformers
        return _open_files(plain, source=source, folder=folder)
    if len(indices) == 1:
        return _open_index(indices[0], source=source)
    if len(weights) == 1 and not indices:
        return _open_files(weights, source=source, folder=folder)
    codes = [] if indices or weights else sorted(folder.glob("*.gguf"))
    if len(codes) == 1:
        return gguf.open_gguf(codes[0], source=source)
    if len(indices) > 1 or weights or codes:
        found = ", ".join(path.name for path in (indices or weights or codes)[:4])
        raise BadInput("the folder holds several checkpoints", where=folder, found=found, fix="name the file you mean")
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise BadInput("the weights are a pickle, which is never loaded", where=folder / pickles[0], fix=_TO_CONVERT)
    raise BadInput("no weights in this folder", where=folder, expected="model.safetensors or model.safetensors.index.json")


def _weighted_parts(folder: Path) -> list[str]:
    """Return the parts of a folder that have weights, or should have; schedulers, tokenizers and poolings have none."""
    names = part_folders(folder)
    if not any(any((folder / name).glob("*.safetensors*")) for name in names):
        return []  # only the top level of a repository, which may hold the model as one file
    needed = (folder / MODEL_INDEX).is_file()
    return [
        name
        for name in names
        if any((folder / name).glob("*.safetensors*")) or (needed and (folder / name / "config.json").is_file())
    ]


def _open_index(index: Path, *, source: str) -> Checkpoint:
    found = read_json(index, _Index, what="not an index of safetensors files")
    items = sorted(found.weight_map.items())
    paths = {file: inside(index.parent, file, named_by=index) for file in sorted({file for _, file in items})}
    for file, path in paths.items():
        if not path.is_file():
            raise BadInput("a file that the index names is missing", where=index, expected=file, fix="download it again")
    headers = {path: read_header(path) for path in paths.values()}
    for name, file in items:
        if name not in headers[paths[file]].tensors:
            raise BadInput("a tensor that the index names is not in its file", where=index, expected=f"{name} in {file}")
    return SafetensorsCheckpoint({name: paths[file] for name, file in items}, headers, source=source, folder=index.parent)


def _open_files(paths: list[Path], *, source: str, folder: Path) -> Checkpoint:
    headers = {}
    for path in paths:
        if path.suffix in _PICKLES:
            raise BadInput("the weights are a pickle, which is never loaded", where=path, fix=_TO_CONVERT)
        headers[path] = read_header(path)
    files = {name: path for path, header in headers.items() for name in header.tensors}
    return SafetensorsCheckpoint(files, headers, source=source, folder=folder)


def _from_hub(name: str, revision: str | None) -> Path:
    """Return the local folder of a Hub id, after downloading what is missing."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name) or Path(name).suffix in (
        ".safetensors",
        *_PICKLES,
    ):
        raise BadInput(
            "no such checkpoint",
            where=name,
            expected="a .safetensors file, a folder with one, or a Hub id",
            fix=near_path(name) or "check the path",
        )
    with needed_by(f"{name} is not a local path; reading it from the Hub"):
        from huggingface_hub import snapshot_download

    known = on_hub(name, revision)

    def fetch(allow: list[str], ignore: list[str]) -> Path:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=allow, ignore_patterns=ignore, local_files_only=not known
            )
        )  # fmt: skip

    try:
        folder = fetch(_HUB_FILES, ["*/*"])  # the files that an AutoModel reads, not onnx/ and the like
        if (folder / MODEL_INDEX).is_file() or (folder / MODULES).is_file():
            folder = fetch([f"*/{pattern}" for pattern in _HUB_FILES], ["*/*/*", "*.fp16.*", "*.non_ema.*"])
        return folder
    except Exception as error:  # many types: offline, not found, gated, a bad id, a broken connection
        raise BadInput(
            "no such file or folder, and it could not be fetched from the Hub",
            where=name if revision is None else f"{name}, revision {revision}",
            found=type(error).__name__,
            fix=near_path(name)
            or "check the spelling, the connection (HF_HUB_OFFLINE) and, for a gated model, that you are logged in",
        ) from error


def on_hub(name: str, revision: str | None = None) -> bool:
    """Return whether the Hub has a model and answers, asking once: downloads try five times before they give up."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, revision=revision, timeout=10)
    except Exception:  # many types, as for a download
        return False
    return True


def near_path(name: str) -> str | None:
    """Return "did you mean PATH?" for the file or folder whose name is closest to one that does not exist."""
    path = Path(name)
    try:
        names = [place.name for place in path.parent.iterdir() if not place.name.startswith(".")]
    except OSError:
        return None
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f"did you mean {path.parent / near[0]}?" if near else None


def _refuse_pickle(path: Path, start: bytes) -> None:
    if start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05" and start[2:] != bytes(6)):
        raise BadInput("the weights are a pickle, which is never loaded", where=path, fix=_TO_CONVERT)


def _not_safetensors(path: Path, why: str) -> BadInput:
    return BadInput(_NOT_SAFETENSORS, where=path, found=why)


def _truncated(path: Path, expected: int, found: int) -> BadInput:
    what = "the file is truncated" if found < expected else "the file is longer than its header says"
    return BadInput(what, where=path, expected=f"{expected} bytes", found=f"{found}", fix="download or write it again")
