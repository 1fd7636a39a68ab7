"""A model of Flux.1-dev's shape on one GPU: eager, and each way to compile it, measured in turns in one run.

    python -m benchmarks.gpu [--json FILE] [--profile FOLDER]
    python -m benchmarks.gpu --start [--blocks DOUBLE SINGLE] [--rounds N] [--sides NAME ...] [--json FILE]
    python -m benchmarks.gpu --card 8 12 16 24 [--resident] [--json FILE]
    python -m benchmarks.gpu --small [--shapes NAME ...] [--sizes N ...] [--sides NAME ...] [--json FILE]
    python -m benchmarks.gpu --family NAME [--layers N] [--formats NAME] [--json FILE]
    python -m benchmarks.gpu --devices N [--guidance] [--shapes NAME ...] [--sizes N ...] [--json FILE]

Needs ``COMFYUI_PATH``; ``devtools.trimmed`` gathers a small one, with wheels, for a machine without a network.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.small import SIDES as SMALL_SIDES
from benchmarks.small import measure_small
from devtools import gpu_host
from devtools.cli import positive, print_table, run_tool, write_json
from devtools.gpu_host import (
    compiled,
    compiled_per_block,
    gguf_layers,
    load,
    load_gguf,
    milliseconds,
    offload,
    predict_streaming,
    quantize,
    time_steps,
)

from . import cards, devices, families, start

GIB = 2**30
BLOCKS = (19, 38)
# As long to compile and to load as all of them, but for the whole model, which takes longer the more there are.
START_BLOCKS = (4, 8)
TEXT_TOKENS = 512
SIZES = ((1024, 1024), (768, 1344), (832, 1216))
IMAGE_STEPS = 28
ROUNDS = 2


@dataclass
class Side:
    """One way to run the model. Times of ``steps`` are in milliseconds, memory is of CUDA's allocator in GiB.

    ``difference`` is from the side named ``like``, else from the first. ``image_seconds``: of sampling ``IMAGE_STEPS``
    steps on the clock, when all is compiled.
    """

    name: str
    model: Any
    cold_seconds: float = 0.0
    graphs: int = 0
    graphs_after_sizes: int = 0
    peak_while_compiling: float = 0.0
    peak_steady: float = 0.0
    difference: float = 0.0
    like: str = ""
    moves: bool = False
    streamed_gib: float = 0.0
    predicted_ms: float = 0.0
    image_seconds: float = 0.0
    steps: list[float] = field(default_factory=list)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__)
    parser.add_argument("--blocks", type=positive, nargs=2, metavar=("DOUBLE", "SINGLE"))
    parser.add_argument("--hidden", type=positive, default=3072, metavar="N")
    parser.add_argument("--resident", action="store_true", help="without the host's dynamic VRAM")
    parser.add_argument("--formats", nargs="*", default=(), metavar="NAME", help="also quantized to these")
    parser.add_argument("--gguf", nargs="*", default=(), metavar="TYPE", help="also as GGUF files of these types")
    parser.add_argument("--shares", type=int, nargs="*", default=(), metavar="PERCENT", help="also offloaded to these")
    parser.add_argument("--sides", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="also write each side's kernels there")
    parser.add_argument(
        "--start", action="store_true", help="only the first prompt of each side, by part, in new processes"
    )
    parser.add_argument("--rounds", type=positive, default=1, metavar="N", help="with --start: starts of each side")
    parser.add_argument("--card", type=float, nargs="+", metavar="GIB", help="only on cards with so much memory free")
    parser.add_argument("--small", action="store_true", help="only small models and sizes, with CUDA graphs")
    parser.add_argument("--shapes", nargs="*", default=(), metavar="NAME", help="with --small or --devices: klein, dev")
    parser.add_argument(
        "--sizes", type=positive, nargs="*", default=(), metavar="N", help="with --small or --devices, in pixels"
    )
    parser.add_argument("--devices", type=positive, metavar="N", help="only over so many GPUs, beside one")
    parser.add_argument("--guidance", action="store_true", help="with --devices: by the host's MultiGPU CFG Split")
    parser.add_argument("--family", choices=families.RUNS, help="only a model of another family")
    parser.add_argument("--layers", type=positive, metavar="N", help="with --family: blocks in each of its lists")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args(arguments)
    if given.family:
        format = (given.formats or ["fp8_e4m3_rowwise"])[0]
        families.measure(given.family, given.layers, None, IMAGE_STEPS // ROUNDS // 2, format, given.json)
        return 0
    if given.devices:
        for shape in given.shapes or devices.SHAPES:
            sizes, steps = given.sizes or devices.SIZES, IMAGE_STEPS // ROUNDS // 2
            file = given.json and given.json.with_stem(f"{given.json.stem}_{shape}")
            names = given.sides or devices.NAMES
            devices.measure(
                given.devices, shape, given.blocks, None, sizes, steps, file, names, guidance=given.guidance
            )
        return 0
    if given.start:
        blocks = tuple(given.blocks or START_BLOCKS)
        return measure_starts(blocks, given.rounds, given.sides, given.json)
    if given.card:
        blocks = tuple(given.blocks or BLOCKS)
        rows = cards.measure(given.card, not given.resident, given.sides or cards.SIDES, given.json, blocks)
        return int(any(row.failed for row in rows))
    gpu_host.start(dynamic_vram=not given.resident)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    if given.small:
        measure_small(given.json, given.shapes, given.sizes, given.sides or SMALL_SIDES, given.hidden)
        return 0
    ceilings = measure_ceilings()
    print(", ".join(f"{name} {value:.0f}" for name, value in ceilings.items()), flush=True)
    sides = [
        side
        for side in make_sides(given.blocks or BLOCKS, given.hidden, given.formats, given.shares, given.gguf)
        if given.sides is None or side.name in given.sides
    ]
    facts: dict[str, Any] = {"GGUF layers": gguf_layers()} if given.gguf else {}
    facts["ceilings"] = ceilings
    measure(sides, ceilings["host to device GB/s"] * 1e6)
    # What compiles again for each size may take longer than anyone waits.
    write(given.json, facts, sides)
    sweep_sizes(sides)
    write(given.json, facts, sides)
    print_sides(sides)
    if given.profile:
        given.profile.mkdir(parents=True, exist_ok=True)
        for side in sides:
            write_profile(side, given.profile / f"{side.name.replace(' ', '_')}.txt")
    return 0


def write(path: Path | None, facts: dict[str, Any], sides: Sequence[Side]) -> None:
    if path:
        numbers = [{name: value for name, value in vars(side).items() if name != "model"} for side in sides]
        write_json(path, {**gpu_host.about(), **facts, "sides": numbers})


def measure_starts(blocks: tuple[int, int], rounds: int, names: Sequence[str] | None, json: Path | None) -> int:
    """The first prompt of each side in new processes, beside eager's, and where its time goes."""
    wide = start.Shape(blocks, 3072, 4096, 768, "bfloat16", SIZES[0], TEXT_TOKENS)
    groups = [group for group in start.ON_A_GPU if names is None or any(side.name in names for side in group)]

    def show(name: str, run: dict[str, Any]) -> None:
        # The machine may be lost before the end.
        print_table((*start.rows({name: [run]})[1:], *start.parts({name: [run]})))
        print(flush=True)

    seen = start.measure(rounds, lambda text: print(f"{text} ...", flush=True), groups, wide, show)
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, {blocks[0]} + {blocks[1]} blocks")
    print_table(start.rows(seen))
    if json:
        write_json(json, {**gpu_host.about(), "blocks": blocks, "sides": seen})
    return 0


