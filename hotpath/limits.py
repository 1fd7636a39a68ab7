"""Compiling: one thread at a time, whatever the path, with Dynamo's recompile limit never passed in silence."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch._dynamo import config

# Dynamo's tracing and Inductor have state of the process, and a host with several GPUs runs regions in several threads.
_lock = threading.RLock()


@contextmanager
def compiling(limit: int | None = None) -> Iterator[None]:
    """Compile, or read compiled code, while no other thread does.

    With ``limit`` a code object may have that many graphs and the next raises, with fullgraph or without, and what
    fails to compile raises too, though another pack may have asked PyTorch to go on without a word. Dynamo's settings
    belong to the thread in PyTorch 2.12 and newer and to the process before.

    Raises:
        FailOnRecompileLimitHit: from the compiled code within, at its limit.
    """
    with _lock:
        if limit is None:
            yield
            return
        with config.patch(recompile_limit=limit, fail_on_recompile_limit_hit=True, suppress_errors=False):
            yield
