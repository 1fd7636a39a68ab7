"""What a compiler needs before it compiles: its modules, its pool of worker processes, Triton's driver."""

from __future__ import annotations

import importlib
import os

import torch
from torch.utils._triton import has_triton_package

from .toolchain import variable

# PyTorch hands few of its options to the workers, and not the one by which kernels of this pack are launched as
# Inductor's own.
_LAUNCHES_OURS = "TORCHINDUCTOR_STATIC_LAUNCH_USER_DEFINED_TRITON_KERNELS"


def start_workers(device: torch.device) -> None:
    """Start the processes that compile Triton kernels for ``device``; they are ready some seconds later."""
    if device.type == "cuda":
        from torch._inductor.async_compile import maybe_warm_pool

        # What whoever started this process chose stays.
        with variable(_LAUNCHES_OURS, os.environ.get(_LAUNCHES_OURS, "1")):
            maybe_warm_pool()


def start_compiler(device: torch.device) -> None:
    """Import, start and compute what the first compilation for ``device`` in a process would. Its workers answer some
    seconds later, in which it traces.

    Raises what a part of it raises: compiling then tells it better.
    """
    start_workers(device)
    # What the first compilation, and loading what was stored, would import.
    importlib.import_module("torch._inductor.compile_fx")
    from torch._inductor.codecache import torch_key

    torch_key()
    if device.type != "cuda" or not has_triton_package():
        return
    import triton

    # A module that Triton builds by the C compiler at its first use.
    _ = triton.runtime.driver.active.utils