def make_sides(
    blocks: Sequence[int], hidden: int, formats: Sequence[str], shares: Sequence[int], gguf: Sequence[str] = ()
) -> list[Side]:
    """The same weights eager and compiled in each way, quantized, and offloaded to shares of the model in percent;
    other weights of GGUF's types, each ``like`` its own eager side; other ways work without dynamic VRAM alone."""
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    double, single = blocks
    text_width = 4096 if hidden == 3072 else 64
    eager = load(double, single, torch.bfloat16, hidden=hidden, text_width=text_width, pooled_width=768)
    sides = [
        Side("eager", eager),
        Side("ours", compiled(eager)),
        Side("ahead ours", compiled(offload(eager))),
        Side("ours max-autotune", compiled(eager, mode="max-autotune-no-cudagraphs")),
    ]
    for format in formats:
        started = time.perf_counter()
        small = quantize(eager, format)
        print(f"{format}: quantized in {time.perf_counter() - started:.1f} s", flush=True)
        sides += [Side(format, small), Side(f"{format} ours", compiled(small))]
        if not eager.is_dynamic():
            sides.append(Side(f"{format} per block", compiled_per_block(small)))
    for kind in gguf:
        packed = load_gguf(double, single, kind, hidden=hidden, text_width=text_width, pooled_width=768)
        sides += [Side(kind, packed), Side(f"{kind} ours", compiled(packed), like=kind)]
        # Of the stand-in's layers PyTorch's compiler makes nothing.
        if gguf_layers() != "stand-in":
            sides.append(Side(f"{kind} per block", compiled_per_block(packed), like=kind))
    for share in shares:
        for ahead in (1, 0):
            lean = offload(eager, budget=f"{share} %", prefetch_blocks=ahead)
            sides.append(Side(f"{share} % {'' if ahead else 'no '}prefetch", compiled(lean), moves=True))
    if not eager.is_dynamic():
        sides.append(Side("per block", compiled_per_block(eager)))
        sides.append(Side("whole model", TorchCompileModel.execute(eager, "inductor").args[0]))
    return sides


