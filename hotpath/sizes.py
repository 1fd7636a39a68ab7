"""Token counts that a block takes as plain integers.

Dynamo bakes an integer into the graph and compiles again when it changes. A size of a tensor it can keep
symbolic, so a count travels as the length of a tensor without data.
"""

from __future__ import annotations

import torch
from torch import Tensor


def as_size(count: int | None, like: Tensor, dynamic: bool) -> Tensor | int | None:
    """A tensor of shape (count, 0), without memory, on ``like``'s device. 0 and 1 stay integers, as Dynamo
    never makes a size of 0 or 1 symbolic, and so does what is no count: None for up to the end."""
    if count is None or count < 2:
        return count
    size = like.new_empty((count, 0))
    if dynamic:
        torch._dynamo.maybe_mark_dynamic(size, 0)
    return size


def from_size(size: Tensor | int | None) -> int | None:
    """The count of ``as_size``, symbolic while tracing."""
    return size.shape[0] if isinstance(size, Tensor) else size


def span_within(start: int | None, end: int | None, length: int) -> tuple[int | None, int | None]:
    """``start`` and ``end`` of a slice within ``length``. A trace is told that they are in order: of sizes that may be
    anything it would take two slices from the same start to the same end for two of different lengths."""
    if start is not None:
        torch._check(start <= length)
    if end is not None:
        torch._check(start is None or start <= end)
        torch._check(end <= length)
    return start, end
