"""Folders of diffusers with int8 weights and a scale for each row, which the host has layers for."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import comfy.quant_ops
import torch
from torch import Tensor

from .format import Place

T = TypeVar("T")

# Activations are quantized too, for which the host has no switch in this format.
_HOST_FORMAT = {"format": "int8_tensorwise"}

# What of a config says which of a method's layouts it is.
_TELLING = ("bnb_4bit_quant_type", "weights_dtype", "quant_type")


@dataclass(frozen=True)
class Int8Rows:
    """How a method names a layer's weight of (rows, columns) and its scales, one for each row in units of ``unit``.

    ``others`` are stored beside them and must have these values, with which they change nothing.
    """

    weight: str
    scale: str
    others: Mapping[str, float]
    unit: float

    def weights(self, stored: Mapping[str, T]) -> dict[str, T]:
        """What is stored by the names of a model in full precision, without scales."""
        layers = self._layers(stored)
        extra = {layer + suffix for layer in layers for suffix in (self.weight, self.scale, *self.others)}
        plain = {name: weight for name, weight in stored.items() if name not in extra}
        return {**plain, **{f"{layer}.weight": stored[layer + self.weight] for layer in layers}}

    def state_dict(self, folder: Path, stored: Mapping[str, Tensor], table: Mapping[str, Place]) -> dict[str, Tensor]:
        """The host's state dict of a quantized checkpoint.

        Raises:
            ValueError: of layers that are one in the host, not all are quantized; or scales are not those of rows.
        """
        layers = self._layers(stored)
        self._check(folder, layers, stored)
        parts: dict[str, list[tuple[Place, str]]] = defaultdict(list)
        for key, place in table.items():
            parts[place.name].append((place, key))
        state = {}
        for name, found in parts.items():
            found.sort(key=lambda part: part[0].rows or (0, 0))
            quantized = {key.removesuffix(".weight") in layers for _, key in found if key.endswith(".weight")}
            if len(quantized) == 2:
                names = ", ".join(key for _, key in found)
                raise ValueError(f"{folder}: {names} are one layer in ComfyUI, and not all of them are quantized.")
            if quantized != {True}:
                state[name] = _joined((place, stored[key]) for place, key in found)
                continue
            of = [(place, key.removesuffix(".weight")) for place, key in found]
            state[name] = _joined((place, stored[layer + self.weight]) for place, layer in of)
            scale = _joined((place, stored[layer + self.scale].float().reshape(-1, 1)) for place, layer in of)
            state[f"{name}_scale"] = scale * self.unit
            conf = json.dumps(_HOST_FORMAT).encode()
            state[f"{name.removesuffix('weight')}comfy_quant"] = torch.tensor(list(conf), dtype=torch.uint8)
        return state

    def _layers(self, stored: Collection[str]) -> set[str]:
        layers = {name.removesuffix(self.scale) for name in stored if name.endswith(self.scale)}
        return {layer for layer in layers if layer + self.weight in stored}

    def _check(self, folder: Path, layers: Iterable[str], stored: Mapping[str, Tensor]) -> None:
        for layer in layers:
            weight, scale = stored[layer + self.weight], stored[layer + self.scale]
            if weight.dtype != torch.int8 or scale.numel() != weight.shape[0]:
                raise ValueError(
                    f"{folder}: {layer} has {scale.numel()} scales for {weight.shape[0]} rows of {weight.dtype}, and "
                    "ComfyUI's layers want one for each row of int8."
                )
            for suffix, value in self.others.items():
                if layer + suffix in stored and stored[layer + suffix].ne(value).any():
                    raise ValueError(f"{folder}: {layer + suffix} is not {value}, as ComfyUI's layers need it.")


_LAYOUTS = {
    "bitsandbytes": Int8Rows(".weight", ".SCB", {".weight_format": 0}, 1 / 127),
    "quanto": Int8Rows(".weight._data", ".weight._scale", {".input_scale": 1, ".output_scale": 1}, 1.0),
}


def int8_layout(config: Path, quantization: Any) -> Int8Rows:
    """How the weights are stored. Raise ValueError, which names the file, for what the host has no layers for."""
    if not isinstance(quantization, dict):
        raise ValueError(f"{config}: quantization_config is no mapping. Download it again.")
    method = quantization.get("quant_method")
    if (method == "bitsandbytes" and quantization.get("load_in_8bit")) or (
        method == "quanto" and quantization.get("weights_dtype") == "int8"
    ):
        if _HOST_FORMAT["format"] not in comfy.quant_ops.QUANT_ALGOS:
            raise ValueError(
                f"{config}: the weights are quantized by {method} in int8, which this ComfyUI has no layers for. "
                "Update ComfyUI, or take the full-precision folder."
            )
        return _LAYOUTS[method]
    given = (
        ", ".join(f"{name} {quantization[name]}" for name in _TELLING if quantization.get(name)) or "no further word"
    )
    raise ValueError(
        f"{config}: the weights are quantized by {method or 'an unknown method'} ({given}), in a "
        "layout that ComfyUI has no layers for. For int8 of bitsandbytes and of quanto it has. Take the full-precision "
        "folder; Quantize Repeated Blocks makes it as small."
    )


def _joined(parts: Iterable[tuple[Place, Tensor]]) -> Tensor:
    tensors = [tensor if place.convert is None else place.convert(tensor) for place, tensor in parts]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
