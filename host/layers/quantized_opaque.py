"""The host's quantized layers in formats that this pack has no layer of its own for: one opaque call in the graph, in
which the layout of the host computes.

Any layout of the host does, those that it will gain too: what enters a region are the tensors that a
``QuantizedTensor`` is made of, and it is put together again within the call.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import comfy.quant_ops
import torch
from torch import Tensor, nn

# Of any layout; the region's own are the activations' dtype and the layer's shape.
_OWN = ("orig_dtype", "orig_shape")
_PLAIN = (bool, int, float, str, type(None))


@torch.library.custom_op("hotpath::quantized_linear", mutates_args=())
def _quantized_linear(
    x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, layout: str, facts: str, width: int
) -> Tensor:
    told = _told(facts)
    tensors = dict(zip(told["tensors"], parts, strict=True))
    data, input_scale = tensors.pop("data"), tensors.pop("input_scale", None)
    rows, made = x.reshape(-1, x.shape[-1]), comfy.quant_ops.QuantizedTensor
    params = comfy.quant_ops.get_layout_class(layout).Params(
        **tensors, **told["plain"], orig_dtype=x.dtype, orig_shape=(width, x.shape[-1])
    )
    taken = made.from_float(rows, layout, scale=input_scale) if told["quantizes input"] else rows
    out = nn.functional.linear(taken, made(data, layout, params), bias)
    if out.dtype != x.dtype:
        raise RuntimeError(f"the host's {layout} gives {out.dtype} for activations in {x.dtype}")
    return out.reshape(*x.shape[:-1], width).contiguous()


@_quantized_linear.register_fake
def _(x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, layout: str, facts: str, width: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], width))


@functools.lru_cache(maxsize=1024)
def _told(facts: str) -> Any:
    return json.loads(facts)


def can_be_opaque(weight: Any) -> bool:
    """Whether ``weight``, a quantized one of the host, is made of tensors and plain values alone."""
    held = _fields(weight.params)
    return all(isinstance(value, (Tensor, *_PLAIN)) for value in held.values())


def opaque_facts(weight: Any) -> tuple[Any, ...]:
    """What the computation with ``weight`` depends on beside its tensors' numbers: its layout, the names of its
    tensors, its plain values."""
    held = _fields(weight.params)
    plain = tuple((name, value) for name, value in held.items() if not isinstance(value, Tensor))
    return weight._layout_cls, tuple(name for name, value in held.items() if isinstance(value, Tensor)), plain


def opaque_tensors(weight: Any) -> dict[str, Tensor]:
    """The tensors of ``weight`` by the names of an ``OpaqueLinear``'s parameters."""
    held = _fields(weight.params)
    tensors = {f"weight_{name}": value for name, value in held.items() if isinstance(value, Tensor)}
    return {"weight": weight._qdata.contiguous(), **tensors}


class OpaqueLinear(nn.Module):
    """``y = linear(x, w, b)`` as the layout of ``w`` computes it.

    Parameters on the meta device: ``weight`` as the layout stores it, ``weight_...`` for each tensor that comes with
    it, ``bias`` (out,), and with ``quantizes_input`` the ``input_scale`` of activations where the layer has one.
    """

    def __init__(self, layer: Any, quantizes_input: bool) -> None:
        super().__init__()
        weight = layer.weight
        self.layout, names, plain = opaque_facts(weight)
        self.width = layer.out_features
        tensors = opaque_tensors(weight)
        if quantizes_input and getattr(layer, "input_scale", None) is not None:
            names, tensors = (*names, "input_scale"), {**tensors, "input_scale": layer.input_scale}
        self.parts = tuple(tensors)
        for name, tensor in tensors.items():
            self._parameter(name, tensor)
        self._parameter("bias", layer.bias)
        told = {"tensors": ["data", *names], "plain": dict(plain), "quantizes input": quantizes_input}
        self.facts = json.dumps(told, sort_keys=True)

    def _parameter(self, name: str, like: Tensor | None) -> None:
        meta = None if like is None else nn.Parameter(torch.empty(like.shape, dtype=like.dtype, device="meta"), False)
        self.register_parameter(name, meta)

    def extra_repr(self) -> str:
        held = ", ".join(f"{name} {tuple(value.shape)} {value.dtype}" for name, value in self.named_parameters())
        return f"{self.layout}, {self.facts}, {held}"

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the dtype of ``x``."""
        parts = [self._parameters[name] for name in self.parts]
        return _quantized_linear(x, parts, self.bias, self.layout, self.facts, self.width)


def _fields(params: Any) -> Mapping[str, Any]:
    return {field.name: getattr(params, field.name) for field in dataclasses.fields(params) if field.name not in _OWN}
