"""Optional packages: the extra that installs each, and the one-line error if one is missing or too old."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from importlib.util import find_spec

from emomerge.errors import MissingExtra

EXTRAS: Mapping[str, Mapping[str, str]] = {
    "train": {
        "transformers": "transformers",
        "peft": "peft",
        "accelerate": "accelerate",
        "datasets": "datasets",
        "huggingface_hub": "huggingface_hub",
        "filelock": "filelock",
    },
    "hub": {"huggingface_hub": "huggingface_hub"},
    "report": {"altair": "altair", "vl_convert": "vl-convert-python", "jinja2": "jinja2"},
    "demo": {"sklearn": "scikit-learn"},
    "images": {"PIL": "pillow"},
    "gguf": {"gguf": "gguf"},
    "ray": {"ray": "ray"},
    "slurm": {"submitit": "submitit"},
}
"""Extra → importable module → the distribution that provides it."""


def require(feature: str, *extras: str) -> None:
    """Check that the packages of extras are installed in supported versions, without importing them.

    Args:
        feature: the feature that needs them, such as `emomerge run`; the subject of the error message.
        extras: keys of EXTRAS.

    Raises:
        MissingExtra: a package is missing or too old.
    """
    _check(feature, {extra: EXTRAS[extra] for extra in extras})


def require_module(feature: str, module: str) -> None:
    """Check a single optional module in the way that `require` checks a whole extra."""
    extra = next(extra for extra, packages in EXTRAS.items() if module in packages)
    _check(feature, {extra: {module: EXTRAS[extra][module]}})


def installed(module: str) -> bool:
    """Return whether an optional module is installed in a supported version."""
    return _fault(module, next(packages[module] for packages in EXTRAS.values() if module in packages)) is None


@contextlib.contextmanager
def needed_by(feature: str) -> Iterator[None]:
    """Turn a failed import of an optional package into MissingExtra; all other errors, including import errors, propagate.

    Args:
        feature: the feature that needs the package, such as `emomerge run`; the subject of the error message.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        for extra, packages in EXTRAS.items():
            if (package := packages.get(error.name or "")) is not None:
                raise MissingExtra(feature, [package], [extra]) from error
        raise


def _check(feature: str, wanted: Mapping[str, Mapping[str, str]]) -> None:
    faults = {extra: [fault for package in wanted[extra].items() if (fault := _fault(*package))] for extra in wanted}
    if any(faults.values()):
        raise MissingExtra(feature, [f for group in faults.values() for f in group], [e for e in faults if faults[e]])


def _fault(module: str, distribution: str) -> str | None:
    """Return the fault of a package for the error message; None if it is installed in a supported version."""
    if find_spec(module) is None:
        return distribution
    oldest = _oldest_supported().get(distribution)
    with contextlib.suppress(metadata.PackageNotFoundError):
        found = metadata.version(distribution)
        if oldest is not None and _numbers(found) < _numbers(oldest):
            return f"{distribution} {oldest} or newer (found {found})"
    return None


def _oldest_supported() -> dict[str, str]:
    """Return distribution → the lower bound in emomerge's metadata; empty if emomerge is not installed."""
    try:
        requirements: Iterable[str] = metadata.requires("emomerge") or ()
    except metadata.PackageNotFoundError:
        return {}
    found = (re.match(r"([\w.-]+)[^;]*?>=([\d.]+)", requirement) for requirement in requirements)
    return {match[1]: match[2] for match in found if match}


def _numbers(version: str) -> tuple[int, ...]:
    """Return the leading numeric components of a version; suffixes such as rc1 and +cpu are ignored."""
    return tuple(int(number) for number in re.match(r"[\d.]*\d|", version)[0].split(".") if number)  # type: ignore[index]
