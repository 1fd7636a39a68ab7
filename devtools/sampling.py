"""Loading and sampling a tiny model through the host, in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import comfy.sample
import comfy.sd
import torch
from torch import Tensor

from ..host.families import family_of
from ..host.measuring.synthetic import latent_shape


def load(state_dict: Mapping[str, Tensor], **options: Any) -> Any:
    """A MODEL through the host's loader."""
    model = comfy.sd.load_diffusion_model_state_dict(state_dict, model_options=options)
    assert model is not None, "the host did not recognize the checkpoint"
    return model


def sample(
    model: Any,
    width: int = 64,
    height: int = 64,
    tokens: int = 16,
    batch: int = 1,
    steps: int = 2,
    seed: int = 0,
    guidance: float = 3.5,
    cfg: float = 1.0,
    sampler: str = "euler",
    scheduler: str = "simple",
    condition: Callable[[Any], Any] | None = None,
    frames: int = 1,
    **cond: Any,
) -> Tensor:
    """Latent of a short run; sizes in pixels, ``tokens`` of text, ``cond`` on the positive side alone.

    ``condition`` changes the positive conditioning, as a node would.
    """
    generator = torch.Generator().manual_seed(seed)
    diffusion = model.model.diffusion_model
    shape = latent_shape(model, width, height, batch, frames)
    noise = torch.randn(shape, generator=generator)
    family: Any = family_of(diffusion)
    text, options = family.conditioning(diffusion, tokens)
    text = torch.randn(text.shape, generator=generator)
    if "guidance" in options:
        options["guidance"] = guidance
    if "pooled_output" in options:
        options["pooled_output"] = torch.randn(options["pooled_output"].shape, generator=generator)
    positive, negative = [[text, {**options, **cond}]], [[text * 0.5, options]]
    if condition is not None:
        positive = condition(positive)
    with torch.inference_mode():
        latent: Tensor = comfy.sample.sample(
            model,
            noise,
            steps,
            cfg,
            sampler,
            scheduler,
            positive,
            negative,
            torch.zeros(shape),
            seed=seed,
            disable_pbar=True,
        )
    return latent
