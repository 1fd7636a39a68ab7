"""The host's quantized layers as they compute, on plain tensors and so traceable.

What each does is what its layout does with the host's ``QuantizedTensor``, which Dynamo can't take as a parameter: data
and scales enter a region as tensors of their own.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import comfy.ops
import comfy.quant_ops
import torch
from comfy_kitchen.backends.eager import quantization as kitchen
from torch import Tensor, nn

from ...hotpath.int4 import dequantized_groups
from ...hotpath.rowwise import (
    FP8,
    computed_once,
    dequantized_rows,
    fp8_product,
    fp8_rows,
    fp8_scales,
    has_int8_kernel,
    int8_product,
    int8_rows,
)
from ...hotpath.template import NotHoistable
from ..quantizing.formats import FP8_ROWWISE, INT4_WEIGHT_ONLY, INT8_WEIGHT_ONLY
from .patched import arrives, is_patched, stays
from .quantized_opaque import OpaqueLinear, can_be_opaque, opaque_facts, opaque_tensors

_FP8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
_INT8 = "int8_tensorwise"
_BY_WEIGHTS = " weights"


@torch.library.custom_op("hotpath::int8_product", mutates_args=())
def _int8_product(rows: Tensor, weight: Tensor) -> Tensor:
    # PyTorch's own refuses few rows on CUDA, which would take a guard in the region.
    return kitchen.mm_int8(rows, weight.t())


@_int8_product.register_fake
def _(rows: Tensor, weight: Tensor) -> Tensor:
    return rows.new_empty((rows.shape[0], weight.shape[0]), dtype=torch.int32)


@torch.library.custom_op("hotpath::int8_linear", mutates_args=())
def _int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, rotate: bool, group: int) -> Tensor:
    # comfy-kitchen's own operator gains arguments from one release to the next, and code that Inductor cached for one
    # would be loaded for another.
    return torch.ops.comfy_kitchen.int8_linear(x, weight, scale, bias, kitchen.DTYPE_TO_CODE[x.dtype], rotate, group)


@_int8_linear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, rotate: bool, group: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


class _Quantized(nn.Module):
    """Parameters on the meta device: ``weight`` (out, in) in the format's dtype, ``weight_scale``, ``bias`` (out,)."""

    weight: nn.Parameter
    weight_scale: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = (layer.out_features, layer.in_features)
        self._parameter("weight", self.shape, dtype)
        self._parameter("weight_scale", layer.weight.params.scale.shape, torch.float32)
        if layer.bias is not None:
            self._parameter("bias", (layer.out_features,), torch.float32)
        else:
            self.register_parameter("bias", None)

    def _parameter(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), False))

    def extra_repr(self) -> str:
        return ", ".join(f"{name} {tuple(value.shape)} {value.dtype}" for name, value in self.named_parameters())


class Fp8Linear(_Quantized):
    """``y = (q(x) @ w.T) * input_scale * weight_scale + bias`` with ``q(x) = fp8(x / input_scale)``.

    One scale for the weight and one for the activations, as calibrated; without one it is 1, as in the host.
    """

    input_scale: nn.Parameter | None

    def __init__(self, layer: Any) -> None:
        super().__init__(layer, _FP8[layer.quant_format])
        if getattr(layer, "input_scale", None) is not None:
            self._parameter("input_scale", layer.input_scale.shape, torch.float32)
        else:
            self.input_scale = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the dtype of ``x``."""
        rows = x.reshape(-1, x.shape[-1])
        scale = torch.ones((), dtype=torch.float32, device=x.device) if self.input_scale is None else self.input_scale
        limit = torch.finfo(self.weight.dtype).max
        quantized = (rows * (1.0 / scale).to(x.dtype)).clamp(-limit, limit).to(self.weight.dtype)
        # What the host's torch.nn.functional.scaled_mm does, which Dynamo can't trace.
        out = torch._scaled_mm(quantized, self.weight.t(), scale, self.weight_scale, self.bias, out_dtype=x.dtype)
        return out.reshape(*x.shape[:-1], self.shape[0])


class Fp8RowwiseLinear(_Quantized):
    """``hotpath.rowwise``: ``weight_scale`` (out, 1) for each row, and one made for each token."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer, FP8)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the dtype of ``x``."""
        rows = computed_once(x.reshape(-1, x.shape[-1]))
        scales = fp8_scales(rows)
        out = fp8_product(fp8_rows(rows, scales), scales, self.weight, self.weight_scale, self.bias, x.dtype)
        return out.reshape(*x.shape[:-1], self.shape[0])


