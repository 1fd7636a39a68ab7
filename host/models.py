"""What reaches a node as its MODEL, and what is on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY


def require_model(model: Any) -> None:
    """Raise ValueError for anything else, which a client of the HTTP API may post and the host passes on."""
    if not isinstance(model, ModelPatcher):
        raise ValueError(f"model: this is {type(model).__name__} and no MODEL. Connect the output of a model loader.")


def compiles_whole_model(options: Mapping[str, Any]) -> bool:
    """Whether the host's own node, or one like it, compiles all of the model that samples under these options."""
    return COMPILE_KEY in options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})
