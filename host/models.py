"""What reaches a node as its MODEL, and what is on it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.quant_ops import QuantizedTensor
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY
from torch import Tensor, nn

WHOLE_MODEL = "diffusion_model"


def require_model(model: Any) -> None:
    """Raise ValueError for anything but a MODEL: the host passes on what a client of the HTTP API posts."""
    if not isinstance(model, ModelPatcher):
        raise ValueError(f"model: this is {type(model).__name__}, not a MODEL. Connect the output of a model loader.")


def to_device(value: Any, device: torch.device) -> Any:
    """A tensor, or each tensor of a list, that is in RAM on ``device``; anything else as it is.

    A copy to a GPU first waits for what was issued before it, and fills the bus less, unless it is from pinned memory:
    the host's own copy of conditioning at each step leaves the GPU idle until the next blocks are issued.
    """
    if isinstance(value, list):
        return [to_device(item, device) for item in value]
    in_ram = isinstance(value, Tensor) and not isinstance(value, QuantizedTensor) and value.device.type == "cpu"
    return value.pin_memory().to(device, non_blocking=True) if in_ram and device.type == "cuda" else value


def why_untouched(patcher: ModelPatcher | None, options: Mapping[str, Any]) -> str | None:
    """Why what runs in the blocks of this call must stay as the host has it, or None."""
    others = compiled_by_another(options)
    if others:
        return f"another node compiles {'the whole model' if WHOLE_MODEL in others else 'single blocks'}"
    if torch.is_grad_enabled():
        return "gradients are being recorded"
    if patcher is None:
        return "the model is called outside of sampling"
    return None


def compiled_by_another(options: Mapping[str, Any]) -> frozenset[str]:
    """What the host's own way to compile, which other packs use too, puts in place of modules while a model samples
    under these options: their paths, such as ``diffusion_model.double_blocks.0``; ``WHOLE_MODEL`` for all of it."""
    found: set[str] = set()
    for wrapper in options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}).get(COMPILE_KEY, ()):
        # Nothing but the host's wrapper knows it.
        closure = inspect.getclosurevars(wrapper).nonlocals if inspect.isfunction(wrapper) else {}
        found.update(closure.get("compiled_module_dict", {WHOLE_MODEL: None}))
    return frozenset(found)


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module`` is what ``torch.compile`` makes of one."""
    return isinstance(module, torch._dynamo.OptimizedModule)


def compiled_as_a_whole(model: ModelPatcher) -> bool:
    """Whether another node compiles all of ``model``."""
    return WHOLE_MODEL in compiled_by_another(model.model_options.get("transformer_options", {}))


def compiled_elsewhere(model: ModelPatcher) -> bool:
    """Whether another node compiles all of ``model`` or single modules."""
    return bool(compiled_by_another(model.model_options.get("transformer_options", {})))
