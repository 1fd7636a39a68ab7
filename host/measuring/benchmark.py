"""Time a MODEL, or two beside each other, on made-up inputs, and draw what came out."""

from __future__ import annotations

import importlib.util
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...hotpath.memory import peak_bytes
from ..compiling.compile import compiled_blocks
from ..families import require_family
from ..models import compiled_as_a_whole, compiled_elsewhere, require_model
from ..quantizing.quantize import quantization, weight_bytes
from ..residency.offload import KEY as OFFLOAD_KEY
from ..residency.streaming import StreamedBlocks
from ..telling.progress import NodeText
from .eager_steps import EagerSteps
from .synthetic import Inputs, sample

_GIB = 2**30
_KEY = "hotpath_benchmark"
_COLOURS = ("#4269d0", "#efb118")
# Inches and dots of the figure: 1600 x 800 pixels.
_SIZE, _DPI = (10.0, 5.0), 160


@dataclass
class Side:
    """What was measured of one MODEL; seconds, and bytes: of the GPU's memory at the peak, and streamed to it a step.

    ``compiling`` is what compiling its blocks took so far, or loading them, in this benchmark and before.
    """

    name: str
    first: float = 0.0
    compiling: float = 0.0
    steps: list[float] = field(default_factory=list)
    images: list[float] = field(default_factory=list)
    peak: int = 0
    streamed: float = 0.0

    @property
    def step(self) -> float:
        """Median of the steady steps."""
        return statistics.median(self.steps)

    @property
    def once(self) -> float:
        """What is paid once: the first step over a steady one, or compiling where that was done before."""
        return max(self.first - self.step, self.compiling)

    @property
    def image(self) -> float:
        """Median of the steps of a whole run together."""
        return statistics.median(self.images)


def benchmark_model(
    model: ModelPatcher, compare_with: ModelPatcher | None, inputs: Inputs, steps: int, rounds: int, text: NodeText
) -> tuple[str, Tensor]:
    """What ``steps`` steps of ``model`` take on ``inputs``, as text and as an image (1, height, width, 3) in 0..1.

    Each side runs once to compile, then ``rounds`` times, the two in turns so that what slows the machine meets both.

    Raises:
        ValueError: one of the two is no MODEL, or none of those that this pack speeds up.
        RuntimeError: matplotlib is missing.
    """
    _require_matplotlib()
    models = [model] if compare_with is None else [model, compare_with]
    for each in models:
        require_model(each)
        require_family(each, "measure")
    sides = [Side(name) for name in _names(models)]
    bar = comfy.utils.ProgressBar(len(models) * (rounds + 1) * steps)
    with text.guarded():
        for number in range(rounds + 1):
            for side, each in zip(sides, models, strict=True):
                run = f"run {number} of {rounds}" if number else "first run"
                text.show(f"{side.name}: {run} ...", "working")
                _run(side, each, inputs, steps, number == 0, bar)
    where = f"{type(model.model).__name__}, {inputs}, {steps} steps, {_device_name(model.load_device)}"
    told = describe(sides, inputs.batch, steps, where)
    text.show(told.splitlines()[-1])
    return told, draw(sides, inputs.batch, where)


def _names(models: Sequence[ModelPatcher]) -> list[str]:
    names = [_name(model) for model in models]
    if len(set(names)) < len(names):
        return [f"{name} ({place})" for name, place in zip(names, ("model", "compare_with"), strict=True)]
    return names


def _name(model: ModelPatcher) -> str:
    """What was done to ``model`` that sets it apart from another."""
    done = quantization(model)
    parts = (
        []
        if done is None
        else [kind.removeprefix("layers in ") for kind in done.layers if kind.startswith("layers in ")]
    )
    if model.get_wrappers(WrappersMP.APPLY_MODEL, OFFLOAD_KEY):
        parts.append("offloaded")
    if compiled_as_a_whole(model):
        parts.append("compiled as a whole")
    else:
        parts.append("eager" if compiled_blocks(model) is None else "compiled")
    return " + ".join(parts)


def _run(side: Side, model: ModelPatcher, inputs: Inputs, steps: int, first: bool, bar: Any) -> None:
    device, apart = model.load_device, 0
    blocks, measured = compiled_blocks(model), model.clone()
    if blocks is None and not compiled_elsewhere(model):
        measured.add_wrapper_with_key(WrappersMP.APPLY_MODEL, _KEY, EagerSteps())

    def on_step() -> None:
        nonlocal apart
        bar.update(1)
        apart = max(apart, _outside(model) - _others(model))

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = sample(measured, inputs, steps, on_step)
    if blocks is not None:
        side.compiling = sum(region.stats.seconds + region.stats.load_seconds for region in blocks.regions)
    if first:
        side.first = seconds[0]
        return
    # The first step of a run may make what serves all others, such as modulation.
    side.steps += seconds[1:]
    side.images.append(sum(seconds))
    streams = model.get_wrappers(WrappersMP.APPLY_MODEL, OFFLOAD_KEY)
    side.streamed = sum(each.bytes_copied for each in streams if isinstance(each, StreamedBlocks)) / steps
    if device.type == "cuda":
        side.peak = max(side.peak, peak_bytes(device) + apart)


def _outside(model: ModelPatcher) -> int:
    """Bytes of the weights that dynamic VRAM has on the device, which PyTorch's allocator does not count."""
    return model.loaded_size() - model.model.model_loaded_weight_memory if model.is_dynamic() else 0


