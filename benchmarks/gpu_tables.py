"""Tables of what was measured on GPUs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

from benchmarks.pages import markdown, read

SIDES = {
    "eager": "without HotPath",
    "per block": "each block compiled by ComfyUI's wrapper",
    "whole model": "ComfyUI's TorchCompileModel",
    "ours": "**Compile Repeated Blocks**",
    "ours max-autotune": "... with `mode` at `max-autotune-no-cudagraphs`",
    "ours, offload": "**Offload Repeated Blocks, Compile Repeated Blocks**",
}
FORMATS = {"fp8": "fp8_e4m3_rowwise", "int8": "int8_dynamic"}


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
    for format in ("", ", fp8_e4m3_rowwise"):
        seen = read("gpu_h200")[f"dynamic VRAM{format}"]["sides"]
        rows += [_step(side, median(seen[0]["steps"])) for side in seen[bool(format) :]]
    return markdown(STEP, rows)


STEP = ["", "Step", "Least to most", "Times as fast", "28 steps"]


def wide() -> str:
    """The H200 with blocks of the width of Flux.2."""
    sides = read("wide_h200")["sides"]
    return markdown(STEP[:-1], (_step(side, median(sides[0]["steps"]))[:-1] for side in sides))


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


def whole_steps() -> str:
    """Steps of all blocks on the H200, as medians of the rounds of one run."""
    rows = {row["name"]: row["rounds"] for row in read("whole_step_h200")["rows"]}
    eager = median(rows["eager"])
    return markdown(
        ["", "Step", "Times as fast"],
        (
            (_whole_side(name), f"{median(rounds):.1f} ms", f"{eager / median(rounds):.2f}")
            for name, rounds in rows.items()
        ),
    )


def _whole_side(name: str) -> str:
    base = name.removesuffix(" in fewer passes")
    return _side(base) if base == name else "... in fewer passes over memory"


def first_steps() -> str:
    """The first step in a new process: without HotPath, compiled in several ways, and loaded."""
    shown = {
        "eager": "without HotPath",
        "ours, loaded": "stored",
        "ours, background": "nothing stored, `when` at `background`",
        "ours, 30 s ahead": "nothing stored, 30 s of loading before it",
        "ours, cold": "nothing stored",
        "plain per block, cold": "each block compiled by ComfyUI's wrapper",
        "ours, compiled in the first step, Inductor started": "nothing stored, the compiler started before",
        "plain per block, Inductor started": "each block by ComfyUI's wrapper, the compiler started before",
    }
    rows = []
    for name, title in shown.items():
        runs = read("start_h200")["sides"][name]
        graphs = str(runs[0]["graphs"]) if name != "eager" else ""
        rows.append([title, f"{median(run['first'] for run in runs):.1f} s", graphs, str(runs[0]["processes"])])
    return markdown(["H200, first step after a start", "Takes", "Graphs compiled", "Processes started"], rows)


def cards(file: str = "cards_h200") -> str:
    """The H200 with less memory free."""
    seen = read(file)
    rows: dict[str, dict[float, dict[str, Any]]] = {}
    for row in seen["rows"]:
        rows.setdefault(row["side"], {})[row["card"]] = row
    sizes = sorted({row["card"] for row in seen["rows"]}, reverse=True)
    return markdown(
        ["Free memory, and a step", *(f"{size:.0f} GiB" for size in sizes)],
        (
            (_card_side(side), *(_card_step(at[size]) if size in at else "" for size in sizes))
            for side, at in rows.items()
        ),
    )


def _card_side(name: str) -> str:
    for short, format in FORMATS.items():
        if f", {short}" in name:
            offload = "Offload Repeated Blocks, " if "offload" in name else ""
            return f"Quantize Repeated Blocks (`{format}`), {offload}Compile Repeated Blocks"
    return SIDES[name]


def _card_step(row: dict[str, Any]) -> str:
    return "out of memory" if "OutOfMemory" in row["failed"] else f"{row['step']:.1f} ms"


def devices() -> str:
    """One image by two H200s, beside one."""
    table, sizes = [], (1024, 2048)
    for file, shown in {"devices_h200": "Flux.1-dev's", "devices_klein_h200": "Flux.2 Klein's"}.items():
        seen = read(file)
        rows: dict[tuple[str, int], dict[int, dict[str, Any]]] = {}
        for row in seen["rows"]:
            name, shared, _ = row["name"].partition(f", {seen['devices']} devices")
            rows.setdefault((name, seen["devices"] if shared else 1), {})[row["pixels"]] = row
        for (name, count), at in rows.items():
            cells = [f"{at[size]['ms']:.0f} ms ({at[size]['times_one']:.2f}x)" if size in at else "" for size in sizes]
            table.append([shown, _devices_side(name), str(count), *cells])
    return markdown(["Shape", "A step", "GPUs", *(f"{size}x{size}" for size in sizes)], table)


def copies() -> str:
    """What keys and values of a block take from GPU to GPU."""
    names, tokens = {"peer copies": "peer copies", "NCCL": "NCCL, all-gather"}, {4608: "1024x1024", 16896: "2048x2048"}
    took = {(row["name"], row["tokens"]): row["us"] for row in read("copies_h200")["rows"]}
    rows = [[shown, *(f"{took[name, count]:.0f} us" for count in tokens)] for name, shown in names.items()]
    return markdown(["Keys and values of a block", *tokens.values()], rows)


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


def _medians(seen: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of a step of each side."""
    return {side["name"]: median(side["steps"]) for side in seen["sides"]}


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
        steps = _medians(seen)
        cells = (f"{steps[side]:.1f} ms ({steps['eager'] / steps[side]:.2f}x)" for side in names)
        rows.append([f"{title}, {seen['blocks']} blocks", f"{steps['eager']:.1f} ms", *cells])
    return markdown(["A step", "without HotPath", *names.values()], rows)


