"""Records what a piece of code launches on a CUDA device, to launch it again as one: PyTorch's ``CUDAGraph``.

What the code allocates comes from one pool for all recordings of a device, or where PyTorch's allocator is not its own
from memory that is there before (``pieces.py``). Nothing in it outlives a replay, so that recordings which run one
after another share all of it.
"""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor

from .internals.memory import clear_workspaces, current_stream, leave_pool
from .limits import nobody_compiling
from .pieces import PieceRecorder, Unrecordable

Launch = Callable[[dict[str, Tensor]], None]

# One capture at a time in a process, PyTorch says.
_capturing = threading.Lock()


class Busy(RuntimeError):
    """Another thread is recording, or compiling."""


@contextmanager
def undisturbed() -> Iterator[None]:
    """A scope in which no other thread records, or gives memory back as kernels that are timed and garbage that Python
    collects do: with another allocator than PyTorch's own that breaks a recording off, and can end the process.

    Raises:
        Busy: another thread is at it.
    """
    if not _capturing.acquire(blocking=False):
        raise Busy("another thread is recording")
    collects = gc.isenabled()
    try:
        with nobody_compiling() as free:
            if not free:
                raise Busy("another thread is compiling")
            gc.disable()
            yield
    finally:
        if collects:
            gc.enable()
        _capturing.release()


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
            Busy: another thread is recording, or compiling.
        """

    def stream(self) -> Hashable:
        """What stands for the stream that is current on the device; recordings of one device run on one."""

    def pool_bytes(self) -> int:
        """Bytes of the device that the pool keeps."""

    def outgrown(self, recording: Recording) -> bool:
        """Whether a later recording took more memory than this one's, into which it would go if it was made anew."""

    def settle(self) -> None:
        """Give back what the allocator keeps and only code that is recorded now had a use for."""

    def forget(self) -> None:
        """All recordings were reset: let the pool go."""

    def mark(self) -> Any:
        """The end of what is queued so far."""

    def idle(self, mark: Any) -> bool:
        """Whether the device has done all up to ``mark``; asked without waiting."""


class CudaGraphs:
    """Records CUDA graphs on one device: each as a whole with PyTorch's own allocator, else in pieces."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._captures = _Captures(device)
        self._pieces = None if self._captures.own else PieceRecorder(device, self._captures)

    def record(self, run: Launch, weights: dict[str, Tensor]) -> Recording:
        with undisturbed(), torch.cuda.device(self._device):
            if self._pieces is not None:
                return self._pieces.record(run, weights)
            with self._captures.stream():
                return self._captures.whole(run, weights)

    def stream(self) -> Hashable:
        return current_stream(self._device)

    def pool_bytes(self) -> int:
        return self._captures.bytes + (self._pieces.bytes if self._pieces is not None else 0)

    def outgrown(self, recording: Recording) -> bool:
        return self._pieces is not None and self._pieces.outgrown(recording)

    def settle(self) -> None:
        torch.cuda.empty_cache()

    def forget(self) -> None:
        self._captures.forget()
        if self._pieces is not None:
            self._pieces.forget()

    def mark(self) -> Any:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def idle(self, mark: Any) -> bool:
        return mark.query()


class _Captures:
    """What is launched on a stream of its own, one CUDA graph after the other, in a pool that they share."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.own = torch.cuda.get_allocator_backend() == "native"
        self._pool: Any = None
        self._keeper: Any = None
        self._side: Any = None
        self._graph: Any = None
        self._free = 0
        self._broken = ""
        self.bytes = 0

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Within it, what is launched can be recorded."""
        if self._broken:
            raise Unrecordable(self._broken)
        if self._side is None:
            self._side = torch.cuda.Stream(self._device)
        with torch.cuda.stream(self._side):
            if self.own and self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
                # A pool that no graph is in can't be used again.
                self.begin()
                self._keeper = self._ended(self._graph)
            yield

    def whole(self, run: Launch, weights: dict[str, Tensor]) -> Recording:
        """What ``run(weights)`` launches as one graph."""
        self.begin()
        try:
            run(weights)
        except BaseException as error:
            self.abandon(error)
            raise
        return self.end()

    def begin(self) -> None:
        graph, self._free = torch.cuda.CUDAGraph(), torch.cuda.mem_get_info(self._device)[0]
        if not self.own:
            # Only PyTorch's allocator has pools; of another it knows each graph by a name that is not used again.
            self._pool = torch.cuda.graph_pool_handle()
        # A workspace from before could be freed while this holds its address; its own is memory like all else.
        clear_workspaces()
        try:
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        except BaseException:
            self._leave_pool()
            raise
        self._graph = graph

    def end(self) -> Any:
        graph, self._graph = self._graph, None
        try:
            clear_workspaces()
            # Between two calls there may be nothing.
            self._ended(graph)
        except BaseException as error:
            self._leave(graph, error)
            raise
        self.bytes += max(0, self._free - torch.cuda.mem_get_info(self._device)[0])
        return graph

    def abandon(self, error: BaseException) -> None:
        graph, self._graph = self._graph, None
        self._leave(graph, error)

    def forget(self) -> None:
        self._pool, self._keeper, self.bytes = None, None, 0

    def _leave(self, graph: Any, error: BaseException) -> None:
        """After a capture that failed."""
        if not self.own and isinstance(error, RuntimeError) and "captur" in str(error):
            # What CUDA itself broke off can't give memory back: a workspace that is freed then ends the process.
            self._broken = f"a recording was broken off ({str(error).splitlines()[0]})"
        elif not self.own:
            clear_workspaces()
        with suppress(RuntimeError):
            self._ended(graph)
        self._leave_pool()

    @staticmethod
    def _ended(graph: Any) -> Any:
        """``graph``, in which there may be nothing."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph.capture_end()
        return graph

    def _leave_pool(self) -> None:
        """A capture that failed may leave the allocator in the pool."""
        with suppress(RuntimeError):
            leave_pool(self._device, self._pool)