class Int8Linear(_Quantized):
    """``y = (q(x) @ w.T) * row_scale * weight_scale + bias`` with ``q(x) = int8(x / row_scale)``.

    ``row_scale`` is each token's largest magnitude / 127; ``weight_scale`` is one number or one for each row.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__(layer, torch.int8)
        self.has_kernel = has_int8_kernel()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kernel {self.has_kernel}"

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the dtype of ``x``."""
        rows, scales = int8_rows(computed_once(x.reshape(-1, x.shape[-1])))
        if self.has_kernel and x.is_cuda:
            out = int8_product(rows, scales, self.weight, self.weight_scale, self.bias, x.dtype)
            return out.reshape(*x.shape[:-1], self.shape[0])
        product = _int8_product(rows, self.weight).float()
        out = (product * (scales * self.weight_scale.reshape(1, -1))).to(x.dtype)
        if self.bias is not None:
            out = out + self.bias.to(x.dtype)
        return out.reshape(*x.shape[:-1], self.shape[0])


class RotatedInt8Linear(_Quantized):
    """As ``Int8Linear``, with weight and activations rotated by Hadamard matrices of ``group`` columns."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer, torch.int8)
        self.group = layer.weight.params.convrot_groupsize

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group {self.group}"

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the dtype of ``x``."""
        return _int8_linear(x.contiguous(), self.weight, self.weight_scale, self.bias, True, self.group)


class WeightOnlyLinear(_Quantized):
    """``y = x @ (w * weight_scale).T + bias``, the product in the dtype of ``x``."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer, layer.weight._qdata.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the dtype of ``x``."""
        if self.weight.dtype == torch.int8:
            weight = dequantized_rows(self.weight, self.weight_scale, x.dtype)
        else:
            weight = self.weight.to(x.dtype) * self.weight_scale.to(x.dtype)
        return nn.functional.linear(x, weight, self.bias)


class Int4WeightOnlyLinear(_Quantized):
    """``hotpath.int4``: ``weight`` (out, in / 2) uint8, ``weight_scale`` float16; the product in the dtype of ``x``."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer, torch.uint8)
        self._parameter("weight", layer.weight._qdata.shape, torch.uint8)
        self._parameter("weight_scale", layer.weight.params.scale.shape, torch.float16)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the dtype of ``x``."""
        return nn.functional.linear(x, dequantized_groups(self.weight, self.weight_scale, x.dtype), self.bias)


def format_in_use(layer: Any) -> str | None:
    """What a mixed precision Linear computes with now, which the host decides at each call: the format that it
    multiplies in, that format and ``weights`` where it multiplies by the dequantized weight, or None for a weight that
    is not quantized or has functions (LoRA) to go through each time.
    """
    if getattr(layer, "layout_type", None) is None or layer.weight_function or layer.bias_function:
        return None
    if not layer._full_precision_mm and not getattr(layer, "comfy_force_cast_weights", False):
        return layer.quant_format
    plain = layer.quant_format in _FP8 or layer.layout_type in (INT8_WEIGHT_ONLY, INT4_WEIGHT_ONLY)
    return layer.quant_format + _BY_WEIGHTS if plain and (not is_patched(layer) or stays(layer)) else None


def refuse_arriving(layer: Any, state: Hashable) -> None:
    """Raise NotHoistable for a ``layer`` of this ``state`` that the host multiplies in another way this time."""
    if isinstance(state, str) and state.endswith(_BY_WEIGHTS) and is_patched(layer) and arrives(layer):
        raise NotHoistable("a LoRA is added to its quantized weights in this step; from the next on it runs compiled")


