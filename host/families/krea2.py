"""Krea 2: blocks of one stream with grouped-query attention, norms and modulation whose weights are their own."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import comfy.ldm.krea2.model as host
from torch import Tensor, nn

from ...hotpath.attention import Attend
from .attention import (
    bind_cudnn,
    bind_traced,
    block_arguments,
    chosen,
    has_queries,
    is_plain,
    mask_dims,
    patched_before,
    patches_called_out,
    region_arguments,
)
from .kinds import BlockKind, Family, Interface, random_tensor

_PATCHES = ("attn1_patch", "attn1_output_patch")


def attention_for(options: Mapping[str, Any], block: nn.Module) -> Attend | None:
    """See ``Interface``."""
    plain = is_plain(host.optimized_attention_masked, options, _PATCHES)
    return None if plain else functools.partial(_attend, options)


def _attend(
    options: Mapping[str, Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pe: Tensor | None,
    mask: Tensor | None,
    slices: Sequence[int],
) -> Tensor:
    """The attention part of a host block, patches included, on the full options of this very call."""
    patches = options.get("patches", {}) if "block_index" in options else {}
    extra_options = dict(options)
    before = patches.get("attn1_patch", ())
    q, k, v, pe, mask = patched_before(before, extra_options, q, k, v, pe, mask)
    if pe is not None:
        q, k = host.apply_rope(q, k, pe)
    if k.shape[1] != q.shape[1]:
        shared = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
    asked = {"mask": mask, "skip_reshape": True, "transformer_options": options}
    attn = host.optimized_attention_masked(q, k, v, q.shape[1], **asked)
    for patch in patches.get("attn1_output_patch", ()):
        attn = patch(attn, extra_options)
    return attn


def region_inputs(inputs: Mapping[str, Any], like: Tensor, dynamic: bool) -> dict[str, Any]:
    """See ``Interface``; where tokens of references begin is a size."""
    return region_arguments(inputs, like, dynamic, ("timestep_zero_index",))


def token_dims(inputs: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """See ``Interface``: (batch, tokens, hidden) stream, (batch, 1, tokens, ...) rotary embedding, a mask."""
    mask = inputs.get("mask")
    dims = {"x": (1,), "freqs": (2,), "mask": mask_dims(mask, both=has_queries(mask))}
    return {name: dims[name] for name in dims if inputs.get(name) is not None}


def bind_opaque(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Stand in for all patches around attention through the host's own hooks, and call out in their place."""
    return block_arguments(inputs, {"block_index": 0, **patches_called_out()})


def conditioning(diffusion_model: Any, tokens: int) -> tuple[Tensor, dict[str, Any]]:
    """Random text (1, tokens, width of all layers that the text encoder gives)."""
    return random_tensor(1, tokens, diffusion_model.txtlayers * diffusion_model.txtdim), {}


KREA2 = Family(
    name="Krea 2",
    models="Krea 2",
    classes=("comfy.ldm.krea2.model.SingleStreamDiT",),
    kinds=(
        BlockKind(
            "single stream",
            "blocks",
            host.SingleStreamBlock,
            "x",
            1,
            Interface(
                attention_for,
                chosen(bind_traced, bind_cudnn, bind_opaque),
                region_inputs,
                token_dims,
                reads=("block_index", "patches"),
            ),
            "blocks",
            owned=("scale", "lin"),
        ),
    ),
    conditioning=conditioning,
    vector_layers=lambda block: {},
)
