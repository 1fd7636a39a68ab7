"""Tiny Flux checkpoints, autoencoders and LoRAs with random weights, in the key layout of the real files.

Weights are scaled so that activations stay finite and each weight changes the result. The same arguments give the
same weights.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

HEAD_DIM = 128
_LARGEST_HEADER = 100_000_000


class NotFlux(ValueError):
    """A file that is not a Flux model in safetensors format; the message says what it is instead."""


@dataclass(frozen=True)
class FluxFile:
    """What a workflow has to know of a checkpoint. ``pooled_width`` is 0 where the model takes no pooled text."""

    double_blocks: int
    single_blocks: int
    text_width: int
    pooled_width: int
    flux2: bool


class _Weights(dict[str, Tensor]):
    """A state dict that is filled layer by layer."""

    def __init__(self, seed: int, dtype: torch.dtype, device: str = "cpu") -> None:
        super().__init__()
        self._generator = torch.Generator(device).manual_seed(seed)
        self._dtype = dtype
        self._device = device

    def linear(self, name: str, out_features: int, in_features: int, bias: bool = True, gain: float = 1) -> None:
        self[f"{name}.weight"] = self._random(out_features, in_features).mul_(gain / in_features**0.5)
        if bias:
            self[f"{name}.bias"] = self._random(out_features).mul_(0.02)

    def conv(self, name: str, out_channels: int, in_channels: int, size: int = 3, bias: bool = True) -> None:
        self.linear(name, out_channels, in_channels * size**2, bias)
        self[f"{name}.weight"] = self[f"{name}.weight"].view(out_channels, in_channels, size, size)

    def norm(self, name: str, features: int) -> None:
        self[f"{name}.scale"] = self._random(features).mul_(0.1).add_(1)

    def modulation(self, name: str, out_features: int, hidden: int, bias: bool = True) -> None:
        # Gates of about 0.5: blocks count, and the residual stream does not grow much in 57 of them.
        self.linear(name, out_features, hidden, bias, gain=0.5)

    def embedder(self, name: str, hidden: int, in_features: int, bias: bool = True, gain: float = 1.4) -> None:
        self.linear(f"{name}.in_layer", hidden, in_features, bias, gain)
        self.linear(f"{name}.out_layer", hidden, hidden, bias, gain)

    def double_block(
        self, index: int, hidden: int, mlp: int, gated: bool = False, bias: bool = True, modulation: bool = True
    ) -> None:
        for stream in ("img", "txt"):
            prefix = f"double_blocks.{index}.{stream}"
            if modulation:
                self.modulation(f"{prefix}_mod.lin", 6 * hidden, hidden, bias)
            self.linear(f"{prefix}_attn.qkv", 3 * hidden, hidden, bias)
            self.linear(f"{prefix}_attn.proj", hidden, hidden, bias)
            self.norm(f"{prefix}_attn.norm.query_norm", HEAD_DIM)
            self.norm(f"{prefix}_attn.norm.key_norm", HEAD_DIM)
            self.linear(f"{prefix}_mlp.0", 2 * mlp if gated else mlp, hidden, bias)
            self.linear(f"{prefix}_mlp.2", hidden, mlp, bias)

    def single_block(
        self, index: int, hidden: int, mlp: int, gated: bool = False, bias: bool = True, modulation: bool = True
    ) -> None:
        prefix = f"single_blocks.{index}"
        self.linear(f"{prefix}.linear1", 3 * hidden + (2 * mlp if gated else mlp), hidden, bias)
        self.linear(f"{prefix}.linear2", hidden, hidden + mlp, bias)
        self.norm(f"{prefix}.norm.query_norm", HEAD_DIM)
        self.norm(f"{prefix}.norm.key_norm", HEAD_DIM)
        if modulation:
            self.modulation(f"{prefix}.modulation.lin", 3 * hidden, hidden, bias)

    def _random(self, *shape: int) -> Tensor:
        """Uniform numbers of variance 1, which are four times as quick to draw as normal ones."""
        empty = torch.empty(shape, dtype=self._dtype, device=self._device)
        return empty.uniform_(-(3**0.5), 3**0.5, generator=self._generator)


def flux1(
    double_blocks: int = 19,
    single_blocks: int = 38,
    *,
    hidden: int = 256,
    text_width: int = 64,
    pooled_width: int = 32,
    in_features: int = 64,
    guidance: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Flux.1 dev; schnell without ``guidance``; Fill with ``in_features=384``."""
    weights = _Weights(seed, dtype, device)
    weights.linear("img_in", hidden, in_features)
    weights.linear("txt_in", hidden, text_width)
    weights.embedder("time_in", hidden, 256)
    weights.embedder("vector_in", hidden, pooled_width)
    if guidance:
        weights.embedder("guidance_in", hidden, 256)
    for index in range(double_blocks):
        weights.double_block(index, hidden, 4 * hidden)
    for index in range(single_blocks):
        weights.single_block(index, hidden, 4 * hidden)
    weights.linear("final_layer.linear", 64, hidden)
    weights.linear("final_layer.adaLN_modulation.1", 2 * hidden, hidden)
    return dict(weights)


