"""A model on one device and shared out over several: eager, compiled and in 8 bits, measured in turns in one run."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.families import ROUNDS, Side, first_prompt, sampled
from devtools import checkpoints, gpu_host
from devtools.cli import print_table, write_json

# By name: what makes the checkpoint, its blocks, its hidden size.
SHAPES = {"dev": (checkpoints.flux1, (19, 38), 3072), "klein": (checkpoints.flux2, (5, 20), 3072)}
SIZES = (1024, 2048)
TEXT_TOKENS = 512
FORMAT = "fp8_e4m3_rowwise"
NAMES = ("eager", "ours, eager", FORMAT, f"ours, {FORMAT}")
CFG = 4.0


def measure(
    count: int,
    shape: str,
    blocks: tuple[int, int] | None,
    hidden: int | None,
    sizes: Sequence[int],
    steps: int,
    json: Path | None,
    names: Sequence[str] = NAMES,
    guidance: bool = False,
    cpu: bool = False,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Measure each of ``names`` on one device and over several, of the model of ``SHAPES`` called ``shape``, at each of
    ``sizes``, in pixels. Rows of a table are printed, and written to ``json``, as they are known.

    Args:
        count: of devices.
        blocks, hidden: by default those of the real model.
        steps: of each round.
        guidance: in place of ``names``, by the host's MultiGPU CFG Split, which gives each device a conditioning: steps
            at a CFG above 1, of which one device runs both at once.
        settings: of Compile Repeated Blocks.
        cpu: on devices that are imitated, to try it out.

    Raises:
        RuntimeError: a side was not shared out, or there are fewer devices.
    """
    with loaded(shape, count, blocks, hidden, cpu) as eager:
        from hotpath_pack.hotpath import fibers

        pairs = guided(eager, count, settings) if guidance else shared_out(eager, names, count, settings)
        how = {"cfg": CFG} if guidance else {"turns": "fibers" if fibers.available() else "threads"}
        facts = {**gpu_host.about(), **how, "devices": count, "shape": shape}
        rows: list[dict[str, Any]] = []
        for size in sizes:

            def sample(model: Any, steps: int, size: int = size) -> tuple[Tensor, list[float]]:
                return _timed(model, size, steps, CFG if guidance else 1.0, cpu)

            rows += measure_pairs(pairs, sample, sample(eager, 1)[0], size, steps)
            _tell(rows, itertools.chain(*pairs), facts, json)
    return rows


def shared_out(eager: Any, names: Sequence[str], count: int, settings: Mapping[str, Any]) -> list[tuple[Side, Side]]:
    """Each of ``names`` on one device, and with its tokens over several."""
    small = gpu_host.quantize(eager, FORMAT) if any(FORMAT in name for name in names) else None
    pairs = []
    for name in names:
        model = small if FORMAT in name else eager
        over = split(model, count)
        if name.startswith("ours"):
            model, over = (gpu_host.compiled(each, **settings) for each in (model, over))
        pairs.append((Side(name, model), Side(f"{name}, {count} devices", over)))
    return pairs


def guided(eager: Any, count: int, settings: Mapping[str, Any]) -> list[tuple[Side, Side]]:
    """Eager and compiled, with both conditionings on one device and each on its own."""
    from comfy.multigpu import create_multigpu_deepclones

    pairs = []
    for name, model in (("eager", eager), ("ours", gpu_host.compiled(eager, **settings))):
        with torch.inference_mode():
            over = create_multigpu_deepclones(model, count)
        pairs.append((Side(name, model), Side(f"{name}, CFG split over {count}", over)))
    return pairs


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


def measure_pairs(
    pairs: Sequence[tuple[Side, Side]],
    sample: Callable[[Any, int], tuple[Tensor, list[float]]],
    want: Tensor,
    size: int,
    steps: int,
) -> list[dict[str, Any]]:
    """Rows of the table at ``size``; times of earlier sizes are forgotten."""
    sides = list(itertools.chain(*pairs))
    for side in sides:
        first_prompt(side, sample, want)
        side.steps = []
    for _ in range(ROUNDS):
        for side in sides:
            side.steps += sample(side.model, steps)[1]
    return [
        {
            "name": side.name,
            "pixels": size,
            "ms": median(side.steps),
            "times_one": median(one.steps) / median(side.steps),
            "cold_seconds": side.cold_seconds,
            "graphs": side.graphs,
            "difference": side.difference,
        }
        for one, over in pairs
        for side in (one, over)
    ]


def _tell(rows: Sequence[dict[str, Any]], sides: Iterable[Side], facts: dict[str, Any], json: Path | None) -> None:
    print(f"\n{facts['devices']} x {facts['device']}, torch {torch.__version__}, shape of {facts['shape']}")
    print_table([("", "    pixels   ms/step   x one   cold s  graphs  rel. diff"), *map(_line, rows)])
    for side in sides:
        for blocks in side.model.get_wrappers("apply_model", "hotpath_compile"):
            print(f"{side.name}: {blocks.replays.summary() or 'no CUDA graphs'}", flush=True)
    if json:
        write_json(json, {**facts, "rows": rows})


def _line(row: dict[str, Any]) -> tuple[str, object]:
    numbers = f"{row['pixels']:10}{row['ms']:10.1f}{row['times_one']:8.2f}{row['cold_seconds']:9.1f}{row['graphs']:8}"
    return row["name"], f"{numbers}{row['difference']:11.1e}"


def _timed(model: Any, size: int, steps: int, cfg: float, cpu: bool) -> tuple[Tensor, list[float]]:
    """A latent, the same at each call, and the milliseconds of each step but the first, from the end of one on the
    first device to that of the next, as a sampler runs them: nothing waits for the devices between."""
    ends: list[Any] = []

    def ended(*progress: Any) -> None:
        if cpu:
            ends.append(time.perf_counter() * 1e3)
        else:
            ends.append(torch.cuda.Event(enable_timing=True))
            ends[-1].record(torch.cuda.current_stream(model.load_device))

    latent = sampled(model, (size, size), 1, 16 if cpu else TEXT_TOKENS, steps, cfg, ended)
    for blocks in model.get_wrappers("apply_model", "hotpath_split"):
        if blocks.why_not or not blocks.steps:
            raise RuntimeError(f"nothing was shared out: {blocks.why_not}")
    if not cpu:
        torch.cuda.synchronize(model.load_device)
    return latent, [after - before if cpu else before.elapsed_time(after) for before, after in pairwise(ends)]
