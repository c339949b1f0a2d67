"""The files beside the weights: configuration, tokenizer, preprocessor and the like.

A folder that is written gets those of the base, with the dtype of the new weights in its configuration and, if the weights come
from folders that agree on a tokenizer of their own, with that. What is not copied is named in a `Note`.
"""

from __future__ import annotations

import filecmp
import json
import re
import shutil
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from emomerge.checkpoints.checkpoint import TensorInfo
from emomerge.checkpoints.parts import part_folders
from emomerge.checkpoints.reader import inside
from emomerge.errors import Note
from emomerge.files import read_json_or
from emomerge.numerics.hashing import sha256

CONFIG = "config.json"
TEMPLATES = "additional_chat_templates"
"""The folder in which transformers saves chat templates beyond the default one."""
LARGEST = 100_000_000
"""Size in bytes of the largest file that is copied."""
_WEIGHTS = r".*\.(safetensors|bin|pt|pth|ckpt|pkl|pickle|h5|msgpack|onnx|gguf|ot|npz|data|mlmodel|tflite|pb|keras|engine)"
_CODE = r".*\.(py|pyc|so|dll|dylib|exe|sh|bat|ps1|ipynb|c|cc|cpp|cu|h|js|jar)|requirements.*\.txt|Makefile|Dockerfile"
_STATE = (
    r"trainer_state\.json|training_args\.\w+|(optimizer|scheduler|scaler)\.(pt|bin)|rng_state\w*\.pth|latest|zero_to_fp32\.py"
)
_REASONS = {reason: re.compile(names, re.IGNORECASE) for reason, names in
            (("state of a training", _STATE), ("code", _CODE), ("weights", _WEIGHTS))}  # fmt: skip
_UNNAMED = re.compile(r".*\.index\.json|adapter_.*|(run|merge|bake)\.json|README(\.md)?|\..*", re.IGNORECASE)
"""Files that belong to the old weights or to git, and the README, which a model card replaces."""
_SETTINGS = r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|chat_template\.(jinja|json)"
_VOCABULARY = r"(vocab|merges|bpe|source|target|spiece|sentencepiece|tokenizer)[\w.-]*\.(json|txt|model|spm|codes|tiktoken)"
_TOKENIZER = re.compile(rf"{_SETTINGS}|{_VOCABULARY}|.*\.(model|spm|tiktoken)|{TEMPLATES}/[^/]+\.jinja")
_EMBEDDING = re.compile(r"(.+\.)?(embed_tokens|wte|word_embeddings|shared|tok_embeddings|token_embedding)\.weight")
_HAVING_CODE = (CONFIG, "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")


def note(text: str) -> None:
    """Warn about an output."""
    warnings.warn(text, Note, stacklevel=2)


def copy_companions(source: Path, target: Path, *, tokenizers_from: Sequence[Path], say: Callable[[str], None]) -> None:
    """Copy everything but weights, code and the state of a training from one folder to another.

    Args:
        source: folder of the base.
        target: an existing folder.
        tokenizers_from: folders of the weights, which may have a tokenizer of their own.
        say: called with one line for each kind of file that is left out and for a tokenizer that is not the base's.
    """
    left_out: dict[str, list[str]] = defaultdict(list)
    _copy(source, target, left_out)
    if unchanged := left_out.pop("unchanged", None):
        say(f"copied unchanged, since a pickle is never opened: {_listed(unchanged)}")
    if left_out:
        kinds = [f"{_listed(names)} ({reason})" for reason, names in sorted(left_out.items())]
        say(f"not copied from {source}: {'; '.join(kinds)}")
    take_tokenizer(source, target, tokenizers_from, say)
    for line in _code_lines(target):
        say(line)


def set_dtype(folder: Path, infos: Iterable[TensorInfo], say: Callable[[str], None]) -> None:
    """Make the configuration of a folder name the dtype of its weights, in which `from_pretrained` loads them.

    Weights of several dtypes are left as the configuration says, if that is one of them. A description of quantized weights is
    removed if they are not quantized, and `say` called.
    """
    infos, sizes = list(infos), defaultdict[str, int](int)
    for info in infos:
        if info.dtype.is_floating_point:
            sizes[str(info.dtype).removeprefix("torch.")] += info.nbytes
    path = folder / CONFIG
    config = _json(path)
    if not sizes or config is None:
        return
    plain = all(info.dtype.is_floating_point and info.dtype.itemsize > 1 for info in infos if len(info.shape) > 1)
    dropped = plain and _without_quantization(config)
    if dropped:
        say("the configuration described quantized weights, which these are not: its quantization_config is left out")
    if _with_dtype(config, sizes) or dropped:
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def check_tokenizer(folder: Path, infos: Mapping[str, TensorInfo], say: Callable[[str], None]) -> None:
    """Say so if the tokenizer of a folder has ids for which the embedding has no row."""
    embeddings = {name: info for name, info in infos.items() if _EMBEDDING.fullmatch(name) and len(info.shape) == 2}
    last = _last_id(folder)
    if not embeddings or last is None:
        return
    name, info = max(embeddings.items(), key=lambda item: item[1].shape[0])
    if last >= info.shape[0]:
        say(f"the tokenizer has ids up to {last}, but {name} has {info.shape[0]} rows: the last tokens cannot be used")