def _others(model: ModelPatcher) -> int:
    """Bytes on the device of weights of other models, which the host keeps there while there is room."""
    mine = {id(parameter) for parameter in model.model.parameters()}
    theirs = {
        id(parameter): parameter
        for loaded in comfy.model_management.current_loaded_models
        if loaded.model is not None
        for parameter in loaded.model.model.parameters()
    }
    return sum(
        weight_bytes(parameter)
        for key, parameter in theirs.items()
        if key not in mine and parameter.device == model.load_device
    )


def describe(sides: Sequence[Side], batch: int, steps: int, where: str) -> str:
    """A line on what was run, one for each side, and with two sides one that compares them."""
    lines = [where]
    for side in sides:
        parts = [f"{_time(side.step)} a step ({_time(min(side.steps))} to {_time(max(side.steps))})"]
        parts += [f"{_time(side.image)} for {steps} steps", f"{_time(side.once)} once"]
        if side.compiling:
            parts.append(f"{_time(side.compiling)} of compiling")
        if side.peak:
            parts.append(f"peak memory {_size(side.peak)}")
        if side.streamed:
            parts.append(f"{_size(side.streamed)} streamed a step")
        lines.append(f"{side.name}: {', '.join(parts)}")
    if len(sides) == 2:
        lines.append(_comparison(sides[0], sides[1], batch))
    return "\n".join(lines)


def _comparison(side: Side, other: Side, batch: int) -> str:
    faster, slower = (side, other) if side.image <= other.image else (other, side)
    said = f"{faster.name} is {slower.image / faster.image:.2f} times as fast as {slower.name}"
    count = break_even(faster, slower, batch)
    if count is None:
        return said
    return f"{said}, ahead from image {count} on"


def break_even(faster: Side, slower: Side, batch: int) -> int | None:
    """How many images it takes until what ``faster`` costs once is regained; None when it never is."""
    gain = (slower.image - faster.image) / batch
    if gain <= 0:
        return None
    return max(math.ceil((faster.once - slower.once) / gain), 1)


def draw(sides: Sequence[Side], batch: int, where: str) -> Tensor:
    """Step times with their spread beside total time over images, as an image (1, height, width, 3) in 0..1."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    title = (
        _comparison(sides[0], sides[1], batch) if len(sides) == 2 else f"{sides[0].name}: {_time(sides[0].step)} a step"
    )
    figure.suptitle(f"{title}\n", fontsize=14, fontweight="bold")
    figure.text(0.5, 0.91, where, ha="center", fontsize=9, color="#555555")
    left, right = figure.subplots(1, 2)
    _draw_steps(left, sides)
    _draw_totals(right, sides, batch)
    canvas.draw()
    width, height = canvas.get_width_height()
    pixels = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8).reshape(1, height, width, 4)
    return pixels[..., :3].float() / 255


def _draw_steps(axes: Any, sides: Sequence[Side]) -> None:
    unit, factor = ("ms", 1000) if max(max(side.steps) for side in sides) < 1 else ("s", 1)
    for place, (side, colour) in enumerate(zip(sides, _COLOURS, strict=False)):
        axes.bar(place, side.step * factor, width=0.55, color=colour, alpha=0.85)
        spread = [[place + (index % 7 - 3) * 0.03 for index in range(len(side.steps))], side.steps]
        axes.scatter(spread[0], [value * factor for value in spread[1]], s=9, color="#222222", alpha=0.6, zorder=3)
    axes.set_xticks(range(len(sides)), ["\n".join(_below(side)) for side in sides])
    axes.set_xlim(-0.7, len(sides) - 0.3)
    axes.margins(y=0.1)
    axes.set_ylabel(f"Time of a step ({unit})")
    axes.set_title("A step: median, and each step as a dot", fontsize=10)
    _plain(axes)


def _below(side: Side) -> list[str]:
    lines = [side.name, f"median {_time(side.step)}"]
    if side.peak:
        lines.append(f"peak memory {_size(side.peak)}")
    if side.streamed:
        lines.append(f"{_size(side.streamed)} streamed a step")
    return lines


def _draw_totals(axes: Any, sides: Sequence[Side], batch: int) -> None:
    crossing = None
    if len(sides) == 2:
        faster, slower = sorted(sides, key=lambda side: side.image)
        crossing = break_even(faster, slower, batch)
    last = max(10, min(2 * (crossing or 0), 10_000))
    for side, colour in zip(sides, _COLOURS, strict=False):
        totals = [side.once + count * side.image / batch for count in (0, last)]
        axes.plot((0, last), totals, color=colour, linewidth=2.5, label=f"{side.name}: {_time(side.once)} once")
    if crossing is not None and 1 < crossing <= last:
        axes.axvline(crossing, color="#888888", linestyle=":", linewidth=1.2)
        axes.annotate(
            f"image {crossing}", (crossing, 0), (4, 4), textcoords="offset points", color="#555555", fontsize=9
        )
    axes.set_xlim(0, last)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("Images")
    axes.set_ylabel("Time in all (s)")
    axes.set_title("Total time, compiling included", fontsize=10)
    axes.legend(framealpha=1, edgecolor="none", fontsize=9, loc="upper left")
    _plain(axes)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _require_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError(
            "Benchmark Model needs the package matplotlib, which draws its figure. Install it and restart ComfyUI: "
            f'"{sys.executable}" -m pip install matplotlib'
        )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return comfy.model_management.get_torch_device_name(device)


def _size(count: float) -> str:
    return f"{count / _GIB:.2f} GiB" if count >= _GIB / 10 else f"{count / 2**20:.1f} MiB"


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s" if seconds < 100 else f"{seconds:.0f} s"
