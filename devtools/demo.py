"""dev.py demo: what Compile Repeated Blocks does to a Flux, in one table."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .cli import add_sampling_arguments, comfyui_folder, print_table, run_tool, write_json
from .measure import compare


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="dev.py demo", description="Sample a Flux in a real ComfyUI, eager and compiled, and compare."
    )
    add_sampling_arguments(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep both latents and the host's log there")
    given = parser.parse_args(arguments)
    comparison = compare(comfyui_folder(), given.model, size=given.size, steps=given.steps, rounds=2, out=given.out)
    numbers = comparison.numbers()
    blocks, seconds = numbers["blocks"], numbers["seconds_per_step"]
    width, height = numbers["size"]
    print(f"{numbers['model']} on {numbers['device']}, {width}x{height}, {numbers['steps']} steps\n")
    print_table(
        [
            ("blocks compiled", f"{blocks['double']} double, {blocks['single']} single"),
            *((f"blocks eager: {reason}", ", ".join(names)) for reason, names in numbers["eager_blocks"].items()),
            ("regions", numbers["regions"]),
            ("graphs", numbers["graphs"]),
            ("graph breaks", numbers["graph_breaks"]),
            ("recompiles", numbers["recompiles"]),
            ("compile seconds", f"{numbers['compile_seconds']:.1f}"),
            ("seconds per step, eager", f"{seconds['eager']:.3f}"),
            ("seconds per step, compiled", f"{seconds['compiled']:.3f}"),
            ("largest difference of latents", f"{numbers['largest_difference']:.1e}"),
        ]
    )
    if given.json:
        write_json(given.json, numbers)
    return 0


if __name__ == "__main__":
    run_tool(main)
