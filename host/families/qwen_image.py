"""Qwen-Image, Qwen-Image-Edit and -Layered: blocks of two streams that read the patches before attention alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import comfy.ldm.qwen_image.model as host
import torch
from torch import Tensor, nn

from ...hotpath.attention import Attend, opaque_attention
from .attention import (
    attend_by_heads,
    bind_called_out,
    bind_cudnn,
    bind_traced,
    block_arguments,
    chosen,
    is_plain,
    mask_dims,
    patched_before,
    region_arguments,
)
from .kinds import BlockKind, Family, Interface, random_tensor

_MASK = "encoder_hidden_states_mask"


def attention_for(options: Mapping[str, Any], block: nn.Module) -> Attend | None:
    """See ``Interface``."""
    attention = host.optimized_attention_masked
    if is_plain(attention, options, ("attn1_patch",)):
        return None
    patched = options.get("patches", {}).get("attn1_patch")
    return functools.partial(_patch_and_attend if patched else attend_by_heads, attention, options)


def _patch_and_attend(
    attention: Callable[..., Tensor],
    options: Mapping[str, Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pe: Tensor | None,
    mask: Tensor | None,
    slices: Sequence[int],
) -> Tensor:
    """The patches before attention, rotation and attention. The host gives patches the mask of the text, and attends
    with one that it made of it before them."""
    joint = None
    if mask is not None:
        joint = torch.zeros((q.shape[0], 1, q.shape[2]), dtype=q.dtype, device=q.device)
        joint[:, 0, : slices[0]] = mask
    extra_options = {**options, "img_slice": list(slices)}
    patches = options["patches"]["attn1_patch"]
    q, k, v, pe, mask = patched_before(patches, extra_options, q, k, v, pe, mask)
    q, k = host.apply_rope1(q, pe), host.apply_rope1(k, pe)
    return attend_by_heads(attention, options, q, k, v, None, joint, ())


def region_inputs(inputs: Mapping[str, Any], like: Tensor, dynamic: bool) -> dict[str, Any]:
    """See ``Interface``; where tokens of references begin is a size."""
    return region_arguments(inputs, like, dynamic, ("timestep_zero_index",))


def token_dims(inputs: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """See ``Interface``: (batch, tokens, hidden) streams, (batch, 1, tokens, ...) rotary embedding, (..., tokens)
    mask."""
    dims: dict[str, tuple[int, ...]] = {
        "hidden_states": (1,),
        "encoder_hidden_states": (1,),
        "image_rotary_emb": (2,),
        _MASK: mask_dims(inputs.get(_MASK), both=False),
    }
    return {name: dims[name] for name in dims if inputs.get(name) is not None}


def bind_patched(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Patches, rotation and attention as one call in place of the patches."""
    result: list[Tensor] = []

    def call_out(
        q: Tensor, k: Tensor, v: Tensor, pe: Tensor, attn_mask: Tensor | None, extra_options: dict[str, Any]
    ) -> dict[str, Any]:
        result.append(opaque_attention(q, k, v, pe, attn_mask, extra_options["img_slice"]))
        return {}

    def deliver(attend: Callable[..., Tensor], q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return result[0]

    return block_arguments(inputs, {"patches": {"attn1_patch": [call_out]}, "optimized_attention_override": deliver})


_bind_unpatched = chosen(bind_traced, bind_cudnn, bind_called_out)


def bind_for(attend: Attend | None, like: Tensor) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """See ``Interface``."""
    if isinstance(attend, functools.partial) and attend.func is _patch_and_attend:
        return bind_patched
    return _bind_unpatched(attend, like)


def vector_layers(block: nn.Module) -> dict[str, nn.Module]:
    """The Linear layers of modulation, which see one vector a step."""
    return {f"{name}.1": getattr(block, name)[1] for name in ("img_mod", "txt_mod")}


def conditioning(diffusion_model: Any, tokens: int) -> tuple[Tensor, dict[str, Any]]:
    """Random text (1, tokens, width)."""
    return random_tensor(1, tokens, diffusion_model.txt_in.in_features), {}


QWEN_IMAGE = Family(
    name="Qwen-Image",
    models="Qwen-Image and Qwen-Image-Edit",
    classes=("comfy.ldm.qwen_image.model.QwenImageTransformer2DModel",),
    kinds=(
        BlockKind(
            "transformer",
            "transformer_blocks",
            host.QwenImageTransformerBlock,
            "hidden_states",
            2,
            Interface(attention_for, bind_for, region_inputs, token_dims),
            "blocks",
        ),
    ),
    conditioning=conditioning,
    vector_layers=vector_layers,
)
