"""Flux blocks in the host: where they are, what they take, what they read from the options."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import comfy.ldm.flux.layers
import comfy.ldm.flux.math
import comfy.ldm.modules.attention
import comfy.quant_ops
import torch
from torch import Tensor, nn

from ...hotpath.attention import Attend, cudnn_attention
from ...hotpath.exchange import exchanged
from ...hotpath.partial_attention import attention_over_devices, has_parts
from ...hotpath.sizes import as_size, from_size, span_within
from ...hotpath.template import NotHoistable
from ...hotpath.values import plainly_strided
from ..layers.containers import preferred_attention
from .attention import (
    chosen,
    has_patches,
    is_overridden,
    is_own,
    mask_dims,
    patched_before,
    patches_called_out,
    shared_attention,
)
from .kinds import BlockKind, Family, Interface, SharedForward, random_tensor

_STREAMS = {"img", "txt", "x"}
# The entry of a region's inputs that counts the tokens of other devices.
_OTHERS = "tokens_of_others"
# Spans of tokens, and the stream that each is of. No mapping: a graph that was traced through one holds this module.
_SPANS = (("modulation_dims", "x"), ("modulation_dims_img", "img"), ("modulation_dims_txt", "txt"))


def modulations(block: nn.Module) -> dict[str, Any]:
    """The block's own modulation modules by name; none where all blocks share theirs or have none."""
    kind = comfy.ldm.flux.layers.Modulation
    return {name: module for name, module in block.named_children() if isinstance(module, kind)}


def vector_layers(block: nn.Module) -> dict[str, nn.Module]:
    """The Linear layers of modulation, which see one vector a step."""
    return {f"{name}.lin": module.lin for name, module in modulations(block).items()}


def conditioning_vector(
    diffusion_model: Any, timesteps: Tensor, conds: Mapping[str, Any], dtype: torch.dtype
) -> Tensor:
    """The vector (batch, hidden) that the host's Flux gives its blocks for ``timesteps`` (batch,), ``guidance`` (1,) or
    (batch,) and pooled text ``y`` (batch, width), computed in ``dtype``."""
    guidance, y = conds.get("guidance"), conds.get("y")
    embed = comfy.ldm.flux.layers.timestep_embedding
    vector = diffusion_model.time_in(embed(timesteps, 256).to(dtype))
    if diffusion_model.params.guidance_embed and guidance is not None:
        vector = vector + diffusion_model.guidance_in(embed(guidance, 256).to(dtype))
    if diffusion_model.vector_in is not None:
        width = diffusion_model.params.vec_in_dim
        if y is None:
            y = torch.zeros((len(timesteps), width), device=timesteps.device, dtype=dtype)
        vector = vector + diffusion_model.vector_in(y[:, :width])
    return vector


def token_dims(inputs: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Token dimensions of the inputs: (batch, tokens, hidden) streams, (batch, 1, tokens, ...) rotary embedding,
    (..., query tokens, key tokens) mask."""
    dims: dict[str, tuple[int, ...]] = {"img": (1,), "txt": (1,), "x": (1,), "pe": (2,)}
    dims["attn_mask"] = mask_dims(inputs.get("attn_mask"), both=True)
    return {name: dims[name] for name in dims if inputs.get(name) is not None}


def attention_for(options: Mapping[str, Any], block: nn.Module) -> Attend | None:
    """How the attention of ``block`` must run under these options; None when it can be traced with the block.

    Raises:
        NotHoistable: the host's attention was replaced by code that does not honour the host's override.
    """
    layers, math = comfy.ldm.flux.layers, comfy.ldm.flux.math
    if layers.attention is not math.attention or not is_own(math.attention, math):
        raise NotHoistable(f"the attention of Flux blocks was replaced by {layers.attention.__module__}")
    if not hasattr(math.optimized_attention, "__wrapped__"):
        raise NotHoistable(f"the host's attention was replaced by {math.optimized_attention.__module__}")
    patches = options.get("patches", {})
    preferred = preferred_attention(block)
    if (
        preferred is None
        and math.optimized_attention is comfy.ldm.modules.attention.attention_pytorch
        and is_own(math.apply_rope, math)
        and is_own(comfy.quant_ops.ck.apply_rope, comfy.quant_ops.ck)
        and (shared_attention(options) is not None or not is_overridden(options))
        and not patches.get("attn1_patch")
        and not patches.get("attn1_output_patch")
    ):
        return None
    return functools.partial(_attend, options, {} if preferred is None else {"preferred_attention": preferred})


def _attend(
    options: Mapping[str, Any],
    preference: Mapping[str, Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pe: Tensor | None,
    mask: Tensor | None,
    slices: Sequence[int],
) -> Tensor:
    """The attention part of a host block, patches included, on the full options of this very call."""
    patches = options.get("patches", {})
    extra_options = dict(options)
    if slices:
        extra_options["img_slice"] = list(slices)
    before = patches.get("attn1_patch", ())
    q, k, v, pe, mask = patched_before(before, extra_options, q, k, v, pe, mask)
    attn = comfy.ldm.flux.layers.attention(q, k, v, pe=pe, mask=mask, transformer_options=options, **preference)
    for patch in patches.get("attn1_output_patch", ()):
        attn = patch(attn, extra_options)
    return attn


def region_inputs(inputs: Mapping[str, Any], like: Tensor, dynamic: bool) -> dict[str, Any]:
    """The block's arguments without its options, with token spans (Kontext's zero timestep) as sizes, and how many
    tokens other devices have.

    Where a node has cut a stream short, the host's spans go beyond it, which a graph would have a guard on.
    """
    taken = {name: value for name, value in inputs.items() if name != "transformer_options"}
    for name in _STREAMS & taken.keys():
        taken[name] = plainly_strided(taken[name])
    for name, stream in _SPANS:
        if taken.get(name):
            tokens = taken[stream].shape[1]
            spans = [
                (min(start, tokens), end if end is None else min(end, tokens), row) for start, end, row in taken[name]
            ]
            taken[name] = [tuple(as_size(count, like, dynamic) for count in span) for span in spans]
    shared = shared_attention(inputs.get("transformer_options", {}))
    if shared is not None:
        taken[_OTHERS] = shared.others_as_size(like, dynamic)
    return taken


def _arguments(inputs: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    taken = {**inputs, "transformer_options": options}
    taken.pop(_OTHERS, None)
    for name, stream in _SPANS:
        if taken.get(name):
            tokens = taken[stream].shape[1]
            taken[name] = [
                (*span_within(from_size(start), from_size(end), tokens), from_size(row))
                for start, end, row in taken[name]
            ]
    return taken


def bind_traced(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """No patch and no override: the block reads nothing else from its options.

    The rotary embedding is traced in its plain form, where the host would call a kernel of its own that nothing can be
    fused with.
    """
    return _rotated(inputs, cudnn=False)


def bind_cudnn(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """As ``bind_traced``, with cuDNN's attention where there is no mask."""
    return _rotated(inputs, cudnn=True)