def run(model: Any, steps: int, size: tuple[int, int] = SIZES[0]) -> tuple[Tensor, list[float]]:
    """A latent and the milliseconds of each call of the model."""
    return time_steps(model, size, TEXT_TOKENS, steps)


def measure(sides: Sequence[Side], bandwidth: float) -> None:
    """Run the sides in turns; ``bandwidth`` of the bus in bytes a millisecond."""
    from hotpath_pack.hotpath.counters import graphs_so_far

    wanted: dict[str, Tensor] = {"": run(sides[0].model, 1)[0]}
    for side in sides:
        if not side.moves:
            run(sides[0].model, 1)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        graphs, started = graphs_so_far(), time.perf_counter()
        latent, _ = run(side.model, 1)
        side.cold_seconds = time.perf_counter() - started
        side.peak_while_compiling = torch.cuda.max_memory_allocated() / GIB
        side.graphs = graphs_so_far() - graphs
        want = wanted.get(side.like, wanted[""])
        wanted[side.name] = latent
        side.difference = ((latent - want).norm() / want.norm()).item()
        print(f"{side.name}: first step {side.cold_seconds:.1f} s, {side.graphs} graphs", flush=True)
        if side.moves:
            # In turns with others all of its weights would have to move each time.
            for _ in range(ROUNDS):
                measure_steps(side)
    for _ in range(ROUNDS):
        for side in [side for side in sides if not side.moves]:
            measure_steps(side)
    resident = next((side for side in sides if side.name == "ahead ours"), None)
    for side in sides:
        predicted = predict_streaming(side.model, median(resident.steps), bandwidth) if resident else None
        if predicted:
            side.streamed_gib, side.predicted_ms = predicted[0] / GIB, predicted[1]


def measure_steps(side: Side) -> None:
    """A part of an image: the first step, which may load weights, is left out of the steady ones."""
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    side.steps += run(side.model, IMAGE_STEPS // ROUNDS)[1][1:]
    side.image_seconds += time.perf_counter() - started
    side.peak_steady = torch.cuda.max_memory_allocated() / GIB
    print(f"{side.name}: {median(side.steps):.1f} ms a step", flush=True)


def sweep_sizes(sides: Sequence[Side]) -> None:
    """Count the graphs that two more sizes cost."""
    from hotpath_pack.hotpath.counters import graphs_so_far

    for side in [side for side in sides if not side.moves]:
        graphs = graphs_so_far()
        for size in SIZES[1:]:
            run(side.model, 1, size)
        side.graphs_after_sizes = side.graphs + graphs_so_far() - graphs


def measure_ceilings() -> dict[str, float]:
    """What the machine can do at most: a large bf16 matrix product, many of them, which lower the clocks of a card at
    its power limit, and copies on the device and to it."""
    size = 8192
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    source, target = (torch.empty(GIB, dtype=torch.uint8, device="cuda") for _ in range(2))
    pinned = torch.empty(GIB, dtype=torch.uint8, pin_memory=True)
    return {
        "bf16 TFLOP/s": 2 * size**3 / milliseconds(lambda: a @ b) / 1e9,
        "bf16 TFLOP/s for seconds": 200 * size**3 / milliseconds(lambda: [a @ b for _ in range(100)]) / 1e9,
        "device copy GB/s": 2 * GIB / milliseconds(lambda: target.copy_(source)) / 1e6,
        "host to device GB/s": GIB / milliseconds(lambda: target.copy_(pinned, non_blocking=True)) / 1e6,
    }


def print_sides(sides: Sequence[Side]) -> None:
    names = f"ms/step,min,max,x eager,{IMAGE_STEPS} steps s,cold s,graphs,+2 sizes"
    header = [*names.split(","), "peak 1st", "steady GiB", "rel. diff", "GiB/step", "predicted"]
    print(f"\n{'':<20}" + "".join(f"{name:>11}" for name in header))
    base = median(sides[0].steps)
    for side in sides:
        middle = median(side.steps)
        row = [f"{middle:.1f}", f"{min(side.steps):.1f}", f"{max(side.steps):.1f}", f"{base / middle:.2f}"]
        row += [f"{side.image_seconds:.2f}", f"{side.cold_seconds:.1f}", str(side.graphs), str(side.graphs_after_sizes)]
        row += [f"{side.peak_while_compiling:.1f}", f"{side.peak_steady:.1f}", f"{side.difference:.1e}"]
        row += [f"{side.streamed_gib:.1f}", f"{side.predicted_ms:.1f}"] if side.streamed_gib else []
        print(f"{side.name:<20}" + "".join(f"{value:>11}" for value in row))


def write_profile(side: Side, path: Path) -> None:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        run(side.model, 2)
    averages = profiler.key_averages()
    gpu = averages.table(sort_by="self_cuda_time_total", row_limit=30, max_name_column_width=100)
    cpu = averages.table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60)
    path.write_text(f"{gpu}\n\n{cpu}\n", encoding="utf-8")


if __name__ == "__main__":
    run_tool(main)
