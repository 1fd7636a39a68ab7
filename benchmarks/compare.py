"""dev.py bench: ours beside eager and every other way to compile a Flux, on the same weights and inputs in one run.

Each side is a process of its own with an empty compiler cache and one thread; sides take turns at each step. Times are
CPU seconds, which another program on the machine changes less than the clock.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import IO, Any

from safetensors.torch import load_file

from benchmarks.bars import bars
from benchmarks.sides import CHECKPOINT, LORA, SIDES, Done, Step
from dev import RUN_MODULE
from devtools.checkpoints import flux1, lora, save
from devtools.server import HostFailed

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20
TOLERANCE = 1e-4
BASE = Step()
OURS, REFERENCE = "ours", "eager"
# In the order in which they happen; the groups are those of the picture.
EVENTS: Mapping[str, tuple[str, Step]] = {
    "320x256": ("sizes", replace(BASE, width=320)),
    "256x384": ("sizes", replace(BASE, height=384)),
    "192x192": ("sizes", replace(BASE, width=192, height=192)),
    "64 text tokens": ("text lengths", replace(BASE, tokens=64)),
    "77 text tokens": ("text lengths", replace(BASE, tokens=77)),
    "LoRA on": ("LoRA", replace(BASE, lora=0.5)),
    "LoRA strength": ("LoRA", replace(BASE, lora=0.8)),
    "LoRA off": ("LoRA", BASE),
    "half of the weights offloaded": ("offload", replace(BASE, resident=0.5)),
    "70 % offloaded": ("offload", replace(BASE, resident=0.3)),
    "batch of 2": ("batch", replace(BASE, batch=2)),
}
GROUPS = tuple(dict.fromkeys(group for group, _ in EVENTS.values()))


@dataclass
class Event:
    """What the first step of a kind cost more than the second, in CPU seconds, and how many graphs there are then."""

    added: float
    graphs: int


@dataclass
class Side:
    """``cold``: CPU seconds of the first step in each process; ``start``: of starting the compiler before it, with the
    side's own options and whatever it compiles then; ``steps``: of each steady step."""

    start: list[float] = field(default_factory=list)
    cold: list[float] = field(default_factory=list)
    cold_wall: list[float] = field(default_factory=list)
    graphs: int = 0
    memory: list[int] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    events: dict[str, Event] = field(default_factory=dict)
    largest_difference: float = 0.0

    @property
    def first(self) -> list[float]:
        """The first step with all that it takes."""
        return [start + cold for start, cold in zip(self.start, self.cold, strict=True)]

    @property
    def graphs_in_all(self) -> int:
        return max([self.graphs, *(event.graphs for event in self.events.values())])

    def added(self, group: str) -> float:
        """CPU seconds that all events of a group added."""
        return sum(event.added for name, event in self.events.items() if EVENTS[name][0] == group)


@dataclass
class Comparison:
    """``quick``: nothing was generated, so that only the counts mean something."""

    blocks: tuple[int, int]
    quick: bool
    machine: dict[str, Any] = field(default_factory=dict)
    sides: dict[str, Side] = field(default_factory=dict)

    def numbers(self) -> dict[str, Any]:
        return asdict(self)


class Process:
    """A running side, with a compiler cache of its own."""

    def __init__(self, name: str, comfyui: Path, folder: Path, cache: Path, backend: str) -> None:
        self._cache = cache
        self._log = folder / f"{cache.name}.log"
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        # Inductor keeps its precompiled headers among temporary files.
        cache.mkdir()
        caches = dict.fromkeys(("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TMPDIR", "TEMP", "TMP"), str(cache))
        command = [sys.executable, "-c", RUN_MODULE, str(ROOT), "benchmarks.sides", name, str(folder), backend]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **threads, **caches, "COMFYUI_PATH": str(comfyui), "HF_HUB_OFFLINE": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
            )

    def step(self, step: Step) -> Done:
        pipe: IO[str] | None = self._process.stdin
        assert pipe is not None
        pipe.write(json.dumps(asdict(step)) + "\n")
        pipe.flush()
        return Done(**self.answer())

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exc: object) -> None:
        with self._process:
            self._process.terminate()
        shutil.rmtree(self._cache, ignore_errors=True)

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
            raise HostFailed(f"A side of the comparison ended. The end of its log:\n{tail}")
        return json.loads(line)


