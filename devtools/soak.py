"""Many prompts on one server, of all kinds in turn.

Each must give what eager gives, graphs must stop growing once all variants were seen, memory must stay flat, and no
model may be left when all is unloaded.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from .checkpoints import FluxFile, describe, flux1, flux2, lora, save
from .server import HostServer
from .workflows import sampling

# Memory may grow by so much of itself after the prompts that see each variant first.
RSS_GROWTH = 0.05
TOLERANCE = 1e-4
# Models that differ in their weights alone share their regions.
STRUCTURES = (("flux1", "scaled"), ("flux2",))
BATCHES = (1, 2, 3)
PATCHES = ((), (("attention_override", 1.3),))
SETTINGS: Sequence[Mapping[str, Any]] = (
    {"backend": "inductor"},
    {"backend": "aot_eager"},
    {"backend": "aot_eager", "dynamic": "always"},
    {"backend": "aot_eager", "single_blocks": "0"},
)


@dataclass
class Soak:
    """What was seen; ``rss`` is the server's resident memory in bytes and ``graphs`` all its graphs, after each prompt.

    ``settled`` is how many prompts came before the first that brought nothing new.
    """

    settled: int
    rss: list[int] = field(default_factory=list)
    graphs: list[int] = field(default_factory=list)
    largest_difference: float = 0.0
    models_left: int = 0

    def problems(self) -> list[str]:
        """What does not hold, in words; empty when all does."""
        problems = []
        if self.largest_difference > TOLERANCE:
            problems.append(f"an image differs from eager by {self.largest_difference:.1e}")
        if new := self.graphs[-1] - self.graphs[self.settled - 1]:
            problems.append(f"{new} graphs were compiled after every variant had been seen")
        if self.rss_growth > RSS_GROWTH:
            problems.append(f"memory grew by {self.rss_growth:.0%}")
        if self.models_left:
            problems.append(f"{self.models_left} models were left after unloading")
        return problems

    @property
    def rss_growth(self) -> float:
        """The largest memory after all variants were seen, relative to what it was then."""
        later = self.rss[self.settled :]
        return max(later) / self.rss[self.settled - 1] - 1 if later else 0.0


def soak(
    comfyui: Path,
    prompts: int,
    settings: Sequence[Mapping[str, Any]] = SETTINGS,
    show: Callable[[str], None] = lambda text: None,
) -> Soak:
    """Run ``prompts`` prompts, each eager and compiled; first one of each variant, then any in any order."""
    with HostServer(comfyui) as server:
        files = dict(_models(server))
        variants = list(itertools.product(STRUCTURES, settings, PATCHES, BATCHES))
        seen = Soak(settled=len(variants))
        choose = random.Random(0)
        process = psutil.Process(server.pid)
        for number in range(max(prompts, len(variants) + 1)):
            variant = variants[number] if number < len(variants) else choose.choice(variants)
            names, compiled, patches, batch = variant
            name = choose.choice(names)
            run = dict(
                width=choose.choice((64, 96, 128)),
                height=choose.choice((64, 160)),
                tokens=choose.choice((5, 16, 33)),
                batch=batch,
                steps=1,
                seed=number,
                patches=patches,
                loras=[(f"{names[0]}_lora.safetensors", choose.choice((0.3, 0.8)))] if choose.random() < 0.5 else [],
            )
            latents = [
                server.latent(server.run(sampling(f"{name}.safetensors", files[name], compiled=inputs, **run)))
                for inputs in (None, compiled)
            ]
            difference = (latents[0] - latents[1]).abs().max().item()
            seen.largest_difference = max(seen.largest_difference, difference)
            seen.graphs.append(sum(region["graphs"] for region in server.report()["regions"]))
            seen.rss.append(process.memory_info().rss)
            show(f"prompt {number + 1}: {seen.graphs[-1]} graphs, {seen.rss[-1] / 2**20:.0f} MiB")
        server.free()
        seen.models_left = server.models_left()
    return seen


def _models(server: HostServer) -> Iterator[tuple[str, FluxFile]]:
    flux, other = flux1(2, 3), flux2(2, 3)
    scaled = {name: weight * 0.9 for name, weight in flux.items()}
    for name, weights in {"flux1": flux, "scaled": scaled, "flux2": other}.items():
        path = save(server.diffusion_models / f"{name}.safetensors", weights)
        save(server.loras / f"{name}_lora.safetensors", lora(weights))
        yield name, describe(path)
