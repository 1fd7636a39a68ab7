"""Arguments of a region without their data: enough to compile it before there is any, and in another process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .values import extent, mapped

_MARKS = "_dynamo_weak_dynamic_indices"


@dataclass(frozen=True)
class Described:
    """All of a tensor but its device and data; ``dynamic`` are the dimensions that ``maybe_mark_dynamic`` marked."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    inference: bool
    dynamic: tuple[int, ...] = ()

    @property
    def bytes(self) -> int:
        return extent(self.shape, self.stride, self.dtype.itemsize)


def describe_tensors(value: Any) -> Any:
    """``value``, a nest of mappings, lists, tuples and dataclasses, with a ``Described`` for each tensor."""
    return mapped(value, Tensor, _describe)


def example_inputs(described: Any, device: torch.device) -> Any:
    """The nest that ``describe_tensors`` described, on ``device``, with whatever was in its memory."""

    def make(told: Described) -> Tensor:
        with torch.inference_mode(told.inference):
            made = torch.empty_strided(told.shape, told.stride, dtype=told.dtype, device=device)
        torch._dynamo.maybe_mark_dynamic(made, list(told.dynamic))
        return made

    return mapped(described, Described, make)


def example_weights(described: Mapping[str, Described], device: torch.device) -> dict[str, Tensor]:
    """Weights that share one piece of memory, as large as the largest: they are read, for results that nobody uses, and
    never written."""
    weights = {}
    for inference in {told.inference for told in described.values()}:
        # Inference tensors and normal ones have a piece each.
        alike = {name: told for name, told in described.items() if told.inference == inference}
        with torch.inference_mode(inference):
            memory = torch.empty(max(told.bytes for told in alike.values()), dtype=torch.uint8, device=device)
            for name, told in alike.items():
                weights[name] = memory[: told.bytes].view(told.dtype).as_strided(told.shape, told.stride)
    return {name: weights[name] for name in described}


def _describe(tensor: Tensor) -> Described:
    dynamic = tuple(sorted(getattr(tensor, _MARKS, ())))
    return Described(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.is_inference(), dynamic)
