"""The families of models whose repeated blocks this pack runs: one file a family, and what is asked of all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from comfy.model_patcher import ModelPatcher
from torch import nn

from ...hotpath.selection import select_blocks
from .flux import FLUX
from .kinds import BlockKind, Family

FAMILIES = (FLUX,)
SUPPORTED = "; ".join(family.models for family in FAMILIES)


def family_of(diffusion_model: nn.Module) -> Family | None:
    """The family that ``diffusion_model`` is of; None when its blocks are of none."""
    return next((it for it in FAMILIES if any(kind.blocks(diffusion_model) for kind in it.kinds)), None)


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
    """``named_blocks``, each with its own modulation modules by name."""
    family = family_of(diffusion_model)
    for path, block in named_blocks(diffusion_model):
        yield path, block, family.modulations(block) if family else {}


def require_family(model: ModelPatcher, verb: str) -> Family:
    """The family of ``model``. Raise ValueError when it has no repeated blocks to ``verb``."""
    diffusion_model = model.get_model_object("diffusion_model")
    family = family_of(diffusion_model)
    if family is None:
        raise ValueError(
            f"model: {type(model.model).__name__} ({type(diffusion_model).__name__}) has no repeated blocks to {verb} "
            f"that this pack knows. Supported are {SUPPORTED}."
        )
    return family


def selected_blocks(diffusion_model: nn.Module, selection: Mapping[str, str]) -> dict[BlockKind, tuple[int, ...]]:
    """The kinds of blocks of the model, each with the indices of its selected blocks.

    Raises:
        ValueError: a block is outside the model.
    """
    found = {}
    for kind in kinds_of(diffusion_model):
        count = len(kind.blocks(diffusion_model))
        found[kind] = tuple(sorted(select_blocks(kind.selected_by, selection[kind.selected_by], count)))
    return found


def as_twin(template: nn.Module) -> None:
    """Make the template of a block one of its kind's ``twin``, where it has one."""
    for kind in (kind for family in FAMILIES for kind in family.kinds):
        if kind.twin is not None and type(template) is kind.block:
            template.__class__ = kind.twin