def compare_sides(
    comfyui: Path,
    blocks: tuple[int, int],
    rounds: int,
    quick: bool,
    show: Callable[[str], None],
) -> Comparison:
    """Measure all sides on a tiny Flux.1 of so many double and single blocks.

    Each is cold once a round, each time in a new process; the processes of the last round go on with steady steps, and
    then with one event after the other. ``quick`` traces without generating code and takes no steady steps.

    Raises:
        HostFailed: a side ended; the message has the end of its log.
    """
    comparison = Comparison(blocks, quick, _machine(), {name: Side() for name in SIDES})
    # Dynamo's backend that generates nothing: it traces the same graphs.
    backend = "eager" if quick else "inductor"
    with tempfile.TemporaryDirectory(prefix="hotpath-") as temporary:
        folder = Path(temporary)
        weights = flux1(*blocks)
        save(folder / CHECKPOINT, weights)
        save(folder / LORA, lora(weights))
        for number in range(1, rounds + 1):
            with ExitStack() as stack:
                processes: dict[str, Process] = {}
                for name in SIDES:
                    cache = folder / f"{name.replace(' ', '_')}_{number}"
                    processes[name] = stack.enter_context(Process(name, comfyui, folder, cache, backend))
                for process in processes.values():
                    comparison.machine.update(process.answer())
                for name, process in processes.items():
                    show(f"{name}, first step, round {number} of {rounds}")
                    _cold(comparison.sides[name], process.step(BASE))
                if number == rounds:
                    _warm(comparison, processes, show)
    return comparison


def _cold(side: Side, done: Done) -> None:
    side.start.append(done.start)
    side.cold.append(done.cpu)
    side.cold_wall.append(done.wall)
    side.graphs = done.graphs
    if done.memory is not None:
        side.memory.append(done.memory)


def _warm(comparison: Comparison, processes: Mapping[str, Process], show: Callable[[str], None]) -> None:
    for number in range(0 if comparison.quick else 30):
        for name, process in processes.items():
            done = process.step(BASE)
            # The first few still warm caches up.
            if number >= 5:
                comparison.sides[name].steps.append(done.cpu)
    for what, (group, step) in {"": ("", BASE), **EVENTS}.items():
        want = load_file(processes[REFERENCE].step(step).output)["out"]
        for name, process in processes.items():
            if name == "diffusers" and group == "offload":
                continue
            show(f"{name}, {what or 'as before'}")
            first = process.step(step)
            second = first if comparison.quick else process.step(step)
            side = comparison.sides[name]
            if group:
                side.events[what] = Event(first.cpu - second.cpu, second.graphs)
            difference = (load_file(second.output)["out"] - want).abs().max().item()
            side.largest_difference = max(side.largest_difference, difference)


def _machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), cpu)
    return {"CPU": cpu, "cores": os.cpu_count(), "system": platform.system(), "Python": platform.python_version()}


