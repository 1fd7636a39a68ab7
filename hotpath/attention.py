"""Attention as an opaque call: one node in the graph, ordinary Python when it runs.

Patches of other packs around attention are arbitrary code that reads whatever it likes. Tracing it would bake in
what it read, or break the graph; dropping the guards on it would give a stale image. So a region with patches
keeps one graph that calls back into Python for the attention alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# What does not take a tensor (cuDNN takes no float32) leaves it to the next.
_CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None", "Tensor | None", Sequence[int]], Tensor]
"""(q, k, v, pe, mask, slices) -> attention output. q is (batch, heads, tokens, head dim); the output is
(batch, tokens, heads * head dim) in q's dtype."""


def prefers_cudnn(device: torch.device) -> bool:
    """Whether cuDNN's attention is the faster one on ``device``: on Hopper alone; elsewhere PyTorch's order was
    measured to be, or nothing was."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return nvidia and torch.cuda.get_device_capability(device)[0] == 9


# For what is asked before each call of a block. Within a trace PyTorch would go by no cache, and warn.
cached_prefers_cudnn = cache(prefers_cudnn)


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's attention, cuDNN's before FlashAttention: on Hopper it takes half the time.

    Args:
        q, k, v: (batch, heads, tokens, head dim).

    Returns:
        (batch, tokens, heads * head dim) in q's dtype.
    """
    with sdpa_kernel(_CUDNN_FIRST, set_priority=True):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return joined(out)


def joined(x: Tensor) -> Tensor:
    """(batch, heads, tokens, head dim) -> (batch, tokens, heads * head dim)."""
    return x.transpose(1, 2).flatten(2)


class AttentionMismatch(RuntimeError):
    """An attention patch returned a tensor of another shape or dtype than the block needs."""


class _Current(threading.local):
    def __init__(self) -> None:
        self.stack: list[Attend] = []


_current = _Current()


@contextmanager
def attention_scope(attend: Attend) -> Iterator[None]:
    """Let regions that run within this scope, on this thread, call ``attend`` for their attention."""
    _current.stack.append(attend)
    try:
        yield
    finally:
        _current.stack.pop()


def called_out() -> bool:
    """Whether attention on this thread is called by a region, from within an operator."""
    return bool(_current.stack)


def _run_attention(
    q: Tensor, k: Tensor, v: Tensor, pe: Tensor | None, mask: Tensor | None, slices: Sequence[int]
) -> Tensor:
    out = _current.stack[-1](q, k, v, pe, mask, slices)
    expected = (q.shape[0], q.shape[2], q.shape[1] * q.shape[3])
    if tuple(out.shape) != expected or out.dtype != q.dtype:
        raise AttentionMismatch(
            f"the attention of a patched block returned {tuple(out.shape)} {out.dtype}, but the block needs "
            f"{expected} {q.dtype}. Remove the attention patch, or leave the blocks it patches out of compilation."
        )
    # The graph relies on getting a tensor of its own: an override may hand q, k or v back.
    shares = any(out.untyped_storage().data_ptr() == t.untyped_storage().data_ptr() for t in (q, k, v))
    return out.clone(memory_format=torch.contiguous_format) if shares else out.contiguous()


# What runs below it is the host's and other packs' own.
ATTENTION_CODE = _run_attention.__code__


@torch.library.custom_op(
    "hotpath::attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? pe, Tensor? mask, SymInt[] slices, Tensor? after=None) -> Tensor",
)
def opaque_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pe: Tensor | None,
    mask: Tensor | None,
    slices: Sequence[int],
    after: Tensor | None = None,
) -> Tensor:
    """Call the attention of the innermost ``attention_scope``.

    Args:
        q, k, v: (batch, heads, tokens, head dim).
        pe: rotary embedding, or None.
        mask: attention mask, or None.
        slices: token offsets that patches expect in their options; may be empty.
        after: the result of a call that comes first, whatever a compiler reorders.

    Returns:
        (batch, tokens, heads * head dim), contiguous, in q's dtype.

    Raises:
        AttentionMismatch: the attention or a patch on it returned something else.
    """
    return _run_attention(q, k, v, pe, mask, slices)


@opaque_attention.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1] * q.shape[3])


def calls_in_order() -> Attend:
    """``opaque_attention`` for all calls of one block, each after the one before it: what is called may count."""
    results: list[Tensor] = []

    def call(q: Tensor, k: Tensor, v: Tensor, pe: Tensor | None, mask: Tensor | None, slices: Sequence[int]) -> Tensor:
        results.append(opaque_attention(q, k, v, pe, mask, slices, results[-1] if results else None))
        return results[-1]

    return call
