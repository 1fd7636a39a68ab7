"""Folders of diffusers, as diffusers writes them."""

import json

import torch
from conditions import in_fill, with_reference
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel

TINY = dict(num_layers=2, num_single_layers=2, num_attention_heads=2, joint_attention_dim=64)
FLUX1 = dict(TINY, pooled_projection_dim=32)
VARIANTS = {
    "dev": (FluxTransformer2DModel, dict(FLUX1, guidance_embeds=True), {}),
    "schnell": (FluxTransformer2DModel, FLUX1, {}),
    "fill": (FluxTransformer2DModel, dict(FLUX1, guidance_embeds=True, in_channels=384, out_channels=64), in_fill()),
    "kontext": (FluxTransformer2DModel, dict(FLUX1, guidance_embeds=True), with_reference(16, "offset")),
    "flux2": (Flux2Transformer2DModel, TINY, {}),
    "flux2-klein": (Flux2Transformer2DModel, dict(TINY, guidance_embeds=False), {}),
    "flux2-reference": (Flux2Transformer2DModel, TINY, with_reference(128, "index")),
}


def lively(kind, **config):
    """diffusers' model with weights of which each changes the result, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    model = kind(**config).requires_grad_(False).eval()
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            weight.normal_(0, weight.shape[1] ** -0.5, generator=generator)
        else:
            weight.normal_(1 if "norm_" in name and "linear" not in name else 0, 0.05, generator=generator)
    return model


def change_config(folder, **changes):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
