"""Wan 2.1 and 2.2: blocks with attention to themselves and to text, whose modulation is a parameter of the block."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import comfy.ldm.wan.model as host
from torch import Tensor, nn

from ...hotpath.attention import Attend, calls_in_order, joined
from .attention import (
    bind_cudnn,
    bind_traced,
    block_arguments,
    by_heads,
    called_out,
    chosen,
    is_plain,
    precision,
    region_arguments,
)
from .kinds import BlockKind, Family, Interface, random_tensor

# What an opaque call stands for besides attention, told by its slices.
_AFTER_SELF, _AFTER_CROSS = [1], [2]


def attention_for(options: Mapping[str, Any], block: nn.Module) -> Attend | None:
    """See ``Interface``."""
    plain = is_plain(host.optimized_attention, options, ("attn1_patch", "attn2_patch"))
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
    """Attention, or the patches after it, on the full options of this very call."""
    heads, stage, patches = q.shape[1], list(slices), options.get("patches", {})
    x = joined(v)
    if stage == _AFTER_SELF:
        for patch in patches.get("attn1_patch", ()):
            x = patch({"x": x, "q": q.transpose(1, 2), "k": k.transpose(1, 2), "transformer_options": options})
        return x
    if stage == _AFTER_CROSS:
        for patch in patches.get("attn2_patch", ()):
            x = patch({"x": x, "transformer_options": options})
        return x
    return host.optimized_attention(
        joined(q), joined(k), x, heads=heads, transformer_options=options, **precision(slices)
    )


def region_inputs(inputs: Mapping[str, Any], like: Tensor, dynamic: bool) -> dict[str, Any]:
    """See ``Interface``; how many tokens of the context are an image's is a size."""
    taken = region_arguments(inputs, like, dynamic, ("context_img_len",))
    # As the block itself begins; the first one gets a transposed view, whose strides would be another graph.
    taken["x"] = taken["x"].contiguous()
    return taken


def token_dims(inputs: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """See ``Interface``: (batch, tokens, hidden) streams, (batch, tokens, 1, ...) rotary embedding, and where
    modulation is of more than one timestep (batch, timesteps, 6, hidden)."""
    dims: dict[str, tuple[int, ...]] = {"x": (1,), "context": (1,), "freqs": (1,)}
    if inputs["e"].ndim == 4 and inputs["e"].shape[1] > 1:
        dims["e"] = (1,)
    return {name: dims[name] for name in dims if inputs.get(name) is not None}


def bind_opaque(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Attention, and each kind of patches after it, as a call."""
    call = calls_in_order()

    def after_self(args: Mapping[str, Any]) -> Tensor:
        q, k = args["q"].transpose(1, 2), args["k"].transpose(1, 2)
        return call(q, k, by_heads(args["x"], q.shape[1]), None, None, _AFTER_SELF)

    def after_cross(args: Mapping[str, Any]) -> Tensor:
        x = args["x"].unsqueeze(1)
        return call(x, x, x, None, None, _AFTER_CROSS)

    patches = {"attn1_patch": [after_self], "attn2_patch": [after_cross]}
    return block_arguments(
        inputs, {"patches": patches, "optimized_attention_override": functools.partial(called_out, call)}
    )


def conditioning(diffusion_model: Any, tokens: int) -> tuple[Tensor, dict[str, Any]]:
    """Random text (1, tokens, width)."""
    return random_tensor(1, tokens, diffusion_model.text_dim), {}


_BIND = chosen(bind_traced, bind_cudnn, bind_opaque)
WAN = Family(
    name="Wan",
    models="Wan 2.1 and 2.2 (text-to-video and image-to-video)",
    classes=("comfy.ldm.wan.model.WanModel",),
    kinds=(
        BlockKind(
            "transformer",
            "blocks",
            host.WanAttentionBlock,
            "x",
            2,
            Interface(attention_for, _BIND, region_inputs, token_dims),
            "blocks",
            owned=("modulation",),
        ),
    ),
    conditioning=conditioning,
    vector_layers=lambda block: {},
)
