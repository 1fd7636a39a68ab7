"""``hotpath.rotary.norm_rotate`` as one Triton kernel in the graph of a region.

Importing this module needs Triton. It registers ``torch.ops.hotpath.norm_rotate`` and ``norm_rotate_joint``, which
Inductor sees through: what is kept of a region is the kernel itself.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

# Tokens and heads of one program, and its warps. `python -m benchmarks.kernels` has others beside them.
BLOCK, HEADS, WARPS = 16, 6, 4


@triton.jit
def _norm_and_rotate(x, scale, first_column, second_column, eps, block_tokens: tl.constexpr, dim: tl.constexpr):  # type: ignore[no-untyped-def]
    wide = x.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, 1) / dim + eps)[:, None] * scale[None, :]
    # Eager rounds what is normalized before it rotates it.
    pairs = tl.reshape(wide.to(x.dtype).to(tl.float32), (block_tokens, dim // 2, 2))
    first, second = tl.split(pairs)
    rotated = first_column * tl.expand_dims(first, 2) + second_column * tl.expand_dims(second, 2)
    return tl.reshape(rotated, (block_tokens, dim))


@triton.jit
def norm_rotate_kernel(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    q_scale,
    k_scale,
    table,
    q_out,
    k_out,
    v_out,
    tokens,
    heads,
    batch_stride,
    head_stride,
    token_stride,
    table_batch_stride,
    table_token_stride,
    out_batch_stride,
    out_head_stride,
    out_token_stride,
    first,
    eps,
    block_tokens: tl.constexpr,
    block_heads: tl.constexpr,
    dim: tl.constexpr,
    with_v: tl.constexpr,
):
    token = tl.program_id(0) * block_tokens + tl.arange(0, block_tokens)
    batch = tl.program_id(2).to(tl.int64)
    column = tl.arange(0, dim)[None, :]
    inside = (token < tokens)[:, None]
    row = token.to(tl.int64)[:, None]
    # The four numbers of a pair lie together; they are read once for all heads of q and k here.
    four = table + batch * table_batch_stride + row * table_token_stride + tl.arange(0, 2 * dim)[None, :]
    numbers = tl.reshape(tl.load(four, mask=inside, other=0.0), (block_tokens, dim // 2, 2, 2))
    first_column, second_column = tl.split(numbers)
    wide_q_scale = tl.load(q_scale + tl.arange(0, dim)).to(tl.float32)
    wide_k_scale = tl.load(k_scale + tl.arange(0, dim)).to(tl.float32)
    source = batch * batch_stride + row * token_stride + column
    target = batch * out_batch_stride + (row + first) * out_token_stride + column
    for index in tl.static_range(block_heads):
        head = tl.program_id(1).to(tl.int64) * block_heads + index
        # A block, as Triton 3.9's interpreter takes a comparison of scalars for no mask.
        here = inside & (tl.broadcast_to(head, (1, 1)) < heads)
        place, goal = source + head * head_stride, target + head * out_head_stride
        x = tl.load(q + place, mask=here, other=0.0)
        x = _norm_and_rotate(x, wide_q_scale, first_column, second_column, eps, block_tokens, dim)
        tl.store(q_out + goal, x.to(q_out.dtype.element_ty), mask=here)
        x = tl.load(k + place, mask=here, other=0.0)
        x = _norm_and_rotate(x, wide_k_scale, first_column, second_column, eps, block_tokens, dim)
        tl.store(k_out + goal, x.to(k_out.dtype.element_ty), mask=here)
        if with_v:
            tl.store(v_out + goal, tl.load(v + place, mask=here, other=0.0), mask=here)


def launch(
    kernel: object,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    q_scale: Tensor,
    k_scale: Tensor,
    table: Tensor,
    outs: tuple[Tensor, Tensor, Tensor | None],
    eps: float,
    first: int = 0,
    block_tokens: int = BLOCK,
    block_heads: int = HEADS,
    warps: int = WARPS,
) -> None:
    """Run ``norm_rotate_kernel`` as ``kernel`` on one stream, whose tokens begin at ``first`` in the ``outs``."""
    batch, heads, tokens, dim = q.shape
    q_out, k_out, v_out = outs
    grid = triton.cdiv(tokens, block_tokens), triton.cdiv(heads, block_heads), batch
    kernel[grid](  # type: ignore[index]
        q,
        k,
        q if v is None else v,
        q_scale,
        k_scale,
        table,
        q_out,
        k_out,
        q if v_out is None else v_out,
        tokens,
        heads,
        *q.stride()[:3],
        table.stride(0) if table.shape[0] > 1 else 0,
        table.stride(2),
        *q_out.stride()[:3],
        first,
        eps,
        block_tokens=block_tokens,
        block_heads=block_heads,
        dim=dim,
        with_v=v is not None,
        num_warps=warps,
    )


def tokens_first(like: Tensor, tokens: int) -> Tensor:
    """Memory for (batch, heads, tokens, dim), the heads of a token beside each other, as attention gives its output."""
    batch, heads, _, dim = like.shape
    return like.new_empty((batch, tokens, heads, dim)).transpose(1, 2)


@triton_op("hotpath::norm_rotate", mutates_args={})
def norm_rotate(
    q: Tensor, k: Tensor, q_scale: Tensor, k_scale: Tensor, table: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``hotpath.rotary.norm_rotate``; q and k are views of the same strides, of 1 in their last dimension."""
    q_out, k_out = tokens_first(q, q.shape[2]), tokens_first(q, q.shape[2])
    launch(wrap_triton(norm_rotate_kernel), q, k, None, q_scale, k_scale, table, (q_out, k_out, None), eps)
    return q_out, k_out


@triton_op("hotpath::norm_rotate_joint", mutates_args={})
def norm_rotate_joint(
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    q_scale: list[Tensor],
    k_scale: list[Tensor],
    table: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``hotpath.rotary.norm_rotate_joint``; q, k and v of a stream are views of the same strides."""
    tokens = sum([x.shape[2] for x in q])
    outs = tokens_first(q[0], tokens), tokens_first(q[0], tokens), tokens_first(q[0], tokens)
    first = 0
    for i in range(len(q)):
        end = first + q[i].shape[2]
        rows = table[:, :, first:end]
        launch(wrap_triton(norm_rotate_kernel), q[i], k[i], v[i], q_scale[i], k_scale[i], rows, outs, eps, first)
        first = end
    return outs
