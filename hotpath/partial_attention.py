"""Attention to keys and values in two parts, of which the second is still on its way while the first is attended to.

Each part gives its result with the logarithm of the sum over its keys, by which the two are weighed; as in Ring
Attention (Liu et al., 2023) and FlashAttention's own blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import joined, prefers_cudnn
from .exchange import GivenRows, keys_and_values

# The largest head of FlashAttention, and of cuDNN's attention.
_FLASH_HEAD = 256
_CUDNN_HEAD = 128
_ATTENTION = torch.ops.aten


def has_parts(q: Tensor) -> bool:
    """Whether attention for queries like these (batch, heads, tokens, head dim) gives the logarithm of its sums."""
    if not q.is_cuda:
        return q.device.type == "cpu"
    half = q.dtype in (torch.float16, torch.bfloat16) and torch.version.hip is None
    return half and q.shape[-1] % 8 == 0 and q.shape[-1] <= _FLASH_HEAD and _capability(q) >= (8, 0)


def attention_over_devices(q: Tensor, k: Tensor, v: Tensor, others: int) -> Tensor:
    """Attention to the keys and values of all devices, those of the others copied while this one's are attended to.

    Args:
        q, k, v: (batch, heads, tokens of this device, head dim), of which ``has_parts`` is true.
        others: tokens of all other devices.

    Returns:
        (batch, tokens, heads * head dim) in q's dtype.
    """
    rows = GivenRows(k, v, others)
    own = _part(q, *keys_and_values(rows.mine))
    rest = _part(q, *keys_and_values(rows.take(after=own[1])))
    return joined(_weighed(own, rest))


def _weighed(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """Attention to the keys of both parts."""
    (own, own_sum), (rest, rest_sum) = one, other
    share = torch.sigmoid(own_sum - rest_sum)
    return (rest + share * (own.float() - rest.float())).to(own.dtype)


def _part(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention (batch, heads, tokens, head dim) and the logarithm of its sums in float32 (batch, heads, tokens, 1)."""
    if not q.is_cuda:
        out, sums = _ATTENTION._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif prefers_cudnn(q.device) and q.shape[-1] <= _CUDNN_HEAD:
        out, sums, *_ = _ATTENTION._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    else:
        out, sums, *_ = _ATTENTION._scaled_dot_product_flash_attention(q, k, v)
    return out, sums.float().reshape(*q.shape[:3], 1)


def _capability(like: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(like.device)