def _rotated(inputs: Mapping[str, Any], cudnn: bool) -> Mapping[str, Any]:
    pe, others = inputs["pe"], from_size(inputs.get(_OTHERS))

    def rotate_and_attend(
        attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        if pe is not None:
            q, k = (comfy.ldm.flux.math._apply_rope1(x, pe) for x in (q, k))
        masked = kwargs.get("mask") is not None
        if others is not None:
            if not masked and has_parts(q):
                return attention_over_devices(q, k, v, others)
            k, v = exchanged(k, v, others)
        if cudnn and not masked:
            return cudnn_attention(q, k, v)
        return attend(q, k, v, *args, **kwargs)

    return _arguments({**inputs, "pe": None}, {"optimized_attention_override": rotate_and_attend})


def bind_opaque(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Stand in for all patches around attention through the host's own hooks, and call out in their place."""
    return _arguments(inputs, patches_called_out("img_slice"))


bind_for = chosen(bind_traced, bind_cudnn, bind_opaque)


def conditioning(diffusion_model: Any, tokens: int) -> tuple[Tensor, dict[str, Any]]:
    """Random text (1, tokens, width), and the guidance and pooled text (1, width) that go with it."""
    params = diffusion_model.params
    width = getattr(params, "vec_in_dim", None)
    pooled = {"pooled_output": random_tensor(1, width)} if width else {}
    return random_tensor(1, tokens, params.context_in_dim), {"guidance": 3.5, **pooled}


def refuse_shares(arguments: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """Why ``forward_orig`` can't run on shares of these tokens; empty where it can."""
    if has_patches(options):
        return "a patch of another node reads the tokens of the whole image"
    if "optimized_attention_override" in options:
        return "another node puts an attention of its own in place of the host's"
    layers, math = comfy.ldm.flux.layers, comfy.ldm.flux.math
    if layers.attention is not math.attention or not hasattr(math.optimized_attention, "__wrapped__"):
        return "the host's attention was replaced"
    if arguments.get("timestep_zero_index") is not None:
        # A share that begins in a reference would take its text for one, too.
        return "references are given at timestep zero"
    return ""


_INTERFACE = Interface(attention_for, bind_for, region_inputs, token_dims, vector="vec")
KINDS = tuple(
    BlockKind(name, f"{name}_blocks", block, activation, streams, _INTERFACE, f"{name}_blocks")
    for name, block, activation, streams in (
        ("double", comfy.ldm.flux.layers.DoubleStreamBlock, "img", 2),
        ("single", comfy.ldm.flux.layers.SingleStreamBlock, "x", 1),
    )
)
FLUX = Family(
    name="Flux",
    models="Flux.1 (dev, schnell, Fill, Kontext and the like), Flux.2, Chroma, Radiance, LongCat-Image, Ovis-Image",
    classes=(
        "comfy.ldm.flux.model.Flux",
        "comfy.ldm.chroma.model.Chroma",
        "comfy.ldm.chroma_radiance.model.ChromaRadiance",
    ),
    kinds=KINDS,
    conditioning=conditioning,
    vector_layers=vector_layers,
    modulations=modulations,
    conditioning_vector=conditioning_vector,
    shared=SharedForward(
        name="forward_orig",
        classes=("comfy.ldm.flux.model.Flux", "comfy.ldm.chroma.model.Chroma"),
        streams=(("txt", "txt_ids"), ("img", "img_ids")),
        mask="attn_mask",
        control="control",
        refuse=refuse_shares,
    ),
)
