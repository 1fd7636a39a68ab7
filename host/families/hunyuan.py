"""HunyuanVideo, HunyuanImage 2.1 and Hunyuan3D 2, whose blocks are Flux's, with vectors of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.ldm.flux.layers
import torch
from torch import Tensor

from . import flux
from .kinds import Family, random_tensor

_POOLED = 768


def video_vector(diffusion_model: Any, timesteps: Tensor, conds: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    """The vector (batch, hidden) that the host gives the blocks of HunyuanVideo; image-to-video has two of them
    (batch, 2, hidden), the first for the tokens of the frame that is given."""
    embed, time_in = comfy.ldm.flux.layers.timestep_embedding, diffusion_model.time_in
    vectors = [time_in(embed(timesteps, 256, time_factor=1.0).to(dtype))]
    frame, guidance = conds.get("guiding_frame_index"), conds.get("guidance")
    if frame is not None:
        vectors.insert(0, time_in(embed(frame, 256, time_factor=1.0)))
    if diffusion_model.vector_in is not None:
        pooled = diffusion_model.vector_in(conds["y"][:, : diffusion_model.params.vec_in_dim])
        vectors = [vector + pooled for vector in vectors]
    vector = vectors[0] if frame is None else torch.stack(vectors, dim=1)
    if diffusion_model.params.guidance_embed and guidance is not None:
        vector = vector + diffusion_model.guidance_in(embed(guidance, 256).to(dtype))
    return vector


def video_conditioning(diffusion_model: Any, tokens: int) -> tuple[Tensor, dict[str, Any]]:
    """Random text (1, tokens, width), pooled text (1, 768) and guidance."""
    text = random_tensor(1, tokens, diffusion_model.params.context_in_dim)
    return text, {"guidance": 6.0, "pooled_output": random_tensor(1, _POOLED)}


def shape_vector(diffusion_model: Any, timesteps: Tensor, conds: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    """The vector (batch, hidden) that the host gives the blocks of Hunyuan3D 2."""
    embed, period = comfy.ldm.flux.layers.timestep_embedding, diffusion_model.max_period
    vector = diffusion_model.time_in(embed(1.0 - timesteps, 256, period).to(dtype))
    guidance = conds.get("guidance")
    if diffusion_model.guidance_in is not None and guidance is not None:
        vector = vector + diffusion_model.guidance_in(embed(guidance, 256, period).to(dtype))
    return vector


def shape_conditioning(diffusion_model: Any, tokens: int) -> tuple[Tensor, dict[str, Any]]:
    """Random features of an image (1, tokens, width) and guidance."""
    return random_tensor(1, tokens, diffusion_model.cond_in.in_features), {"guidance": 5.0}


HUNYUAN_VIDEO = Family(
    name="HunyuanVideo",
    models="HunyuanVideo 1 and 1.5, HunyuanImage 2.1",
    classes=("comfy.ldm.hunyuan_video.model.HunyuanVideo",),
    kinds=flux.KINDS,
    conditioning=video_conditioning,
    vector_layers=flux.vector_layers,
    modulations=flux.modulations,
    conditioning_vector=video_vector,
)
HUNYUAN_3D = Family(
    name="Hunyuan3D",
    models="Hunyuan3D 2",
    classes=("comfy.ldm.hunyuan3d.model.Hunyuan3Dv2",),
    kinds=flux.KINDS,
    conditioning=shape_conditioning,
    vector_layers=flux.vector_layers,
    modulations=flux.modulations,
    conditioning_vector=shape_vector,
)