def _copy(source: Path, target: Path, left_out: dict[str, list[str]], within: str = "") -> None:
    parts = part_folders(source)
    for path in sorted(source.iterdir()):
        name, shown = path.name, f"{within}{path.name}"
        if path.is_dir():
            if name in parts or name == TEMPLATES:
                (target / name).mkdir()
                _copy(path, target / name, left_out, f"{shown}/")
            elif not name.startswith("."):
                left_out["folder"].append(shown)
        elif path.is_file() and not _UNNAMED.fullmatch(name) and not name.endswith(".safetensors"):
            reason = next((reason for reason, names in _REASONS.items() if names.fullmatch(name)), None)
            if reason is None and path.stat().st_size > LARGEST:
                reason = "large"
            if within and name == "pytorch_model.bin" and not any(source.glob("*.safetensors")):
                reason = "unchanged"  # a layer of sentence-transformers, without which the folder does not load
            if reason in (None, "unchanged"):
                shutil.copyfile(inside(source, name, named_by=path), target / name)
            if reason is not None:
                left_out[reason].append(shown)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _code_lines(folder: Path) -> list[str]:
    """Return what to tell about configurations that name code to load the model with."""
    named: dict[str, list[str]] = defaultdict(list)
    for file in _HAVING_CODE:
        config = _json(folder / file) or {}
        classes = config.get("auto_map")
        for entry in classes.values() if isinstance(classes, dict) else ():
            for reference in entry if isinstance(entry, list) else [entry]:
                if isinstance(reference, str):
                    named[file].append(reference)
    modules = _json(folder / "modules.json", list) or []
    kinds = [str(module.get("type")) for module in modules if isinstance(module, dict)]
    named["modules.json"] += [kind for kind in kinds if not kind.startswith("sentence_transformers.")]
    return [
        f"{file} still names code, which is not copied ({_listed(sorted(set(references)))}): if loading needs it, read it and "
        "copy its file from the base"
        for file, references in named.items()
        if references
    ]


class _Tokenizer(NamedTuple):
    """A tokenizer on disk, and what it does."""

    folder: Path
    files: tuple[str, ...]
    meaning: tuple[object, ...]
    """Vocabulary, special tokens and chat templates; equal for tokenizers that do the same."""
    tokens: int | None

    def __str__(self) -> str:
        size = "" if self.tokens is None else f" ({self.tokens} tokens)"
        return f"{self.folder}{size}"


def take_tokenizer(base: Path | None, target: Path, folders: Sequence[Path], say: Callable[[str], None] = note) -> None:
    """Replace the tokenizer in `target` by that of the runs, if they have one that is not the base's and agree on it.

    Args:
        base: folder of the base.
        target: folder that is written.
        folders: folders of the runs.
        say: as in `copy_companions`.
    """
    folders = [folder for folder in dict.fromkeys(folders) if not _same_files(base, folder)]
    own = _tokenizer_of(base) if folders else None
    found = [tokenizer for folder in folders if (tokenizer := _tokenizer_of(folder, own)) is not None]
    if all(own is not None and tokenizer.meaning == own.meaning for tokenizer in found):
        return
    if any(tokenizer.meaning != found[0].meaning for tokenizer in found):
        kept = "that of the base is written" if own is not None else "none is written"
        say(f"the runs have different tokenizers or chat templates, {kept}: {_listed([str(each) for each in found])}")
        return
    taken = found[0]
    if "tokenizer_config.json" in taken.files:  # complete: what it lacks, such as a template, it has not
        for name in _tokenizer_files(target):
            if re.fullmatch(_SETTINGS, name) or "/" in name:
                (target / name).unlink()
    for name in taken.files:
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(inside(taken.folder, name, named_by=taken.folder / name), target / name)
    say(f"tokenizer and chat template are those of {taken}, not the base's" if own else f"the tokenizer is that of {taken}")