def flux2(
    double_blocks: int = 2,
    single_blocks: int = 3,
    *,
    hidden: int = 256,
    text_width: int = 64,
    guidance: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Flux.2 dev: one modulation for all blocks, gated MLPs, no biases. Klein without ``guidance``."""
    weights = _Weights(seed, dtype, device)
    weights.linear("img_in", hidden, 128, bias=False)
    weights.linear("txt_in", hidden, text_width, bias=False)
    weights.embedder("time_in", hidden, 256, bias=False)
    if guidance:
        weights.embedder("guidance_in", hidden, 256, bias=False)
    weights.modulation("double_stream_modulation_img.lin", 6 * hidden, hidden, bias=False)
    weights.modulation("double_stream_modulation_txt.lin", 6 * hidden, hidden, bias=False)
    weights.modulation("single_stream_modulation.lin", 3 * hidden, hidden, bias=False)
    for index in range(double_blocks):
        weights.double_block(index, hidden, 3 * hidden, gated=True, bias=False, modulation=False)
    for index in range(single_blocks):
        weights.single_block(index, hidden, 3 * hidden, gated=True, bias=False, modulation=False)
    weights.linear("final_layer.linear", 128, hidden, bias=False)
    weights.linear("final_layer.adaLN_modulation.1", 2 * hidden, hidden, bias=False)
    return dict(weights)


def chroma(
    double_blocks: int = 1,
    single_blocks: int = 1,
    *,
    text_width: int = 64,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Tensor]:
    """Chroma: modulation comes from an approximator. The host fixes its widths, so that this is 1.2 GB."""
    hidden, approximator = 3072, 5120
    weights = _Weights(seed, dtype)
    weights.linear("img_in", hidden, 64)
    weights.linear("txt_in", hidden, text_width)
    weights.linear("distilled_guidance_layer.in_proj", approximator, 64)
    for index in range(5):
        weights.embedder(f"distilled_guidance_layer.layers.{index}", approximator, approximator, gain=1)
        weights.norm(f"distilled_guidance_layer.norms.{index}", approximator)
    weights.modulation("distilled_guidance_layer.out_proj", hidden, approximator)
    for index in range(double_blocks):
        weights.double_block(index, hidden, 4 * hidden, modulation=False)
    for index in range(single_blocks):
        weights.single_block(index, hidden, 4 * hidden, modulation=False)
    weights.linear("final_layer.linear", 64, hidden)
    return dict(weights)


def autoencoder(*, flux2: bool = False, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Encoder and decoder of TAEF1 or TAEF2, the small autoencoders that the host has beside those of Flux."""
    latent, inner = (32 if flux2 else 16), 64
    encoder, decoder = _Weights(seed, torch.float32), _Weights(seed + 1, torch.float32)

    def blocks(weights: _Weights, indices: Iterable[int], pooled: bool = False) -> None:
        for index in indices:
            for layer in (0, 2, 4):
                weights.conv(f"{index}.conv.{layer}", inner, inner)
            if pooled:
                weights.conv(f"{index}.pool.0", 4 * inner, inner, 1, bias=False)
                weights.conv(f"{index}.pool.3", inner, 4 * inner, 1, bias=False)
                weights[f"{index}.pool.1.weight"] = torch.ones(4 * inner)
                weights[f"{index}.pool.1.bias"] = torch.zeros(4 * inner)

    encoder.conv("0", inner, 3)
    blocks(encoder, (1, 3, 4, 5, 7, 8, 9))
    blocks(encoder, (11, 12, 13), pooled=flux2)
    encoder.conv("14", latent, inner)
    decoder.conv("1", inner, latent)
    blocks(decoder, (3, 4, 5), pooled=flux2)
    blocks(decoder, (8, 9, 10, 13, 14, 15, 18))
    decoder.conv("19", 3, inner)
    for weights, resampling in ((encoder, (2, 6, 10)), (decoder, (7, 12, 17))):
        for index in resampling:
            weights.conv(str(index), inner, inner, bias=False)
    return dict(encoder), dict(decoder)


def normal(model: Mapping[str, Tensor], *, seed: int = 0, outliers: bool = False) -> dict[str, Tensor]:
    """``model`` with matrices of normal numbers of 0.02, as many models begin, which lets less of each block through.

    With ``outliers`` every 97th output row of its blocks is 20 times larger.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = dict(model)
    for name, weight in model.items():
        if weight.ndim == 2:
            weights[name] = torch.randn(weight.shape, dtype=weight.dtype, generator=generator) * 0.02
            if outliers and "_blocks." in name:
                weights[name][::97] *= 20
    return weights


def quantized(model: Mapping[str, Tensor], format: str, **conf: bool) -> dict[str, Tensor]:
    """``model`` with the Linears of its blocks as the host stores ``float8_e4m3fn`` (one scale a weight) or
    ``int8_tensorwise`` (one scale a row); ``conf`` goes into each layer's ``comfy_quant``."""
    weights = dict(model)
    for name, weight in model.items():
        if not name.endswith(".weight") or weight.ndim != 2 or "_blocks." not in name:
            continue
        if format == "int8_tensorwise":
            scale = weight.abs().amax(1, keepdim=True).float() / 127
            weights[name] = (weight / scale).round().to(torch.int8)
        else:
            scale = weight.abs().amax().float() / torch.finfo(torch.float8_e4m3fn).max
            weights[name] = (weight / scale).to(torch.float8_e4m3fn)
        weights[f"{name}_scale"] = scale
        text = json.dumps({"format": format, **conf})
        layer = name.removesuffix(".weight")
        weights[f"{layer}.comfy_quant"] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    return weights


def lora(
    model: Mapping[str, Tensor], layers: Iterable[str] | None = None, *, rank: int = 4, seed: int = 1
) -> dict[str, Tensor]:
    """A LoRA for ``layers`` of ``model``, such as ``double_blocks.0.img_attn.qkv``; all Linears of its blocks by
    default. At strength 1 it changes a weight by about a fifth."""
    if layers is None:
        names = (name for name in model if name.endswith(".weight") and model[name].ndim == 2)
        layers = [name.removesuffix(".weight") for name in names if "_blocks." in name]
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in layers:
        out_features, in_features = model[f"{layer}.weight"].shape
        down = torch.randn(rank, in_features, generator=generator)
        up = torch.randn(out_features, rank, generator=generator)
        weights[f"diffusion_model.{layer}.lora_down.weight"] = down * (0.2 / in_features**0.5)
        weights[f"diffusion_model.{layer}.lora_up.weight"] = up / rank**0.5
        weights[f"diffusion_model.{layer}.alpha"] = torch.tensor(float(rank))
    return weights


def save(path: Path, weights: Mapping[str, Tensor]) -> Path:
    """Write ``weights`` as safetensors, making the folder; ``path`` is never half written. Returns ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.part")
    save_file(dict(weights), unfinished)
    os.replace(unfinished, path)
    return path


def describe(path: Path) -> FluxFile:
    """Read the header of a Flux checkpoint.

    Raises:
        NotFlux: the file is not safetensors, or holds no Flux.
        OSError: the file can't be read.
    """
    shapes = _shapes(path)
    marker = "double_blocks.0.img_attn.qkv.weight"
    found = next((name for name in shapes if name.endswith(marker)), None)
    if found is None or f"{found.removesuffix(marker)}txt_in.weight" not in shapes:
        raise NotFlux(f"{path} holds no Flux model: it lacks {marker} or txt_in.weight.")
    prefix = found.removesuffix(marker)
    return FluxFile(
        double_blocks=_count(shapes, f"{prefix}double_blocks."),
        single_blocks=_count(shapes, f"{prefix}single_blocks."),
        text_width=shapes[f"{prefix}txt_in.weight"][1],
        pooled_width=shapes.get(f"{prefix}vector_in.in_layer.weight", (0, 0))[1],
        flux2=f"{prefix}double_stream_modulation_img.lin.weight" in shapes,
    )


def _shapes(path: Path) -> dict[str, Sequence[int]]:
    """Tensor shapes from the header: an 8-byte length and JSON. Reads no weights, so any file size is quick."""
    with path.open("rb") as file:
        start = file.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        header = file.read(size) if 0 < size <= _LARGEST_HEADER else b""
    try:
        tensors = json.loads(header)
        return {name: entry["shape"] for name, entry in tensors.items() if name != "__metadata__"}
    except (ValueError, AttributeError, KeyError, TypeError):
        raise NotFlux(f"{path} is not a safetensors file.") from None


def _count(names: Iterable[str], prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)})
