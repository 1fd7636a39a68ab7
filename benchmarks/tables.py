"""The tables of README and docs/, made of benchmarks/results.

    python -m benchmarks.tables

Each page holds a table between two comments that name it; a test fails where one is not what its results give.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.compare import Comparison, Event, Side, table
from benchmarks.memory import CARDS, GB, Need
from devtools.cli import run_tool

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PLACE = re.compile(r"(<!-- table ([\w-]+), made by python -m benchmarks\.tables -->\n).*?(<!-- end -->)", re.DOTALL)
SIDES = {
    "eager": "without HotPath",
    "per block": "each block compiled by ComfyUI's wrapper",
    "whole model": "ComfyUI's TorchCompileModel",
    "ours": "**Compile Repeated Blocks**",
    "ours max-autotune": "... with `mode` at `max-autotune-no-cudagraphs`",
    "ours, offload": "**Offload Repeated Blocks, Compile Repeated Blocks**",
}
FORMATS = {"fp8": "fp8_e4m3_rowwise", "int8": "int8_dynamic"}


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(text: str) -> str:
    """``text`` of a page with its tables as the results give them.

    Raises:
        KeyError: it has a place for a table that there is none of.
    """
    return PLACE.sub(lambda place: f"{place[1]}{TABLES[place[2]]()}\n{place[3]}", text)


def gain() -> str:
    """Seconds of sampling an image."""
    resident, cards = read("gpu_h200"), read("cards_h200")["rows"]
    large = {side["name"]: side["image_seconds"] for side in resident["dynamic VRAM"]["sides"]}
    quantized = {side["name"]: side["image_seconds"] for side in resident["dynamic VRAM, fp8_e4m3_rowwise"]["sides"]}
    small = {row["side"]: row["image"] for row in cards if row["card"] == 12}
    rows = [
        ("all of an H200", "Compile", large["eager"], large["ours"]),
        ("all of an H200", "Quantize, Compile", quantized["eager"], quantized["fp8_e4m3_rowwise ours"]),
        ("12 GiB of it free", "Offload, Compile", small["eager"], small["ours, offload"]),
        ("12 GiB of it free", "Quantize, Compile", small["eager"], small["ours, fp8"]),
    ]
    return markdown(
        ["Flux.1-dev, 1024x1024, 28 steps", "Nodes", "Without HotPath", "With it", "Times as fast"],
        (
            (card, nodes, f"{before:.1f} s", f"{after:.1f} s", f"**{before / after:.2f}**")
            for card, nodes, before, after in rows
        ),
    )


def sides() -> str:
    """Ways to compile a tiny Flux.1 on a CPU."""
    return table(comparison())


def comparison() -> Comparison:
    numbers = read("sides_19_38")
    measured = {}
    for name, side in numbers["sides"].items():
        events = {event: Event(**seen) for event, seen in side["events"].items()}
        measured[name] = Side(**{**side, "events": events})
    return Comparison(**{**numbers, "sides": measured})


def resident() -> str:
    """The H200 with all of the model on it."""
    rows = []
    for group in ("resident", "resident, 8 bits"):
        seen = read("gpu_h200")[group]["sides"]
        eager = median(seen[0]["steps"])
        for side in seen if group == "resident" else seen[1:]:
            graphs = f"{side['graphs']}, {side['graphs_after_sizes']}" if side["graphs"] else ""
            # Beside the others' weights in 8 bits, the peak is not one side's.
            cold = [f"{side['cold_seconds']:.1f} s", graphs, f"{side['peak_while_compiling']:.1f} GiB"]
            rows.append([*_step(side, eager), *(cold if group == "resident" else ["", graphs, ""])])
    return markdown([*STEP, "First step", "Graphs; after two more sizes", "Peak memory, first step"], rows)


def dynamic() -> str:
    """The H200 with ComfyUI's dynamic VRAM."""
    rows = []
    for format in ("", ", fp8_e4m3_rowwise", ", int8_dynamic"):
        seen = read("gpu_h200")[f"dynamic VRAM{format}"]["sides"]
        rows += [_step(side, median(seen[0]["steps"])) for side in seen[bool(format) :]]
    return markdown(STEP, rows)