def _same_files(base: Path | None, folder: Path) -> bool:
    """Return whether a folder of weights has no tokenizer, or the very files of the base."""
    if not any((folder / name).is_file() for name in (CONFIG, "adapter_config.json", "tokenizer_config.json")):
        return True  # one of many files in a folder
    names = _tokenizer_files(folder)
    return not names or (
        base is not None
        and names == _tokenizer_files(base)
        and all(filecmp.cmp(base / name, folder / name, shallow=False) for name in names)
    )


def _tokenizer_files(folder: Path) -> list[str]:
    names = [path.relative_to(folder).as_posix() for path in (*folder.glob("*"), *folder.glob(f"{TEMPLATES}/*"))]
    return sorted(name for name in names if _TOKENIZER.fullmatch(name) and (folder / name).is_file())


def _tokenizer_of(folder: Path | None, default: _Tokenizer | None = None) -> _Tokenizer | None:
    """Return the tokenizer in a folder; what it lacks, such as a chat template alone, is taken from `default`."""
    if folder is None or not folder.is_dir() or not (files := _tokenizer_files(folder)):
        return None
    inherited = [] if default is None or "tokenizer_config.json" in files else default.files
    paths = {name: default.folder / name for name in inherited} if default is not None else {}
    paths |= {name: folder / name for name in files}
    vocabulary, special, templates = _vocabulary(paths), {}, {}
    settings = _json(paths.get("tokenizer_config.json", folder / "-")) or {}
    for key, value in settings.items():
        if key.endswith("_token") and key != "pad_token":
            special[key] = value.get("content") if isinstance(value, dict) else value
    templates["chat_template"] = settings.get("chat_template")
    saved = _json(paths.get("chat_template.json", folder / "-"))
    if saved is not None:
        templates["chat_template"] = saved.get("chat_template")
    for path in paths.values():
        if path.suffix == ".jinja":
            templates[path.stem] = path.read_text(encoding="utf-8", errors="replace")
    last = _last_id(folder)
    return _Tokenizer(folder, tuple(files), (vocabulary, special, templates), None if last is None else last + 1)


def _vocabulary(paths: Mapping[str, Path]) -> object:
    """Return what decides which text becomes which ids: of the fast tokenizer if there is one, else its files' hashes."""
    fast = _json(paths["tokenizer.json"]) if "tokenizer.json" in paths else None
    if fast is not None:
        return {key: value for key, value in fast.items() if key not in ("padding", "truncation")}  # state of the last call
    return {
        name: sha256(path)
        for name, path in paths.items()
        if not re.fullmatch(_SETTINGS, name) or name == "added_tokens.json"
    }  # fmt: skip


def _last_id(folder: Path) -> int | None:
    """Return the largest id of the tokenizer in a folder, None if it is not known."""
    fast = _json(folder / "tokenizer.json")
    ids: list[Any] = []
    if fast is not None:
        model, added = fast.get("model"), fast.get("added_tokens")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocabulary, (dict, list)):
            ids += vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))[-1:]
        ids += [token.get("id") for token in (added if isinstance(added, list) else ()) if isinstance(token, dict)]
    else:
        for name in ("vocab.json", "added_tokens.json"):
            ids += (_json(folder / name) or {}).values()
    return max((number for number in ids if type(number) is int), default=None)


def _with_dtype(config: dict[str, Any], sizes: Mapping[str, int]) -> bool:
    """Set the dtype in a configuration and in those nested in it; return whether anything changed."""
    changed = False
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str) and _is_float(value) and value not in sizes:
            config[key], changed = max(sizes, key=sizes.__getitem__), True
        elif key.endswith("_config") and key != "quantization_config" and isinstance(value, dict):
            changed |= _with_dtype(value, sizes)
    return changed


def _without_quantization(config: dict[str, Any]) -> bool:
    """Remove a description of quantized weights from a configuration and from those in it; return whether there was one."""
    nested = [_without_quantization(value) for value in config.values() if isinstance(value, dict)]
    return config.pop("quantization_config", None) is not None or any(nested)


def _is_float(name: str) -> bool:
    dtype = getattr(torch, name.removeprefix("torch."), None)
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


def _json(path: Path, kind: type[Any] = dict) -> Any:
    """Return the content of a JSON file, None if it is missing, damaged or of another kind."""
    return read_json_or(path, kind, None)
