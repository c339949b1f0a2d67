"""Train five short runs with loss-driven learning rates, merge them into one model, and measure what that brings.

    import emomerge
    base = emomerge.open_checkpoint("base")
    baked = emomerge.bake(base, "runs/sens-0")
    merged = emomerge.merge(base, ["runs/sens-0", "runs/cats-0"], method="ties", density=0.2)
    emomerge.write_checkpoint(merged, "out", dtype="bfloat16")

Weights: `open_checkpoint`, `write_checkpoint`, `Checkpoint`. Adapters: `bake`. Merging: `merge`, `merge_method` (registers a
method of your own), `METHODS`. Measuring: `probe`; `load_results` returns the `Results` that `emomerge run` measured.
Optimizers are in `emomerge.optim`, trainers in `emomerge.integrations`.
Errors: all are `EmomergeError`; `BadInput`, `MissingExtra`, `MissingLossError`, `NonFiniteLossError`, `RunFailed`.

Names are imported when they are first used, so that `import emomerge` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emomerge.adapters import bake as bake
    from emomerge.checkpoints import Checkpoint as Checkpoint
    from emomerge.checkpoints import open_checkpoint as open_checkpoint
    from emomerge.checkpoints import write_checkpoint as write_checkpoint
    from emomerge.errors import BadInput as BadInput
    from emomerge.errors import EmomergeError as EmomergeError
    from emomerge.errors import MissingExtra as MissingExtra
    from emomerge.errors import MissingLossError as MissingLossError
    from emomerge.errors import NonFiniteLossError as NonFiniteLossError
    from emomerge.errors import RunFailed as RunFailed
    from emomerge.merging import METHODS as METHODS
    from emomerge.merging import merge as merge
    from emomerge.merging import merge_method as merge_method
    from emomerge.probing import probe as probe
    from emomerge.results import Results as Results
    from emomerge.results import load_results as load_results

    __version__: str

_HOMES = {
    "METHODS": "merging",
    "BadInput": "errors",
    "Checkpoint": "checkpoints",
    "EmomergeError": "errors",
    "MissingExtra": "errors",
    "MissingLossError": "errors",
    "NonFiniteLossError": "errors",
    "Results": "results",
    "RunFailed": "errors",
    "bake": "adapters",
    "load_results": "results",
    "merge": "merging",
    "merge_method": "merging",
    "open_checkpoint": "checkpoints",
    "probe": "probing",
    "write_checkpoint": "checkpoints",
}
__all__ = [
    "METHODS", "BadInput", "Checkpoint", "EmomergeError", "MissingExtra", "MissingLossError", "NonFiniteLossError", "Results",
    "RunFailed", "__version__", "bake", "load_results", "merge", "merge_method", "open_checkpoint", "probe", "write_checkpoint",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("emomerge")
    if name not in _HOMES:
        raise AttributeError(f"module 'emomerge' has no attribute {name!r}")
    return getattr(import_module(f"emomerge.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, "__version__"])
