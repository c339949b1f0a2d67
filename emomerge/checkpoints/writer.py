"""Writing checkpoints as a stream: the header from `info()`, then one tensor at a time, rounded once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from emomerge.checkpoints.atomic import new_path, require_space, translate_os_error
from emomerge.checkpoints.checkpoint import Checkpoint, RoundingLoss, TensorInfo, all_finite
from emomerge.checkpoints.companions import check_tokenizer, copy_companions, note, set_dtype
from emomerge.checkpoints.metadata import kept_metadata
from emomerge.checkpoints.parts import STEMS, part_folders, parts_of, weight_stem
from emomerge.checkpoints.reader import DTYPES, open_checkpoint
from emomerge.checkpoints.stream import Stream
from emomerge.errors import BadInput, EmomergeError
from emomerge.numerics.memory import release_free_memory
from emomerge.numerics.rounding import Rounding, round_at_random, round_to

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
RELEASED = 2**25
"""Bytes of output after which free memory is returned to the system."""
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

FLOATS = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2,
}  # fmt: skip
"""The dtypes that an output may have; FP8 only its tensors of two or more dimensions."""

Plan = dict[str, TensorInfo]
ExtraFiles = Mapping[str, str] | Callable[[], Mapping[str, str]]
Progress = Callable[[str, int], None]


class SideFile(NamedTuple):
    """Tensors for a separate file beside the weights, written unchanged, and the metadata of its header."""

    tensors: Checkpoint
    metadata: Mapping[str, str]


class WriteOptions(NamedTuple):
    """Options of `write_checkpoint` that concern single tensors."""

    rounding: Rounding = "nearest"
    seed: int = 0
    loss: RoundingLoss | None = None
    progress: Progress | None = None
    prefix: str = ""
    """Removed from the tensor names in the file: the part of a model that the file belongs to."""
    order: tuple[str, ...] = ()
    """Names in the order in which they are written; without it, wide dtypes come first."""
    metadata: Mapping[str, str] = MappingProxyType({})
    """Texts for the header of the file."""
    hashed: bool = True
    """Whether the SHA-256 of the file is wanted."""


ShardWriter = Callable[[Sequence[tuple[Plan, Path]], WriteOptions], list[str]]
"""Writes the tensors of each plan to its path, and returns the files' SHA-256."""


