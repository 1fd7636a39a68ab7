"""Records what a piece of code launches on a CUDA device, to launch it again as one: PyTorch's ``CUDAGraph``.

What the code allocates comes from one pool for all recordings of a device. Nothing in it outlives a replay, so that
recordings which run one after another share all of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor

Launch = Callable[[dict[str, Tensor]], None]

# One capture at a time in a process, PyTorch says.
_capturing = threading.Lock()


class Busy(RuntimeError):
    """Another thread is recording."""


class Recording(Protocol):
    """What was recorded."""

    def replay(self) -> None:
        """Launch it again, on the current stream, with what is in memory now."""

    def reset(self) -> None:
        """Forget it; what still runs of it runs to its end."""


class Recorder(Protocol):
    """What records on one device."""

    def record(self, run: Launch, weights: dict[str, Tensor]) -> Recording:
        """Record what ``run(weights)`` launches, without running it. Of ``weights`` it holds the addresses alone.

        Raises:
            Busy: another thread is recording.
        """

    def stream(self) -> Hashable:
        """What stands for the stream that is current on the device; recordings of one device run on one."""

    def pool_bytes(self) -> int:
        """Bytes of the device that the pool keeps."""

    def forget(self) -> None:
        """All recordings were reset: let the pool go."""

    def mark(self) -> Any:
        """The end of what is queued so far."""

    def idle(self, mark: Any) -> bool:
        """Whether the device has done all up to ``mark``; asked without waiting."""


class CudaGraphs:
    """Records CUDA graphs on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self._side: Any = None
        self._pool_bytes = 0

    def record(self, run: Launch, weights: dict[str, Tensor]) -> Recording:
        if not _capturing.acquire(blocking=False):
            raise Busy("another thread is recording")
        try:
            with torch.cuda.device(self._device):
                return self._capture(run, weights)
        finally:
            _capturing.release()

    def _capture(self, run: Launch, weights: dict[str, Tensor]) -> Recording:
        if self._pool is None:
            self._pool, self._side = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self._device)
        graph: Any = torch.cuda.CUDAGraph()
        free, _ = torch.cuda.mem_get_info(self._device)
        with torch.cuda.stream(self._side):
            # A workspace from before could be freed while this holds its address; its own is memory like all else.
            torch._C._cuda_clearCublasWorkspaces()
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                run(weights)
                torch._C._cuda_clearCublasWorkspaces()
            except BaseException:
                with suppress(RuntimeError):
                    graph.capture_end()
                self._leave_pool()
                raise
            try:
                graph.capture_end()
            except BaseException:
                self._leave_pool()
                raise
        self._pool_bytes += max(0, free - torch.cuda.mem_get_info(self._device)[0])
        return graph

    def _leave_pool(self) -> None:
        """After a capture that failed, which may leave the allocator in the pool."""
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)

    def stream(self) -> Hashable:
        return torch._C._cuda_getCurrentRawStream(self._device.index)

    def pool_bytes(self) -> int:
        return self._pool_bytes

    def forget(self) -> None:
        self._pool, self._pool_bytes = None, 0

    def mark(self) -> Any:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def idle(self, mark: Any) -> bool:
        return mark.query()
