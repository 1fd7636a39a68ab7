"""dev.py bench --offload: what streaming costs a step on a card, by a model of the bus, beside what was measured.

Sizes are those of the host's models on the meta device, so that it runs anywhere. Block times come from the work of a
block and the rate of a card's tensor cores, of which a compiled step reached ``UTILISATION`` on an H200.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.bars import bars
from benchmarks.memory import FLUX_DEV, SIZE, TAKEN
from devtools import gpu_host

MEASURED = Path(__file__).parent / "results" / "offload_h200.json"
GIB = 2**30
TEXT_TOKENS = 512
FLUX2_DEV: dict[str, Any] = {
    "image_model": "flux2",
    "in_channels": 128,
    "out_channels": 128,
    "patch_size": 1,
    "vec_in_dim": None,
    "context_in_dim": 15360,
    "hidden_size": 6144,
    "mlp_ratio": 3.0,
    "num_heads": 48,
    "depth": 8,
    "depth_single_blocks": 48,
    "axes_dim": [32, 32, 32, 32],
    "theta": 2000,
    "qkv_bias": False,
    "guidance_embed": True,
    "txt_ids_dims": [3],
    "global_modulation": True,
    "mlp_silu_act": True,
    "ops_bias": False,
    "default_ref_method": "index",
    "ref_index_scale": 10.0,
    "yak_mlp": False,
    "txt_norm": False,
}
# A card of each size, with its dense bf16 rate in TFLOP/s at fp32 accumulation (NVIDIA's architecture whitepapers).
CARDS = {
    8: ("RTX 4060", 30.2),
    12: ("RTX 4070", 58.3),
    16: ("RTX 4080", 97.5),
    24: ("RTX 4090", 165.2),
    32: ("RTX 5090", 209.5),
}
# Bytes a second of 16 lanes, as specified; a pinned copy reached USABLE of it on the H200, at PCIe 5.
PCIE = {3: 15.75e9, 4: 31.5e9, 5: 63.0e9}
USABLE = 55 / 63
# A step of Flux.1-dev at 1024x1024 took 129.0 ms for the work of ``Model.work`` on an H200, whose matrix product
# reached 791 TFLOP/s.
UTILISATION = 0.73
AHEAD = 1


@dataclass(frozen=True)
class Model:
    """A model in one format: bytes of its blocks without modulation, in order, and of all else that is on the card.

    ``activations`` is the host's estimate for an NVIDIA card; ``work`` are the floating point operations of a block.
    """

    name: str
    blocks: list[int]
    fixed: int
    activations: int
    work: list[float]


@dataclass(frozen=True)
class Row:
    """What a card does with a model: how many blocks are resident; by PCIe generation milliseconds a step (none where
    not even the slots have room), and GiB of the model that must be resident for a step 3 % over its compute time."""

    model: str
    card: str
    gib: int
    resident: int
    blocks: int
    compute_ms: float
    step_ms: dict[int, float]
    enough_gib: dict[int, float]


def models() -> list[Model]:
    """Flux.1-dev and Flux.2-dev in bf16 and with 8-bit weights."""
    gpu_host.start(dynamic_vram=False, cpu=True)
    import comfy.model_management
    import comfy.supported_models
    from hotpath_pack.host.residency.streaming import streamable_layers

    found = []
    for name, kind, config in (("Flux.1", "Flux", FLUX_DEV), ("Flux.2", "Flux2", FLUX2_DEV)):
        supported = getattr(comfy.supported_models, kind)({**config, "dtype": torch.bfloat16})
        model = supported.get_model({}, "", device="meta")
        with patch.object(comfy.model_management, "pytorch_attention_flash_attention", return_value=True):
            side = SIZE // 8 if kind == "Flux" else SIZE // 16
            activations = int(model.memory_required([1, config["in_channels"], side, side]))
        layers = streamable_layers(model.diffusion_model, ahead=True)
        tokens, hidden = (SIZE // 16) ** 2 + TEXT_TOKENS, config["hidden_size"]
        counts = [sum(layer.weight.numel() for layer in block.values()) for block in layers.values()]
        # A weight of a double-stream block sees the tokens of its own stream alone, half the block's weights each.
        doubles = config["depth"]
        work = [
            (1.0 if turn < doubles else 2.0) * count * tokens + 4.0 * tokens**2 * hidden
            for turn, count in enumerate(counts)
        ]
        everything = sum(tensor.numel() for tensor in model.diffusion_model.parameters())
        apart = sum(
            module.lin.weight.numel()
            for path, module in model.diffusion_model.named_modules()
            if "blocks." in path and hasattr(module, "lin")
        )
        for format, bits in (("bf16", 16), ("8 bits", 8)):
            sizes = [count * bits // 8 for count in counts]
            fixed = (everything - apart - sum(counts)) * 2
            found.append(Model(f"{name} {format}", sizes, fixed, activations, work))
    return found


def rows(found: Sequence[Model]) -> Iterator[Row]:
    """Each model on each card."""
    from hotpath_pack.hotpath.stream import resident_blocks

    for model in found:
        whole = sum(model.blocks)
        for gib, (card, rate) in CARDS.items():
            compute = sum(_seconds(model, rate))
            room = gib * GIB - TAKEN - model.activations - model.fixed
            if room < whole:
                room -= (AHEAD + 1) * max(model.blocks)
            stay = resident_blocks(model.blocks, room)
            steps, enough = {}, {}
            for generation, bus in PCIE.items():
                if room >= 0:
                    steps[generation] = 1e3 * _step(model, rate, bus * USABLE, stay)
                shares = (resident_blocks(model.blocks, whole * percent / 100) for percent in range(0, 101, 5))
                least = next(share for share in shares if _step(model, rate, bus * USABLE, share) <= 1.03 * compute)
                enough[generation] = (model.fixed + sum(model.blocks[turn] for turn in least)) / GIB
            yield Row(model.name, card, gib, len(stay), len(model.blocks), 1e3 * compute, steps, enough)


def _seconds(model: Model, rate: float) -> list[float]:
    return [work / (rate * 1e12 * UTILISATION) for work in model.work]


def _step(model: Model, rate: float, bus: float, stay: frozenset[int]) -> float:
    from hotpath_pack.hotpath.stream import predict

    streamed = [turn for turn in range(len(model.blocks)) if turn not in stay]
    return predict(model.blocks, _seconds(model, rate), bus, streamed, AHEAD, steps=4)


def table(found: Sequence[Row]) -> list[tuple[str, str]]:
    """A line for each model and card."""
    pcie = "".join(f"{f'PCIe {generation}':>9}" for generation in PCIE)
    lines = [("", f"{'resident':>9}{'compute':>11}{pcie}   enough GiB:{pcie}")]
    for row in found:
        ratios = [f"x{step / row.compute_ms:.2f}" for step in row.step_ms.values()] or ["-"] * len(PCIE)
        steps = "".join(f"{ratio:>9}" for ratio in ratios)
        least = "".join(f"{gib:>9.1f}" for gib in row.enough_gib.values())
        resident = f"{row.resident}/{row.blocks}" if row.step_ms else "no room"
        numbers = f"{resident:>9}{row.compute_ms:>8.0f} ms{steps}{'':>14}{least}"
        lines.append((f"{row.model}, {row.gib} GB {row.card}", numbers))
    return lines


def compared(found: Sequence[Model]) -> list[tuple[str, str]]:
    """What was measured on the H200 beside what the model of the bus predicts, a line a budget."""
    from hotpath_pack.hotpath.stream import predict, resident_blocks

    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    steps = {side["name"]: median(side["steps"]) for side in measured["sides"]}
    model = next(model for model in found if model.name == "Flux.1 bf16")
    seconds = [steps["ahead ours"] / 1e3 / len(model.blocks)] * len(model.blocks)
    bus = measured["ceilings"]["host to device GB/s"] * 1e9
    lines = [(f"Flux.1-dev bf16, {measured['device']}, {bus / 1e9:.0f} GB/s", "   GB a step   predicted    measured")]
    lines.append(("all blocks resident", f"{0:>12.1f}{steps['ahead ours']:>9.1f} ms{steps['ahead ours']:>9.1f} ms"))
    everything = sum(model.blocks) + model.fixed + _modulation()
    for side in measured["sides"]:
        share, _, rest = side["name"].partition(" % ")
        if not rest or not side["streamed_gib"]:
            continue
        stay = resident_blocks(model.blocks, everything * int(share) / 100 - model.fixed)
        streamed = [turn for turn in range(len(model.blocks)) if turn not in stay]
        step = 1e3 * predict(model.blocks, seconds, bus, streamed, 0 if rest.startswith("no") else 1, steps=4)
        moved = sum(model.blocks[turn] for turn in streamed) / 1e9
        lines.append(
            (
                f"budget {side['name'].replace(' %', ' %,')}",
                f"{moved:>12.1f}{step:>9.1f} ms{median(side['steps']):>9.1f} ms",
            )
        )
    return lines


def _modulation() -> int:
    """Bytes of what Flux.1 makes ahead, of which a budget in percent is a share too."""
    hidden, outputs = FLUX_DEV["hidden_size"], 12 * FLUX_DEV["depth"] + 3 * FLUX_DEV["depth_single_blocks"]
    return outputs * hidden * (hidden + 1) * 2


def picture(found: Sequence[Row]) -> str:
    """An SVG: a step on each card, and how much longer it takes over an older bus."""
    shown, said = {}, {}
    for row in found:
        if not row.step_ms:
            continue
        name = f"{row.model}, {row.gib} GB {row.card}"
        ends = [row.compute_ms, *(row.step_ms[key] for key in sorted(PCIE, reverse=True))]
        parts = ["compute", "waits, PCIe 5", "more, PCIe 4", "more, PCIe 3"]
        lengths = [ends[0], *(max(0.0, after - before) for before, after in pairwise(ends))]
        shown[name] = {part: length / 1e3 for part, length in zip(parts, lengths, strict=True)}
        said[name] = f"{ends[0] / 1e3:.2f} to {ends[-1] / 1e3:.2f} s"
    return bars(f"A step at {SIZE}x{SIZE} with Offload Repeated Blocks, seconds, predicted", shown, said)
