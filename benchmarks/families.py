"""A model of another family at its real width on one GPU: eager, per block, ours, and eager and ours in 8 bits."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from devtools import gpu_host
from devtools.cli import print_table, write_json

ROUNDS = 2


@dataclass(frozen=True)
class Run:
    """What is sampled: pixels, frames of latents, tokens of text; and how many blocks fit beside those in 8 bits."""

    size: tuple[int, int]
    frames: int
    tokens: int
    blocks: int


# By name of ``devtools.family_models.MODELS``.
RUNS = {
    "qwen_image": Run((1024, 1024), 1, 256, 30),
    "z_image": Run((1024, 1024), 1, 128, 30),
    "wan_t2v": Run((832, 480), 9, 512, 16),
    "wan_ti2v_5b": Run((1280, 704), 9, 512, 30),
    "krea2": Run((1024, 1024), 1, 256, 28),
    "ltx2": Run((1280, 704), 9, 256, 24),
    "hunyuan_video": Run((832, 480), 9, 256, 10),
}


@dataclass
class Side:
    """One way to run the model. Times of ``steps`` are in milliseconds, and ``difference`` is of its latent from the
    eager one, relative."""

    name: str
    model: Any
    cold_seconds: float = 0.0
    graphs: int = 0
    difference: float = 0.0
    peak_gib: float = 0.0
    steps: list[float] = field(default_factory=list)


def measure(
    name: str, blocks: int | None, heads: int | None, steps: int, format: str, json: Path | None, cpu: bool = False
) -> list[Side]:
    """Measure each side of the model called ``name`` and print a table.

    Args:
        blocks: in each of its lists; by default as many as fit.
        heads: of attention, each 128 wide; by default as many as the real model has.
        format: of Quantize Repeated Blocks.
        cpu: without a GPU, to try it out.
    """
    gpu_host.start(dynamic_vram=False, cpu=cpu)
    from devtools import family_models

    run = RUNS[name]
    device, dtype = ("cpu", torch.float32) if cpu else ("cuda", torch.bfloat16)
    eager = family_models.build(name, heads, blocks or run.blocks, dtype=dtype, device=device)
    sides = [
        Side("eager", eager),
        Side("per block", gpu_host.compiled_per_block(eager)),
        Side("ours", gpu_host.compiled(eager)),
    ]
    small = gpu_host.quantize(eager, format)
    sides += [Side(format, small), Side(f"ours, {format}", gpu_host.compiled(small))]
    size = (64, 64) if cpu else run.size

    def sample(model: Any, count: int) -> tuple[Tensor, list[float]]:
        return timed(model, size, run.frames, run.tokens, count, not cpu)

    want, _ = sample(eager, 1)
    for side in sides:
        first_prompt(side, sample, want)
    for _ in range(ROUNDS):
        for side in sides:
            side.steps += sample(side.model, steps)[1][1:]
    report(name, sides, blocks or run.blocks, json)
    return sides


def first_prompt(side: Side, sample: Callable[[Any, int], tuple[Tensor, list[float]]], want: Tensor) -> None:
    from hotpath_pack.hotpath.counters import graphs_so_far

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    graphs, started = graphs_so_far(), time.perf_counter()
    latent, _ = sample(side.model, 1)
    side.cold_seconds = time.perf_counter() - started
    side.graphs = graphs_so_far() - graphs
    side.difference = ((latent - want).norm() / want.norm()).item()
    side.peak_gib = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    print(f"{side.name}: first step {side.cold_seconds:.1f} s, {side.graphs} graphs", flush=True)


def timed(
    model: Any, size: tuple[int, int], frames: int, tokens: int, steps: int, cuda: bool
) -> tuple[Tensor, list[float]]:
    """A latent, the same at each call, and the milliseconds of each evaluation of the model."""
    times: list[float] = []

    def clocked(call: Callable[[], Tensor]) -> Tensor:
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        out = call()
        if cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - started) * 1e3)
        return out

    return sampled(gpu_host.calling(model, clocked), size, frames, tokens, steps), times


def sampled(
    model: Any,
    size: tuple[int, int],
    frames: int,
    tokens: int,
    steps: int,
    cfg: float = 1.0,
    callback: Callable[..., None] | None = None,
) -> Tensor:
    """A latent, the same at each call; with a ``cfg`` other than 1 of two branches."""
    import comfy.sample
    from hotpath_pack.host.families import family_of
    from hotpath_pack.host.families.kinds import random_tensor
    from hotpath_pack.host.measuring.synthetic import latent_shape

    diffusion_model = model.model.diffusion_model
    family: Any = family_of(diffusion_model)
    text, extra = family.conditioning(diffusion_model, tokens)
    noise = random_tensor(*latent_shape(model, *size, 1, frames))
    branches = [[text, extra]], [[-text, extra]]
    run = dict(seed=0, disable_pbar=True, callback=callback)
    with torch.inference_mode():
        return comfy.sample.sample(model, noise, steps, cfg, "euler", "simple", *branches, noise * 0, **run)


def report(name: str, sides: Sequence[Side], blocks: int, json: Path | None) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    base = median(sides[0].steps)
    print(f"\n{device}, torch {torch.__version__}, {name}, {blocks} blocks")
    rows: list[tuple[str, object]] = [("", "   ms/step   x eager   cold s  graphs  rel. diff  peak GiB")]
    for side in sides:
        middle = median(side.steps)
        numbers = f"{middle:10.1f}{base / middle:10.2f}{side.cold_seconds:9.1f}{side.graphs:8}"
        rows.append((side.name, f"{numbers}{side.difference:11.1e}{side.peak_gib:10.1f}"))
    print_table(rows)
    if json:
        seen = [{key: value for key, value in vars(side).items() if key != "model"} for side in sides]
        write_json(json, {**gpu_host.about(), "model": name, "blocks": blocks, "sides": seen})
