"""Matrix products of 8-bit rows: one scale for each output row of the weight, one for each token, made on the fly.

``y = (q(x) @ w.T) * x_scale * w_scale + bias``. Plain PyTorch, so that Inductor fuses the quantization of activations
into what precedes it and the scales into what follows.

Sources: Micikevicius et al., "FP8 Formats for Deep Learning", arXiv:2209.05433; per-token scales are those of
Dettmers et al., "LLM.int8()", arXiv:2208.07339.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor
from torch.utils._triton import has_triton_package

FP8 = torch.float8_e4m3fn


def computed_once(x: Tensor) -> Tensor:
    """``x`` for two readers, of the largest magnitudes of its rows and of what is rounded by them.

    Inductor would compute it for each of them, with all that comes before it. With a GELU that takes a GPU longer than
    to store it and read it again.
    """
    if not torch.compiler.is_compiling():
        return x
    from torch._inductor.inductor_prims import force_stride_order

    return force_stride_order(x, x.stride())


def fp8_scales(x: Tensor) -> Tensor:
    """Scales (rows, 1) float32 that bring the largest magnitude of each row of ``x`` (rows, K) to fp8's largest."""
    largest = x.abs().amax(-1, keepdim=True).float()
    # A row of zeros keeps a scale that can be divided by.
    return (largest / torch.finfo(FP8).max).clamp(min=torch.finfo(torch.float32).tiny)


def fp8_rows(x: Tensor, scales: Tensor) -> Tensor:
    """``x`` (rows, K) in its ``fp8_scales`` (rows, 1), rounded to float8_e4m3fn."""
    # The largest comes to within a rounding of fp8's largest, which rounds to it.
    return (x.float() / scales).to(FP8)


def fp8_product(
    rows: Tensor, scales: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The product above of fp8 ``rows`` (M, K) and fp8 ``weight`` (N, K) with scales (M, 1) and (N, 1): (M, N)."""
    if rows.is_cuda:
        bias = None if bias is None else bias.to(torch.bfloat16)
        # PyTorch's per-row kernels give bf16 alone, whose rounding is far below that of fp8.
        out = torch._scaled_mm(
            rows, weight.t(), scales, weight_scale.t(), bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        return out.to(dtype)
    # Products of fp8 are exact in float32; PyTorch's own on the CPU is a plain loop with one scale.
    out = (rows.float() @ weight.float().t()) * (scales * weight_scale.t())
    return out.to(dtype) if bias is None else out.to(dtype) + bias


def has_int8_kernel() -> bool:
    """Whether ``int8_product`` can be had here, on NVIDIA cards; makes its operator known to PyTorch."""
    if not has_triton_package() or not torch.cuda.is_available() or torch.version.hip:
        return False
    if min(map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))) < (8, 0):
        return False
    importlib.import_module(f"{__package__}.triton_int8")
    return True


def int8_product(
    rows: Tensor, scales: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The product above of int8 ``rows`` (M, K) and ``weight`` (N, K) on a CUDA device: (M, N).

    Args:
        scales: (M, 1) float32.
        weight_scale: (N, 1) float32, or one number for all.
        bias: (N,), added in ``dtype``.
    """
    product: Tensor = torch.ops.hotpath.int8_scaled_product(rows, scales, weight, weight_scale, bias, dtype)
    return product


def int8_rows(x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``x`` (rows, K) as int8 and scales (rows, 1) float32, each row's largest magnitude at 127.

    Rounds to nearest, or with ``noise`` (rows, K) of [0, 1) stochastically.
    """
    scales = (x.abs().amax(-1, keepdim=True).float() / 127).clamp(min=1e-30)
    scaled = x / scales.to(x.dtype).clamp(min=torch.finfo(x.dtype).tiny)
    rounded = scaled.round() if noise is None else (scaled + noise).floor()
    return rounded.clamp(-128, 127).to(torch.int8), scales


def dequantized_rows(rows: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """``rows`` (N, K) of 8 bits times ``scales`` (N, 1) float32, in ``dtype``."""
    return (rows.float() * scales).to(dtype)
