"""dev.py bench: seconds per step eager and compiled, on one thread, in turns; a soak; formats' quality; starts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

from benchmarks import start
from benchmarks.quantize import qualities, rows
from devtools.cli import Progress, add_sampling_arguments, comfyui_folder, positive, print_table, run_tool, write_json
from devtools.measure import compare
from devtools.soak import soak


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="dev.py bench", description="Measure Compile Repeated Blocks against eager in a real ComfyUI."
    )
    add_sampling_arguments(parser)
    parser.add_argument("--rounds", type=positive, default=3, metavar="N", help="warm runs of each (default: 3)")
    parser.add_argument(
        "--soak",
        type=positive,
        nargs="?",
        const=300,
        metavar="N",
        help="instead, N prompts of all kinds on one server (default: 300): images, graphs, memory and leaks",
    )
    parser.add_argument(
        "--quantize", action="store_true", help="instead, size and signal-to-noise ratio of each format"
    )
    parser.add_argument(
        "--start", action="store_true", help="instead, the first step after a start of ComfyUI: cold, warm and loaded"
    )
    given = parser.parse_args(arguments)
    if given.start:
        return run_start(given.rounds, given.json)
    if given.soak:
        return run_soak(given.soak, given.json)
    if given.quantize:
        return run_quantize(given.size or (128, 128), given.json)
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


def run_quantize(size: tuple[int, int], json: Path | None) -> int:
    progress = Progress()
    progress.stage("Quantizing a tiny Flux.1 of 19 double and 38 single blocks")
    measured = qualities(comfyui_folder(), size, progress.detail)
    progress.done()
    print(f"Signal-to-noise ratio against full precision, {size[0]}x{size[1]}\n")
    print_table(rows(measured))
    if json:
        write_json(json, [asdict(quality) for quality in measured])
    return 0


def run_start(rounds: int, json: Path | None) -> int:
    progress = Progress()
    progress.stage("Starting, on a tiny Flux.1 of 19 double and 38 single blocks")
    seen = start.measure(rounds, progress.detail)
    progress.done()
    print("The first step after a start, each in a process of its own, one thread\n")
    print_table(start.rows(seen))
    if json:
        write_json(json, seen)
    return 0


def _spread(seconds: Sequence[float]) -> str:
    return f"{median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f})"


if __name__ == "__main__":
    run_tool(main)
