"""RMS norm of queries and keys, and their rotary embedding, together.

Sources: Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467; Su et al., "RoFormer",
arXiv:2104.09864, with neighbours as pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import rms_norm


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate pairs of neighbours of ``x`` (batch, heads, tokens, dim) by ``table`` (batch or 1, 1, tokens, dim / 2, 2,
    2) of float32 matrices, computed in float32 and rounded once to the dtype of ``x``."""
    pairs = x.to(table.dtype).unflatten(-1, (-1, 1, 2))
    return torch.addcmul(table[..., 0] * pairs[..., 0], table[..., 1], pairs[..., 1]).flatten(-2).to(x.dtype)


def norm_rotate(
    q: Tensor, k: Tensor, q_scale: Tensor, k_scale: Tensor, table: Tensor, eps: float | None
) -> tuple[Tensor, Tensor]:
    """``q`` and ``k`` (batch, heads, tokens, dim) normalized over dim with scales (dim,), rounded, and rotated."""
    width = q_scale.shape
    return rotate(rms_norm(q, width, q_scale, eps), table), rotate(rms_norm(k, width, k_scale, eps), table)
