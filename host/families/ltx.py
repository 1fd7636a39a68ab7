"""LTX-Video 2: blocks of two streams, video and sound, each with attention to itself, to text and to the other.

All that modulates them are parameters of the block. Timesteps of a video come as one for each frame.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import comfy.ldm.lightricks.av_model as host
import comfy.ldm.modules.attention
from torch import Tensor, nn

from ...hotpath.attention import Attend, calls_in_order, joined
from ...hotpath.sizes import as_size, from_size
from ...hotpath.template import NotHoistable
from .attention import called_out, chosen, cudnn_first, has_queries, is_plain, mask_dims, precision
from .kinds import BlockKind, Family, Interface, random_tensor

_STREAMS = ("video", "audio")
_ROTATIONS = ("v_pe", "a_pe", "v_cross_pe", "a_cross_pe")
_TIMESTEPS = (
    "v_timestep",
    "a_timestep",
    "v_cross_scale_shift_timestep",
    "a_cross_scale_shift_timestep",
    "v_cross_gate_timestep",
    "a_cross_gate_timestep",
    "v_prompt_timestep",
    "a_prompt_timestep",
)
_CONTEXTS = ("v_context", "a_context")
# Options by which another node leaves parts of a block out, those first that are on where none does.
_ON, _OFF = ("run_vx", "run_ax", "a2v_cross_attn", "v2a_cross_attn"), ("stg_skip_self_attn",)
# No mapping: on the order of its keys a graph guards by the name of this module, and is not kept.
_PARTS = (*_ON, *_OFF)
# Entries of a region's inputs: tokens that each timestep is for, whether a rotation is of halves, which parts run.
_TOKENS, _HALVES, _RUN = "tokens", "halves", "run"


def attention_for(options: Mapping[str, Any], block: nn.Module) -> Attend | None:
    """See ``Interface``."""
    plain = is_plain(comfy.ldm.modules.attention.optimized_attention, options, ())
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
    """Attention on the full options of this very call."""
    heads = q.shape[1]
    q, k, v = (joined(x) for x in (q, k, v))
    asked = {"mask": mask, "transformer_options": options, **precision(slices)}
    return comfy.ldm.modules.attention.optimized_attention(q, k, v, heads, **asked)


def region_inputs(inputs: Mapping[str, Any], like: Tensor, dynamic: bool) -> dict[str, Any]:
    """See ``Interface``; timesteps as the host keeps them, with the tokens that each is for as a size.

    Raises:
        NotHoistable: guides weaken attention, or the host is older than one tensor for a rotation.
    """
    options = inputs.get("transformer_options") or {}
    for name in ("attention_mask", "self_attention_mask"):
        if not isinstance(inputs.get(name), (Tensor, type(None))):
            raise NotHoistable("guides of less than full strength give attention a mask for each kind of token")
    taken = {name: value for name, value in inputs.items() if name not in ("x", "transformer_options")}
    taken.update(zip(_STREAMS, inputs["x"], strict=True))
    taken[_HALVES], taken[_TOKENS] = {}, {}
    for name in _ROTATIONS:
        if taken.get(name) is not None:
            if len(taken[name]) != 2:
                raise NotHoistable("this ComfyUI gives the rotations of LTX-Video 2 in an older form")
            taken[name], halves = taken[name]
            taken[_HALVES][name] = int(halves)
    for name in _TIMESTEPS:
        if isinstance(taken.get(name), host.CompressedTimestep):
            taken[_TOKENS][name] = as_size(taken[name].patches_per_frame, like, dynamic)
            taken[name] = taken[name].data
    taken[_RUN] = {name: int(bool(options.get(name, name in _ON))) for name in _PARTS}
    return taken


def token_dims(inputs: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """See ``Interface``: (batch, tokens, hidden) streams and texts, (batch, tokens, heads, ...) rotary embeddings,
    (batch, timesteps, width) modulation where it is of more than one timestep, masks."""
    dims: dict[str, tuple[int, ...]] = {name: (1,) for name in (*_STREAMS, *_CONTEXTS, *_ROTATIONS, *_TIMESTEPS)}
    for name in ("attention_mask", "self_attention_mask"):
        mask = inputs.get(name)
        dims[name] = mask_dims(mask, both=has_queries(mask))
    present = {name: given for name, given in dims.items() if inputs.get(name) is not None}
    return {name: given for name, given in present.items() if all(inputs[name].shape[dim] > 1 for dim in given)}


def _arguments(inputs: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    ours = (*_STREAMS, _HALVES, _TOKENS, _RUN)
    taken = {name: value for name, value in inputs.items() if name not in ours}
    taken["x"] = inputs["video"], inputs["audio"]
    for name in _ROTATIONS:
        if taken.get(name) is not None:
            taken[name] = taken[name], inputs[_HALVES][name] == 1
    for name in _TIMESTEPS:
        tokens = from_size(inputs[_TOKENS].get(name, 1))
        if tokens != 1:
            taken[name] = taken[name].unsqueeze(2).expand(-1, -1, tokens, -1).flatten(1, 2)
    run = {name: inputs[_RUN][name] == 1 for name in _PARTS}
    taken["transformer_options"] = {**run, **options}
    return taken


def bind_traced(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """No override: the block reads nothing else from its options than which of its parts run."""
    return _arguments(inputs, {})


def bind_cudnn(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """As ``bind_traced``, with cuDNN's attention where there is no mask."""
    return _arguments(inputs, {"optimized_attention_override": cudnn_first})


def bind_opaque(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Attention as a call."""
    return _arguments(inputs, {"optimized_attention_override": functools.partial(called_out, calls_in_order())})


def conditioning(diffusion_model: Any, tokens: int) -> tuple[Tensor, dict[str, Any]]:
    """Random text (1, tokens, width for video and for sound) as the host's text encoder gives it, its connectors run
    already."""
    if diffusion_model.caption_proj_before_connector:
        width = diffusion_model.cross_attention_dim + diffusion_model.audio_cross_attention_dim
    else:
        width = 2 * diffusion_model.caption_channels
    return random_tensor(1, tokens, width), {}


LTX = Family(
    name="LTX-Video 2",
    models="LTX-Video 2",
    classes=("comfy.ldm.lightricks.av_model.LTXAVModel",),
    kinds=(
        BlockKind(
            "transformer",
            "transformer_blocks",
            host.BasicAVTransformerBlock,
            "v_context",
            2,
            Interface(
                attention_for, chosen(bind_traced, bind_cudnn, bind_opaque), region_inputs, token_dims, reads=_PARTS
            ),
            "blocks",
            owned=(
                "scale_shift_table",
                "audio_scale_shift_table",
                "prompt_scale_shift_table",
                "audio_prompt_scale_shift_table",
                "scale_shift_table_a2v_ca_audio",
                "scale_shift_table_a2v_ca_video",
            ),
        ),
    ),
    conditioning=conditioning,
    vector_layers=lambda block: {},
)
