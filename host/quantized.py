"""The host's quantized layers as they compute: on plain tensors, in the host's own operations, so traceable.

What each does is what comfy-kitchen's layouts do with the host's ``QuantizedTensor``, which Dynamo can't take as a
parameter: data and scales enter a region as tensors of their own.
"""

from __future__ import annotations

from typing import Any

import comfy.ops
import comfy.quant_ops
import torch
from comfy_kitchen.backends.eager.quantization import DTYPE_TO_CODE
from torch import Tensor, nn

from ..hotpath.template import NotHoistable

_FP8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
_INT8 = "int8_tensorwise"


@torch.library.custom_op("hotpath::int8_linear", mutates_args=())
def _int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, rotate: bool, group: int) -> Tensor:
    # comfy-kitchen's own operator gains arguments from one release to the next, and code that Inductor cached for one
    # would be loaded for another.
    return torch.ops.comfy_kitchen.int8_linear(x, weight, scale, bias, DTYPE_TO_CODE[x.dtype], rotate, group)


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


class Int8Linear(_Quantized):
    """``y = (q(x) @ w.T) * row_scale * weight_scale + bias`` with ``q(x) = int8(x / row_scale)``.

    ``row_scale`` is each token's largest magnitude / 127; ``weight_scale`` is one number or one for each row.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__(layer, torch.int8)
        params = layer.weight.params
        self.rotation = (params.convrot, params.convrot_groupsize)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rotation {self.rotation}"

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the dtype of ``x``."""
        return _int8_linear(x.contiguous(), self.weight, self.weight_scale, self.bias, *self.rotation)


def format_in_use(layer: Any) -> str | None:
    """The format that a mixed precision Linear multiplies in now; the host decides so at each call."""
    quantizes = (
        getattr(layer, "layout_type", None) is not None
        and not layer._full_precision_mm
        and not getattr(layer, "comfy_force_cast_weights", False)
        and not layer.weight_function
        and not layer.bias_function
    )
    return layer.quant_format if quantizes else None


def quantized_layer(layer: Any) -> nn.Module:
    """The layer that computes as ``layer`` does in its format.

    Raises:
        NotHoistable: the format is not one of those above.
    """
    if layer.quant_format in _FP8:
        return Fp8Linear(layer)
    if layer.quant_format == _INT8:
        return Int8Linear(layer)
    raise NotHoistable(f"a layer computes in {layer.quant_format} with quantized activations")


def quantized_weights(layer: Any, like: Tensor) -> dict[str, Tensor]:
    """The tensors of ``layer`` by the names of ``quantized_layer``'s parameters, as the host would use them now.

    Raises:
        NotHoistable: the host would not keep the weight quantized for activations of ``like``'s dtype.
    """
    if layer.quant_format == _INT8:
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
    tensors = {"weight": weight._qdata.contiguous(), "weight_scale": weight.params.scale, "bias": bias}
    if getattr(layer, "input_scale", None) is not None and layer.quant_format != _INT8:
        tensors["input_scale"] = layer.input_scale
    return {name: value.to(like.device) for name, value in tensors.items() if value is not None}
