"""What reaches a node as its MODEL, and what is on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY
from torch import Tensor


def require_model(model: Any) -> None:
    """Raise ValueError for anything else, which a client of the HTTP API may post and the host passes on."""
    if not isinstance(model, ModelPatcher):
        raise ValueError(f"model: this is {type(model).__name__} and no MODEL. Connect the output of a model loader.")


def to_device(conditioning: Any, device: torch.device) -> Any:
    """A tensor, or each tensor of a list, on ``device``; anything else as it is.

    The host keeps conditioning in RAM and copies it at each step. Such a copy first waits for the step before, so that
    the GPU is idle until the next blocks are issued; one from pinned memory takes its turn in the stream.
    """
    if isinstance(conditioning, list):
        return [to_device(item, device) for item in conditioning]
    if device.type == "cuda" and isinstance(conditioning, Tensor) and conditioning.device.type == "cpu":
        return conditioning.pin_memory().to(device, non_blocking=True)
    return conditioning


def why_untouched(patcher: ModelPatcher | None, options: Mapping[str, Any]) -> str | None:
    """Why what runs in the blocks of this call must stay as the host has it, or None."""
    if compiles_whole_model(options):
        return "another node compiles the whole model"
    if torch.is_grad_enabled():
        return "gradients are being recorded"
    if patcher is None:
        return "the model is called outside of sampling"
    return None


def compiles_whole_model(options: Mapping[str, Any]) -> bool:
    """Whether the host's own node, or one like it, compiles all of the model that samples under these options."""
    return COMPILE_KEY in options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})


def compiled_as_a_whole(model: ModelPatcher) -> bool:
    """Whether that node is on ``model``."""
    return compiles_whole_model(model.model_options.get("transformer_options", {}))
