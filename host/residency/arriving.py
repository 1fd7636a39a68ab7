"""Weights that the host left in RAM without dynamic VRAM, copied to the device while what came before them computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import torch
from torch import nn


def affords(device: torch.device, size: int) -> bool:
    """Whether the host would find so many bytes free, beside what it leaves to others."""
    return comfy.model_management.get_free_memory(device) - comfy.model_management.extra_reserved_memory() >= size


@contextmanager
def arriving(layers: Sequence[nn.Module], device: torch.device) -> Iterator[bool]:
    """A scope in which the weights of ``layers`` are on ``device``; whether any of them are there for its length alone.

    They are copied on a stream of the host's, as its own layers have theirs copied, and all of the scope's at once, so
    that those of one block arrive while the block before it computes. Where the host has no such stream, or the device
    no memory for both, they are left where they are.
    """
    away = [
        (layer, name, parameter)
        for layer in layers
        for name, parameter in layer._parameters.items()
        # Other packs' parameters may have more to them than their data.
        if type(parameter) is nn.Parameter and parameter.device != device
    ]
    fits = away and affords(device, sum(parameter.nbytes for _, _, parameter in away))
    stream: Any = comfy.model_management.get_offload_stream(device) if fits else None
    arrived = [] if stream is None else _copied([parameter for _, _, parameter in away], device, stream)
    if not arrived:
        yield False
        return
    try:
        comfy.model_management.sync_stream(device, stream)
        for (layer, name, _), parameter in zip(away, arrived, strict=True):
            layer._parameters[name] = parameter
        yield True
    finally:
        for layer, name, parameter in away:
            layer._parameters[name] = parameter
        # Their memory is the stream's, which may copy other weights there once it is free.
        stream.wait_stream(comfy.model_management.current_stream(device))


def _copied(parameters: Sequence[nn.Parameter], device: torch.device, stream: Any) -> list[nn.Parameter]:
    """Copies of ``parameters``; none of them where there is no memory for all."""
    non_blocking = comfy.model_management.device_supports_non_blocking(device)
    try:
        return [
            nn.Parameter(comfy.model_management.cast_to(each, None, device, non_blocking, stream=stream), False)
            for each in parameters
        ]
    except torch.OutOfMemoryError:
        return []
