"""What Inductor is asked for when it compiles a region."""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.exc import CppCompileError

from .internals.compiler import TRUSTED
from .internals.state import known_options
from .plain_forms import plain_forms

_FIRST_PASS = "pre_grad_custom_pass"
# Variants of Triton kernels that Inductor thinks of after the others were compiled: no quicker in these blocks, they
# bring back the compiler when a region is loaded.
_LATE_VARIANTS = "dynamic_scale_rblock"
# A kernel of this pack is launched as Inductor's own are: else what is kept of a region would need Triton's compiler.
_LAUNCHES_OURS = "static_launch_user_defined_triton_kernels"
# PyTorch finds a kernel's binary by the kernel's whole name, and Triton writes it under the first 150 characters: one
# that names all that was fused into it may be longer, and is not launched without Triton's compiler then.
_LONG_NAMES = "triton.descriptive_names"
# Its own would copy a region's weights, which are inputs, at each replay; see ``recorded.py``.
_CUDA_GRAPHS = "triton.cudagraphs"


def region_options(mode: str, probe: bool) -> dict[str, Any]:
    """Options of ``torch.compile`` for Inductor in ``mode``.

    Without ``probe`` nothing that is compiled with them has the C++ compiler probed; see ``internals.compiler``.
    """
    always: dict[str, Any] = {_CUDA_GRAPHS: False, _FIRST_PASS: plain_forms}
    quicker = {_LATE_VARIANTS: False, _LAUNCHES_OURS: True, _LONG_NAMES: "", **({} if probe else {TRUSTED: True})}
    return {**torch._inductor.list_mode_options(mode), **always, **known_options(quicker)}


def may_lack_instructions(error: BaseException) -> bool:
    """Whether ``error`` may be that of code for an instruction set that the C++ compiler lacks, or of a compiler or a
    file of its that is gone."""
    inner = getattr(error, "inner_exception", error)
    return isinstance(inner, (CppCompileError, ImportError, OSError, UnicodeDecodeError))
