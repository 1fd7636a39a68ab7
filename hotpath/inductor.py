"""What Inductor is asked for when it compiles a region."""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.cpu_vec_isa import supported_vec_isa_list, valid_vec_isa_list
from torch._inductor.exc import CppCompileError

_TRUSTED = "cpp.vec_isa_ok"
# Variants of Triton kernels that Inductor thinks of after the others were compiled: no quicker in these blocks, they
# bring back the compiler when a region is loaded.
_LATE_VARIANTS = "dynamic_scale_rblock"


def region_options(mode: str, probe: bool) -> dict[str, Any]:
    """Options of ``torch.compile`` for Inductor in ``mode``.

    Without ``probe`` the C++ compiler is taken to have all instruction sets that the processor has. Inductor would find
    out by compiling and loading a program for each, which on a CPU takes a quarter of a region's first step.
    """
    return {**torch._inductor.list_mode_options(mode), _LATE_VARIANTS: False, **({} if probe else {_TRUSTED: True})}


def needs_probe(error: BaseException) -> bool:
    """Whether code for an instruction set that was not probed could not be compiled or loaded. What Inductor took the
    compiler to have is forgotten then."""
    inner = getattr(error, "inner_exception", error)
    if not isinstance(inner, (CppCompileError, ImportError, OSError)):
        return False
    kinds: list[Any] = [type(known) for known in supported_vec_isa_list]
    for kind in kinds:
        if hasattr(kind.__bool__, "cache_clear"):
            kind.__bool__.cache_clear()
    valid_vec_isa_list.cache_clear()
    return True
