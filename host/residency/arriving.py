"""Weights that the host left in RAM without dynamic VRAM, copied to the device while what came before them computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from ...hotpath.stream import CopyEngine, Slots, copy_engine
from .offload import LeavesOut
from .pieces import Piece, flat, pieces_of, placed, put_in, within

_PLACES = 2


class Arrivals:
    """Memory of the devices in which the weights of a block arrive while the block before it computes.

    The host leaves free what activations take. So it is had to leave more of the model in RAM, once: the memory stays
    until the model is unloaded, or loaded as a whole.
    """

    def __init__(self) -> None:
        self._landings: dict[torch.device, _Landing] = {}

    def start(self, patcher: ModelPatcher, layers: Callable[[], Sequence[Sequence[nn.Module]]]) -> None:
        """The model of ``patcher`` is loaded, and ``arriving`` will be asked for these ``layers``, block by block."""
        device = patcher.load_device
        # Blocks that Offload streams are there when they run. Without streams of the host's none are wanted.
        if patcher.is_dynamic() or isinstance(patcher, LeavesOut) or not comfy.model_management.NUM_STREAMS:
            return
        landing, blocks = self._landings.pop(device, None), layers()
        size = _most_away(blocks, device)
        if not size:
            return
        # The host pins what a load leaves in RAM, until any clone goes, and not what an earlier load left there.
        for key, parameter in patcher.model.named_parameters():
            if parameter.device != device:
                patcher.pin_weight_to_device(key)
        room = landing.size if landing else 0
        while room < size:
            patcher.partially_unload(patcher.offload_device, _PLACES * (size - room))
            # Of what left for them a block may have more than any had away before.
            room, size = size, _most_away(blocks, device)
        if landing is None or landing.size < room:
            del landing
            try:
                landing = _Landing(copy_engine(device), device, room)
            except torch.OutOfMemoryError:
                return
        self._landings[device] = landing

    def drop(self, device: torch.device) -> None:
        """The model is unloaded from ``device``."""
        self._landings.pop(device, None)

    @contextmanager
    def arriving(self, layers: Sequence[nn.Module], device: torch.device) -> Iterator[bool]:
        """A scope in which the weights of ``layers`` are on ``device``, but those for which there is no memory; whether
        any of them are there for its length alone."""
        landing = self._landings.get(device)
        pieces = landing.fitting(layers, device) if landing else []
        if landing is None or not pieces:
            yield False
            return
        with landing.holding(pieces) as arrived, put_in(arrived):
            yield True


class _Landing:
    """Places of ``size`` bytes each, for one block and the next in turn."""

    def __init__(self, engine: CopyEngine, device: torch.device, size: int) -> None:
        self.size = size
        self._slots = Slots(engine, device, size, _PLACES)
        self._turn = 0

    def fitting(self, layers: Iterable[nn.Module], device: torch.device) -> list[Piece]:
        """Those parameters of ``layers`` that are not on ``device`` and have room in a place, in their order."""
        pieces, _ = pieces_of(layers, there=device)
        return [piece for piece in pieces if piece.offsets[-1] + piece.tensors[-1].nbytes <= self.size]

    @contextmanager
    def holding(self, pieces: Sequence[Piece]) -> Iterator[list[tuple[Piece, nn.Parameter]]]:
        """Each with its copy in a place, for the compute that is queued within the scope."""
        turn = self._turn = (self._turn + 1) % _PLACES
        arrival = self._slots.copy(turn, [(flat(tensor), offset) for tensor, offset in placed(pieces)])
        with self._slots.read(turn, arrival):
            yield [(piece, within(self._slots.memory[turn], piece)) for piece in pieces]


def _most_away(blocks: Iterable[Sequence[nn.Module]], device: torch.device) -> int:
    """Bytes of the weights that are not on ``device``, of the block that has the most."""
    return max((pieces_of(layers, there=device)[1] for layers in blocks), default=0)
