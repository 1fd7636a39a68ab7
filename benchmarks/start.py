"""dev.py bench --start: what the first prompt costs after each start of ComfyUI, every side in a process of its own.

A prompt loads the weights from disk, executes the node, and takes one step. Each process has empty compiler caches of
its own, unless its side finds those of the one before, or what that one stored.
"""

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
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dev import RUN_MODULE
from devtools import gpu_host
from devtools.checkpoints import flux1, save
from devtools.parts import Parts

ROOT = Path(__file__).resolve().parent.parent
_LONGEST_SECONDS = 570
# Parts of a profile that are shorter are summed up.
_SHORT_SECONDS = 0.05


@dataclass(frozen=True)
class Shape:
    """The Flux that all sides load, and the size of its image."""

    blocks: tuple[int, int]
    hidden: int = 256
    text_width: int = 64
    pooled_width: int = 32
    dtype: str = "float32"
    size: tuple[int, int] = (256, 256)
    tokens: int = 32


@dataclass(frozen=True)
class Side:
    """A start: ``kind`` is ``eager``, ``ours``, ``per-block`` or ``whole``.

    ``finds`` is what it has of the side before it: nothing, its compiler ``cache``, or what it ``stored``. ``started``:
    something else was compiled in this process before. ``pause``: seconds between the node and the first step, in
    which the host would load other models. ``when``: an input of the node.
    """

    name: str
    kind: str
    finds: str = ""
    started: bool = False
    pause: float = 0
    when: str = "wait"


TINY = Shape((19, 38))
# Sides that find something of the one before stay behind it when the order changes.
ON_A_CPU = (
    (
        Side("ours, cold", "ours"),
        Side("ours, warm cache", "ours", "cache"),
        Side("ours, loaded", "ours", "stored"),
    ),
    (Side("plain per block, cold", "per-block"), Side("plain per block, warm cache", "per-block", "cache")),
    (Side("whole model, cold", "whole"), Side("whole model, warm cache", "whole", "cache")),
)
ON_A_GPU = (
    (Side("eager", "eager"),),
    (Side("ours, cold", "ours"), Side("ours, loaded", "ours", "stored")),
    (Side("ours, 30 s ahead", "ours", pause=30),),
    (Side("ours, compiled in the first step", "ours", when=""),),
    (Side("ours, compiled in the first step, Inductor started", "ours", started=True, when=""),),
    (Side("ours, background", "ours", when="background"),),
    (Side("plain per block, cold", "per-block"),),
    (Side("plain per block, Inductor started", "per-block", started=True),),
    (Side("whole model, cold", "whole"),),
    (Side("whole model, Inductor started", "whole", started=True),),
)


def measure(
    rounds: int,
    show: Callable[[str], None],
    groups: Sequence[Sequence[Side]] = ON_A_CPU,
    shape: Shape = TINY,
    shown: Callable[[str, dict[str, Any]], None] = lambda name, run: None,
) -> dict[str, list[dict[str, Any]]]:
    """``rounds`` starts of each side, in an order that rotates: seconds of the first prompt, its first step and of
    loading what was stored, seconds by part, counts, and the largest difference of the latent from eager. ``shown`` is
    called with each that has ended."""
    seen: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="hotpath-", ignore_cleanup_errors=True) as temporary:
        checkpoint = Path(temporary) / "flux.safetensors"
        show("making the weights")
        _make(checkpoint, shape)
        bytecode = {}
        if not Path(str(torch.__spec__.cached)).exists():
            # Without what pip leaves of each package, each start would compile Python as well.
            bytecode = {"PYTHONPYCACHEPREFIX": f"{temporary}/bytecode", "PYTHONDONTWRITEBYTECODE": ""}
            show("a start that leaves Python's bytecode behind")
            _start(Side("", "ours"), shape, checkpoint, Path(temporary) / "cache", Path(temporary) / "user", bytecode)
        for number in range(rounds):
            turn = number % len(groups)
            for index, group in enumerate((*groups[turn:], *groups[:turn])):
                folder = Path(temporary) / f"{number}-{index}"
                for side in group:
                    show(f"{side.name}, round {number + 1} of {rounds}")
                    cache = folder / (side.name if side.finds == "stored" else "cache")
                    user = folder / ("nobody" if side.finds == "cache" else "user")
                    seen[side.name].append(_start(side, shape, checkpoint, cache, user, bytecode))
                    shown(side.name, seen[side.name][-1])
    return {side.name: seen[side.name] for group in groups for side in group}


def rows(seen: Mapping[str, list[dict[str, Any]]]) -> list[tuple[str, str]]:
    """A table of the first steps as multiples of ``ours, cold``, and of the prompts that they were part of."""
    cold = median(run["first"] for run in seen.get("ours, cold", next(iter(seen.values()))))
    counted = ("graphs", "frames", "processes")
    header = f"{'first step, s':<26}ours, cold = 1  loading, s  {'  '.join(counted)}  difference  prompt, s"
    table = [("", header)]
    for name, runs in seen.items():
        first = [run["first"] for run in runs]
        spread = f"{median(first):.2f} ({min(first):.2f} to {max(first):.2f})"
        loading, prompt = (median(run[what] for run in runs) for what in ("loading", "prompt"))
        counts = "  ".join(f"{runs[-1][what]:>{len(what)}}" for what in counted)
        difference = max(run["difference"] for run in runs)
        line = f"{spread:<26}{median(first) / cold:>14.3f}  {loading:>10.2f}  {counts}  {difference:>10.1e}"
        table.append((name, f"{line}  {prompt:>9.2f}"))
        for run in runs:
            if "behind" in run:
                told = f"{run['first after']:.2f} in the prompt after; compiled {run['behind']:.1f} s after the start"
                table.append(("", told))
    return table