def gguf() -> str:
    """Layers of GGUF files and weights in 4 bits on an H200, beside what each is without HotPath."""
    steps = _medians(read("gguf_h200"))
    rows = []
    for name in ("eager", "int4_weight_only", "Q4_K", "Q8_0"):
        shown = {"eager": "bf16", "int4_weight_only": "Quantize (`int4_weight_only`)"}.get(name, f"GGUF, {name}")
        ours = "ours" if name == "eager" else f"{name} ours"
        cells = [f"{steps[side]:.1f} ms" if side in steps else "" for side in (name, f"{name} per block", ours)]
        rows.append([shown, *cells, f"{steps[name] / steps[ours]:.2f}"])
    return markdown(["A step", "without Compile", "per block", "Compile Repeated Blocks", "Times as fast"], rows)


def four_bits() -> str:
    """Products in 4 and 8 bits on an H200, of blocks as in the table of GGUF files."""
    rows = []
    for file, names in {
        "four_bits_h200": ("eager", "convrot_w4a4", "int8_dynamic"),
        "four_bits_033_h200": ("eager", "asym_w4a8_int8"),
    }.items():
        seen = read(file)
        steps = _medians(seen)
        for name in names:
            shown = "bf16" if name == "eager" else f"Quantize (`{name}`)"
            ours = steps["ours" if name == "eager" else f"{name} ours"]
            cells = [f"{steps[name]:.1f} ms" if name in steps else "", f"{ours:.1f} ms", f"{ours / steps['ours']:.2f}"]
            rows.append([shown, seen["ComfyUI"], *cells])
    return markdown(["A step", "ComfyUI", "without Compile", "Compile Repeated Blocks", "Of bf16's"], rows)


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


def attention() -> str:
    """Attention of Flux.1-dev at 1024x1024, in full and in 8 bits."""
    rows = {row["name"]: row for row in read("attention_h200")["rows"]}
    triton = min((name for name in rows if name.startswith("Triton")), key=lambda name: rows[name]["us"])
    ways = {
        "cuDNN, bf16": "bf16, cuDNN's, as PyTorch has it",
        "FA3, bf16": "bf16, FlashAttention 3's",
        "FA3, fp8 unscaled": "fp8, FlashAttention 3's",
        triton: "fp8, a Triton kernel",
        "q, k, v to fp8": "q, k and v to fp8, as passes of their own",
    }
    return markdown(
        ["", "Takes", "Signal to noise"],
        (
            (told, f"{rows[name]['us']:.0f} us", f"{rows[name]['dB']:.0f} dB" if "dB" in rows[name] else "")
            for name, told in ways.items()
        ),
    )


TABLES: dict[str, Callable[[], str]] = {
    "resident": resident,
    "dynamic": dynamic,
    "whole-steps": whole_steps,
    "wide": wide,
    "first-steps": first_steps,
    "cards": cards,
    "cards-ordinary": partial(cards, "cards_ordinary_h200"),
    "devices": devices,
    "copies": copies,
    "families": families,
    "gguf": gguf,
    "four-bits": four_bits,
    "guidance": guidance,
    "streamed": streamed,
    "graphs": graphs,
    "int8": int8,
    "attention": attention,
}
