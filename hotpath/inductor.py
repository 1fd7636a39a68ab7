"""What Inductor is asked for when it compiles a region."""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor import config
from torch._inductor.cpu_vec_isa import supported_vec_isa_list, valid_vec_isa_list
from torch._inductor.exc import CppCompileError

from .plain_forms import plain_forms
from .toolchain import forget_toolchain

_FIRST_PASS = "pre_grad_custom_pass"
_TRUSTED = "cpp.vec_isa_ok"
# What Inductor's instruction sets note of themselves when they are probed.
_FOUND = ("_is_avx512_bf16_supported", "_is_amx_fp16_supported")
# Variants of Triton kernels that Inductor thinks of after the others were compiled: no quicker in these blocks, they
# bring back the compiler when a region is loaded.
_LATE_VARIANTS = "dynamic_scale_rblock"
# A kernel of this pack is launched as Inductor's own are: else what is kept of a region would need Triton's compiler.
_LAUNCHES_OURS = "static_launch_user_defined_triton_kernels"
# Its own would copy a region's weights, which are inputs, at each replay; see ``recorded.py``.
_CUDA_GRAPHS = "triton.cudagraphs"


def region_options(mode: str, probe: bool) -> dict[str, Any]:
    """Options of ``torch.compile`` for Inductor in ``mode``.

    Without ``probe`` nothing that is compiled with them has the C++ compiler probed; see ``trust_compiler``.
    """
    always: dict[str, Any] = {_LATE_VARIANTS: False, _CUDA_GRAPHS: False, _FIRST_PASS: plain_forms}
    if hasattr(config, _LAUNCHES_OURS):
        always[_LAUNCHES_OURS] = True
    return {**torch._inductor.list_mode_options(mode), **always, **({} if probe else {_TRUSTED: True})}


def trust_compiler() -> None:
    """Take the C++ compiler to have all instruction sets that the processor has, where Inductor has not asked it yet.

    Inductor would find out by compiling a program for each and loading it in a new process, which on a CPU takes a
    fifth of a region's first step. Its option to go without skips some of these programs alone.
    """
    if valid_vec_isa_list.cache_info().currsize:
        return
    kinds: list[Any] = supported_vec_isa_list
    with config.patch({_TRUSTED: True}):
        for kind in kinds:
            kind.check_build = lambda code: True
        try:
            valid_vec_isa_list()
        finally:
            for kind in kinds:
                vars(kind).pop("check_build", None)


def may_lack_instructions(error: BaseException) -> bool:
    """Whether ``error`` may be that of code for an instruction set that the C++ compiler lacks, or of a compiler or a
    file of its that is gone."""
    inner = getattr(error, "inner_exception", error)
    return isinstance(inner, (CppCompileError, ImportError, OSError, UnicodeDecodeError))


def forget_compiler() -> None:
    """Have Inductor ask anew what the C++ compiler has, and where it is."""
    forget_toolchain()
    for kind in supported_vec_isa_list:
        for found in _FOUND:
            vars(kind).pop(found, None)
        for method in vars(type(kind)).values():
            if hasattr(method, "cache_clear"):
                method.cache_clear()
    valid_vec_isa_list.cache_clear()
