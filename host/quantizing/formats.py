"""The formats of Quantize Repeated Blocks: how a weight is kept, what it takes to multiply in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import comfy.float
import comfy.model_management
import comfy.quant_ops
import torch
from comfy.quant_ops import QuantizedLayout, QuantizedTensor
from comfy_kitchen.tensor.base import BaseLayoutParams, dequantize_args
from torch import Tensor

from ...hotpath.int4 import GROUP, dequantized_groups, int4_groups
from ...hotpath.rowwise import FP8, dequantized_rows, fp8_product, fp8_rows, fp8_scales, int8_rows

FP8_ROWWISE = "HotPathFP8RowwiseLayout"
INT8_WEIGHT_ONLY = "HotPathInt8WeightOnlyLayout"
INT4_WEIGHT_ONLY = "HotPathInt4WeightOnlyLayout"
# As much of a name that can't be read as an error repeats.
_QUOTED = 40
# Values of a weight that are quantized at once.
AT_ONCE = 2**22
# In rows that divide by this: products, with which formats rotate, may give the rest of a tile other bits.
_TILE = 64
_NEWER_COMFYUI = "a newer ComfyUI, which has {} layers"


class _RowwiseLayout(QuantizedLayout):
    """(rows, K) with one float32 scale a row."""

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        """``scale``: (rows, 1) float32."""

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Any) -> Tensor:
        return dequantized_rows(qdata, params.scale, params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[Tensor, ...]:
        return qtensor._qdata, qtensor._params.scale

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params: Any) -> dict[str, Tensor]:
        return {"": qdata, "_scale": params.scale}


class FP8RowwiseLayout(_RowwiseLayout):
    """float8_e4m3fn. The host quantizes activations with the layout of the weight: their rows are tokens."""

    MIN_SM_VERSION = (8, 9)

    @classmethod
    def quantize(cls, tensor: Tensor, stochastic_rounding: int = 0, **options: Any) -> tuple[Tensor, Any]:
        """Scales are always those of ``tensor``; ``stochastic_rounding`` is a seed, or 0 to round to nearest."""
        scales = fp8_scales(tensor)
        if stochastic_rounding:
            data = comfy.float.stochastic_rounding(tensor.float() / scales, FP8, seed=stochastic_rounding)
        else:
            data = fp8_rows(tensor, scales)
        return data, cls.Params(scale=scales, orig_dtype=tensor.dtype, orig_shape=tuple(tensor.shape))


class Int8WeightOnlyLayout(_RowwiseLayout):
    """int8 weights. The host's own int8 layout quantizes activations too, whatever is asked of it."""

    @classmethod
    def quantize(cls, tensor: Tensor, stochastic_rounding: int = 0, **options: Any) -> tuple[Tensor, Any]:
        """As ``FP8RowwiseLayout.quantize``."""
        data, scales = int8_rows(tensor.float(), _noise(tensor, stochastic_rounding))
        return data, cls.Params(scale=scales, orig_dtype=tensor.dtype, orig_shape=tuple(tensor.shape))


class Int4WeightOnlyLayout(_RowwiseLayout):
    """``hotpath.int4``: two values a byte, and a float16 scale for each ``GROUP`` of them."""

    @classmethod
    def quantize(cls, tensor: Tensor, stochastic_rounding: int = 0, **options: Any) -> tuple[Tensor, Any]:
        """As ``FP8RowwiseLayout.quantize``."""
        data, scales = int4_groups(tensor, _noise(tensor, stochastic_rounding))
        return data, cls.Params(scale=scales, orig_dtype=tensor.dtype, orig_shape=tuple(tensor.shape))

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Any) -> Tensor:
        return dequantized_groups(qdata, params.scale, params.orig_dtype)


def _noise(tensor: Tensor, seed: int) -> Tensor | None:
    """Uniform numbers of [0, 1) as many as ``tensor`` has; None for the seed 0."""
    if not seed:
        return None
    generator = torch.Generator(device=tensor.device).manual_seed(seed)
    return torch.rand(tensor.shape, device=tensor.device, generator=generator)


