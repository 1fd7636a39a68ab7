"""Flux.1-dev's shape on cards of less memory than the one there is, each way that a user may run it."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from devtools import gpu_host
from devtools.ballast import GIB, small_card
from devtools.cli import write_json
from devtools.gpu_host import compiled, compiled_per_block, load, offload, quantize, sample, timed

SIZE = (1024, 1024)
TEXT_TOKENS = 512
# In the first ones weights settle, and blocks are recorded.
SETTLING, STEPS = 8, 6
IMAGE_STEPS = 28
SIDES = (
    "eager",
    "ours",
    "ours, offload",
    "ours, fp8",
    "ours, fp8, offload",
    "ours, int8",
    "ours, int8, offload",
)
FORMATS = {"fp8": "fp8_e4m3_rowwise", "int8": "int8_dynamic"}


@dataclass
class Row:
    """One side on one card. Times are of the device in milliseconds and of the clock in seconds, memory in GiB.

    ``steps``: of one run, of which ``step`` is the median without the first ``SETTLING``. ``first``: the first call of
    the model, which moves weights, and compiles where nothing before it did. ``image``: of ``IMAGE_STEPS`` steps, as
    what sampling took beside its steps, and that many steady ones. ``resident``: the share of the weights that was on
    the card. ``peak``: of CUDA's allocator, without what dynamic VRAM holds. ``failed``: the error, and nothing else
    then.
    """

    card: float
    dynamic: bool
    side: str
    step: float = 0.0
    steps: list[float] = field(default_factory=list)
    first: float = 0.0
    image: float = 0.0
    resident: float = 0.0
    peak: float = 0.0
    failed: str = ""


def measure(
    cards: Sequence[float],
    dynamic: bool,
    sides: Sequence[str],
    json: Path | None,
    blocks: Sequence[int] = (19, 38),
    told: bool = True,
) -> list[Row]:
    """A row for each of ``sides`` on each of ``cards``, written to ``json`` as they come."""
    gpu_host.start(dynamic_vram=dynamic)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}", flush=True)
    whole = load(*blocks, torch.bfloat16, hidden=3072, text_width=4096, pooled_width=768, dynamic=dynamic)
    models: dict[str, Any] = {}
    rows: list[Row] = []
    for card in cards:
        _unload()
        with small_card(card, told=told and dynamic) as free:
            print(f"{free:.1f} GiB free, {'with' if dynamic else 'without'} dynamic VRAM", flush=True)
            for side in sides:
                row = _measure(Row(card, dynamic, side), partial(make, side, whole, models))
                rows.append(row)
                print(_line(row), flush=True)
                if json:
                    numbers = [asdict(row) for row in rows]
                    write_json(json, {**gpu_host.about(), "told": told, "rows": numbers})
    return rows


def make(side: str, whole: Any, quantized: dict[str, Any]) -> Any:
    """The MODEL of a side's name."""
    parts = side.split(", ")
    model = whole
    for name in FORMATS:
        if name in parts:
            if name not in quantized:
                quantized[name] = quantize(whole, FORMATS[name])
            model = quantized[name]
    if "offload" in parts:
        model = offload(model)
    if "per block" in parts:
        return compiled_per_block(model)
    if "whole model" in parts:
        from comfy_extras.nodes_torch_compile import TorchCompileModel

        return TorchCompileModel.execute(model, "inductor").args[0]
    return compiled(model) if "ours" in parts else model


def _unload() -> None:
    import comfy.model_management as management

    with torch.inference_mode():
        management.unload_all_models()
    gc.collect()
    torch.cuda.empty_cache()


def _measure(row: Row, model: Callable[[], Any]) -> Row:
    _unload()
    torch.cuda.reset_peak_memory_stats()
    try:
        made, took = timed(model())
        started = time.perf_counter()
        sample(made, SIZE, TEXT_TOKENS, 1)
        row.first = time.perf_counter() - started
        started = time.perf_counter()
        sample(made, SIZE, TEXT_TOKENS, SETTLING + STEPS)
        row.steps = took()[1:]
        beside = max(0.0, time.perf_counter() - started - sum(row.steps) / 1e3)
        row.step = median(row.steps[SETTLING:])
        row.image = beside + IMAGE_STEPS * row.step / 1e3
        row.resident = made.loaded_size() / made.model_size()
        row.peak = torch.cuda.max_memory_allocated() / GIB
    except Exception as error:
        # A row that fails is a result of this measurement.
        row.failed = f"{type(error).__name__}: {error}"[:200]
        print("".join(traceback.format_exc()[-3000:]), flush=True)
    return row


def _line(row: Row) -> str:
    if row.failed:
        return f"  {row.side:<22} FAILED {row.failed}"
    each = " ".join(f"{step:.0f}" for step in row.steps)
    return (
        f"  {row.side:<22} step {row.step:7.1f} ms (all {each}), first {row.first:5.1f} s, "
        f"{IMAGE_STEPS} steps {row.image:5.1f} s, {row.resident:4.0%} there, peak {row.peak:4.1f} GiB"
    )
