"""LoRAs of each kind that the host reads, with random weights, in the key layout of the real files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from .checkpoints import lora

Shape = tuple[int, int]
# At strength 1 a weight changes by about a fifth.
_GAIN = 0.2


def adapter(
    model: Mapping[str, Tensor], kind: str, layers: Iterable[str] | None = None, *, rank: int = 4, seed: int = 1
) -> dict[str, Tensor]:
    """An adapter of ``kind``, ``lora`` or one of ``KINDS``, for ``layers`` of ``model``; see ``checkpoints.lora``."""
    if kind == "lora":
        return lora(model, layers, rank=rank, seed=seed)
    if layers is None:
        names = (name for name in model if name.endswith(".weight") and model[name].ndim == 2)
        layers = [name.removesuffix(".weight") for name in names if "_blocks." in name]
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in layers:
        out_features, in_features = model[f"{layer}.weight"].shape
        made = KINDS[kind]((out_features, in_features), rank, generator)
        if kind == "dora":
            made["dora_scale"] = model[f"{layer}.weight"].float().norm(dim=1, keepdim=True) * 1.1
        weights.update({f"diffusion_model.{layer}.{name}": tensor for name, tensor in made.items()})
    return weights


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def _lora(shape: Shape, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "lora_up.weight": _normal(generator, shape[0], rank) / rank**0.5,
        "lora_down.weight": _normal(generator, rank, shape[1]) * (_GAIN / shape[1] ** 0.5),
        "alpha": torch.tensor(float(rank)),
    }


def _loha(shape: Shape, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    gain = (_GAIN / shape[1] ** 0.5) ** 0.5 / rank**0.5
    return {
        "hada_w1_a": _normal(generator, shape[0], rank) * gain,
        "hada_w1_b": _normal(generator, rank, shape[1]),
        "hada_w2_a": _normal(generator, shape[0], rank) * gain,
        "hada_w2_b": _normal(generator, rank, shape[1]),
        "alpha": torch.tensor(float(rank)),
    }


def _lokr(shape: Shape, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    factor = 4
    gain = _GAIN / shape[1] ** 0.5 / rank**0.5
    return {
        "lokr_w1": _normal(generator, factor, factor),
        "lokr_w2_a": _normal(generator, shape[0] // factor, rank) * gain,
        "lokr_w2_b": _normal(generator, rank, shape[1] // factor),
        "alpha": torch.tensor(float(rank)),
    }


def _lokr_full(shape: Shape, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    factor = 8
    return {
        "lokr_w1": _normal(generator, factor, factor),
        "lokr_w2": _normal(generator, shape[0] // factor, shape[1] // factor) * (_GAIN / shape[1] ** 0.5),
    }


def _diff(shape: Shape, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "diff": _normal(generator, *shape) * (_GAIN / shape[1] ** 0.5),
        "diff_b": _normal(generator, shape[0]) * 0.1,
    }


KINDS: Mapping[str, Callable[[Shape, int, torch.Generator], dict[str, Tensor]]] = {
    "dora": _lora,
    "loha": _loha,
    "lokr": _lokr,
    "lokr_full": _lokr_full,
    "diff": _diff,
}