@comfy.quant_ops.register_layout_op(torch.ops.aten.linear.default, FP8RowwiseLayout)
def _fp8_linear(first: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x, weight, bias = (*args, None)[:3]
    if not (isinstance(x, QuantizedTensor) and isinstance(weight, QuantizedTensor)):
        return torch.nn.functional.linear(*dequantize_args((x, weight, bias)))
    return fp8_product(x._qdata, x._params.scale, weight._qdata, weight._params.scale, bias, x.dtype)


comfy.quant_ops.register_layout_class(FP8_ROWWISE, FP8RowwiseLayout)
comfy.quant_ops.register_layout_class(INT8_WEIGHT_ONLY, Int8WeightOnlyLayout)
comfy.quant_ops.register_layout_class(INT4_WEIGHT_ONLY, Int4WeightOnlyLayout)


@dataclass(frozen=True)
class Format:
    """How Linear layers are quantized.

    ``host_name`` is the format as the host's layers and files name it, ``layout`` and ``options`` what makes a
    ``QuantizedTensor``. ``multiple`` is what both sides of a weight must be a multiple of, ``smallest`` the side below
    which quantizing activations takes longer than the product saves. With ``weight_only`` the product is in full
    precision, of the dequantized weight. ``by_rows``: a row's values depend on no other row, but for one scale of all.
    """

    name: str
    host_name: str
    layout: str
    options: tuple[tuple[str, Any], ...] = ()
    weight_only: bool = False
    multiple: int = 1
    smallest: int = 1
    by_rows: bool = True

    def missing(self, device: torch.device) -> str | None:
        """The hardware or software that this format needs and ``device`` lacks, in words."""
        return None

    def quantize(self, weight: Tensor, dtype: torch.dtype) -> QuantizedTensor:
        """``weight`` (out, in) of any float dtype, quantized where it is, for computing in ``dtype``.

        ``peak_bytes`` says what that takes.
        """
        rows = max(_TILE, AT_ONCE // weight.shape[1] // _TILE * _TILE) if self.by_rows else len(weight)
        options = self._options_for(weight)
        # The host divides by a scale of the weight's own dtype, which bf16 would round.
        parts = [QuantizedTensor.from_float(part.float(), self.layout, **options) for part in weight.split(rows)]
        if len(parts) == 1:
            return parts[0].to(dtype)
        params = parts[0]._params
        scale = torch.cat([part._params.scale for part in parts]) if params.scale.ndim else params.scale
        params = replace(params, scale=scale, orig_shape=tuple(weight.shape))
        return QuantizedTensor(torch.cat([part._qdata for part in parts]), self.layout, params).to(dtype)

    def peak_bytes(self, weight: Tensor) -> int:
        """What ``quantize`` takes at most, with a copy of ``weight`` on the device and the result twice."""
        at_once = min(AT_ONCE, weight.numel()) if self.by_rows else weight.numel()
        return weight.nbytes + 2 * weight.numel() + at_once * 4 * 4

    def _options_for(self, weight: Tensor) -> dict[str, Any]:
        """The options of the host's layout to quantize ``weight`` with."""
        return dict(self.options)


class Fp8(Format):
    """``fp8_e4m3``: ``w ~ fp8(w / s) * s`` with one scale ``s = max|w| / 448`` a weight; activations as they are, in
    fp8, which have no scale in the host. Half of bf16.

    Source: the host's ``TensorCoreFP8E4M3Layout``; arXiv:2209.05433.
    """

    def _options_for(self, weight: Tensor) -> dict[str, Any]:
        options = dict(self.options)
        if options.get("scale") == "recalculate":
            options["scale"] = torch.stack(torch.aminmax(weight)).abs().amax().float() / torch.finfo(FP8).max
        return options

    def missing(self, device: torch.device) -> str | None:
        if device.type == "cpu" or comfy.model_management.supports_fp8_compute(device):
            return None
        return "a GPU that multiplies in fp8: NVIDIA of compute capability 8.9 or newer (RTX 40 series, H100)"


class Fp8Rowwise(Fp8):
    """``fp8_e4m3_rowwise``: a scale for each row of the weight and, made on the fly, for each token:
    ``y = (fp8(x / s_x) @ fp8(w / s_w).T) * s_x * s_w``. Half of bf16.

    Source: ``hotpath.rowwise``; ``torch._scaled_mm`` with per-row scales.
    """

    def missing(self, device: torch.device) -> str | None:
        if device.type == "cuda" and not comfy.model_management.is_nvidia():
            return "an NVIDIA GPU of compute capability 8.9 or newer (RTX 40 series, H100)"
        return super().missing(device)


class Int8(Format):
    """``int8_dynamic``: ``y = (int8(x / s_x) @ int8(w / s_w).T) * s_x * s_w`` with ``s_w = max|row| / 127`` for each
    row of the weight and ``s_x`` likewise for each token. Half of bf16.

    Source: the host's ``TensorWiseINT8Layout``; arXiv:2208.07339.
    """

    def missing(self, device: torch.device) -> str | None:
        if self.host_name not in comfy.quant_ops.QUANT_ALGOS:
            return _NEWER_COMFYUI.format("int8")
        return _nvidia_or_cpu(device, (7, 5), "RTX 20 series")


class Int8WeightOnly(Format):
    """``int8_weight_only``: ``y = x @ (int8(w / s_w) * s_w).T``: half of bf16's memory, products in full precision.

    Source: ``Int8WeightOnlyLayout``; files hold the host's ``int8_tensorwise``.
    """

    def missing(self, device: torch.device) -> str | None:
        return None if self.host_name in comfy.quant_ops.QUANT_ALGOS else _NEWER_COMFYUI.format("int8")


class Int4WeightOnly(Format):
    """``int4_weight_only``: a scale for each 64 values, levels closer the smaller they are; products in full precision.
    0.27 of bf16, modulation included.

    Source: ``hotpath.int4``.
    """

    def peak_bytes(self, weight: Tensor) -> int:
        return super().peak_bytes(weight) + min(AT_ONCE, weight.numel()) * 4 * 6


class ConvRotInt4(Format):
    """``convrot_w4a4``: ``y = (int4(x R / s_x) @ int4(w R / s_w).T) * s_x * s_w`` with scales as in ``int8_dynamic``
    and ``R`` a Hadamard matrix for each 256 columns, which spreads outliers. On cards without products in 4 bits the
    host keeps activations in 8. A quarter of bf16.

    Source: the host's ``TensorCoreConvRotW4A4Layout``; Ashkboos et al., "QuaRot", arXiv:2404.00456.
    """

    def missing(self, device: torch.device) -> str | None:
        if self.host_name not in comfy.quant_ops.QUANT_ALGOS:
            return _NEWER_COMFYUI.format(self.host_name)
        return _nvidia_or_cpu(device, (7, 5), "RTX 20 series")


class AsymW4A8(Format):
    """``asym_w4a8_int8``: weights rotated as in ``convrot_w4a4``, in 4 bits with an fp8 scale for each 16 values and
    one for the row, in levels of the weight's own; activations in int8 with a scale for each token. 0.28 of bf16.

    Source: the host's ``AsymW4A8Int8Layout``.
    """

    def missing(self, device: torch.device) -> str | None:
        if self.host_name not in comfy.quant_ops.QUANT_ALGOS:
            return _NEWER_COMFYUI.format(self.host_name)
        # On a CPU it would run; finding the levels of a weight takes minutes there.
        return _nvidia(device, (8, 0), "RTX 30 series")

    def peak_bytes(self, weight: Tensor) -> int:
        return super().peak_bytes(weight) + weight.numel() * 4 * 4


class NvFp4(Format):
    """``nvfp4``: 4-bit e2m1 with an fp8 scale for each 16 values along a row and one for the weight; 0.28 of bf16.

    Source: the host's ``TensorCoreNVFP4Layout``; NVIDIA, "Pretraining Large Language Models with NVFP4",
    arXiv:2509.25149.
    """

    def missing(self, device: torch.device) -> str | None:
        if device.type == "cuda" and comfy.model_management.supports_nvfp4_compute(device):
            return None
        return "an NVIDIA GPU of compute capability 10.0 or newer (RTX 50 series, B200)"


class MxFp8(Format):
    """``mxfp8``: fp8 with a power of two for each 32 values along a row; 0.52 of bf16.

    Source: the host's ``TensorCoreMXFP8Layout``; Rouhani et al., "Microscaling Data Formats", arXiv:2310.10537.
    """

    def missing(self, device: torch.device) -> str | None:
        if self.host_name not in comfy.quant_ops.QUANT_ALGOS:
            return "a newer comfy-kitchen, which has mxfp8"
        if device.type == "cuda" and comfy.model_management.supports_mxfp8_compute(device):
            return None
        return "an NVIDIA GPU of compute capability 10.0 or newer (RTX 50 series, B200) and PyTorch 2.10 or newer"


def _nvidia_or_cpu(device: torch.device, capability: tuple[int, int], series: str) -> str | None:
    """None for the CPU and for an NVIDIA GPU of that compute capability; for all others what is missing."""
    return None if device.type == "cpu" else _nvidia(device, capability, series)


def _nvidia(device: torch.device, capability: tuple[int, int], series: str) -> str | None:
    nvidia = device.type == "cuda" and comfy.model_management.is_nvidia()
    if nvidia and torch.cuda.get_device_capability(device) >= capability:
        return None
    return f"an NVIDIA GPU of compute capability {capability[0]}.{capability[1]} or newer ({series})"


_INT8 = ("int8_tensorwise", "TensorWiseINT8Layout", (("per_channel", True),))
_FP8 = ("float8_e4m3fn", "TensorCoreFP8E4M3Layout", (("scale", "recalculate"),))

# In the order in which the node offers them; the first that runs is its default.
AUTO = "auto"
FORMATS: Mapping[str, Format] = {
    format.name: format
    for format in (
        Int8("int8_dynamic", *_INT8, multiple=8, smallest=256),
        Fp8Rowwise("fp8_e4m3_rowwise", "fp8_e4m3_rowwise", FP8_ROWWISE, multiple=16, smallest=256),
        Fp8("fp8_e4m3", *_FP8, multiple=16, smallest=256),
        Int8WeightOnly("int8_weight_only", "int8_tensorwise", INT8_WEIGHT_ONLY, weight_only=True),
        Int4WeightOnly("int4_weight_only", "int4_weight_only", INT4_WEIGHT_ONLY, weight_only=True, multiple=GROUP),
        ConvRotInt4("convrot_w4a4", "convrot_w4a4", "TensorCoreConvRotW4A4Layout", multiple=256, smallest=256),
        AsymW4A8("asym_w4a8_int8", "asym_w4a8_int8", "AsymW4A8Int8Layout", multiple=256, smallest=256, by_rows=False),
        NvFp4("nvfp4", "nvfp4", "TensorCoreNVFP4Layout", multiple=32, smallest=256, by_rows=False),
        MxFp8("mxfp8", "mxfp8", "TensorCoreMXFP8Layout", multiple=32, smallest=256, by_rows=False),
    )
}
# Of layers that see one vector a step, such as modulation; in a ComfyUI without int8 what its files may hold.
VECTOR_FORMAT = (
    FORMATS["int8_weight_only"]
    if "int8_tensorwise" in comfy.quant_ops.QUANT_ALGOS
    else Fp8("fp8_e4m3 weight-only", *_FP8, weight_only=True)
)


def runnable_formats(device: torch.device) -> list[str]:
    """Names of the formats that ``device`` can compute in, the one to choose first."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    runnable = [name for name, format in FORMATS.items() if format.missing(device) is None]
    # Measured on an H200: a step takes 96 ms in fp8, 104 ms in int8 and 131 ms in bf16.
    return sorted(runnable, key=lambda name: hopper and not name.startswith("fp8"))


def require_format(name: str, device: torch.device) -> Format:
    """The format called ``name``; ``auto`` is the first of those that ``device`` can run.

    Raises:
        ValueError: there is none, or ``device`` can't compute in it.
    """
    formats = runnable_formats(device)
    if name == AUTO and formats:
        return FORMATS[formats[0]]
    runnable = ", ".join(formats)
    if not isinstance(name, str) or name not in FORMATS:
        raise ValueError(f"format: {str(name)[:_QUOTED]!r} is unknown. Choose one of {runnable}.")
    missing = FORMATS[name].missing(device)
    if missing is not None:
        raise ValueError(f"format: {name} needs {missing}. This machine ({device.type}) can run {runnable}.")
    return FORMATS[name]


def node_formats() -> list[str]:
    """What a node on this machine offers, the one to begin with first."""
    return [AUTO, *runnable_formats(comfy.model_management.get_torch_device())]


def require_format_here(name: str) -> Format:
    """``require_format`` for the device that this machine loads models to."""
    return require_format(name, comfy.model_management.get_torch_device())