STEP = ["", "Step", "Least to most", "Times as fast", "28 steps"]


def _step(side: dict[str, Any], eager: float) -> list[str]:
    steps = side["steps"]
    spread = f"{min(steps):.0f} to {max(steps):.0f} ms"
    return [
        _side(side["name"]),
        f"{median(steps):.1f} ms",
        spread,
        f"{eager / median(steps):.2f}",
        f"{side['image_seconds']:.1f} s",
    ]


def _side(name: str) -> str:
    if name in SIDES:
        return SIDES[name]
    format, compiled = name.removesuffix(" ours"), name.endswith(" ours")
    quantized = f"Quantize Repeated Blocks (`{format}`)"
    return f"**{quantized}, Compile Repeated Blocks**" if compiled else f"{quantized} alone"


def first_steps() -> str:
    """The first step in a new process, compiled and loaded."""
    seen = read("gpu_h200")["first steps"]
    return markdown(
        ["H200, first step after a start", "Takes", "Of it loading", "Graphs compiled", "Kinds of processes started"],
        (
            (
                name,
                f"{run['first step']:.1f} s",
                f"{run['loading']:.1f} s",
                str(run["graphs"]),
                str(len(set(run["processes"]))),
            )
            for name, run in seen.items()
        ),
    )


def cards() -> str:
    """The H200 with less memory free."""
    seen = read("cards_h200")
    rows: dict[str, dict[float, dict[str, Any]]] = {}
    for row in seen["rows"]:
        rows.setdefault(row["side"], {})[row["card"]] = row
    sizes = sorted({row["card"] for row in seen["rows"]}, reverse=True)
    return markdown(
        ["Free memory, and a step", *(f"{size:.0f} GiB" for size in sizes)],
        (
            (_card_side(side), *(f"{at[size]['step']:.1f} ms" if size in at else "" for size in sizes))
            for side, at in rows.items()
        ),
    )


def _card_side(name: str) -> str:
    for short, format in FORMATS.items():
        if f", {short}" in name:
            offload = "Offload Repeated Blocks, " if "offload" in name else ""
            return f"Quantize Repeated Blocks (`{format}`), {offload}Compile Repeated Blocks"
    return SIDES[name]


def devices() -> str:
    """One image by two H200s, beside one."""
    rows: dict[tuple[str, int], dict[int, dict[str, Any]]] = {}
    seen = read("devices_h200")
    for row in seen["rows"]:
        name, shared, _ = row["name"].partition(f", {seen['devices']} devices")
        rows.setdefault((name, seen["devices"] if shared else 1), {})[row["pixels"]] = row
    sizes = sorted({row["pixels"] for row in seen["rows"]})
    return markdown(
        ["A step", "GPUs", *(f"{size}x{size}" for size in sizes)],
        (
            (
                _devices_side(name),
                str(count),
                *(f"{at[size]['ms']:.0f} ms ({at[size]['times_one']:.2f}x)" for size in sizes),
            )
            for (name, count), at in rows.items()
        ),
    )


def guidance() -> str:
    """Two conditionings by two H200s, by the host's own node."""
    seen = read("guidance_h200")
    split = f", CFG split over {seen['devices']}"
    rows = {row["name"]: row for row in seen["rows"]}
    return markdown(
        ["A step", "1 GPU", f"{seen['devices']} GPUs, MultiGPU CFG Split"],
        (
            (
                SIDES[name],
                f"{rows[name]['ms']:.1f} ms",
                f"{rows[name + split]['ms']:.1f} ms ({rows[name + split]['times_one']:.2f}x)",
            )
            for name in ("eager", "ours")
        ),
    )


