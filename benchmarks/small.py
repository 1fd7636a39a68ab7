"""``python -m benchmarks.gpu --small``: steps that launching takes longer than computing, with CUDA graphs and without.

Shapes of Flux.2 Klein 4B (5 + 20 blocks) and Flux.1-dev (19 + 38), both of width 3072, with random weights, each in
bf16 and in 8 bits: milliseconds from step to step beside what its kernels take one after another.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from devtools import gpu_host
from devtools.cli import write_json
from devtools.gpu_host import calling, compiled, load, quantize, sample

GIB = 2**30
TEXT_TOKENS = 512
FORMAT = "fp8_e4m3_rowwise"
ROWS = (
    ("klein", (5, 20), (512, 1024)),
    ("dev", (19, 38), (512, 256, 1024)),
)
ROUNDS = 3
SIDES = ("eager", "without", "auto")


@dataclass
class Way:
    """One way to run one shape at one size. Times are milliseconds a step, memory is in GiB.

    ``difference`` is from the same regions without graphs, and from eager for those; the first must be 0.
    ``used`` is what the whole device has in use, ``kept`` what of it recordings keep.
    """

    shape: str
    size: int
    name: str
    steps: list[float] = field(default_factory=list)
    issue: float = 0.0
    kernels: float = 0.0
    difference: float = 0.0
    peak: float = 0.0
    reserved: float = 0.0
    used: float = 0.0
    kept: float = 0.0
    summary: str = ""

    @property
    def step(self) -> float:
        return median(self.steps)


def measure_small(
    json: Path | None, names: Sequence[str], sizes: Sequence[int], sides: Sequence[str], hidden: int = 3072
) -> list[Way]:
    """All rows, or those of shapes ``names`` and ``sizes``, of the ways ``sides``; printed and written to ``json`` as
    they come."""
    ways: list[Way] = []
    for shape, blocks, all_sizes in ROWS:
        chosen = [size for size in all_sizes if not sizes or size in sizes]
        if (names and shape not in names) or not chosen:
            continue
        made = _sides(blocks, hidden)
        for size in chosen:
            for models in made:
                latents: dict[str, torch.Tensor] = {}
                for name in [name for name in models if name.removeprefix("fp8 ") in sides]:
                    ways.append(_measure(shape, size, name, models[name], latents))
                    _print(ways[-1], ways)
                    _write(json, ways)
        del made, models
        gc.collect()
        torch.cuda.empty_cache()
    return ways


def _sides(blocks: tuple[int, int], hidden: int) -> list[dict[str, Any]]:
    """For bf16 and for 8 bits, the MODELs by name."""
    text_width = 4096 if hidden == 3072 else 64
    plain = load(*blocks, torch.bfloat16, hidden=hidden, text_width=text_width, pooled_width=768)
    sides = []
    for name, model in (("", plain), ("fp8 ", quantize(plain, FORMAT))):
        always = compiled(model, cache="auto")
        always.get_wrappers("apply_model", "hotpath_compile")[0].replays.always = True
        models = {
            f"{name}eager": model,
            f"{name}without": compiled(model, cache="auto", cuda_graphs="off"),
            f"{name}auto": compiled(model, cache="auto"),
            f"{name}always": always,
        }
        if name:
            # The host multiplies these slower than it does in bf16.
            del models[f"{name}eager"]
        sides.append(models)
    return sides


def _write(json: Path | None, ways: Sequence[Way]) -> None:
    if json:
        numbers = [{**vars(way), "step": way.step} for way in ways]
        write_json(json, {**gpu_host.about(), "ways": numbers})


def _measure(shape: str, size: int, name: str, model: Any, latents: dict[str, torch.Tensor]) -> Way:
    way = Way(shape, size, name)
    _forget()
    # The first step compiles, the next ones record.
    latents[name] = _sample(model, size, 5)
    # What is recorded is compared with the same regions unrecorded, and those with eager.
    base = next((latents[known] for known in latents if known.endswith("without") != name.endswith("without")), None)
    if base is not None and name != "eager":
        way.difference = ((latents[name] - base).norm() / base.norm()).item()
    torch.cuda.reset_peak_memory_stats()
    _sample(model, size, 2)
    way.peak = torch.cuda.max_memory_allocated() / GIB
    way.reserved = torch.cuda.max_memory_reserved() / GIB
    free, total = torch.cuda.mem_get_info()
    way.used = (total - free) / GIB
    wrapper = model.get_wrappers("apply_model", "hotpath_compile")
    if wrapper:
        way.kept = wrapper[0].replays.bytes / GIB
        way.summary = wrapper[0].summary()
    way.issue = _issue(model, size)
    way.kernels = _kernels(model, size)
    count = 5 if size >= 1024 else 8
    way.steps = [_from_step_to_step(model, size, count) for _ in range(ROUNDS)]
    return way


def _forget() -> None:
    """What another way recorded, and what the allocator keeps."""
    from hotpath_pack.host.compiling import replay

    for recordings in replay._RECORDINGS.values():
        recordings.drop()
    gc.collect()
    torch.cuda.empty_cache()


def _sample(model: Any, size: int, steps: int) -> torch.Tensor:
    return sample(model, (size, size), TEXT_TOKENS, steps)


def _from_step_to_step(model: Any, size: int, count: int) -> float:
    """Milliseconds a step on the device's clock, from one step to the next: of ``count``, the first of all left out."""
    marks = []

    def marked(call: Callable[[], torch.Tensor]) -> torch.Tensor:
        out = call()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        marks.append(mark)
        return out

    _sample(calling(model, marked), size, count + 1)
    torch.cuda.synchronize()
    return marks[0].elapsed_time(marks[-1]) / count


def _issue(model: Any, size: int) -> float:
    """Milliseconds until a step is launched, when nothing waits for the device."""
    times = []

    def timed(call: Callable[[], torch.Tensor]) -> torch.Tensor:
        torch.cuda.synchronize()
        started = time.perf_counter()
        out = call()
        times.append(time.perf_counter() - started)
        return out

    _sample(calling(model, timed), size, 8)
    return median(times[3:]) * 1e3


def _kernels(model: Any, size: int) -> float:
    """Milliseconds of all that runs on the device in a step."""
    totals = []
    for steps in (2, 4):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            _sample(model, size, steps)
            torch.cuda.synchronize()
        events = profiler.profiler.kineto_results.events()
        totals.append(
            sum(event.duration_ns() for event in events if event.device_type() == torch.profiler.DeviceType.CUDA)
        )
    return (totals[1] - totals[0]) / 2 / 1e6


def _print(way: Way, ways: Sequence[Way]) -> None:
    eager = [known.step for known in ways if (known.shape, known.size, known.name) == (way.shape, way.size, "eager")]
    gain = f"{eager[0] / way.step:5.2f}x" if eager else ""
    print(
        f"{way.shape:<6}{way.size:>5} {way.name:<12}{way.step:7.1f} ms (least {min(way.steps):.1f}) {gain:>6} "
        f"{way.step / way.kernels:5.2f} of kernels {way.kernels:.1f}  issue {way.issue:.1f}  "
        f"peak {way.peak:.2f} reserved {way.reserved:.2f} used {way.used:.2f} kept {way.kept:.2f} GiB  "
        f"diff {way.difference:.1e}  {way.summary}",
        flush=True,
    )
