"""A model on one device and shared out over several: eager, compiled and in 8 bits, measured in turns in one run."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
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
CFG = 4.0


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
    with loaded(shape, count, blocks, hidden, cpu) as eager:
        small = gpu_host.quantize(eager, format)
        sides: list[Side] = []
        for name, model in (("eager", eager), (format, small)):
            over = split(model, count)
            sides += [Side(name, model), Side(f"{name}, {count} devices", over)]
            ours = gpu_host.compiled(model, **settings), gpu_host.compiled(over, **settings)
            sides += [Side(f"ours, {name}", ours[0]), Side(f"ours, {name}, {count} devices", ours[1])]
        rows = [row for size in sizes for row in measure_size(sides, size, steps, cpu)]
    _print(
        count,
        shape,
        cpu,
        [("", "    pixels   ms/step   x one  issue ms   cold s  graphs  rel. diff"), *map(_line, rows)],
    )
    if json:
        from hotpath_pack.hotpath import fibers

        turns = "fibers" if fibers.available() else "threads"
        write_json(json, {**gpu_host.about(), "turns": turns, "devices": count, "shape": shape, "rows": rows})
    return sides


@contextmanager
def loaded(shape: str, count: int, blocks: tuple[int, int] | None, hidden: int | None, cpu: bool) -> Iterator[Any]:
    """A MODEL of ``SHAPES`` that the host read from a file and can read again, on a machine with ``count`` devices."""
    gpu_host.start(dynamic_vram=False, cpu=cpu)
    import comfy.sd

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
            model = comfy.sd.load_diffusion_model(str(path))
        yield model


def split(model: Any, count: int) -> Any:
    """``model`` as Split Repeated Blocks returns it."""
    from hotpath_pack.host.splitting.split import split_repeated_blocks
    from hotpath_pack.host.telling.progress import NodeText

    with torch.inference_mode():
        return split_repeated_blocks(model, ", ".join(map(str, range(count))), NodeText(None))


def _print(count: int, shape: str, cpu: bool, rows: Sequence[tuple[str, object]]) -> None:
    where = "imitated devices" if cpu else torch.cuda.get_device_name()
    print(f"\n{count} x {where}, torch {torch.__version__}, shape of {shape}")
    print_table(rows)


def _line(row: dict[str, Any]) -> tuple[str, object]:
    numbers = f"{row['pixels']:10}{row['ms']:10.1f}{row['times_one']:8.2f}"
    numbers += f"{row['issue']:10.1f}" if "issue" in row else ""
    numbers += f"{row['cold_seconds']:9.1f}{row['graphs']:8}"
    return row["name"], f"{numbers}{row['difference']:11.1e}"


def measure_guidance(
    count: int,
    shape: str,
    blocks: tuple[int, int] | None,
    hidden: int | None,
    sizes: Sequence[int],
    steps: int,
    json: Path | None,
    cpu: bool = False,
    **settings: Any,
) -> list[Side]:
    """The same of the host's MultiGPU CFG Split, which gives each device a conditioning: steps of a sampler at a CFG
    above 1, whose sides on one device run both at once."""
    with loaded(shape, count, blocks, hidden, cpu) as eager:
        from comfy.multigpu import create_multigpu_deepclones

        sides: list[Side] = []
        for name, model in (("eager", eager), ("ours", gpu_host.compiled(eager, **settings))):
            with torch.inference_mode():
                over = create_multigpu_deepclones(model, count)
            sides += [Side(name, model), Side(f"{name}, CFG split over {count}", over)]
        rows = []
        for size in sizes:

            def sample(model: Any, steps: int, size: int = size) -> tuple[Tensor, list[float]]:
                return _timed_guidance(model, size, steps, cpu)

            want, _ = sample(eager, 1)
            for side in sides:
                first_prompt(side, sample, want)
                side.steps = []
            for _ in range(ROUNDS):
                for side in sides:
                    side.steps += sample(side.model, steps)[1]
            for one, side in zip([sides[0], sides[0], sides[2], sides[2]], sides, strict=True):
                row = {"name": side.name, "pixels": size, "ms": median(side.steps)}
                row |= {"times_one": median(one.steps) / row["ms"], "cold_seconds": side.cold_seconds}
                rows.append(row | {"graphs": side.graphs, "difference": side.difference})
    _print(count, shape, cpu, [("", "    pixels   ms/step   x one   cold s  graphs  rel. diff"), *map(_line, rows)])
    if json:
        write_json(json, {**gpu_host.about(), "devices": count, "shape": shape, "cfg": CFG, "rows": rows})
    return sides


def _timed_guidance(model: Any, size: int, steps: int, cpu: bool) -> tuple[Tensor, list[float]]:
    """A latent, the same at each call, and the milliseconds of each step but the first."""
    import comfy.sample
    from hotpath_pack.host.families import family_of
    from hotpath_pack.host.families.kinds import random_tensor
    from hotpath_pack.host.measuring.synthetic import latent_shape

    ends: list[float] = []

    def ended(*progress: Any) -> None:
        if not cpu:
            for number in range(torch.cuda.device_count()):
                torch.cuda.synchronize(number)
        ends.append(time.perf_counter() * 1e3)

    diffusion_model = model.model.diffusion_model
    family: Any = family_of(diffusion_model)
    ((text, extra),) = [list(family.conditioning(diffusion_model, 16 if cpu else TEXT_TOKENS))]
    noise = random_tensor(*latent_shape(model, size, size, 1, 1))
    with torch.inference_mode():
        latent = comfy.sample.sample(
            model,
            noise,
            steps,
            CFG,
            "euler",
            "simple",
            [[text, extra]],
            [[-text, extra]],
            noise * 0,
            seed=0,
            disable_pbar=True,
            callback=ended,
        )
    return latent, [after - before for before, after in pairwise(ends)]


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