def _devices_side(name: str) -> str:
    format = name.removeprefix("ours, ")
    nodes = [] if format == "eager" else [f"Quantize (`{format}`)"]
    nodes += ["Compile Repeated Blocks"] if name.startswith("ours") else []
    return ", ".join(nodes) or SIDES["eager"]


def families() -> str:
    """Models of other families on an H200."""
    names = {
        "per block": "per block",
        "ours": "Compile",
        "fp8_e4m3_rowwise": "Quantize (`fp8_e4m3_rowwise`)",
        "ours, fp8_e4m3_rowwise": "Quantize, Compile",
    }
    shown = {"qwen_image": "Qwen-Image", "z_image": "Z-Image", "wan_t2v": "Wan 2.2 text to video"}
    rows = []
    for name, title in shown.items():
        seen = read(f"families_{name}")
        steps = {side["name"]: median(side["steps"]) for side in seen["sides"]}
        cells = (f"{steps[side]:.1f} ms ({steps['eager'] / steps[side]:.2f}x)" for side in names)
        rows.append([f"{title}, {seen['blocks']} blocks", f"{steps['eager']:.1f} ms", *cells])
    return markdown(["A step", "without HotPath", *names.values()], rows)


def gguf() -> str:
    """Layers of GGUF files and weights in 4 bits on an H200, beside what each is without HotPath."""
    steps = {side["name"]: median(side["steps"]) for side in read("gguf_h200")["sides"]}
    rows = []
    for name in ("eager", "int4_weight_only", "Q4_K", "Q8_0"):
        shown = {"eager": "bf16", "int4_weight_only": "Quantize (`int4_weight_only`)"}.get(name, f"GGUF, {name}")
        ours = "ours" if name == "eager" else f"{name} ours"
        cells = [f"{steps[side]:.1f} ms" if side in steps else "" for side in (name, f"{name} per block", ours)]
        rows.append([shown, *cells, f"{steps[name] / steps[ours]:.2f}"])
    return markdown(["A step", "without Compile", "per block", "Compile Repeated Blocks", "Times as fast"], rows)


def four_bits() -> str:
    """Products in 4 and 8 bits on an H200, of blocks as in the table of GGUF files."""
    steps = {side["name"]: median(side["steps"]) for side in read("four_bits_h200")["sides"]}
    rows = []
    for name in ("eager", "convrot_w4a4", "int8_dynamic"):
        shown = "bf16" if name == "eager" else f"Quantize (`{name}`)"
        ours = steps["ours" if name == "eager" else f"{name} ours"]
        cells = [f"{steps[name]:.1f} ms" if name in steps else "", f"{ours:.1f} ms", f"{ours / steps['ours']:.2f}"]
        rows.append([shown, *cells])
    return markdown(["A step", "without Compile", "Compile Repeated Blocks", "Of bf16's"], rows)


def streamed() -> str:
    """What streaming cost on the H200, beside what the model of the bus said."""
    rows = []
    for side in read("offload_h200")["sides"][1:]:
        share, _, way = side["name"].partition(" % ")
        budget = "all stays" if side["name"] == "ahead ours" else f"{share} %"
        prefetch = "" if side["name"] == "ahead ours" else "0" if way.startswith("no") else "1"
        predicted = f"{side['predicted_ms']:.1f} ms" if side["streamed_gib"] else ""
        rows.append((budget, prefetch, f"{side['streamed_gib']:.1f} GiB", predicted, f"{median(side['steps']):.1f} ms"))
    return markdown(["`budget`", "`prefetch_blocks`", "Streamed a step", "Predicted", "Measured"], rows)


