"""dev.py bench: ours beside every other way to compile; a model of yours, a soak, a fuzz, formats, memory, starts."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch

from benchmarks import memory, offload, start
from benchmarks.compare import compare_sides, picture, problems, table
from benchmarks.quantize import qualities, rows
from devtools import gpu_host
from devtools.cli import Progress, add_sampling_arguments, comfyui_folder, positive, print_table, run_tool, write_json
from devtools.measure import compare
from devtools.soak import soak


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="dev.py bench",
        description="Measure Compile Repeated Blocks beside eager, ComfyUI's TorchCompileModel, torch.compile of each "
        "block and diffusers' compile_repeated_blocks(), on a tiny Flux.1; with --model beside eager on that.",
    )
    add_sampling_arguments(parser)
    parser.add_argument(
        "--rounds", type=positive, default=3, metavar="N", help="cold starts, with --model warm runs (default: 3)"
    )
    parser.add_argument(
        "--blocks", type=_blocks, default=(19, 38), metavar="D+S", help="of the tiny Flux.1 (default: 19+38)"
    )
    parser.add_argument("--quick", action="store_true", help="count graphs without generating code or timing")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw it as SVG")
    parser.add_argument(
        "--soak",
        type=positive,
        nargs="?",
        const=300,
        metavar="N",
        help="instead, N prompts of all kinds on one server (default: 300): images, graphs, memory and leaks",
    )
    parser.add_argument(
        "--quantize",
        nargs="*",
        metavar="FORMAT",
        help="instead, size and signal-to-noise ratio of each format, or of these",
    )
    parser.add_argument(
        "--memory", action="store_true", help="instead, what Flux.1-dev takes on the card and over the bus"
    )
    parser.add_argument(
        "--offload", action="store_true", help="instead, what streaming blocks costs a step on cards of 8 to 32 GB"
    )
    parser.add_argument(
        "--start", action="store_true", help="instead, the first step after a start of ComfyUI: cold, warm and loaded"
    )
    parser.add_argument(
        "--fuzz",
        type=positive,
        metavar="SECONDS",
        help="instead, random graphs of all kinds for so long, each beside eager; what differs is told as a test",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random graphs (default: 0)")
    given = parser.parse_args(arguments)
    if given.fuzz:
        return run_fuzz(given.seed, given.fuzz, given.json)
    if given.start:
        return run_start(given.rounds, given.json)
    if given.soak:
        return run_soak(given.soak, given.json)
    if given.quantize is not None:
        return run_quantize(given.quantize, given.size or (128, 128), given.json)
    if given.memory:
        return run_memory(given.json, given.plot)
    if given.offload:
        return run_offload(given.json, given.plot)
    if not given.model:
        return run_sides(given.blocks, given.rounds, given.quick, given.json, given.plot)
    comparison = compare(
        comfyui_folder(),
        given.model,
        size=given.size,
        steps=given.steps,
        rounds=given.rounds,
        env={"OMP_NUM_THREADS": "1"},
    )
    numbers = comparison.numbers()
    width, height = numbers["size"]
    print(f"{numbers['model']} on {numbers['device']}, {width}x{height}, {numbers['steps']} steps, one thread\n")
    print_table(
        [
            ("seconds per step, eager", _spread(comparison.eager)),
            ("seconds per step, compiled", _spread(comparison.compiled)),
            ("eager / compiled", f"{numbers['ratio']:.2f}"),
            ("compile seconds, empty cache", f"{numbers['compile_seconds']:.1f}"),
            ("graphs", numbers["graphs"]),
            ("largest difference of latents", f"{numbers['largest_difference']:.1e}"),
        ]
    )
    if given.json:
        write_json(given.json, numbers)
    return 0


def run_sides(blocks: tuple[int, int], rounds: int, quick: bool, json: Path | None, plot: Path | None) -> int:
    progress = Progress()
    comparison = compare_sides(comfyui_folder(), blocks, rounds, quick, progress.stage)
    progress.done()
    print(", ".join(f"{name} {value}" for name, value in comparison.machine.items()))
    print(f"\n{table(comparison)}\n")
    for problem in problems(comparison):
        print(f"DOES NOT HOLD: {problem}")
    if json:
        write_json(json, comparison.numbers())
    if plot:
        write_plot(plot, picture(comparison))
    return 1 if problems(comparison) else 0


def run_soak(prompts: int, json: Path | None) -> int:
    progress = Progress()
    progress.stage("Running prompts on one server")
    seen = soak(comfyui_folder(), prompts, show=progress.detail)
    progress.done()
    print_table(
        [
            ("prompts, each eager and compiled", len(seen.rss)),
            ("largest difference of latents", f"{seen.largest_difference:.1e}"),
            (f"graphs after {seen.settled} and all prompts", f"{seen.graphs[seen.settled - 1]} and {seen.graphs[-1]}"),
            (f"memory after {seen.settled} prompts", f"{seen.rss[seen.settled - 1] / 2**20:.0f} MiB"),
            ("its largest growth after that", f"{seen.rss_growth:.1%}"),
            ("models left after unloading", seen.models_left),
        ]
    )
    for problem in seen.problems():
        print(f"FAILED: {problem}")
    if json:
        write_json(json, asdict(seen))
    return 1 if seen.problems() else 0


def run_fuzz(seed: int, seconds: int, json: Path | None) -> int:
    gpu_host.start(dynamic_vram=False, cpu=True)
    # In tensors this small threads cost more than they do.
    torch.set_num_threads(1)
    fuzz = importlib.import_module("hotpath_pack.devtools.fuzz")
    progress = Progress()
    progress.stage(f"Running random graphs of seed {seed} for {seconds} s")
    seen = fuzz.fuzz(seed, seconds=seconds, show=progress.line)
    progress.done()
    print_table(fuzz.rows(seen))
    for failure in seen.failures:
        print(f"\nFAILED: {failure.problem}\n\n{failure.as_test()}")
    if json:
        write_json(json, fuzz.numbers(seen))
    return 1 if seen.failures else 0


def run_quantize(formats: Sequence[str], size: tuple[int, int], json: Path | None) -> int:
    progress = Progress()
    progress.stage("Quantizing a tiny Flux.1 of 19 double and 38 single blocks")
    measured = qualities(comfyui_folder(), formats, size, progress.detail)
    progress.done()
    print(f"Signal-to-noise ratio against full precision, {size[0]}x{size[1]}\n")
    print_table(rows(measured))
    if json:
        write_json(json, [asdict(quality) for quality in measured])
    return 0


def run_memory(json: Path | None, plot: Path | None) -> int:
    needs = memory.needs()
    print(f"Flux.1-dev, {memory.SIZE}x{memory.SIZE}: weights on the card, and what crosses the bus for")
    print(f"an image of {memory.STEPS} steps on cards of which 1 GiB is taken\n")
    print_table(memory.rows(needs))
    if json:
        write_json(json, [asdict(need) for need in needs])
    if plot:
        write_plot(plot, memory.picture(needs))
    return 0


def run_offload(json: Path | None, plot: Path | None) -> int:
    models = offload.models()
    rows = list(offload.rows(models))
    print_table(offload.compared(models))
    print(f"\nPredicted at {offload.SIZE}x{offload.SIZE} with budget auto, cards of which 1 GiB is taken: a step, as a")
    print("multiple of its compute time, and the GiB resident from which on it stays within 3 % of that\n")
    print_table(offload.table(rows))
    if json:
        write_json(json, [asdict(row) for row in rows])
    if plot:
        write_plot(plot, offload.picture(rows))
    return 0


def _blocks(text: str) -> tuple[int, int]:
    double, _, single = text.partition("+")
    return positive(double), positive(single)


def write_plot(path: Path, picture: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(picture, encoding="utf-8")


def run_start(rounds: int, json: Path | None) -> int:
    progress = Progress()
    progress.stage("Starting, on a tiny Flux.1 of 19 double and 38 single blocks")
    seen = start.measure(rounds, progress.detail)
    progress.done()
    print("The first step after a start, each in a process of its own, one thread\n")
    print_table(start.rows(seen))
    print("\nSeconds of the first step by part\n")
    print_table(start.parts(seen))
    if json:
        write_json(json, seen)
    return 0


def _spread(seconds: Sequence[float]) -> str:
    return f"{median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f})"


if __name__ == "__main__":
    run_tool(main)
