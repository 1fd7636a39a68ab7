"""Whether blocks of this ComfyUI are built as this pack knows them: asked once when it starts, before anyone waits."""

from __future__ import annotations

import functools
import logging
from typing import Any

import comfy.ops
import torch
from comfyui_version import __version__

from ..hotpath.template import NotHoistable, plan_block
from . import NEWEST_HOST, OLDEST_HOST
from .families.flux import FLUX
from .residency.weights import layer_states, plain_layers

log = logging.getLogger(__name__)

# As small as they can be, and without weights.
_SMALL: dict[str, dict[str, Any]] = {
    "double": dict(hidden_size=64, num_heads=2, mlp_ratio=2.0),
    "single": dict(hidden_size=64, num_heads=2),
}


@functools.cache
def unknown_structure() -> str:
    """Why a kind of Flux blocks of this ComfyUI can't be compiled, in a sentence for log and node; else empty."""
    for kind in FLUX.kinds:
        try:
            meta: dict[str, Any] = dict(device="meta", dtype=torch.float32, operations=comfy.ops.manual_cast)
            block = kind.block(**_SMALL[kind.name], **meta)
            if not {kind.activation, "transformer_options"} <= set(kind.parameters):
                raise NotHoistable(f"{kind.block.__name__} takes other arguments")
            plan_block(block, plain_layers(block, fuses=False), layer_states)
        except (NotHoistable, TypeError, AttributeError) as reason:
            return (
                f"{kind.name} blocks of this ComfyUI {__version__} can't be compiled ({reason}): images are right and "
                f"not faster. "
                f"HotPath was tested with ComfyUI {OLDEST_HOST} to {NEWEST_HOST}; is there a newer HotPath?"
            )
    return ""


def tell_unknown_structure() -> None:
    """Say in the log when ComfyUI starts that blocks will run eager, and why."""
    if unknown_structure():
        log.warning("%s", unknown_structure())
