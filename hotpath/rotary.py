"""RMS norm of queries and keys, and their rotary embedding, together.

On CUDA devices they are one Triton kernel (``triton_rotary``), elsewhere plain PyTorch.

Sources: Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467; Su et al., "RoFormer",
arXiv:2104.09864, with neighbours as pairs.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import rms_norm
from torch.utils._triton import has_triton_package


def has_kernel() -> bool:
    """Whether the kernel can be had here; makes its operators known to PyTorch."""
    if not has_triton_package():
        return False
    importlib.import_module(f"{__package__}.triton_rotary")
    return True


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate pairs of neighbours of ``x`` (batch, heads, tokens, dim) by ``table`` (batch or 1, 1, tokens, dim / 2, 2,
    2) of float32 matrices, computed in float32 and rounded once to the dtype of ``x``."""
    pairs = x.to(table.dtype).unflatten(-1, (-1, 1, 2))
    return torch.addcmul(table[..., 0] * pairs[..., 0], table[..., 1], pairs[..., 1]).flatten(-2).to(x.dtype)


def norm_rotate(
    q: Tensor, k: Tensor, q_scale: Tensor, k_scale: Tensor, table: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Normalize over dim, round, and rotate.

    Args:
        q, k: (batch, heads, tokens, dim).
        q_scale, k_scale: (dim,).
        table: as for ``rotate``; of more tokens the first are taken.

    Returns:
        Both in their own shape and dtype.

    Raises:
        ValueError: the table is of another shape.
    """
    table = _rows(table, q.shape[0], q.shape[2])
    if q.is_cuda:
        q, k = torch.ops.hotpath.norm_rotate(q, k, q_scale, k_scale, table, eps)
        return q, k
    width = q_scale.shape
    return rotate(rms_norm(q, width, q_scale, eps), table), rotate(rms_norm(k, width, k_scale, eps), table)


def norm_rotate_joint(
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    q_scale: Sequence[Tensor],
    k_scale: Sequence[Tensor],
    table: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``norm_rotate`` of streams with scales of their own, whose tokens follow each other in ``table``.

    Returns:
        q, k and v of all of them, joined in that order.
    """
    table = _rows(table, q[0].shape[0], sum([x.shape[2] for x in q]))
    if q[0].is_cuda:
        joined, keys, values = torch.ops.hotpath.norm_rotate_joint(
            list(q), list(k), list(v), list(q_scale), list(k_scale), table, eps
        )
        return joined, keys, values
    normed = [
        torch.cat([rms_norm(x, scale.shape, scale, eps) for x, scale in zip(*each, strict=True)], 2)
        for each in ((q, q_scale), (k, k_scale))
    ]
    return rotate(normed[0], table), rotate(normed[1], table), torch.cat(list(v), 2)


def _rows(table: Tensor, batch: int, tokens: int) -> Tensor:
    if table.shape[2] > tokens:
        table = table[:, :, :tokens]
    if table.shape[2] != tokens or table.shape[1] != 1 or table.shape[0] not in (1, batch):
        raise ValueError(f"the rotary embedding is of shape {tuple(table.shape)}, for {batch} x {tokens} tokens")
    # The kernel reads the numbers of a token in one piece.
    return table.contiguous()
