"""What would keep a backend from working on this machine, found before it is asked to, in words that help."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Collection
from pathlib import Path

import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.utils._triton import has_triton_package

from .toolchain import cpp_compiler, named_user

# Triton generates code for compute capability 7.0 (Volta) and later.
_OLDEST_CUDA = (7, 0)
# Ada (RTX 40) multiplies in fp8.
_OLDEST_FP8 = (8, 9)
_FP8 = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})
# Windows refuses paths of 260 characters; Inductor and Triton add up to 180 to their cache folder.
_LONGEST_WINDOWS_CACHE = 80
# A region of Flux leaves a few MB there, and its compiler twice that while it works.
_LEAST_FREE = 16 << 20


def compile_problems(backend: str, device: torch.device, dtypes: Collection[torch.dtype] = ()) -> list[str]:
    """Why ``backend`` can't work for ``device`` in this process, each with the fix; empty when nothing is known.

    ``dtypes`` are those of the weights that enter a region.
    """
    if torch._dynamo.config.disable:
        return ["torch.compile is switched off in this process. Start ComfyUI without TORCHDYNAMO_DISABLE"]
    if backend != "inductor":
        return []
    with named_user():
        cache = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir())
    problems = [_cache_problem(cache, sys.platform)]
    if device.type == "cpu":
        with named_user():
            # Precompiled headers lie in the one that PyTorch would choose, whatever is set.
            problems += [_cpp_problem(), _spaces_problem(sys.platform, cache, Path(default_cache_dir()))]
    else:
        problems.append(_triton_problem(sys.platform, has_triton_package()) or _launch_problem())
    if device.type == "cuda" and torch.version.cuda is not None:
        capability = torch.cuda.get_device_capability(device)
        problems += [_capability_problem(capability), _fp8_problem(capability, dtypes)]
    return [problem for problem in problems if problem is not None]


def _cpp_problem() -> str | None:
    try:
        cpp_compiler()
    except RuntimeError:
        return (
            "no C++ compiler was found, which Inductor needs for the CPU. Install g++ or clang++ (Windows: Visual "
            "Studio Build Tools with C++), or set CXX to the one you have"
        )
    return None


def _spaces_problem(system: str, *folders: Path) -> str | None:
    """Inductor takes its own compiler commands apart at spaces; on Windows it quotes."""
    for folder in folders:
        if system != "win32" and re.search(r"\s", str(folder)):
            return (
                f"the compiler's folder {folder} has a space in its path, which Inductor can't work with. Set "
                "TORCHINDUCTOR_CACHE_DIR and TMPDIR to folders without one"
            )
    return None


def _triton_problem(system: str, installed: bool) -> str | None:
    if not installed:
        package = "triton-windows" if system == "win32" else "triton"
        return f"Triton is not installed, which Inductor needs for this device. Install the package {package}"
    # Triton builds its launcher with the system's compiler; on Windows it brings its own.
    if system != "win32" and not any(map(shutil.which, (os.environ.get("CC", ""), "cc", "gcc", "clang"))):
        return "no C compiler was found, which Triton needs. Install gcc or clang, or set CC to the one you have"
    return None


def _launch_problem() -> str | None:
    """Have Triton build and load its driver, as it would for the first kernel; it keeps the result."""
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
    # Drivers of all makes raise what they like: for a missing Python.h, a wrong libcuda, no device.
    except Exception as error:
        what = next(iter(str(error).splitlines()), "no message")
        return (
            f"Triton can't launch kernels here ({type(error).__name__}: {what}). Update the GPU's driver, install "
            "Python's headers (the package python3-dev) or reinstall Triton"
        )
    return None


def _capability_problem(capability: tuple[int, int]) -> str | None:
    if capability < _OLDEST_CUDA:
        found = ".".join(map(str, capability))
        return f"Triton needs a GPU of compute capability 7.0 or later and this one has {found}. Bypass the node"
    return None


def _fp8_problem(capability: tuple[int, int], dtypes: Collection[torch.dtype]) -> str | None:
    """A host may be told to take a card for one that multiplies in fp8."""
    if capability < _OLDEST_FP8 and not _FP8.isdisjoint(dtypes):
        found = ".".join(map(str, capability))
        return (
            f"fp8 products need a GPU of compute capability 8.9 or later and this one has {found}. Start ComfyUI "
            "without --supports-fp8-compute, or use a checkpoint in bf16 or int8"
        )
    return None


def _cache_problem(folder: Path, system: str) -> str | None:
    if system == "win32" and len(str(folder)) > _LONGEST_WINDOWS_CACHE:
        return (
            f"the compiler's cache folder {folder} is too long a path for Windows. Set TORCHINDUCTOR_CACHE_DIR to a "
            "short one, such as C:\\inductor"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError
        free = shutil.disk_usage(folder).free
    except OSError:
        return (
            f"the compiler's cache folder {folder} can't be written. Set TORCHINDUCTOR_CACHE_DIR to a folder that can"
        )
    if free < _LEAST_FREE:
        return (
            f"the disk of the compiler's cache folder {folder} is full. Make room, or set TORCHINDUCTOR_CACHE_DIR to a "
            "folder on another"
        )
    return None
