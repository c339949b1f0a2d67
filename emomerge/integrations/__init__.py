"""The emo optimizers in trainers of other libraries. Names are imported when they are first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emomerge.integrations.transformers import EmoTrainer as EmoTrainer

__all__ = ["EmoTrainer"]


def __getattr__(name: str) -> Any:
    if name != "EmoTrainer":
        raise AttributeError(f"module 'emomerge.integrations' has no attribute {name!r}")
    from emomerge.integrations.transformers import EmoTrainer

    return EmoTrainer