def parts(seen: Mapping[str, list[dict[str, Any]]]) -> list[tuple[str, str]]:
    """A table of the seconds by part of the first step of each side, of its median run."""
    table = []
    for name, runs in seen.items():
        run = sorted(runs, key=lambda run: run["first"])[len(runs) // 2]
        for thread, seconds in run["parts"].items():
            table.append((f"{name}, {thread}", f"{sum(seconds.values()):6.2f} s"))
            table += [(f"    {part}", f"{took:6.2f}") for part, took in seconds.items() if took >= _SHORT_SECONDS]
    return table


def _make(path: Path, shape: Shape) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = flux1(
        *shape.blocks,
        hidden=shape.hidden,
        text_width=shape.text_width,
        pooled_width=shape.pooled_width,
        dtype=getattr(torch, shape.dtype),
        device=device,
    )
    save(path, {name: weight.cpu() for name, weight in made.items()})
    del made
    if device == "cuda":
        torch.cuda.empty_cache()


def _start(
    side: Side, shape: Shape, checkpoint: Path, cache: Path, user: Path, bytecode: Mapping[str, str]
) -> dict[str, Any]:
    # Triton's workers would start ahead of what is measured.
    env = {**os.environ, **bytecode, "OMP_NUM_THREADS": "1"}
    env |= {"TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "TRITON_CACHE_DIR": str(cache / "triton")}
    given = {"side": vars(side), "shape": vars(shape), "checkpoint": str(checkpoint), "user": str(user)}
    command = [sys.executable, "-c", RUN_MODULE, str(ROOT), "benchmarks.start", json.dumps(given)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=_LONGEST_SECONDS)
    if done.returncode != 0:
        raise OSError(f"{side.name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _run(side: Side, shape: Shape, checkpoint: Path, user: Path) -> dict[str, Any]:
    """In a fresh process: a prompt of the side, then an eager step to compare with."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gpu_host.start(dynamic_vram=device == "cuda" and side.kind in ("eager", "ours"), cpu=device == "cpu")
    # A server has it before its first prompt.
    import comfy.sample
    import comfy.sd
    import folder_paths
    from comfy_extras.nodes_torch_compile import TorchCompileModel
    from hotpath_pack.host.compiling.behind import HELPER
    from hotpath_pack.host.compiling.compile import compile_repeated_blocks
    from hotpath_pack.host.compiling.regions import REGIONS
    from hotpath_pack.host.telling.progress import NodeText
    from hotpath_pack.hotpath.counters import graphs_so_far
    from hotpath_pack.hotpath.settings import CompileSettings

    folder_paths.set_user_directory(str(user))
    if side.started:
        _start_inductor(device, getattr(torch, shape.dtype))
    torch.zeros(1, device=device)
    processes: list[str] = []
    sys.addaudithook(lambda event, given: processes.append(str(given[0])) if event == "subprocess.Popen" else None)
    graphs, frames = graphs_so_far(), sum(torch._dynamo.utils.counters["frames"].values())
    begun = time.perf_counter()
    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model(str(checkpoint), {"dtype": getattr(torch, shape.dtype)})
    if side.kind == "ours":
        cache = "off" if side.finds == "cache" else "auto"
        chosen = "all", "all", "error", NodeText(None), cache
        with torch.inference_mode():
            made = compile_repeated_blocks(model, CompileSettings(), *chosen, when=side.when)
    elif side.kind == "whole":
        made = TorchCompileModel.execute(model, "inductor").args[0]
    else:
        made = model if side.kind == "eager" else gpu_host.compiled_per_block(model)
    time.sleep(side.pause)
    with Parts() as watched:
        step = time.perf_counter()
        got = gpu_host.sample(made, shape.size, shape.tokens, steps=1)
        ended = time.perf_counter()
    found = {
        "first": ended - step,
        "prompt": ended - begun - side.pause,
        "loading": sum(region.stats.load_seconds for region in REGIONS),
        "graphs": graphs_so_far() - graphs,
        "frames": sum(torch._dynamo.utils.counters["frames"].values()) - frames,
        "processes": len(processes),
        "parts": {thread: watched.table(thread) for thread in list(watched.seconds)},
        "timed by PyTorch": {
            name: sum(took) for name, took in torch._dynamo.utils.compilation_time_metrics.items() if sum(took) > 0.05
        },
    }
    if side.when == "background":
        HELPER.wait()
        found["behind"] = time.perf_counter() - begun
        step = time.perf_counter()
        got = gpu_host.sample(made, shape.size, shape.tokens, steps=1)
        found["first after"] = time.perf_counter() - step
        found["loading"] = sum(region.stats.load_seconds for region in REGIONS)
    want = gpu_host.sample(model, shape.size, shape.tokens, steps=1)
    return {**found, "difference": (got - want).abs().max().item()}


def _start_inductor(device: str, dtype: torch.dtype) -> None:
    """Compile something else, and have the workers that compile kernels answer."""
    from torch._inductor.async_compile import AsyncCompile

    x = torch.randn(64, 64, device=device, dtype=dtype)
    torch.compile(lambda x: (x @ x).sin().sum(-1))(x)
    if device == "cuda":
        AsyncCompile.wait_pool_ready()
    torch._dynamo.reset()


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("given", type=json.loads)
    given = parser.parse_args(arguments).given
    told: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in given["shape"].items()
    }
    print(json.dumps(_run(Side(**given["side"]), Shape(**told), Path(given["checkpoint"]), Path(given["user"]))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