def graphs() -> str:
    """CUDA graphs at a small size."""
    names = {
        "eager": "without HotPath",
        "without": "Compile Repeated Blocks, `cuda_graphs` `off`",
        "auto": "**Compile Repeated Blocks, `cuda_graphs` `auto`**",
        "fp8 without": "Quantize (`fp8_e4m3_rowwise`), Compile, `off`",
        "fp8 auto": "Quantize (`fp8_e4m3_rowwise`), Compile, `auto`",
    }
    sizes, rows = (256, 512, 1024), []
    for shape, shown in {"klein": "Flux.2 Klein's", "dev": "Flux.1-dev's"}.items():
        ways = {(way["name"], way["size"]): way for way in read("graphs_h200")["ways"] if way["shape"] == shape}
        for name, told in names.items():
            cells = []
            for size in sizes:
                way, eager = ways.get((name, size)), ways.get(("eager", size))
                cells.append(f"{way['step']:.1f} ms ({eager['step'] / way['step']:.2f}x)" if way and eager else "")
            rows.append([shown, told, *cells])
    return markdown(["Shape", "A step", *(f"{size}x{size}" for size in sizes)], rows)


def int8() -> str:
    """8-bit products of Flux.1-dev's blocks at 1024x1024."""
    rows: dict[str, dict[str, float]] = {}
    for row in read("int8_h200")["rows"]:
        size, _, way = row["name"].partition(": ")
        rows.setdefault(size, {})[way] = row["us"]
    ways = {
        "bf16": "bf16",
        "int32, then scales": "int8, scaled after",
        "kernel, (128, 128, 128, 8, 8, 3)": "int8, one kernel",
    }
    table = [[size, *(f"{each[way]:.0f} us" for way in ways)] for size, each in rows.items()]
    return markdown(["Tokens, in, out", *ways.values()], table)


def memory() -> str:
    """What Flux.1-dev takes on a card, and what crosses the bus where it does not fit."""
    needs = [Need(**need) for need in read("memory")]
    return markdown(
        ["Weights", "`modulation`", "On the card", *(f"{card} GB card" for card in CARDS)],
        (
            (
                f"`{need.format}`" if "_" in need.format else need.format,
                f"`{'ahead' if ahead else 'in place'}`",
                f"{need.resident(ahead) / GB:.1f} GB",
                *(f"{need.bus(ahead, card) / GB:.0f} GB" for card in CARDS),
            )
            for need in needs
            for ahead in (False, True)
        ),
    )


def budgets() -> str:
    """A step with Offload at ``auto``, as a model of the bus predicts it."""
    rows = read("offload_predicted")
    return markdown(
        ["Model and card", "Blocks that stay", *(f"PCIe {generation}" for generation in rows[0]["enough_gib"])],
        (
            (
                f"{row['model']}, {row['gib']} GB {row['card']}",
                f"{row['resident']} of {row['blocks']}" if row["step_ms"] else "no room",
                *(f"x{step / row['compute_ms']:.2f}" for step in row["step_ms"].values()),
                *("" for _ in range(len(row["enough_gib"]) - len(row["step_ms"]))),
            )
            for row in rows
        ),
    )


def quality() -> str:
    """Signal-to-noise ratios of the formats."""
    rows = read("quantize")
    return markdown(
        ["`format`", "Bits a weight", *(name.capitalize().replace("lora", "LoRA") for name in rows[0]["snr"])],
        (
            (
                f"`{row['format'].removesuffix(', simulated')}`",
                f"{row['bits']:.1f}",
                *(f"{decibels:.1f} dB" for decibels in row["snr"].values()),
            )
            for row in sorted(rows, key=lambda row: -row["snr"]["20 steps"])
        ),
    )


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        re.sub(" +", " ", f"| {' | '.join(line)} |").replace("| ---", "|---").replace("--- |", "---|") for line in lines
    )


TABLES: dict[str, Callable[[], str]] = {
    "gain": gain,
    "sides": sides,
    "resident": resident,
    "dynamic": dynamic,
    "first-steps": first_steps,
    "cards": cards,
    "devices": devices,
    "families": families,
    "gguf": gguf,
    "four-bits": four_bits,
    "guidance": guidance,
    "streamed": streamed,
    "graphs": graphs,
    "int8": int8,
    "memory": memory,
    "budgets": budgets,
    "quality": quality,
}


def main(arguments: Sequence[str]) -> int:
    for page in pages():
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_tool(main)
