"""What Inductor remembers of the C++ compiler; what a newer PyTorch no longer tells is found out as PyTorch does."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

# The type of what functools.cache makes, which has no public name.
_CACHED = type(lru_cache(len))
# An option of Inductor.
TRUSTED = "cpp.vec_isa_ok"
# What Inductor's instruction sets note of themselves when they are probed.
_FOUND = ("_is_avx512_bf16_supported", "_is_amx_fp16_supported")


def trust_compiler() -> None:
    """Take the C++ compiler to have all instruction sets that the processor has, where Inductor has not asked it yet.

    Inductor would find out by compiling a program for each and loading it in a new process, which on a CPU takes a
    fifth of a region's first step. Its option to go without skips some of these programs alone.
    """
    from torch._inductor import config, cpu_vec_isa

    kinds: list[Any] = getattr(cpu_vec_isa, "supported_vec_isa_list", [])
    find: Any = getattr(cpu_vec_isa, "valid_vec_isa_list", None)
    if not hasattr(find, "cache_info") or find.cache_info().currsize:
        return
    with config.patch({TRUSTED: True}):
        for kind in kinds:
            kind.check_build = lambda code: True
        try:
            find()
        finally:
            for kind in kinds:
                vars(kind).pop("check_build", None)


def forget_compiler() -> None:
    """Have Inductor ask anew what the C++ compiler has, and where it is."""
    from torch._inductor import cpu_vec_isa

    forget_toolchain()
    for kind in getattr(cpu_vec_isa, "supported_vec_isa_list", []):
        for found in _FOUND:
            vars(kind).pop(found, None)
        for method in vars(type(kind)).values():
            if hasattr(method, "cache_clear"):
                method.cache_clear()


def forget_toolchain() -> None:
    """Have Inductor look anew for the compiler and for files that it made before, which a cleaner may have taken."""
    from torch._inductor import codecache, cpp_builder, cpu_vec_isa

    for module in (codecache, cpp_builder, cpu_vec_isa):
        for known in vars(module).values():
            if isinstance(known, _CACHED):
                known.cache_clear()
