"""One start of a process on a GPU: the first compiled step, compiled or loaded, and what it took.

    python -m devtools.gpu_start USER_FOLDER KIND

Prints JSON. ``KIND`` is ``fp32``, ``int8_tensorwise``, or ``wide``: two blocks of a kind at the width of Flux.1-dev, in
bf16 and at 1024x1024, which take as long to compile and to load as all of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import gpu_host
from .cli import run_tool

ROOT = Path(__file__).resolve().parent.parent
_WIDE: dict[str, Any] = dict(hidden=3072, text_width=4096, pooled_width=768)
_BASE: dict[str, Any] = dict(size=(1024, 1024), tokens=512)
_RUNS: tuple[dict[str, Any], ...] = ({}, dict(tokens=77), dict(size=(320, 320)))


def start(folder: Path, user: Path, kind: str) -> dict[str, Any]:
    """What a new process prints that keeps its compiler caches in ``folder`` and the host's user folder in ``user``.

    Raises:
        RuntimeError: it ended; the message has the end of its log.
    """
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}
    command = [sys.executable, "-m", "devtools.gpu_start", str(user), kind]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **caches}, capture_output=True, text=True, timeout=500)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(arguments: Sequence[str]) -> int:
    user, kind = arguments
    gpu_host.start()
    import folder_paths

    folder_paths.set_user_directory(user)
    from hotpath_pack.host.compiling.regions import REGIONS
    from hotpath_pack.hotpath.counters import graphs_so_far

    if kind == "wide":
        model = gpu_host.load(2, 2, torch.bfloat16, **_WIDE)
        runs: tuple[dict[str, Any], ...] = tuple({**_BASE, **run} for run in _RUNS)
    else:
        model, runs = gpu_host.load(2, 3, torch.float32, None if kind == "fp32" else kind), _RUNS
    wanted = [gpu_host.sample(model, **run, steps=1) for run in runs]
    processes: list[str] = []
    sys.addaudithook(lambda event, given: processes.append(str(given[0])) if event == "subprocess.Popen" else None)
    fast = gpu_host.compiled(model, cache="auto")
    seconds, differences = [], []
    for run, want in zip(runs, wanted, strict=True):
        started = time.perf_counter()
        got = gpu_host.sample(fast, **run, steps=1)
        seconds.append(time.perf_counter() - started)
        differences.append(((got - want).norm() / want.norm()).item())
    found = {
        "first step": seconds[0],
        "loading": sum(region.stats.load_seconds for region in REGIONS),
        "differences": differences,
        "graphs": graphs_so_far(),
        "frames": sum(torch._dynamo.utils.counters["frames"].values()),
        "processes": processes,
        "need Triton": _need_triton(),
        "states": sorted({region.stats.cache for region in REGIONS}),
        "kernels timed": "CachingAutotuner.benchmark_all_configs" in torch._dynamo.utils.compilation_time_metrics,
    }
    print(json.dumps(found))
    return 0


def _need_triton() -> dict[str, list[str]]:
    """Triton kernels of this process that can't be kept, with the variants that PyTorch can't launch by itself and
    why."""
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner, StaticTritonCompileResult

    def why(kernel: Any, variant: Any) -> str:
        try:
            with torch._inductor.config.patch(strict_static_triton_launcher=True):
                given = kernel.inductor_meta, variant.compile_meta, kernel.heuristic_type
                StaticTritonCompileResult.can_statically_launch(variant.kernel, *given)
        except Exception as reason:
            return str(reason)
        return "it could now"

    return {
        name: [
            f"{variant.config}: {why(kernel, variant)}"
            for variant in kernel.compile_results
            if not isinstance(variant, StaticTritonCompileResult)
        ]
        for module in PyCodeCache.modules
        for name, kernel in vars(module).items()
        if isinstance(kernel, CachingAutotuner) and not kernel.is_statically_launchable()
    }


if __name__ == "__main__":
    run_tool(main)
