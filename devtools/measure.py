"""Samples the same workflow with and without Compile Repeated Blocks and compares."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .checkpoints import FluxFile, describe, flux1, save
from .cli import Progress
from .server import STATUS, Event, HostServer, Result
from .workflows import sampling


@dataclass
class Comparison:
    """What eager and compiled runs of the same seeds gave; times are in seconds.

    The first run of each kind is cold: eager loads the model, compiled compiles.
    """

    model: str
    device: str
    size: tuple[int, int]
    steps: int
    report: Mapping[str, Any] = field(default_factory=dict)
    eager: list[float] = field(default_factory=list)
    compiled: list[float] = field(default_factory=list)
    cold: float = 0.0
    largest_difference: float = 0.0

    def numbers(self) -> dict[str, Any]:
        """Everything as JSON values; seconds per step are medians of the warm runs."""
        blocks, regions = self.report["compiled_blocks"], self.report["regions"]
        return {
            "model": self.model,
            "device": self.device,
            "torch": torch.__version__,
            "size": list(self.size),
            "steps": self.steps,
            "blocks": {kind: blocks.get(kind, 0) for kind in ("double", "single")},
            "eager_blocks": self.report["eager"],
            "regions": len(regions),
            "graphs": sum(region["graphs"] for region in regions),
            "graph_breaks": sum(len(region["breaks"]) for region in regions),
            "recompiles": sum(len(region["recompiles"]) for region in regions),
            "compile_seconds": sum(region["seconds"] for region in regions),
            "first_run_seconds": self.cold,
            "seconds_per_step": {"eager": median(self.eager), "compiled": median(self.compiled)},
            "seconds_per_step_all": {"eager": self.eager, "compiled": self.compiled},
            "ratio": median(self.eager) / median(self.compiled),
            "largest_difference": self.largest_difference,
        }


def compare(
    comfyui: Path,
    model: tuple[Path, FluxFile] | None,
    *,
    size: tuple[int, int] | None,
    steps: int,
    rounds: int,
    env: Mapping[str, str] | None = None,
    out: Path | None = None,
) -> Comparison:
    """Run the host on ``model``, or on a tiny Flux.1, eager and compiled in turns: one cold round, ``rounds`` warm.

    The compiler's cache starts empty. With ``out`` the latents of the first round and the log are kept there.
    """
    progress = Progress()
    progress.stage("Starting ComfyUI")
    folders = [model[0].parent] if model else []
    server = HostServer(comfyui, model_folders=folders, env=env)
    server.env["TORCHINDUCTOR_CACHE_DIR"] = str(server.base / "inductor")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    with server:
        try:
            if model is None:
                progress.stage("Making a tiny Flux.1 of 19 double and 38 single blocks")
                path = save(server.diffusion_models / "tiny_flux1.safetensors", flux1())
                model, size = (path, describe(path)), size or (256, 256)
            return _compare(server, progress, model, size or (1024, 1024), steps, rounds, out)
        finally:
            progress.done()
            if out is not None:
                shutil.copy(server.log, out)


def snr(want: Tensor, got: Tensor) -> float:
    """Signal-to-noise ratio of ``got`` in dB."""
    return (10 * torch.log10(want.pow(2).sum() / (want - got).pow(2).sum())).item()


def _compare(
    server: HostServer,
    progress: Progress,
    model: tuple[Path, FluxFile],
    size: tuple[int, int],
    steps: int,
    rounds: int,
    out: Path | None,
) -> Comparison:
    path, flux = model
    device = server.get("/system_stats")["devices"][0]["name"]
    comparison = Comparison(path.name, device, size, steps)
    names: dict[str, dict[str, Any] | None] = {"eager": None, "compiled": {}}
    for number in range(rounds + 1):
        latents = []
        for name, compiled in names.items():
            progress.stage(f"Sampling {name}, {f'round {number} of {rounds}' if number else 'first run'}")
            workflow = sampling(
                path.name, flux, width=size[0], height=size[1], steps=steps, seed=number + 1, compiled=compiled
            )
            result = server.run(workflow, lambda event: _show(progress, event), timeout=3600)
            latents.append(server.latent(result))
            _keep(server, result, name, number, comparison, out)
        difference = (latents[0] - latents[1]).abs().max().item()
        comparison.largest_difference = max(comparison.largest_difference, difference)
    report = server.report()
    comparison.report = next(entry for entry in report["models"] if entry["node_id"] == "compile")
    return comparison


def _keep(server: HostServer, result: Result, name: str, number: int, comparison: Comparison, out: Path | None) -> None:
    seconds = result.seconds("sampler")
    if number:
        getattr(comparison, name).append(seconds / comparison.steps)
        return
    if name == "compiled":
        comparison.cold = seconds
    if out is not None:
        shutil.copy(server.latent_file(result), out / f"{name}.latent")


def _show(progress: Progress, event: Event) -> None:
    if event.type == "progress":
        progress.detail(f"step {event.data['value']} of {event.data['max']}")
    elif event.type == STATUS:
        progress.detail(event.data["text"])
