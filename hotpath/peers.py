"""Copies from one device of this process to another, on streams of their own, so that both compute meanwhile."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .internals.memory import current_stream


class Streams:
    """Streams and events of CUDA devices, made when they are first asked for and used again at each block: what waits
    for an event waits for what it stood for then."""

    def __init__(self) -> None:
        self._ways: dict[tuple[Hashable, Hashable], tuple[torch.cuda.Stream, torch.cuda.Stream]] = {}
        self._events: dict[Hashable, torch.cuda.Event] = {}
        self._current: dict[tuple[torch.device, int], torch.cuda.Stream] = {}

    def current(self, device: torch.device) -> torch.cuda.Stream:
        key = device, current_stream(device)
        if key not in self._current:
            self._current[key] = torch.cuda.current_stream(device)
        return self._current[key]

    def event(self, key: Hashable) -> torch.cuda.Event:
        """The event of what has ``key``, to be recorded on one device."""
        if key not in self._events:
            self._events[key] = torch.cuda.Event()
        return self._events[key]

    def way(
        self, source: Hashable, leaves: torch.device, target: Hashable, arrives: torch.device
    ) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
        """A stream of the device ``leaves`` and one of ``arrives``, for what is copied from one to the other, of which
        ``source`` and ``target`` are the keys."""
        if (source, target) not in self._ways:
            self._ways[source, target] = torch.cuda.Stream(leaves), torch.cuda.Stream(arrives)
        return self._ways[source, target]


class Given(NamedTuple):
    """Tensors of one device, and on CUDA the event after which they are complete."""

    tensors: tuple[Tensor, ...]
    complete: torch.cuda.Event | None


def give(tensors: Sequence[Tensor]) -> Given:
    """What the current stream of the device of ``tensors`` computes, for another device to ``take``."""
    on_cuda = bool(tensors) and tensors[0].is_cuda
    complete = torch.cuda.current_stream(tensors[0].device).record_event() if on_cuda else None
    return Given(tuple(tensors), complete)


class PeerCopies:
    """Copies to ``device`` from others, on streams of their own, so that both devices compute meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams = Streams()

    def take(self, given: Given) -> tuple[Tensor, ...]:
        """``given`` on this device, complete for what its current stream runs next."""
        source = given.tensors[0].device if given.tensors else self._device
        if source == self._device or given.complete is None:
            return tuple(tensor.to(self._device) for tensor in given.tensors)
        current = torch.cuda.current_stream(self._device)
        # PyTorch copies on the current stream of the source and has that of the target wait for it.
        leaving, arriving = self._streams.way(source, source, self._device, self._device)
        leaving.wait_event(given.complete)
        with torch.cuda.stream(leaving), torch.cuda.stream(arriving):
            taken = tuple(tensor.to(self._device, non_blocking=True) for tensor in given.tensors)
        current.wait_stream(arriving)
        for tensor, copy in zip(given.tensors, taken, strict=True):
            tensor.record_stream(leaving)
            copy.record_stream(current)
        return taken
