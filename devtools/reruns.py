"""CUDA graphs as a CPU can imitate them: what was recorded runs again, on what is at the addresses that it holds."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..hotpath import exchange
from ..hotpath.cuda_graphs import Launch, Recording
from ..hotpath.recorded import Recordings
from ..hotpath.split import Crew
from ..hotpath.values import extent


class Reruns:
    """Records on the CPU, as ``CudaGraphs`` does on a CUDA device.

    ``before_recording`` is called with the number of each recording before it is made, and may raise; ``before_replay``
    and ``after_replay`` with that of each replay.
    ``waits`` is what the device is taken to do whenever it is asked whether it waits. Recordings made before the last
    call of ``grow`` are outgrown.
    """

    def __init__(self, waits: bool = True) -> None:
        self.waits = waits
        self.before_recording: Callable[[int], None] = lambda number: None
        self.before_replay: Callable[[int], None] = lambda number: None
        self.after_replay: Callable[[int], None] = lambda number: None
        self.recorded = 0
        self.replays = 0
        self.alive = 0
        self.current_stream = 0
        self.settled = 0
        self._size = 0
        self._numbers = itertools.count()

    def grow(self) -> None:
        self._size += 1

    def record(self, run: Launch, weights: dict[str, Tensor]) -> Recording:
        self.before_recording(next(self._numbers))
        self.recorded += 1
        self.alive += 1
        return _Rerun(self, run, weights, self._size)

    def outgrown(self, recording: Any) -> bool:
        return recording.size < self._size

    def settle(self) -> None:
        self.settled += 1

    def stream(self) -> Hashable:
        return self.current_stream

    def pool_bytes(self) -> int:
        return self.alive

    def forget(self) -> None:
        assert not self.alive, "the pool went before what was recorded in it"

    def mark(self) -> Any:
        return self.recorded

    def idle(self, mark: Any) -> bool:
        return self.waits


def of_each_device(recordings: Sequence[Recordings]) -> Callable[[torch.device], Recordings]:
    """What gives the recordings of the device that computes on this thread, by its place, where several are one."""
    return lambda device: recordings[exchange._current.at[1] if exchange._current.at else 0]


def forwards_in_fibers(patch: Any) -> list[bool]:
    """Of each forward that is shared out while ``patch``, pytest's ``monkeypatch``, lasts, whether one thread computed
    it."""
    seen: list[bool] = []
    run = Crew.run

    def watched(crew: Crew, *args: Any) -> list[Tensor]:
        try:
            return run(crew, *args)
        finally:
            seen.append(crew.in_fibers)

    patch.setattr(Crew, "run", watched)
    return seen


class _Rerun:
    def __init__(self, owner: Reruns, run: Launch, weights: dict[str, Tensor], size: int) -> None:
        self._owner = owner
        self.size = size
        self._run: Launch | None = run
        self._inference = torch.is_inference_mode_enabled()
        self._weights = {name: _Place(weight) for name, weight in weights.items()}

    def replay(self) -> None:
        assert self._run is not None, "replayed after it was forgotten"
        number = self._owner.replays
        self._owner.replays += 1
        self._owner.before_replay(number)
        with torch.inference_mode(self._inference):
            self._run({name: place.tensor() for name, place in self._weights.items()})
        self._owner.after_replay(number)

    def reset(self) -> None:
        if self._run is not None:
            self._owner.alive -= 1
        self._run = None

    def __del__(self) -> None:
        self.reset()


class _Place:
    """An address with the geometry of the tensor that was there."""

    def __init__(self, tensor: Tensor) -> None:
        self._address, self._dtype = tensor.data_ptr(), tensor.dtype
        self._geometry = tensor.shape, tensor.stride()
        self._bytes = extent(*self._geometry, tensor.element_size())

    def tensor(self) -> Tensor:
        if not self._bytes:
            return torch.empty(self._geometry[0], dtype=self._dtype)
        memory = (ctypes.c_char * self._bytes).from_address(self._address)
        return torch.frombuffer(memory, dtype=torch.uint8).view(self._dtype).as_strided(*self._geometry)