def as_multiplied(layer: Any, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` of ``layer``, dequantized where the host does that for each product with activations of ``dtype``."""
    quantized = isinstance(weight, comfy.quant_ops.QuantizedTensor) and weight.dtype == dtype
    return weight.dequantize() if quantized and (format_in_use(layer) or "").endswith(_BY_WEIGHTS) else weight


def quantizes_activations_itself(layer: Any) -> bool:
    """Whether the layout of ``layer`` does so in its product, even where full precision is asked for."""
    host = comfy.quant_ops.QUANT_ALGOS.get(layer.quant_format, {})
    return layer.layout_type == host.get("comfy_tensor_layout") and not host.get("quantize_input", True)


def quantized_layer(layer: Any) -> nn.Module:
    """The layer that computes as ``layer`` does with the format in use.

    Raises:
        NotHoistable: the format's layout is of a form that is not known.
    """
    if format_in_use(layer) != layer.quant_format:
        return Int4WeightOnlyLinear(layer) if layer.layout_type == INT4_WEIGHT_ONLY else WeightOnlyLinear(layer)
    if layer.quant_format in _FP8:
        return Fp8Linear(layer)
    if layer.quant_format == _INT8:
        return RotatedInt8Linear(layer) if _rotated(layer) else Int8Linear(layer)
    if layer.layout_type == FP8_ROWWISE:
        return Fp8RowwiseLinear(layer)
    if not can_be_opaque(layer.weight):
        raise NotHoistable(f"a layer computes in {layer.quant_format}, which holds more than tensors and numbers")
    return OpaqueLinear(layer, _quantizes_input(layer))


def state_in_use(layer: Any) -> Hashable:
    """``format_in_use``, with all that an opaque layer depends on beside its tensors."""
    format = format_in_use(layer)
    if format is None:
        # A layer that a quantized model leaves in full precision has no format.
        return None
    known = format != layer.quant_format or format in _FP8 or format == _INT8 or layer.layout_type == FP8_ROWWISE
    return format if known else (format, opaque_facts(layer.weight))


def quantized_weights(layer: Any, state: Hashable, like: Tensor) -> dict[str, Tensor]:
    """The tensors of ``layer`` by the names of ``quantized_layer``'s parameters, as the host would use them now with
    ``state``, the ``state_in_use``.

    Raises:
        NotHoistable: the host would not keep the weight quantized for activations of ``like``'s dtype.
    """
    facts = state[1] if isinstance(state, tuple) else None
    opaque = facts is not None
    weight_only = not opaque and state != layer.quant_format
    if weight_only or layer.quant_format == _INT8 or (opaque and not _quantizes_input(layer)):
        weight, bias = comfy.ops.cast_bias_weight(
            layer,
            dtype=layer.weight.dtype,
            device=like.device,
            bias_dtype=like.dtype,
            compute_dtype=like.dtype,
            want_requant=True,
        )
    else:
        weight, bias = comfy.ops.cast_bias_weight(layer, like, compute_dtype=like.dtype, want_requant=True)
    if not isinstance(weight, comfy.quant_ops.QuantizedTensor):
        raise NotHoistable(f"a layer is kept in {layer.quant_format} and used in {like.dtype}")
    if opaque:
        if opaque_facts(weight) != facts:
            raise NotHoistable(f"a layer is kept in {layer.quant_format} and handed out in another form")
        tensors = {**opaque_tensors(weight), "bias": bias}
        if _quantizes_input(layer):
            tensors["input_scale"] = getattr(layer, "input_scale", None)
        return {name: value.to(like.device) for name, value in tensors.items() if value is not None}
    tensors = {"weight": weight._qdata.contiguous(), "weight_scale": weight.params.scale, "bias": bias}
    if layer.quant_format in _FP8 and not weight_only:
        tensors["input_scale"] = getattr(layer, "input_scale", None)
    return {name: value.to(like.device) for name, value in tensors.items() if value is not None}


def _quantizes_input(layer: Any) -> bool:
    return comfy.quant_ops.QUANT_ALGOS.get(layer.quant_format, {}).get("quantize_input", True)


def _rotated(layer: Any) -> bool:
    return getattr(layer.weight.params, "convrot", False)
