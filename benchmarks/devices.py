"""A model on one device and shared out over several: eager, compiled and in 8 bits, measured in turns in one run."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.families import ROUNDS, Side, first_prompt, timed
from devtools import checkpoints, gpu_host
from devtools.cli import print_table, write_json

# By name: what makes the checkpoint, its blocks, its hidden size.
SHAPES = {"dev": (checkpoints.flux1, (19, 38), 3072), "klein": (checkpoints.flux2, (5, 20), 3072)}
SIZES = (1024, 2048)
TEXT_TOKENS = 512
FORMAT = "fp8_e4m3_rowwise"


def measure(
    count: int,
    shape: str,
    blocks: tuple[int, int] | None,
    hidden: int | None,
    sizes: Sequence[int],
    steps: int,
    json: Path | None,
    format: str = FORMAT,
    cpu: bool = False,
    **settings: Any,
) -> list[Side]:
    """Measure each side of the model of ``SHAPES`` called ``shape`` at each of ``sizes``, in pixels, and print a table.

    Args:
        count: of devices.
        blocks, hidden: by default those of the real model.
        steps: of each round.
        settings: of Compile Repeated Blocks.
        cpu: on devices that are imitated, to try it out.

    Raises:
        RuntimeError: a side was not shared out, or there are fewer devices.
    """
    gpu_host.start(dynamic_vram=False, cpu=cpu)
    import comfy.sd
    from hotpath_pack.hotpath import fibers

    there = gpu_host.imitated_devices(count) if cpu else nullcontext()
    make, real_blocks, real_hidden = SHAPES[shape]
    dtype = torch.float32 if cpu else torch.bfloat16
    made_on = "cpu" if cpu else "cuda"
    made = make(*(blocks or real_blocks), hidden=hidden or real_hidden, dtype=dtype, device=made_on)
    weights = {name: weight.cpu() for name, weight in made.items()}
    del made
    with tempfile.TemporaryDirectory() as folder, there:
        path = checkpoints.save(Path(folder, "model.safetensors"), weights)
        with torch.inference_mode():
            eager = comfy.sd.load_diffusion_model(str(path))
        small = gpu_host.quantize(eager, format)
        sides: list[Side] = []
        for name, model in (("eager", eager), (format, small)):
            over = split(model, count)
            sides += [Side(name, model), Side(f"{name}, {count} devices", over)]
            ours = gpu_host.compiled(model, **settings), gpu_host.compiled(over, **settings)
            sides += [Side(f"ours, {name}", ours[0]), Side(f"ours, {name}, {count} devices", ours[1])]
        rows = [row for size in sizes for row in measure_size(sides, size, steps, cpu)]
    where = "imitated devices" if cpu else torch.cuda.get_device_name()
    print(f"\n{count} x {where}, torch {torch.__version__}, shape of {shape}")
    print_table([("", "    pixels   ms/step   x one  issue ms   cold s  graphs  rel. diff"), *map(_line, rows)])
    if json:
        turns = "fibers" if fibers.available() else "threads"
        write_json(json, {**gpu_host.about(), "turns": turns, "devices": count, "shape": shape, "rows": rows})
    return sides


def split(model: Any, count: int) -> Any:
    """``model`` as Split Repeated Blocks returns it."""
    from hotpath_pack.host.splitting.split import split_repeated_blocks
    from hotpath_pack.host.telling.progress import NodeText

    with torch.inference_mode():
        return split_repeated_blocks(model, ", ".join(map(str, range(count))), NodeText(None))


def _line(row: dict[str, Any]) -> tuple[str, object]:
    numbers = f"{row['pixels']:10}{row['ms']:10.1f}{row['times_one']:8.2f}{row['issue']:10.1f}"
    numbers += f"{row['cold_seconds']:9.1f}{row['graphs']:8}"
    return row["name"], f"{numbers}{row['difference']:11.1e}"


def measure_size(sides: Sequence[Side], size: int, steps: int, cpu: bool) -> list[dict[str, Any]]:
    """Rows of the table at ``size``; times of earlier sizes are forgotten.

    ``issue`` is the milliseconds in which Python launches a step when nothing waits for the devices.
    """

    def sample(model: Any, count: int, wait: bool = True) -> tuple[Tensor, list[float]]:
        out = timed(model, (size, size), 1, 16 if cpu else TEXT_TOKENS, count, not cpu, wait)
        for blocks in model.get_wrappers("apply_model", "hotpath_split"):
            if blocks.why_not or not blocks.steps:
                raise RuntimeError(f"nothing was shared out: {blocks.why_not}")
        return out

    want, _ = sample(sides[0].model, 1)
    for side in sides:
        first_prompt(side, sample, want)
        side.steps = []
    for _ in range(ROUNDS):
        for side in sides:
            side.steps += sample(side.model, steps)[1][1:]
    rows = []
    for one, side in zip([each for each in sides[::2] for _ in range(2)], sides, strict=True):
        middle, alone = median(side.steps), median(one.steps)
        rows.append(
            {
                "name": side.name,
                "pixels": size,
                "ms": middle,
                "times_one": alone / middle,
                "issue": median(sample(side.model, steps, wait=False)[1][1:]),
                "cold_seconds": side.cold_seconds,
                "graphs": side.graphs,
                "difference": side.difference,
            }
        )
    return rows
