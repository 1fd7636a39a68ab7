"""Linear layers of weights in the block formats of ggml, as GGUF files hold them: dequantized where they are used.

A weight (out, in) is ``BLOCK`` values at a time ``BYTES`` bytes: scales in float16, in most formats smaller scales in a
few bits that these are multiplied by, and the values in 2 to 8 bits. Nothing but bit arithmetic, which Inductor makes
one kernel of; the scales of parts of a block, which many values share, are made before it, once each.

Source: the formats' description in ggml (``ggml-common.h``, ``ggml-quants.c``) and its Python twin, the package
``gguf``.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .rowwise import computed_once


class GgmlLinear(nn.Module):
    """``y = x @ dequantized(weight).T + bias``, the product in the dtype of ``x``.

    Parameters on the meta device: ``weight`` (out, bytes of a row) uint8; ``halves``, the same memory in float16;
    ``bias`` (out,) or None.

    ``compute`` is the dtype of the dequantization's arithmetic, None for that of ``x``.
    """

    BLOCK = 32
    BYTES = 0
    bias: nn.Parameter | None

    def __init__(
        self, out_features: int, in_features: int, bias: torch.dtype | None, compute: torch.dtype | None
    ) -> None:
        super().__init__()
        self.shape = (out_features, in_features)
        self.compute = compute
        row = in_features // self.BLOCK * self.BYTES
        self.weight = self._parameter((out_features, row), torch.uint8)
        self.halves = self._parameter((out_features, row // 2), torch.float16)
        self.bias = None if bias is None else self._parameter((out_features,), bias)

    @staticmethod
    def _parameter(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)

    def extra_repr(self) -> str:
        parameters = ", ".join(f"{name} {tuple(value.shape)} {value.dtype}" for name, value in self.named_parameters())
        return f"{self.shape}, computed in {self.compute}, {parameters}"

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the dtype of ``x``."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return linear(x, self.dequantized(x.dtype), bias)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) in ``dtype``."""
        data, halves = self.weight.reshape(-1, self.BYTES), self.halves.reshape(-1, self.BYTES // 2)
        return self._values(data, halves, self.compute or dtype).reshape(self.shape).to(dtype)

    def _values(self, data: Tensor, halves: Tensor, dtype: torch.dtype) -> Tensor:
        """The values, ``BLOCK`` for each row of ``data`` (blocks, BYTES), with arithmetic in ``dtype``."""
        raise NotImplementedError


def _parts(data: Tensor, bits: int, run: int) -> Tensor:
    """The numbers of ``bits`` bits in bytes (blocks, n): of each ``run`` bytes first all lowest ones, then the next
    higher, as (blocks, runs, 8 / bits, run) uint8."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device).reshape(-1, 1)
    return (data.reshape(data.shape[0], -1, 1, run) >> shifts) & (2**bits - 1)


class BF16(GgmlLinear):
    """bfloat16 as it is; ``weight`` (out, in) is in it."""

    BLOCK, BYTES = 1, 2

    def __init__(
        self, out_features: int, in_features: int, bias: torch.dtype | None, compute: torch.dtype | None
    ) -> None:
        super().__init__(out_features, in_features, bias, compute)
        self.weight = self._parameter(self.shape, torch.bfloat16)
        del self.halves

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)


class Q80(GgmlLinear):
    """``d * q``: int8 ``q``."""

    BYTES = 34

    def _values(self, data: Tensor, halves: Tensor, dtype: torch.dtype) -> Tensor:
        return halves[:, :1].to(dtype) * data[:, 2:].view(torch.int8)


class Q40(GgmlLinear):
    """``d * (q - 8)``: 4 bits of ``q``."""

    BYTES = 18

    def _values(self, data: Tensor, halves: Tensor, dtype: torch.dtype) -> Tensor:
        q = _parts(data[:, 2:], 4, 16).flatten(1).to(torch.int8) - 8
        return halves[:, :1].to(dtype) * q


class Q41(GgmlLinear):
    """``d * q + m``: 4 bits of ``q``."""

    BYTES = 20

    def _values(self, data: Tensor, halves: Tensor, dtype: torch.dtype) -> Tensor:
        q = _parts(data[:, 4:], 4, 16).flatten(1)
        return halves[:, :1].to(dtype) * q + halves[:, 1:2].to(dtype)


class _FiveBits(GgmlLinear):
    def _five_bits(self, high: Tensor, low: Tensor) -> Tensor:
        """uint8 (blocks, 32) of 4 bytes of fifth bits and 16 bytes of the others."""
        bits = torch.arange(8, dtype=torch.uint8, device=high.device)
        fifth = (high.reshape(-1, 4, 1) >> bits) & 1
        return _parts(low, 4, 16).flatten(1) | (fifth.flatten(1) << 4)


class Q50(_FiveBits):
    """``d * (q - 16)``: 5 bits of ``q``, the highest apart."""

    BYTES = 22

    def _values(self, data: Tensor, halves: Tensor, dtype: torch.dtype) -> Tensor:
        q = self._five_bits(data[:, 2:6], data[:, 6:]).to(torch.int8) - 16
        return halves[:, :1].to(dtype) * q


class Q51(_FiveBits):
    """``d * q + m``: 5 bits of ``q``, the highest apart."""

    BYTES = 24

    def _values(self, data: Tensor, halves: Tensor, dtype: torch.dtype) -> Tensor:
        q = self._five_bits(data[:, 4:8], data[:, 8:])
        return halves[:, :1].to(dtype) * q + halves[:, 1:2].to(dtype)


class _SixBitScales(GgmlLinear):
    """Blocks of 256, each 32 values with a scale and a minimum of 6 bits."""

    BLOCK = 256

    def _scales(self, data: Tensor, halves: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scales and minima (blocks, 8, 1) of 12 bytes."""
        low, mid, high = data[:, 0:4], data[:, 4:8], data[:, 8:12]
        scales = torch.cat((low & 0x3F, (high & 0x0F) | ((low >> 2) & 0x30)), dim=1)
        minima = torch.cat((mid & 0x3F, (high >> 4) | ((mid >> 2) & 0x30)), dim=1)
        d, m = halves[:, :1].to(dtype) * scales, halves[:, 1:2].to(dtype) * minima
        return computed_once(d).unsqueeze(-1), computed_once(m).unsqueeze(-1)


class Q4K(_SixBitScales):
    """``d * s * q - m * t``: 4 bits of ``q``; ``s`` and ``t`` of 6 bits for each 32 values."""

    BYTES = 144

    def _values(self, data: Tensor, halves: Tensor, dtype: torch.dtype) -> Tensor:
        d, m = self._scales(data[:, 4:16], halves, dtype)
        q = _parts(data[:, 16:], 4, 32).flatten(1, 2)
        return (d * q - m).flatten(1)


class Q5K(_SixBitScales):
    """As Q4_K with 5 bits of ``q``, the highest apart."""

    BYTES = 176

    def _values(self, data: Tensor, halves: Tensor, dtype: torch.dtype) -> Tensor:
        d, m = self._scales(data[:, 4:16], halves, dtype)
        fifth = _parts(data[:, 16:48], 1, 32).flatten(1, 2)
        q = _parts(data[:, 48:], 4, 32).flatten(1, 2) | (fifth << 4)
        return (d * q - m).flatten(1)


class Q6K(GgmlLinear):
    """``d * s * (q - 32)``: 6 bits of ``q``, the highest two apart; an int8 ``s`` for each 16 values."""

    BLOCK, BYTES = 256, 210

    def _values(self, data: Tensor, halves: Tensor, dtype: torch.dtype) -> Tensor:
        scales = computed_once(halves[:, 104:].to(dtype) * data[:, 192:208].view(torch.int8).to(dtype))
        low = _parts(data[:, :128], 4, 64).reshape(-1, 16, 16)
        high = _parts(data[:, 128:192], 2, 32).reshape(-1, 16, 16)
        q = (low | (high << 4)).to(torch.int8) - 32
        return (scales.unsqueeze(-1) * q).flatten(1)


class Q3K(GgmlLinear):
    """``d * (s - 32) * (q - 4)``: 3 bits of ``q``, the highest apart; 6 bits of ``s`` for each 16 values."""

    BLOCK, BYTES = 256, 110

    def _values(self, data: Tensor, halves: Tensor, dtype: torch.dtype) -> Tensor:
        scales = _parts(data[:, 96:104], 4, 8).flatten(1)
        scales = scales | (_parts(data[:, 104:108], 2, 4).flatten(1) << 4)
        d = computed_once(halves[:, 54:].to(dtype) * (scales.to(torch.int8) - 32))
        low = _parts(data[:, 32:96], 2, 32).reshape(-1, 16, 16)
        high = _parts(data[:, :32], 1, 32).reshape(-1, 16, 16)
        q = (low | (high << 2)).to(torch.int8) - 4
        return (d.unsqueeze(-1) * q).flatten(1)


class Q2K(GgmlLinear):
    """``d * s * q - m * t``: 2 bits of ``q``; ``s`` and ``t`` of 4 bits for each 16 values."""

    BLOCK, BYTES = 256, 84

    def _values(self, data: Tensor, halves: Tensor, dtype: torch.dtype) -> Tensor:
        scales = data[:, :16]
        d = computed_once(halves[:, 40:41].to(dtype) * (scales & 0x0F))
        m = computed_once(halves[:, 41:].to(dtype) * (scales >> 4))
        q = _parts(data[:, 16:80], 2, 32).reshape(-1, 16, 16)
        return (d.unsqueeze(-1) * q - m.unsqueeze(-1)).flatten(1)


class _Table(GgmlLinear):
    # Sixteen int8 values, a byte each: a tensor of them would be copied to the device in each call.
    NEGATIVE = int.from_bytes(struct.pack("8b", -127, -104, -83, -65, -49, -35, -22, -10), "little") - 2**64
    POSITIVE = int.from_bytes(struct.pack("8b", 1, 13, 25, 38, 53, 69, 89, 113), "little")

    def _looked_up(self, q: Tensor) -> Tensor:
        """The values at ``q`` of 4 bits, int8."""
        table = torch.where(q < 8, self.NEGATIVE, self.POSITIVE)
        return (table >> ((q & 7).to(torch.int64) * 8)).to(torch.int8)


class IQ4NL(_Table):
    """``d * table[q]``: 4 bits of ``q``."""

    BYTES = 18

    def _values(self, data: Tensor, halves: Tensor, dtype: torch.dtype) -> Tensor:
        return halves[:, :1].to(dtype) * self._looked_up(_parts(data[:, 2:], 4, 16).flatten(1))


class IQ4XS(_Table):
    """``d * (s - 32) * table[q]``: 4 bits of ``q``; 6 bits of ``s`` for each 32 values."""

    BLOCK, BYTES = 256, 136

    def _values(self, data: Tensor, halves: Tensor, dtype: torch.dtype) -> Tensor:
        scales = _parts(data[:, 4:8], 4, 1).flatten(1) | (_parts(data[:, 2:4], 2, 1).flatten(1) << 4)
        d = computed_once(halves[:, :1].to(dtype) * (scales.to(torch.int8) - 32).to(dtype))
        q = self._looked_up(_parts(data[:, 8:], 4, 16).reshape(-1, 8, 32))
        return (d.unsqueeze(-1) * q).flatten(1)


KINDS: Mapping[str, type[GgmlLinear]] = {
    "BF16": BF16,
    "Q8_0": Q80,
    "Q6_K": Q6K,
    "Q5_K": Q5K,
    "Q4_K": Q4K,
    "Q3_K": Q3K,
    "Q2_K": Q2K,
    "Q5_1": Q51,
    "Q5_0": Q50,
    "Q4_1": Q41,
    "Q4_0": Q40,
    "IQ4_NL": IQ4NL,
    "IQ4_XS": IQ4XS,
}
"""By the name of the type in ggml."""
