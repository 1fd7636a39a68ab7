"""dev.py bench --quantize: what each format that this machine can run costs in quality and saves in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from devtools.checkpoints import describe, flux1, lora, normal, save
from devtools.measure import snr
from devtools.server import HostServer
from devtools.workflows import sampling

STEPS = (1, 20)
SEEDS = (1, 2, 3)
# Formats whose products no CPU has: quantized as ever, multiplied by the host with operands that it dequantizes.
SIMULATED = ("nvfp4", "mxfp8")
# What only newer ComfyUIs have and a CPU takes minutes for: where it is asked for.
SLOW = ("asym_w4a8_int8",)


@dataclass
class Quality:
    """``bits`` a weight of the blocks, scales and biases included; ``snr`` in dB against full precision by number of
    steps, alone and with a LoRA, means over seeds."""

    format: str
    bits: float
    snr: dict[str, float] = field(default_factory=dict)


def qualities(
    comfyui: Path, formats: Sequence[str], size: tuple[int, int], show: Callable[[str], None]
) -> list[Quality]:
    """Sample a tiny Flux.1 of 19 + 38 blocks in full precision and in each format, with and without a LoRA.

    Args:
        formats: by name; without any, all that this machine can run or simulate.
    """
    with HostServer(comfyui) as server:
        weights = normal(flux1())
        path = save(server.diffusion_models / "tiny_flux1.safetensors", weights)
        save(server.loras / "style.safetensors", lora(weights))
        flux, count = describe(path), sum(weight.numel() for name, weight in weights.items() if "_blocks." in name)

        def latent(format: str | None, seed: int, steps: int, loras: list[tuple[str, float]]) -> Tensor:
            run: dict[str, Any] = dict(width=size[0], height=size[1], seed=seed, steps=steps, loras=loras)
            workflow = sampling(path.name, flux, quantized=format, **run)
            if format in unlisted:
                workflow["quantize"]["class_type"] = "HotPathDevQuantize"
            return server.latent(server.run(workflow))

        runs = {
            f"{steps} step{'s' * (steps > 1)}{', LoRA' * bool(loras)}": (steps, loras)
            for loras in ([], [("style.safetensors", 0.5)])
            for steps in STEPS
        }
        info = server.get("/object_info/HotPathQuantizeRepeatedBlocks")["HotPathQuantizeRepeatedBlocks"]
        offered = info["input"]["required"]["format"][1]["options"]
        runnable = [name for name in offered if name != "auto"]
        simulated = [format for format in SIMULATED if format not in runnable]
        unlisted = [*simulated, *SLOW]
        full = {(name, seed): latent(None, seed, *run) for name, run in runs.items() for seed in SEEDS}
        measured = []
        for format in formats or [*runnable, *simulated]:
            snrs = {}
            for name, run in runs.items():
                show(f"{format}, {name}")
                got = [snr(full[name, seed], latent(format, seed, *run)) for seed in SEEDS]
                snrs[name] = sum(got) / len(got)
            done = server.report()["quantized"][-1]
            shown = f"{format}, simulated" if format in simulated else format
            measured.append(Quality(shown, 8 * done["bytes_after"] / count, snrs))
        return measured


def rows(measured: list[Quality]) -> list[tuple[str, str]]:
    """The table, a line a format."""
    names = list(measured[0].snr)
    lines = [("format", f"{'bits a weight':>13}  " + "  ".join(f"{name:>14}" for name in names))]
    for quality in measured:
        decibels = "  ".join(f"{quality.snr[name]:>11.1f} dB" for name in names)
        lines.append((quality.format, f"{quality.bits:>13.1f}  {decibels}"))
    return lines
