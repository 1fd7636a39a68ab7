"""Parameters of layers as bytes in a buffer, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from ...hotpath.stream import ALIGNMENT
from ..layers.gguf import moved, plain, take_patches


class Piece(NamedTuple):
    """A parameter of a layer, its tensors, and where they lie in a slot."""

    layer: Any
    name: str
    parameter: nn.Parameter
    tensors: list[Tensor]
    offsets: list[int]


def tensors_of(parameter: Tensor) -> list[Tensor]:
    """The plain tensors that a parameter is made of."""
    if isinstance(parameter, QuantizedTensor):
        names, _ = parameter.__tensor_flatten__()
        return [getattr(parameter, name) for name in names]
    return [plain(parameter.data)]


def pieces_of(layers: Iterable[Any], there: torch.device | None = None) -> tuple[list[Piece], int]:
    """The parameters of ``layers`` as they are now, but those on the device ``there``, and how many bytes a slot needs
    for them."""
    pieces, offset = [], 0
    for layer in layers:
        for name, parameter in layer._parameters.items():
            if parameter is None or parameter.device == there:
                continue
            tensors, offsets = tensors_of(parameter), []
            for tensor in tensors:
                offsets.append(offset)
                offset += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
            pieces.append(Piece(layer, name, parameter, tensors, offsets))
    return pieces, offset


def placed(pieces: Sequence[Piece]) -> Iterator[tuple[Tensor, int]]:
    """The tensors of ``pieces``, each with its offset in a slot."""
    for piece in pieces:
        yield from zip(piece.tensors, piece.offsets, strict=True)


def flat(tensor: Tensor) -> Tensor:
    return tensor.data.contiguous().reshape(-1).view(torch.uint8)


def within(buffer: Tensor, piece: Piece) -> nn.Parameter:
    """The parameter of ``piece`` whose bytes are in ``buffer``."""
    views = [
        buffer[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for tensor, offset in placed([piece])
    ]
    value = views[0]
    if isinstance(piece.parameter, QuantizedTensor):
        names, context = piece.parameter.__tensor_flatten__()
        inner = dict(zip(names, views, strict=True))
        shape, stride = piece.parameter.shape, piece.parameter.stride()
        # As the host has them, which could not move it otherwise.
        with torch.inference_mode():
            value = type(piece.parameter).__tensor_unflatten__(inner, context, shape, stride)
            return nn.Parameter(value, requires_grad=False)
    if type(piece.parameter) is not nn.Parameter:
        return moved(piece.parameter, value)
    return nn.Parameter(value, requires_grad=False)


@contextmanager
def put_in(arrived: Sequence[tuple[Piece, nn.Parameter]]) -> Iterator[None]:
    """A scope in which layers have copies of their parameters in their place, with the LoRAs of now."""
    try:
        for piece, parameter in arrived:
            take_patches(parameter, piece.parameter)
            piece.layer._parameters[piece.name] = parameter
        yield
    finally:
        for piece, _ in arrived:
            piece.layer._parameters[piece.name] = piece.parameter
