"""Which files of a model belong on the Hub, and how they get there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emomerge.errors import BadInput

KINDS = (".safetensors", ".json", ".txt", ".model", ".jinja", ".md", ".vocab")
"""Endings of the files that loading a model may need, or that say where it comes from."""
TRAINING = ("optimizer", "scheduler.pt", "rng_state", "training_args", "trainer_state", "state.", "evaluations.", "metrics.")
"""Beginnings of files that only belong to a training or a measurement; the ledger and the logs among them."""
DEPTH = 2
"""Folders of diffusers, and of masks, have their files one level down."""


@dataclass(frozen=True)
class Upload:
    """What is to be uploaded: path in the repository → file, and the text of the model card."""

    files: dict[str, Path]
    card: str

    @property
    def listed(self) -> list[dict[str, Any]]:
        """The names and sizes of all files, the card included."""
        sizes = {name: file.stat().st_size for name, file in self.files.items()} | {"README.md": len(self.card.encode())}
        return [{"name": name, "bytes": size} for name, size in sorted(sizes.items())]


def upload_of(source: Path) -> Upload:
    """Return the files of a model.

    Args:
        source: a model or adapter (a folder or a `.safetensors` file), a run directory, or the output folder of a recipe,
            which stands for the model that its report recommends.

    Raises:
        BadInput: there is no model.
    """
    from emomerge.adapters import artefact_of
    from emomerge.cli.write import card

    place = artefact_of(_recommended(source) if (source / "results.json").is_file() else source)
    if place.is_file() and place.suffix == ".safetensors":
        files = {place.name: place}
    elif place.is_dir():
        files = {str(file.relative_to(place).as_posix()): file for file in _model_files(place)}
    else:
        raise BadInput("no model here", where=source, expected="a folder or a .safetensors file")
    if not any(name.endswith(".safetensors") for name in files):
        raise BadInput("no weights here", where=place, expected="a .safetensors file")
    readme = files.pop("README.md", None)
    text = readme.read_text(encoding="utf-8") if readme else card({"title": place.stem, "about": "Made with emomerge."})
    return Upload(files, text)


def _recommended(folder: Path) -> Path:
    """Return the model that the report of an output folder recommends."""
    from emomerge.results import load_results

    selected = load_results(folder).selected
    if selected is None or selected.kind != "model" or selected.path is None:
        raise BadInput(
            "the report recommends no model of this folder", where=folder, found=selected.sentence if selected else None,
            fix="name the model itself, such as one in its folder merges",
        )  # fmt: skip
    path = Path(selected.path)
    moved = next((folder / Path(*path.parts[i:]) for i in range(len(path.parts)) if path.parts[i] in ("runs", "merges")), path)
    return moved if moved.exists() else path


def _model_files(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts)
        training = file.name.startswith(TRAINING) or file.name == "run.json"
        wanted = len(parts) <= DEPTH and file.suffix in KINDS and not (hidden or training)
        if wanted and file.is_file() and not file.is_symlink():
            yield file


def push(upload: Upload, repo: str, *, private: bool, revision: str | None, message: str) -> dict[str, str]:
    """Upload files in one commit and return its `url` and `commit`; creates the repository and the branch if need be.

    Raises:
        BadInput: the Hub cannot be reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        raise BadInput("the Hub is switched off", where="HF_HUB_OFFLINE", fix="unset it, or look first with --dry-run")
    if get_token() is None:
        raise BadInput("there is no token for the Hub", fix="log in with `hf auth login`, or set HF_TOKEN")
    with _explained(repo):
        api = HfApi()
        made = api.create_repo(repo, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(made.repo_id, branch=revision, exist_ok=True)
        operations = [CommitOperationAdd(name, str(file)) for name, file in sorted(upload.files.items())]
        operations.append(CommitOperationAdd("README.md", upload.card.encode()))
        done = api.create_commit(made.repo_id, operations, commit_message=message, revision=revision)
    return {"url": str(made), "commit": str(done.oid)}


@contextlib.contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turn the errors of huggingface_hub into one line each."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except HFValidationError:
        raise BadInput("not the name of a repository on the Hub", found=repo, expected="USER/NAME or NAME") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise BadInput(
                "the Hub does not let this token write", where=repo, found=f"status {status}",
                fix="log in with a token that may write there: `hf auth login`",
            ) from None  # fmt: skip
        found = getattr(error, "server_message", None) or f"status {status}"
        raise BadInput("the Hub refuses the upload", where=repo, found=found) from None
    except HfHubHTTPError.__bases__ as error:  # its client's own errors, whichever client it is, and those of the system
        raise BadInput("the Hub cannot be reached", found=type(error).__name__, fix="check the connection") from None
