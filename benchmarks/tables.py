"""The tables of README and docs/, made of benchmarks/results.

    python -m benchmarks.tables

Each page holds a table between two comments that name it; a test fails where one is not what its results give.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import gpu_tables
from benchmarks.compare import Comparison, Event, Side, table
from benchmarks.memory import CARDS, GB, Need
from benchmarks.pages import ROOT, markdown, read
from devtools.cli import run_tool

PLACE = re.compile(r"(<!-- table ([\w-]+), made by python -m benchmarks\.tables -->\n).*?(<!-- end -->)", re.DOTALL)


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


TABLES: dict[str, Callable[[], str]] = {
    **gpu_tables.TABLES,
    "gain": gain,
    "sides": sides,
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
