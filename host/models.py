"""What reaches a node as its MODEL."""

from __future__ import annotations

from typing import Any

from comfy.model_patcher import ModelPatcher


def require_model(model: Any) -> None:
    """Raise ValueError for anything else, which a client of the HTTP API may post and the host passes on."""
    if not isinstance(model, ModelPatcher):
        raise ValueError(f"model: this is {type(model).__name__} and no MODEL. Connect the output of a model loader.")
