"""The families of models whose repeated blocks this pack runs: one file a family, and what is asked of all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from comfy.model_patcher import ModelPatcher
from torch import nn

from ...hotpath.selection import select_blocks
from .flux import FLUX
from .hunyuan import HUNYUAN_3D, HUNYUAN_VIDEO
from .kinds import BlockKind, Family
from .ltx import LTX
from .qwen_image import QWEN_IMAGE
from .wan import WAN
from .z_image import Z_IMAGE

FAMILIES: tuple[Family, ...] = (FLUX, HUNYUAN_VIDEO, HUNYUAN_3D, QWEN_IMAGE, Z_IMAGE, WAN, LTX)
with suppress(ModuleNotFoundError):
    # Not in the oldest ComfyUI that is supported.
    from .krea2 import KREA2

    FAMILIES += (KREA2,)
SUPPORTED = ", ".join(family.models for family in FAMILIES)
# Of models that are asked for and stay out: what their blocks do.
_STAYS_OUT = {
    "comfy.ldm.hidream.model.HiDreamImageTransformer2DModel": "its blocks route each token to experts of its own",
    "comfy.ldm.seedvr.model.NaDiT": "its blocks take a cache and tables of shapes as arguments",
    "comfy.ldm.minimax.model.MiniMaxH3Model": "ComfyUI records and plans its blocks itself",
}


def family_of(diffusion_model: nn.Module) -> Family | None:
    """The family that ``diffusion_model`` is of; None when its blocks are of none."""
    return next((family for family in FAMILIES if family.has(diffusion_model)), None)


def kinds_of(diffusion_model: nn.Module) -> tuple[BlockKind, ...]:
    """The kinds of repeated blocks that the family of ``diffusion_model`` has."""
    family = family_of(diffusion_model)
    return family.kinds if family else ()


def named_blocks(diffusion_model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All repeated blocks by their path in the diffusion model."""
    for kind in kinds_of(diffusion_model):
        for index, block in enumerate(kind.blocks(diffusion_model)):
            yield f"{kind.attribute}.{index}", block


def named_modulations(diffusion_model: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, Any]]]:
    """``named_blocks``, each with its own modulation modules that can be made ahead by name."""
    family = family_of(diffusion_model)
    for path, block in named_blocks(diffusion_model):
        yield path, block, family.modulations(block) if family else {}


def selected_blocks(diffusion_model: nn.Module, selection: Mapping[str, str]) -> dict[BlockKind, tuple[int, ...]]:
    """The kinds of blocks of the model, each with the indices of its selected blocks.

    Args:
        selection: by input of Compile Repeated Blocks, ``all``, ``none`` or ranges. Where one input selects among lists
            of several kinds, it counts on from one list to the next.

    Raises:
        ValueError: a block is outside the model.
    """
    kinds = kinds_of(diffusion_model)
    found: dict[BlockKind, tuple[int, ...]] = {}
    for name, text in selection.items():
        counts = {kind: len(kind.blocks(diffusion_model)) for kind in kinds if kind.selected_by == name}
        chosen, start = select_blocks(name, text, sum(counts.values())), 0
        for kind, count in counts.items():
            found[kind] = tuple(index for index in range(count) if start + index in chosen)
            start += count
    return found


def require_family(model: ModelPatcher, verb: str) -> Family:
    """The family of ``model``. Raise ValueError when it has no repeated blocks to ``verb``."""
    diffusion_model = model.get_model_object("diffusion_model")
    family = family_of(diffusion_model)
    if family is None:
        kind = type(diffusion_model)
        why = _STAYS_OUT.get(f"{kind.__module__}.{kind.__qualname__}")
        raise ValueError(
            f"model: {type(model.model).__name__} ({kind.__name__}) has no repeated blocks to {verb} "
            f"that this pack knows{f': {why}' if why else ''}. Supported are {SUPPORTED}."
        )
    return family