def problems(comparison: Comparison) -> list[str]:
    """What ours promises and does not hold here, in words; times count only where code was generated."""
    ours = comparison.sides[OURS]
    found = []
    free = [name for name, (group, _) in EVENTS.items() if group != "batch"]
    graphs = max([ours.graphs, *(ours.events[name].graphs for name in free)])
    if graphs != 2:
        found.append(f"ours made {graphs} graphs over all sizes, text lengths, LoRAs and offloads, and not 2")
    for name, side in comparison.sides.items():
        if name not in (REFERENCE, OURS) and side.graphs_in_all <= graphs:
            found.append(f"{name} made no more graphs than ours ({side.graphs_in_all})")
        # What the others compile is theirs, but much more would be other weights or inputs.
        if side.largest_difference > (TOLERANCE if name == OURS else 10 * TOLERANCE):
            found.append(f"{name} differs from eager by {side.largest_difference:.1e}")
    if comparison.quick:
        return found
    cold = median(ours.first)
    if (ratio := median(comparison.sides["whole model"].first) / cold) < 3:
        found.append(f"the first step with the whole model compiled takes {ratio:.2f} times as long, and not 3 times")
    for name in ("per block", "diffusers"):
        if min(ours.first) > max(comparison.sides[name].first):
            found.append(f"the first step is slower than with {name}")
    if ours.added("sizes") >= 0.02 * cold:
        found.append(f"three sizes added {ours.added('sizes') / cold:.1%} of the first step")
    best = min(comparison.sides, key=lambda name: median(comparison.sides[name].steps))
    slower = median(ours.steps) / median(comparison.sides[best].steps) - 1
    if slower > 0.02:
        found.append(f"a steady step takes {slower:.1%} more than {best}'s")
    return found


def table(comparison: Comparison) -> str:
    """Markdown: a column a side, a row for each thing that was measured."""
    sides = comparison.sides
    rows: list[tuple[str, Callable[[Side], str]]] = []
    if not comparison.quick:
        best = min(median(side.steps) for side in sides.values())
        first, cold = median(sides[OURS].first), median(sides[OURS].cold)
        rows += [
            ("First step, CPU seconds", lambda side: _spread(side.first, "{:.1f}")),
            ("... times ours", lambda side: f"{median(side.first) / first:.2f}"),
            ("... without the compiler's own start", lambda side: _spread(side.cold, "{:.1f}")),
            ("... times ours", lambda side: f"{median(side.cold) / cold:.2f}"),
        ]
    rows.append(("Graphs after the first step", lambda side: str(side.graphs)))
    rows += [(f"... then {name}", lambda side, name=name: _event(side, name, comparison.quick)) for name in EVENTS]  # type: ignore[misc]
    if not comparison.quick:
        rows += [
            ("Steady step, CPU milliseconds", lambda side: _spread([1000 * step for step in side.steps], "{:.0f}")),
            ("... times the best", lambda side: f"{median(side.steps) / best:.3f}"),
            ("Memory of the first step, MiB", lambda side: _spread([size / MIB for size in side.memory], "{:.0f}")),
        ]
    rows.append(("Largest difference from eager", lambda side: f"{side.largest_difference:.0e}"))
    lines = [f"| | {' | '.join(sides)} |", "|---" * (len(sides) + 1) + "|"]
    lines += [f"| {title} | {' | '.join(cell(side) for side in sides.values())} |" for title, cell in rows]
    return "\n".join(lines)


def _event(side: Side, name: str, quick: bool) -> str:
    event = side.events.get(name)
    if event is None:
        return "-"
    return str(event.graphs) if quick else f"{event.graphs} ({event.added:+.2f} s)"


def _spread(values: Sequence[float], format: str) -> str:
    if not values:
        return "-"
    return f"{format.format(median(values))} ({format.format(min(values))} to {format.format(max(values))})"


def picture(comparison: Comparison) -> str:
    """An SVG: for each side a bar of the CPU seconds that went into compiling, by what made it compile."""
    compilers = {name: side for name, side in comparison.sides.items() if name != REFERENCE}
    spent = {
        name: {"first step": median(side.first), **{group: max(side.added(group), 0.0) for group in GROUPS}}
        for name, side in compilers.items()
    }
    said = {
        name: f"{sum(parts.values()):.0f} s, {compilers[name].graphs_in_all} graphs" for name, parts in spent.items()
    }
    double, single = comparison.blocks
    title = f"CPU seconds spent compiling a Flux.1 of {double} + {single} blocks, by what made it compile"
    return bars(title, spent, said)
