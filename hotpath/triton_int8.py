"""``hotpath.rowwise.int8_product`` as one Triton kernel in the graph of a region.

Importing this module needs Triton. It registers ``torch.ops.hotpath.int8_scaled_product``, which Inductor sees through:
what is kept of a region is the kernel itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

Shape = tuple[int, int, int, int, int, int]
# Rows, columns and depth of a program's tile, tiles in a group that share columns, warps and stages. The first takes 96
# KiB of shared memory, as much as an RTX card has in all; `python -m benchmarks.kernels --parts int8` has others.
SHAPE, SMALLER = (128, 128, 128, 8, 8, 3), (128, 128, 64, 8, 4, 4)
_ROOM = 2**17


@triton.jit
def int8_product_kernel(  # type: ignore[no-untyped-def]
    rows,
    weight,
    row_scale,
    weight_scale,
    bias,
    out,
    m,
    n,
    weight_scale_step,
    k: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    group: tl.constexpr,
    with_bias: tl.constexpr,
):
    # Programs that run at once share rows and columns, which stay in the cache.
    down, across = tl.cdiv(m, block_m), tl.cdiv(n, block_n)
    first = tl.program_id(0) // (group * across) * group
    many = tl.minimum(down - first, group)
    inside = tl.program_id(0) % (group * across)
    row = (first + inside % many) * block_m + tl.arange(0, block_m)
    column = inside // many * block_n + tl.arange(0, block_n)
    depth = tl.arange(0, block_k)
    # Beyond the edge what is there is read again, and not stored.
    left = rows + (row % m).to(tl.int64)[:, None] * k + depth[None, :]
    right = weight + (column % n).to(tl.int64)[None, :] * k + depth[:, None]
    total = tl.zeros((block_m, block_n), tl.int32)
    for start in range(0, k, block_k):
        if k % block_k == 0:
            total = tl.dot(tl.load(left), tl.load(right), total, out_dtype=tl.int32)
        else:
            there = depth < k - start
            x = tl.load(left, mask=there[None, :], other=0)
            w = tl.load(right, mask=there[:, None], other=0)
            total = tl.dot(x, w, total, out_dtype=tl.int32)
        left += block_k
        right += block_k
    scales = tl.load(row_scale + row % m)[:, None] * tl.load(weight_scale + column % n * weight_scale_step)[None, :]
    y = (total.to(tl.float32) * scales).to(out.dtype.element_ty)
    if with_bias:
        added = tl.load(bias + column % n).to(y.dtype).to(tl.float32)[None, :]
        y = (y.to(tl.float32) + added).to(y.dtype)
    goal = out + row.to(tl.int64)[:, None] * n + column[None, :]
    tl.store(goal, y, mask=(row < m)[:, None] & (column < n)[None, :])


def launch(
    kernel: object,
    rows: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    shape: Shape,
) -> None:
    """Run ``int8_product_kernel`` as ``kernel``; all are contiguous."""
    block_m, block_n, block_k, group, warps, stages = shape
    m, n, k = rows.shape[0], weight.shape[0], rows.shape[1]
    kernel[(triton.cdiv(m, block_m) * triton.cdiv(n, block_n),)](  # type: ignore[index]
        rows,
        weight,
        scales,
        weight_scale,
        scales if bias is None else bias,
        out,
        m,
        n,
        int(weight_scale.numel() > 1),
        k=k,
        block_m=block_m,
        block_n=block_n,
        block_k=block_k,
        group=group,
        with_bias=bias is not None,
        num_warps=warps,
        num_stages=stages,
    )


def shape_on(device: torch.device) -> Shape:
    """The quickest that was measured of those that a card has the shared memory for."""
    has = torch.cuda.get_device_properties(device)
    return SHAPE if getattr(has, "shared_memory_per_block_optin", 0) >= _ROOM else SMALLER


@triton_op("hotpath::int8_scaled_product", mutates_args={})
def int8_scaled_product(
    rows: Tensor, scales: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``hotpath.rowwise.int8_product`` of rows on a CUDA device."""
    out = rows.new_empty((rows.shape[0], weight.shape[0]), dtype=dtype)
    shape = shape_on(rows.device)
    launch(wrap_triton(int8_product_kernel), rows, scales, weight, weight_scale, bias, out, shape)
    return out
