"""dev.py bench --memory: what Flux.1-dev must have on the card, and what crosses the bus for an image of 28 steps.

From the host's model on the meta device at full size: no weight is made, so it runs anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.bars import bars
from devtools import gpu_host

STEPS = 28
SIZE = 1024
GB = 1e9
CARDS = (8, 12, 16, 24, 32)
# Of a card's memory, taken by the CUDA context, the desktop and the like.
TAKEN = 2**30
FORMATS = (None, "fp8_e4m3", "int8_dynamic")
FLUX_DEV: dict[str, Any] = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}


@dataclass(frozen=True)
class Need:
    """Bytes of Flux.1-dev in one format: modulation layers, all other weights, and what modulation of a schedule takes.

    ``activations`` is the host's estimate, for an NVIDIA card, of what it needs beside weights.
    """

    format: str
    modulation: int
    others: int
    table: int
    activations: int

    def resident(self, ahead: bool) -> int:
        """What must be on the card to sample with nothing streamed, activations aside."""
        return self.others + (self.table if ahead else self.modulation)

    def bus(self, ahead: bool, card: int) -> int:
        """What crosses the bus for an image on a card of ``card`` GiB that is full of weights from the image before."""
        room = card * 2**30 - TAKEN - self.activations
        return STEPS * max(0, self.resident(ahead) - room) + ahead * self.modulation


def needs() -> list[Need]:
    """What Flux.1-dev takes in each format, from the tensors of the host's model."""
    gpu_host.start(dynamic_vram=False, cpu=True)
    import comfy.model_management
    import comfy.supported_models
    from hotpath_pack.host.quantizing.formats import FORMATS as ALL_FORMATS
    from hotpath_pack.host.quantizing.quantize import choose, weight_bytes
    from hotpath_pack.host.residency.modulation import modulation_layers

    config = comfy.supported_models.Flux({**FLUX_DEV, "dtype": torch.bfloat16})
    model = config.get_model({}, "", device="meta")
    with patch.object(comfy.model_management, "pytorch_attention_flash_attention", return_value=True):
        activations = int(model.memory_required([1, 16, SIZE // 8, SIZE // 8]))
    diffusion_model = model.diffusion_model
    vectors = modulation_layers(diffusion_model)
    table = (STEPS + 1) * sum(layer.out_features for layer in vectors.values()) * torch.bfloat16.itemsize
    measured = []
    for name in FORMATS:
        layers, _ = choose(diffusion_model, ALL_FORMATS[name], "") if name else ({}, None)
        sizes = {path: tensor.nbytes for path, tensor in diffusion_model.named_parameters()}
        for path, format in layers.items():
            weight = diffusion_model.get_submodule(path).weight
            sizes[f"{path}.weight"] = weight_bytes(format.quantize(weight, weight.dtype))
        modulation = sum(size for path, size in sizes.items() if path.rpartition(".")[0] in vectors)
        others = sum(sizes.values()) - modulation
        measured.append(Need(name or "bf16", modulation, others, table, activations))
    return measured


def rows(measured: Sequence[Need]) -> list[tuple[str, str]]:
    """The table, two lines a format."""
    cards = "".join(f"{f'{card} GB card':>12}" for card in CARDS)
    lines = [("", f"{'on the card':>12}{cards}")]
    for need in measured:
        for ahead in (False, True):
            bus = "".join(f"{need.bus(ahead, card) / GB:>9.1f} GB" for card in CARDS)
            lines.append((_name(need, ahead), f"{need.resident(ahead) / GB:>9.1f} GB{bus}"))
    return lines


def picture(measured: Sequence[Need]) -> str:
    """An SVG: for each format with and without, what must be on the card, with cards marked."""
    shown, said = {}, {}
    for need in measured:
        for ahead in (False, True):
            name = _name(need, ahead)
            parts = {"all else": need.others, "modulation": need.table if ahead else need.modulation}
            shown[name] = {part: size / GB for part, size in {**parts, "activations": need.activations}.items()}
            said[name] = f"{sum(shown[name].values()):.1f} GB"
    marks = {f"{card} GB": (card * 2**30 - TAKEN) / GB for card in CARDS}
    return bars(
        f"What Flux.1-dev takes while it samples {SIZE}x{SIZE}, in GB, and cards of which 1 GiB is taken",
        shown,
        said,
        marks,
    )


def _name(need: Need, ahead: bool) -> str:
    return f"{need.format}, modulation {'ahead' if ahead else 'in place'}"
