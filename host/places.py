"""Where a block's weights are, known again without asking the host for each of them.

What the host makes of a layer's weights depends on where they are and on a few switches of the layer. While all that is
as it was, and with dynamic VRAM the pages too, the host would hand out the same memory as before.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import comfy_aimdo.model_vbar
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from .weights import Layers

_DYNAMIC = ("weight", "bias")


class Places:
    """Where the weights of ``layers`` are. Nothing is kept alive by it."""

    def __init__(self, layers: Layers) -> None:
        self._each = [_place(layer) for _, layer, _ in layers]

    def cover(self, weights: Mapping[str, Tensor]) -> bool:
        """Whether all ``weights`` are the layers' own memory, and none was made for this use."""
        known = {part for place in self._each for part in place if type(part) is int}
        return all(weight.data_ptr() in known for weight in weights.values() if weight.numel())

    @contextmanager
    def held(self, layers: Layers) -> Iterator[bool]:
        """Whether they are all still there, as they stay within the scope."""
        pinned: list[Any] = []
        try:
            yield self._there(layers, pinned)
        finally:
            for pages in pinned:
                comfy_aimdo.model_vbar.vbar_unpin(pages)

    def _there(self, layers: Layers, pinned: list[Any]) -> bool:
        for (_, layer, _), place in zip(layers, self._each, strict=True):
            if _place(layer) != place:
                return False
        for _, layer, _ in layers:
            held = layer.__dict__
            if "_v" not in held:
                continue
            if "_prefetch" in held:
                return False
            signature = comfy_aimdo.model_vbar.vbar_fault(held["_v"])
            if signature is None:
                return False
            pinned.append(held["_v"])
            if not comfy_aimdo.model_vbar.vbar_signature_compare(signature, held.get("_v_signature")):
                return False
        return True


def _place(layer: nn.Module) -> list[Hashable]:
    held = layer.__dict__
    place: list[Hashable] = [
        held.get("comfy_cast_weights"),
        bool(held.get("weight_function")),
        bool(held.get("bias_function")),
    ]
    dynamic = "_v" in held
    for name, parameter in layer._parameters.items():
        value: Any = parameter
        if dynamic and name in _DYNAMIC:
            place.append(None if parameter is None else parameter.device)
            value = held.get(f"_v_{name}")
        for tensor in _tensors(value):
            place += (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
    return place


def _tensors(value: Any) -> Collection[Tensor]:
    if value is None:
        return ()
    if isinstance(value, QuantizedTensor):
        names, _ = value.__tensor_flatten__()
        return [getattr(value, name) for name in names]
    return (value,)
