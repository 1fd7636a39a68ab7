"""dev.py bench: seconds per step eager and compiled, on one thread, over several rounds in turns."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import median

from devtools.cli import add_sampling_arguments, comfyui_folder, positive, print_table, run_tool, write_json
from devtools.measure import compare


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="dev.py bench", description="Measure Compile Repeated Blocks against eager in a real ComfyUI."
    )
    add_sampling_arguments(parser)
    parser.add_argument("--rounds", type=positive, default=3, metavar="N", help="warm runs of each (default: 3)")
    given = parser.parse_args(arguments)
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


def _spread(seconds: Sequence[float]) -> str:
    return f"{median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f})"


if __name__ == "__main__":
    run_tool(main)
