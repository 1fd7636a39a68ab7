"""Peak memory, as the system and the allocator keep it."""

from __future__ import annotations

import sys

import psutil
import torch


def peak_bytes(device: torch.device) -> int:
    """The most memory that was in use at once so far: of CUDA's allocator on ``device``, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
