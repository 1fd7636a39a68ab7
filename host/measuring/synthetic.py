"""Sampling on made-up inputs, by the host's own way, so that all that is on a MODEL acts as in a prompt."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sample
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP

from ..families import require_family
from ..families.kinds import random_tensor
from ..models import require_model

_KEY = "hotpath_synthetic"
# Flux takes tokens of 16 pixels a side; other sizes are padded to them.
_TOKEN = 16
_LARGEST = 16384
_LARGEST_BATCH = 4096
# As much of a text that can't be read as an error repeats.
_QUOTED = 40


@dataclass(frozen=True)
class Inputs:
    """What a model is given: ``width`` and ``height`` in pixels, ``batch`` images, ``tokens`` of text."""

    width: int
    height: int
    batch: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}, batch {self.batch}, {self.tokens} text tokens"


def read_sizes(text: str) -> list[tuple[int, int]]:
    """(width, height) in pixels of a text such as ``1024x1024, 832x1216``.

    Raises:
        ValueError: an entry can't be read, or is no size that Flux takes.
    """
    sizes = []
    for entry in _entries("sizes", text, "1024x1024, 832x1216"):
        found = re.fullmatch(r"(\d{1,5})\s*[xX]\s*(\d{1,5})", entry)
        if found is None:
            raise ValueError(
                f"sizes: cannot read '{entry[:_QUOTED]}'. Write width x height in pixels, such as 1024x1024."
            )
        width, height = int(found[1]), int(found[2])
        for side in (width, height):
            if not _TOKEN <= side <= _LARGEST or side % _TOKEN:
                nearest = min(max(round(side / _TOKEN), 1) * _TOKEN, _LARGEST)
                raise ValueError(
                    f"sizes: {side} in '{entry}' is no multiple of {_TOKEN} from {_TOKEN} to {_LARGEST}. The nearest "
                    f"is {nearest}."
                )
        sizes.append((width, height))
    return list(dict.fromkeys(sizes))


def read_batch_sizes(text: str) -> list[int]:
    """Batch sizes of a text such as ``1, 2``.

    Raises:
        ValueError: an entry is no whole number of at least 1.
    """
    batches = []
    for entry in _entries("batch_sizes", text, "1, 2"):
        if not re.fullmatch(r"\d{1,4}", entry) or not 1 <= int(entry) <= _LARGEST_BATCH:
            raise ValueError(
                f"batch_sizes: cannot read '{entry[:_QUOTED]}'. Write whole numbers from 1 to {_LARGEST_BATCH}, such "
                "as 1, 2."
            )
        batches.append(int(entry))
    return list(dict.fromkeys(batches))


def _entries(name: str, text: str, example: str) -> list[str]:
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    if not entries:
        raise ValueError(f"{name}: it is empty. Write at least one, such as {example}.")
    return entries


def sample(model: ModelPatcher, inputs: Inputs, steps: int, on_step: Callable[[], None] | None = None) -> list[float]:
    """Seconds of each of ``steps`` evaluations of ``model``, in order; loading it before the first is not counted.

    ``on_step`` is called after each. ``model`` stays as it is, and an interrupt of the host ends it between steps.

    Raises:
        ValueError: ``model`` is no MODEL, or none of those that this pack speeds up.
    """
    require_model(model)
    family = require_family(model, "run")
    seconds: list[float] = []

    def timed(executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Any:
        comfy.model_management.throw_exception_if_processing_interrupted()
        _synchronize(model.load_device)
        start = time.perf_counter()
        out = executor(*args, **kwargs)
        _synchronize(model.load_device)
        seconds.append(time.perf_counter() - start)
        if on_step is not None:
            on_step()
        return out

    timing = model.clone()
    timing.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, _KEY, timed)
    noise = random_tensor(*latent_shape(model, inputs.width, inputs.height, inputs.batch))
    condition = [list(family.conditioning(model.get_model_object("diffusion_model"), inputs.tokens))]
    with torch.inference_mode():
        comfy.sample.sample(
            timing,
            noise,
            steps,
            1.0,
            "euler",
            "simple",
            condition,
            condition,
            torch.zeros_like(noise),
            disable_pbar=True,
            seed=0,
        )
    return seconds


def latent_shape(model: ModelPatcher, width: int, height: int, batch: int, frames: int = 1) -> tuple[int, ...]:
    """The shape of the latents of ``batch`` images of this size in pixels, (batch, channels, height, width); of videos
    (batch, channels, frames, height, width), with as many frames in latents, and of what has no sides (batch, channels,
    tokens), with as many tokens as Flux has for this size."""
    latent = model.get_model_object("latent_format")
    if latent.latent_dimensions == 1:
        return batch, latent.latent_channels, (width // _TOKEN) * (height // _TOKEN)
    scale = latent.spacial_downscale_ratio
    between = (frames,) if latent.latent_dimensions == 3 else ()
    return batch, latent.latent_channels, *between, height // scale, width // scale


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
