"""Weights in 4 bits: groups of values with one scale each, in levels that lie closer the smaller they are.

``w = s * (q + q ** 3 / 128)`` with whole ``q`` from -8 to 7 and a float16 ``s`` for each 64 values along a row, so 4.25
bits a weight. Evenly spaced levels lose 0.8 dB on normal numbers, and so does a minimum for each 128 values in place of
half of the scales. The cube is two multiplications, where a table of levels as in "QLoRA" (Dettmers et al.,
arXiv:2305.14314) is a lookup for each value, for 0.1 dB.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 64
_CUBE = 1 / 128
_LOWEST, _HIGHEST = -8, 7
# Of the scale that reaches the largest magnitude; a smaller one cuts that off and rounds all else less.
_TRIED = tuple(0.72 + 0.04 * step for step in range(9))


def int4_groups(weight: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``weight`` (rows, K) as uint8 (rows, K / 2) and scales (rows, K / GROUP) float16.

    The scale of a group is of those tried the one with the least squared error. Values go to the nearest level, or with
    ``noise`` (rows, K) of [0, 1) to one of the two that are next to them, in proportion.

    Of each ``GROUP / 2`` bytes the low halves are the first values of a group, the high ones the others.
    """
    rows = weight.shape[0]
    groups = weight.float().reshape(-1, GROUP)
    levels = _levels(torch.arange(_LOWEST, _HIGHEST + 1, device=weight.device, dtype=torch.float32))
    # The largest magnitude goes to the lowest level, the largest in magnitude too.
    largest = groups.gather(1, groups.abs().argmax(1, keepdim=True)) / levels[0]
    between = (levels[1:] + levels[:-1]) / 2
    if noise is None:
        scales, best = _nearest(groups, largest, levels, between)
    else:
        # Nothing may be beyond the last levels, which it could only be rounded to.
        reached = (groups / largest.where(largest != 0, 1)).amax(1, keepdim=True) / levels[-1]
        scales = _finite(largest * reached.clamp(min=1))
        scaled = groups / scales
        below = (torch.bucketize(scaled, levels, right=True, out_int32=True) - 1).clamp(0, len(levels) - 2)
        part = (scaled - levels[below]) / (levels[below + 1] - levels[below])
        best = below + (noise.reshape(-1, GROUP) < part)
    low, high = best.to(torch.uint8).reshape(-1, 2, GROUP // 2).unbind(1)
    return (low | (high << 4)).reshape(rows, -1), scales.to(torch.float16).reshape(rows, -1)


def dequantized_groups(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What ``int4_groups`` gave, (rows, K) in ``dtype``."""
    shifts = torch.arange(0, 8, 4, dtype=torch.uint8, device=packed.device).reshape(2, 1)
    q = ((packed.reshape(-1, 1, GROUP // 2) >> shifts) & 0x0F).to(torch.int8) + _LOWEST
    return (_levels(q.float()) * scales.reshape(-1, 1, 1).float()).reshape(packed.shape[0], -1).to(dtype)


def _nearest(groups: Tensor, largest: Tensor, levels: Tensor, between: Tensor) -> tuple[Tensor, Tensor]:
    """The best scale of each group and the number of the level of each value."""
    scales, best = _finite(largest), torch.zeros_like(groups, dtype=torch.int32)
    least = torch.full_like(scales, torch.inf)
    for factor in _TRIED:
        tried = _finite(largest * factor)
        nearest = torch.bucketize(groups / tried, between, right=True, out_int32=True)
        error = (levels[nearest] * tried - groups).square().sum(1, keepdim=True)
        better = error < least
        scales, least = torch.where(better, tried, scales), torch.where(better, error, least)
        best = torch.where(better, nearest, best)
    return scales, best


def _levels(q: Tensor) -> Tensor:
    return q + q * q * q * _CUBE


def _finite(scales: Tensor) -> Tensor:
    """As float16 keeps them, in float32; a group of zeros keeps one that can be divided by."""
    tiny = torch.finfo(torch.float16).tiny
    kept = scales.clamp(-torch.finfo(torch.float16).max, torch.finfo(torch.float16).max).half().float()
    return torch.where(kept.abs() < tiny, tiny, kept)
