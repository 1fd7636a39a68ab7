"""dev.py bench --start: what the first step costs after each start of ComfyUI, every side in a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dev import RUN_MODULE
from devtools import gpu_host
from devtools.checkpoints import flux1

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = (19, 38)
# Side, whether it finds Inductor's cache of the side before, and whether what that side stored.
SIDES = (
    ("ours, cold", "ours", False, False),
    ("ours, warm cache", "ours", True, False),
    ("ours, loaded", "ours", False, True),
    ("plain per block, cold", "per-block", False, False),
    ("plain per block, warm cache", "per-block", True, False),
    ("whole model, cold", "whole", False, False),
    ("whole model, warm cache", "whole", True, False),
)


def measure(rounds: int, show: Callable[[str], None]) -> dict[str, list[dict[str, Any]]]:
    """``rounds`` starts of each side in turns: seconds of the first step and of loading, counts, largest difference of
    the latent from eager."""
    seen: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for number in range(rounds):
        with tempfile.TemporaryDirectory(prefix="hotpath-", ignore_cleanup_errors=True) as folder:
            for name, kind, warm, stored in SIDES:
                show(f"{name}, round {number + 1} of {rounds}")
                cache = Path(folder) / (kind if not stored else "empty")
                user = Path(folder) / "user" if kind == "ours" and not warm else Path(folder) / "nobody"
                seen[name].append(_start(kind, cache, user))
    return dict(seen)


def rows(seen: Mapping[str, list[dict[str, Any]]]) -> list[tuple[str, str]]:
    cold = median(run["first"] for run in seen["ours, cold"])
    table = [("", "first step, s             ours, cold = 1  loading, s  graphs  frames  processes  difference")]
    for name, runs in seen.items():
        first = [run["first"] for run in runs]
        spread = f"{median(first):.2f} ({min(first):.2f} to {max(first):.2f})"
        loading = median(run["loading"] for run in runs)
        counts = "  ".join(f"{runs[-1][what]:>{len(what)}}" for what in ("graphs", "frames", "processes"))
        difference = max(run["difference"] for run in runs)
        line = f"{spread:<26}{median(first) / cold:>14.3f}  {loading:>10.2f}  {counts}  {difference:>10.1e}"
        table.append((name, line))
    return table


def _start(kind: str, cache: Path, user: Path) -> dict[str, Any]:
    # Triton's workers would start ahead of what is measured.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", RUN_MODULE, str(ROOT), "benchmarks.start", kind, str(user)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"{kind} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _side(kind: str, user: Path) -> dict[str, Any]:
    """In a fresh process: load a Flux, take an eager step, then the first step of the side."""
    gpu_host.start(dynamic_vram=False, cpu=not torch.cuda.is_available())
    import comfy.sd
    import folder_paths
    from comfy_extras.nodes_torch_compile import TorchCompileModel
    from hotpath_pack.host.compile import REGIONS, compile_repeated_blocks
    from hotpath_pack.host.progress import NodeText
    from hotpath_pack.hotpath.compiled import CompileSettings
    from hotpath_pack.hotpath.counters import graphs_so_far

    folder_paths.set_user_directory(str(user))
    double, single = BLOCKS
    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model_state_dict(flux1(double, single))
    want = gpu_host.sample(model, steps=1)
    if kind == "ours":
        cache = "off" if user.name == "nobody" else "auto"
        side = compile_repeated_blocks(model, CompileSettings(), "all", "all", "error", NodeText(None), cache)
    elif kind == "whole":
        side = TorchCompileModel.execute(model, "inductor").args[0]
    else:
        side = gpu_host.compiled_per_block(model)
    started: list[str] = []
    sys.addaudithook(lambda event, given: started.append(str(given[0])) if event == "subprocess.Popen" else None)
    frames = sum(torch._dynamo.utils.counters["frames"].values())
    begun = time.perf_counter()
    got = gpu_host.sample(side, steps=1)
    first = time.perf_counter() - begun
    return {
        "difference": (got - want).abs().max().item(),
        "first": first,
        "loading": sum(region.stats.load_seconds for region in REGIONS),
        "graphs": graphs_so_far(),
        "frames": sum(torch._dynamo.utils.counters["frames"].values()) - frames,
        "processes": len(started),
    }


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=("ours", "per-block", "whole"))
    parser.add_argument("user", type=Path)
    given = parser.parse_args(arguments)
    print(json.dumps(_side(given.kind, given.user)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