def write_checkpoint(
    checkpoint: Checkpoint,
    out: str | Path,
    *,
    dtype: str = "base",
    rounding: Rounding = "nearest",
    seed: int = 0,
    loss: RoundingLoss | None = None,
    max_shard_size: str | int = "5GB",
    files_from: Path | None = None,
    beside: Mapping[str, SideFile] = MappingProxyType({}),
    extra_files: ExtraFiles = MappingProxyType({}),
    metadata: Mapping[str, str] = MappingProxyType({}),
    one_file: bool | None = None,
    force: bool = False,
    progress: Progress | None = None,
    shards_by: ShardWriter | None = None,
    hashed: bool = True,
    say: Callable[[str], None] = note,
) -> dict[str, str]:
    """Write weights as safetensors, holding one tensor in memory at a time; equal input gives equal bytes.

    Args:
        checkpoint: the weights. If `checkpoint[name]` is wider than `checkpoint.info(name).dtype`, as a baked or merged
            tensor is, it is rounded once. A model of several parts is written as a folder of the same layout. A single file
            (see `StoredFile`) keeps the order of its tensors and its metadata.
        out: a name that ends in `.safetensors` for one file; any other for a folder that `from_pretrained` loads.
        dtype: one of `FLOATS` for floating tensors; "base" keeps the dtypes of `info()`.
        rounding: "nearest" (ties to even), or "stochastic": up or down at random, exact in expectation.
        seed: of stochastic rounding; the draws depend on it and on the tensor's name.
        loss: accumulates the error of rounding θ₀ + τ over its base.
        max_shard_size: bytes, or a string such as "5GB", above which the weights in a folder are split into files.
        files_from: a folder whose configuration, tokenizer and other files are copied, but no weights and no code. The
            configuration gets the dtype that is written. A tokenizer in the folders of the weights (see
            `Checkpoint.tokenizers_from`) takes precedence if these agree on it.
        beside: file name → more tensors, for a folder.
        metadata: texts for the header, in addition to those of the single file that the model came in.
        extra_files: file name → text, or a function that returns it and is called after all weights are written.
        one_file: write a folder with one file that is named like it and has no index, with no companions, as programs for
            images want it; by default so if the weights came in one file that has a prefix for each part of a model.
        force: replace an existing `out`, once the new one is complete.
        progress: called with each tensor's name and bytes after it is computed.
        shards_by: used instead of this process to write the weight files if there are several.
        hashed: whether the hashes are wanted, which take as long to compute as a merge.
        say: called with each line about what the output lacks or has from elsewhere; by default it is a warning (`Note`).

    Returns:
        dict: file name → SHA-256 of every weight file, or an empty string if it is not wanted.

    Raises:
        BadInput: `out` exists, the disk is full, or a tensor holds NaN or infinity. Nothing is left behind.
    """
    out = Path(out)
    plan = {name: _stored(checkpoint.info(name), dtype) for name in checkpoint.names()}
    needed = sum(info.nbytes for info in plan.values())
    limit = _bytes(max_shard_size)
    file = checkpoint.file
    one_file = (file is not None and bool(parts_of(checkpoint))) if one_file is None else one_file
    header = {**(kept_metadata(file.metadata) if file else {}), **metadata}
    options = WriteOptions(rounding, seed, loss, progress, order=file.order if file else (), metadata=header, hashed=hashed)
    for folder in (checkpoint.folder, files_from):
        if folder is not None and out.resolve() in folder.resolve().parents:
            raise BadInput("refusing to replace a folder that the weights are read from", where=out, found=folder)
    with translate_os_error(out, needed=needed), new_path(out, force=force) as temporary:
        require_space(out, needed)
        layout = files_from or checkpoint.folder
        if out.suffix == ".safetensors":
            if parts := _parts(plan, layout):
                what = "a model of several parts is written as a folder"
                raise BadInput(what, where=out, found=", ".join(parts), fix="give a name without .safetensors")
            digest = write_file(checkpoint, plan, temporary, options)
            _check(temporary, plan, out)
            return {out.name: digest}
        temporary.mkdir()
        if one_file:
            name = f"{out.name}.safetensors"
            hashes = {name: write_file(checkpoint, plan, temporary / name, options)}
        else:
            if files_from is not None:
                copy_companions(files_from, temporary, tokenizers_from=checkpoint.tokenizers_from, say=say)
            hashes = _write_weights(checkpoint, plan, temporary, limit, options, shards_by, layout)
        for name, (tensors, texts) in beside.items():
            infos = {tensor: tensors.info(tensor) for tensor in tensors}
            (temporary / name).parent.mkdir(exist_ok=True)
            hashes[name] = write_file(tensors, infos, temporary / name, WriteOptions(metadata=texts, hashed=hashed))
        for name, text in (extra_files() if callable(extra_files) else extra_files).items():
            (temporary / name).write_text(text, encoding="utf-8", newline="\n")
        if files_from is not None or not _parts(plan, layout):  # without their index, parts are several checkpoints
            _check(temporary, plan, out)
        if not one_file:
            _fit_companions(temporary, plan, layout, say)
        return hashes


def _check(path: Path, plan: Plan, out: Path) -> None:
    """Open a file or folder as its reader will, and compare it with what was to be written."""
    written = open_checkpoint(path)
    found = {name: written.info(name) for name in written}
    for name in plan.keys() | found.keys():
        if plan.get(name) != found.get(name):
            raise EmomergeError(f"{out} would not hold what was to be written: {name}, {plan.get(name)}; {found.get(name)}")


