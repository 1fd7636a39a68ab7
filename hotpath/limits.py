"""Compiling: one thread at a time, whatever the path, with Dynamo's recompile limit never passed in silence."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch._dynamo import config
from torch.fx.experimental import _config

from .internals.state import keep_device_guard
from .toolchain import named_user
from .waiting import POLL, ask

# Dynamo's tracing and Inductor have state of the process, and a host with several GPUs runs regions in several threads.
_lock = threading.RLock()
_shapes: Any = _config
_ANY_SIZE = "backed_size_oblivious"
# PyTorch 2.8 and newer.
ANY_SIZE = hasattr(_shapes, _ANY_SIZE)


@contextmanager
def compiling(limit: int | None = None, any_size: bool = False) -> Iterator[None]:
    """Compile, or read compiled code, while no other thread does.

    With ``limit`` a code object may have that many graphs and the next raises, with fullgraph or without, and what
    fails to compile raises too, though another pack may have asked PyTorch to go on without a word. Dynamo's settings
    belong to the thread in PyTorch 2.12 and newer and to the process before.

    ``any_size``: a dynamic size of 1 gets no graph of its own, where PyTorch can do that.

    Raises:
        FailOnRecompileLimitHit: from the compiled code within, at its limit.
        What ends the wait for another thread: see ``while_waiting``.
    """
    while not _lock.acquire(timeout=POLL):
        ask()
    try:
        with named_user(), _limited(limit), _sized(any_size and limit is not None):
            keep_device_guard()
            yield
    finally:
        _lock.release()


def _limited(limit: int | None) -> AbstractContextManager[Any]:
    if limit is None:
        return nullcontext()
    return config.patch(recompile_limit=limit, fail_on_recompile_limit_hit=True, suppress_errors=False)


def _sized(any_size: bool) -> AbstractContextManager[Any]:
    return _shapes.patch(**{_ANY_SIZE: True}) if any_size and ANY_SIZE else nullcontext()


@contextmanager
def nobody_compiling() -> Iterator[bool]:
    """A scope in which no other thread compiles, and whether that could be had without waiting for one."""
    free = _lock.acquire(blocking=False)
    try:
        yield free
    finally:
        if free:
            _lock.release()
