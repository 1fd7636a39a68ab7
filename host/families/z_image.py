"""Z-Image and Lumina 2: blocks of one stream for text and image together, and the refiners of each before them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import comfy.ldm.lumina.model as host
from torch import Tensor, nn

from ...hotpath.attention import Attend
from ...hotpath.template import NotHoistable
from .attention import (
    attend_by_heads,
    bind_called_out,
    bind_cudnn,
    bind_traced,
    chosen,
    is_plain,
    mask_dims,
    region_arguments,
)
from .kinds import BlockKind, Family, Interface, random_tensor

_ZERO = "timestep_zero_index"


def attention_for(options: Mapping[str, Any], block: nn.Module) -> Attend | None:
    """See ``Interface``."""
    attention = host.optimized_attention_masked
    return None if is_plain(attention, options, ()) else functools.partial(attend_by_heads, attention, options)


def region_inputs(inputs: Mapping[str, Any], like: Tensor, dynamic: bool) -> dict[str, Any]:
    """See ``Interface``.

    Raises:
        NotHoistable: there are references (Z-Image Omni).
    """
    if inputs.get(_ZERO) is not None:
        raise NotHoistable("references give each block spans of tokens at another timestep, which it sorts by number")
    return region_arguments(inputs, like, dynamic)


def token_dims(inputs: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """See ``Interface``: (batch, tokens, hidden) stream, (batch, tokens, 1, ...) rotary embedding, a mask."""
    dims = {"x": (1,), "freqs_cis": (1,), "x_mask": mask_dims(inputs.get("x_mask"), both=True)}
    return {name: dims[name] for name in dims if inputs.get(name) is not None}


def vector_layers(block: nn.Module) -> dict[str, nn.Module]:
    """The Linear layer of modulation, which sees one vector a step; none in the text's refiner."""
    modulation: Any = getattr(block, "adaLN_modulation", None)
    last = 0 if modulation is None else len(modulation) - 1
    return {} if modulation is None else {f"adaLN_modulation.{last}": modulation[last]}


def conditioning(diffusion_model: Any, tokens: int) -> tuple[Tensor, dict[str, Any]]:
    """Random text (1, tokens, width)."""
    return random_tensor(1, tokens, diffusion_model.cap_embedder[1].in_features), {}


def _kind(name: str, attribute: str) -> BlockKind:
    interface = Interface(attention_for, chosen(bind_traced, bind_cudnn, bind_called_out), region_inputs, token_dims)
    return BlockKind(name, attribute, host.JointTransformerBlock, "x", 1, interface, "blocks", unread=("layer_id",))


Z_IMAGE = Family(
    name="Z-Image",
    models="Z-Image and Lumina 2",
    classes=("comfy.ldm.lumina.model.NextDiT",),
    kinds=(
        _kind("main", "layers"),
        _kind("noise refiner", "noise_refiner"),
        _kind("context refiner", "context_refiner"),
        _kind("image refiner", "siglip_refiner"),
    ),
    conditioning=conditioning,
    vector_layers=vector_layers,
)