def _fit_companions(folder: Path, plan: Plan, layout: Path | None, say: Callable[[str], None]) -> None:
    """Bring the files beside the weights, part by part, in agreement with the weights."""
    parts = _parts(plan, layout)
    for part, infos in parts.items():
        set_dtype(folder / part, infos.values(), say)
    root = {name: info for name, info in plan.items() if not any(name in infos for infos in parts.values())}
    set_dtype(folder, root.values(), say)
    check_tokenizer(folder, root, say)


def _parts(plan: Plan, layout: Path | None) -> dict[str, Plan]:
    """Return the tensors of each part that a folder has; see `checkpoints.parts`."""
    found = {part: {n: info for n, info in plan.items() if n.startswith(f"{part}/")} for part in part_folders(layout)}
    return {part: tensors for part, tensors in found.items() if tensors}


def _write_weights(
    checkpoint: Checkpoint, plan: Plan, folder: Path, limit: int, options: WriteOptions, shards_by: ShardWriter | None,
    layout: Path | None,
) -> dict[str, str]:  # fmt: skip
    """Write the weights of each part into its subfolder, and all others into the folder itself."""
    hashes: dict[str, str] = {}
    parts = _parts(plan, layout)
    for part, tensors in parts.items():
        (folder / part).mkdir(exist_ok=True)
        stem, in_part = weight_stem((layout or folder) / part), options._replace(prefix=f"{part}/")
        written = _write_shards(checkpoint, tensors, folder / part, limit, in_part, shards_by, stem)
        hashes |= {f"{part}/{name}": digest for name, digest in written.items()}
    rest = plan.keys() - {name for tensors in parts.values() for name in tensors}
    if rest or not parts:
        hashes |= _write_shards(checkpoint, {n: plan[n] for n in plan if n in rest}, folder, limit, options, shards_by)
    return hashes


def _write_shards(
    checkpoint: Checkpoint, plan: Plan, folder: Path, limit: int, options: WriteOptions, shards_by: ShardWriter | None,
    stem: str = STEMS[0],
) -> dict[str, str]:  # fmt: skip
    """Write the weight files, and the index if there are several, under the names that `from_pretrained` expects."""
    shards = _shards(plan, limit)
    if len(shards) == 1:
        return {f"{stem}.safetensors": write_file(checkpoint, plan, folder / f"{stem}.safetensors", options)}
    names = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    files = [(shard, folder / name) for name, shard in zip(names, shards, strict=True)]
    found = shards_by(files, options) if shards_by else [write_file(checkpoint, *file, options) for file in files]
    hashes = dict(zip(names, found, strict=True))
    index = {
        "metadata": {
            "total_parameters": sum(info.numel for info in plan.values()),
            "total_size": sum(info.nbytes for info in plan.values()),
        },
        "weight_map": {
            tensor.removeprefix(options.prefix): name for name, shard in zip(names, shards, strict=True) for tensor in shard
        },
    }
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return hashes


def write_file(checkpoint: Checkpoint, plan: Plan, path: Path, options: WriteOptions) -> str:
    """Write one safetensors file and return its SHA-256, if wanted; each tensor is computed while earlier ones are written."""
    order = _order(plan, options.order)
    header = _header(plan, order, options.prefix, options.metadata)
    size = len(header) + sum(info.nbytes for info in plan.values())
    with Stream(path, size, hashed=options.hashed) as stream:
        stream.put(header)
        computed = 0
        for name in order:
            info = plan[name]
            _write_tensor(checkpoint, name, info, options, stream.reserve(info.nbytes))
            stream.commit(info.nbytes)
            if options.progress is not None:
                options.progress(name, info.nbytes)
            computed += info.nbytes
            if computed > RELEASED:
                release_free_memory()
                computed = 0
        stream.finish()
    return stream.sha256


