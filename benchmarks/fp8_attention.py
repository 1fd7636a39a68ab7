"""Attention in fp8 as a plain Triton kernel: what a kernel without Hopper's own tricks gives."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Queries and keys of one turn, warps, stages.
SHAPES = ((128, 128, 8, 3), (128, 64, 4, 4), (128, 64, 8, 3), (64, 128, 4, 3), (128, 128, 8, 2))


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    q, k, v, out, softmax_scale, tokens: tl.constexpr, rows: tl.constexpr, keys: tl.constexpr, dim: tl.constexpr
):
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    column = tl.arange(0, dim)
    head = tl.program_id(1).to(tl.int64) * tokens * dim
    queries = tl.load(q + head + row[:, None] * dim + column[None, :])
    largest = tl.full([rows], float("-inf"), tl.float32)
    total = tl.zeros([rows], tl.float32)
    result = tl.zeros([rows, dim], tl.float32)
    for start in range(0, tokens, keys):
        key = start + tl.arange(0, keys)
        scores = tl.dot(queries, tl.load(k + head + key[None, :] * dim + column[:, None])) * softmax_scale
        new = tl.maximum(largest, tl.max(scores, 1))
        # Up to 256 rather than 1, where fp8 has its numbers.
        weights = tl.exp2(scores - new[:, None] + 8)
        decay = tl.exp2(largest - new)
        total = total * decay + tl.sum(weights, 1)
        values = tl.load(v + head + key[:, None] + column[None, :] * tokens)
        result = tl.dot(weights.to(v.dtype.element_ty), values, result * decay[:, None])
        largest = new
    place = head + row[:, None] * dim + column[None, :]
    tl.store(out + place, (result / total[:, None]).to(out.dtype.element_ty))


def attend(q: Tensor, k: Tensor, v: Tensor, rows: int, keys: int, warps: int, stages: int) -> Tensor:
    """q and k (batch, heads, tokens, dim) and v (batch, heads, dim, tokens), contiguous, fp8; tokens a multiple of 128.

    Returns:
        (batch, heads, tokens, dim) in bf16.
    """
    batch, heads, tokens, dim = q.shape
    out = torch.empty(q.shape, dtype=torch.bfloat16, device=q.device)
    scale = dim**-0.5 * 1.4426950408889634
    grid = tokens // rows, batch * heads
    _attend[grid](q, k, v, out, scale, tokens=tokens, rows=rows, keys=keys, dim=dim, num_warps=warps, num_stages=stages)
    return out
