"""Where a block's weights are, recognized without asking the host for each of them.

What the host makes of a layer's weights depends on where they are and on a few switches of the layer. While all that is
as it was, and with dynamic VRAM the pages too, the host would hand out the same memory as before.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields
from typing import Any, NamedTuple

import comfy_aimdo.model_vbar
import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from .weights import Layers

_DYNAMIC = ("weight", "bias")
_PAGES = "_v"
_PLAIN = (Tensor, nn.Parameter, type(None))


class _Place(NamedTuple):
    """Where a parameter of a layer, or with ``inner`` one of the tensors within it, was found."""

    parameter: str
    device: torch.device | None
    kind: type
    inner: Sequence[str]
    address: int
    dtype: torch.dtype | None
    shape: Sequence[int]
    stride: Sequence[int]


class Places:
    """Where the weights of ``layers`` are. Nothing is kept alive by it."""

    def __init__(self, layers: Layers) -> None:
        self._each = [(_switches(layer), [*_places(layer)]) for _, layer, _ in layers]
        self._paged = any(_PAGES in layer.__dict__ for _, layer, _ in layers)

    def cover(self, weights: Mapping[str, Tensor]) -> bool:
        """Whether all ``weights`` are the layers' own memory, and none was made for this use.

        Tensors of another pack's class, such as those of GGUF files, may have a LoRA on them that no address tells of.
        """
        every = [place for _, places in self._each for place in places]
        if not all(place.kind in _PLAIN or issubclass(place.kind, QuantizedTensor) for place in every):
            return False
        known = {place.address for place in every}
        return all(weight.data_ptr() in known for weight in weights.values() if weight.numel())

    def hold(self, layers: Layers, scope: ExitStack) -> bool:
        """Whether they are all still there, as they then stay until ``scope`` ends."""
        if not self._there(layers):
            return False
        if not self._paged:
            return True
        pinned: list[Any] = []
        scope.callback(_unpin, pinned)
        return _resident(layers, pinned)

    def _there(self, layers: Layers) -> bool:
        # Asked before each call of a block.
        for (_, layer, _), (switches, places) in zip(layers, self._each, strict=True):
            held, parameters = layer.__dict__, layer._parameters
            if _switches(layer) != switches:
                return False
            for name, device, kind, inner, address, dtype, shape, stride in places:
                value: Any = parameters.get(name)
                if device is not None:
                    if value is None or value.device != device:
                        return False
                    value = held.get(f"{_PAGES}_{name}")
                if type(value) is not kind:
                    return False
                if value is None:
                    continue
                for attribute in inner:
                    value = getattr(value, attribute)
                if (
                    value.data_ptr() != address
                    or value.dtype is not dtype
                    or value.shape != shape
                    or value.stride() != stride
                ):
                    return False
        return True


def _switches(layer: nn.Module) -> Hashable:
    """The switches by which the host decides what to do with the weights of ``layer``, and how many it has."""
    held = layer.__dict__
    functions = bool(held.get("weight_function")), bool(held.get("bias_function"))
    return held.get("comfy_cast_weights"), functions, _PAGES in held, len(layer._parameters)


def _places(layer: nn.Module) -> Iterator[_Place]:
    held = layer.__dict__
    for name, parameter in layer._parameters.items():
        value: Any = parameter
        paged = _PAGES in held and name in _DYNAMIC and parameter is not None
        device = value.device if paged else None
        if paged:
            value = held.get(f"{_PAGES}_{name}")
        for inner in _inner(value):
            tensor = value
            for attribute in inner:
                tensor = getattr(tensor, attribute)
            if tensor is None:
                yield _Place(name, device, type(value), inner, 0, None, (), ())
            else:
                geometry = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
                yield _Place(name, device, type(value), inner, *geometry)


def _inner(value: Any) -> list[tuple[str, ...]]:
    """The ways from a parameter to the tensors that hold its elements."""
    if not isinstance(value, QuantizedTensor):
        return [()]
    params = [each.name for each in fields(value._params) if isinstance(getattr(value._params, each.name), Tensor)]
    return [("_qdata",), *(("_params", name) for name in params)]


def _unpin(pinned: list[Any]) -> None:
    for pages in pinned:
        comfy_aimdo.model_vbar.vbar_unpin(pages)


def _resident(layers: Layers, pinned: list[Any]) -> bool:
    """Pin the pages of ``layers``, which are added to ``pinned``: whether what is on them is what was put there."""
    for _, layer, _ in layers:
        held = layer.__dict__
        if _PAGES not in held:
            continue
        if "_prefetch" in held:
            return False
        signature = comfy_aimdo.model_vbar.vbar_fault(held[_PAGES])
        if signature is None:
            return False
        pinned.append(held[_PAGES])
        if not comfy_aimdo.model_vbar.vbar_signature_compare(signature, held.get(f"{_PAGES}_signature")):
            return False
    return True