def _order(plan: Plan, wanted: Sequence[str]) -> list[str]:
    """Return the names in the given order if every tensor is then aligned, else with wide dtypes first."""
    places = {name: place for place, name in enumerate(wanted)}
    order = sorted(plan, key=lambda name: (places.get(name, len(places)), -plan[name].dtype.itemsize, name))
    begin = 0
    for name in order:
        if begin % plan[name].dtype.itemsize:
            return sorted(order, key=lambda name: -plan[name].dtype.itemsize)
        begin += plan[name].nbytes
    return order


def _header(plan: Plan, order: list[str], prefix: str, metadata: Mapping[str, str]) -> bytes:
    """Return the safetensors header: its length in 8 bytes, then JSON padded with spaces to a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    begin = 0
    for name in order:
        info = plan[name]
        end = begin + info.nbytes
        entry = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [begin, end]}
        entries[name.removeprefix(prefix)] = entry
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(checkpoint: Checkpoint, name: str, info: TensorInfo, options: WriteOptions, memory: memoryview) -> None:
    """Write a tensor to memory of its size."""
    out = torch.frombuffer(memory, dtype=info.dtype) if info.nbytes else torch.empty(0, dtype=info.dtype)
    found = _rounded(checkpoint, name, info, options, out.view(info.shape))
    if found.data_ptr() != out.data_ptr():
        memory[:] = _raw_bytes(found)


def _rounded(checkpoint: Checkpoint, name: str, info: TensorInfo, options: WriteOptions, out: Tensor) -> Tensor:
    """Return a tensor as it is written: rounded once, on the CPU, contiguous and finite; it may be `out`."""
    loss, old, delta = options.loss, None, None
    if options.rounding == "nearest" and (ready := checkpoint.rounded(name, info.dtype, loss, out)) is not None:
        return ready
    if loss is None:
        tensor = checkpoint[name].detach()
    else:
        tensor, old, delta = checkpoint.with_base(name, loss.base)
    where = f"{checkpoint.source}, {name}"
    if tuple(tensor.shape) != info.shape:
        raise BadInput(
            "a tensor has another shape than its checkpoint announced", where=where, expected=info.shape, found=tensor.shape
        )
    if options.rounding == "stochastic":
        rounded = round_at_random(tensor, info.dtype, name=name, seed=options.seed).contiguous()
    else:
        rounded = round_to(tensor, info.dtype).cpu().contiguous()
    if not all_finite(rounded):
        overflow = all_finite(tensor)
        raise BadInput(
            f"values too large for {info.dtype}" if overflow else "NaN or infinity in a tensor",
            where=where,
            fix="write it as bfloat16 or float32" if overflow else "check the run that it comes from",
        )
    if loss is not None and old is not None and delta is not None:
        loss.add(old, delta, rounded)
    return rounded


def _raw_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def _stored(info: TensorInfo, dtype: str) -> TensorInfo:
    """Return shape and dtype of a tensor in the file."""
    if dtype == "base":
        return info
    if dtype not in FLOATS:
        raise BadInput("unknown dtype", where=dtype, expected=f"base, {', '.join(FLOATS)}")
    if FLOATS[dtype].itemsize == 1 and len(info.shape) < 2:
        return info  # biases and norms are few, and sensitive
    return TensorInfo(FLOATS[dtype], info.shape) if info.dtype.is_floating_point else info


def _shards(plan: Plan, limit: int) -> list[Plan]:
    """Split a plan, in the order of names, into files of at most `limit` bytes; a larger tensor gets a file of its own."""
    shards: list[Plan] = [{}]
    filled = 0
    for name, info in plan.items():
        if shards[-1] and filled + info.nbytes > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = info
        filled += info.nbytes
    return shards


def _bytes(size: str | int) -> int:
    match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([KMGT]I?B|)", str(size).strip().upper())
    if match is None or match[2] not in _UNITS or (limit := int(float(match[1]) * _UNITS[match[2]])) < 1:
        raise BadInput("not a size", where=f"max_shard_size {size}", expected="a number of bytes or such as 5GB, 500MB")
    return limit
