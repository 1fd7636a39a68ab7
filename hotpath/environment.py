"""The facts that compiled code depends on, beside what it was made from: PyTorch, the machine, the settings of both."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._triton import has_triton_package

from .fingerprint import describe, digest

# Settings that change how long compiling takes, where files lie or when it gives up, and not what comes out.
_NO_MATTER = (
    "accumulated_recompile_limit",
    "cache_size_limit",
    "compile_threads",
    "cpp.cxx",
    "debug",
    "enable_aot_compile",
    "error_on_recompile",
    "fail_on_",
    "log_",
    "recompile_limit",
    "report_",
    "suppress_errors",
    "trace.",
    "verbose",
    "worker_",
)


def environment(device: torch.device) -> dict[str, str]:
    """The facts of this process, device and PyTorch that compiled code depends on, by names that a user knows."""
    facts = {
        "PyTorch": torch.__version__,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "deterministic algorithms": str(torch.are_deterministic_algorithms_enabled()),
        "settings of PyTorch": digest(repr(_switches())),
        "settings of torch.compile": digest("\n".join(map(_config_text, _configs()))),
    }
    if device.type == "cpu":
        return {**facts, "CPU": _cpu(), "threads": str(torch.get_num_threads())}
    return {**facts, "Triton": _triton_version(), **_gpu(device)}


def difference(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """``PyTorch 2.11.0 -> 2.12.0`` for each fact that is another one now; empty when none is."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{name} {before.get(name, 'none')} -> {now.get(name, 'none')}" for name in names)


def _configs() -> Sequence[Any]:
    return torch._dynamo.config, torch._inductor.config, torch._functorch.config


def _config_text(config: Any) -> str:
    settings = config.save_config_portable(ignore_private_configs=False)
    # Passes that other packs may have set, which are told by their code.
    settings.update({name: getattr(config, name, None) for name in config._save_config_ignore})
    return "\n".join(
        f"{name}={describe(settings[name])}" for name in sorted(settings) if not name.lstrip("_").startswith(_NO_MATTER)
    )


def _switches() -> list[object]:
    """Switches of the process that decide which kernels are called, of which Dynamo guards some."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return [
        torch.get_float32_matmul_precision(),
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()),
        (cuda.matmul.allow_fp16_reduced_precision_reduction, cuda.matmul.allow_bf16_reduced_precision_reduction),
        (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32),
        (torch.backends.mkldnn.enabled, torch.get_default_dtype()),
    ]


def _cpu() -> str:
    """The CPU's model and a digest of its features, for which Inductor has its code made."""
    # Not platform.processor(), which starts a process.
    model, features = os.environ.get("PROCESSOR_IDENTIFIER", platform.machine()), ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        entries = dict(line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line)
        named = {name.strip(): value.strip() for name, value in entries.items()}
        model = named.get("model name", model)
        features = " ".join(sorted(named.get("flags", named.get("Features", "")).split()))
    return f"{model} {torch.backends.cpu.get_cpu_capability()} {digest(features)}"


def _triton_version() -> str:
    if not has_triton_package():
        return "none"
    import triton

    return triton.__version__


def _cuda_of_driver() -> str:
    """The major version of CUDA that the driver runs, which PyTorch does not tell."""
    version = ctypes.c_int()
    driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    driver.cuDriverGetVersion(ctypes.byref(version))
    return str(version.value // 1000)


def _gpu(device: torch.device) -> dict[str, str]:
    if torch.version.hip is not None:
        runtime = {"ROCm": torch.version.hip}
    else:
        runtime = {"CUDA": str(torch.version.cuda), "driver for CUDA": _cuda_of_driver()}
    properties = torch.cuda.get_device_properties(device)
    architecture = getattr(properties, "gcnArchName", "") or f"{properties.major}.{properties.minor}"
    return {**runtime, "GPU": f"{properties.name} {architecture}"}
