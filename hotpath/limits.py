"""Dynamo's recompile limit, raised to what a region may need and never passed in silence."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch._dynamo import config

# The config is the whole process's, and a host with several GPUs runs regions in several threads at once.
_lock = threading.Lock()
_running: list[int] = []
_patched = ExitStack()


@contextmanager
def graph_limit(limit: int) -> Iterator[None]:
    """Let a code object have ``limit`` graphs and raise at the next, with fullgraph or without.

    While calls overlap the highest of their limits holds; the last one to end restores what was there.

    Raises:
        FailOnRecompileLimitHit: from the compiled code within, at its limit.
    """
    with _lock:
        if not _running:
            _patched.enter_context(config.patch(recompile_limit=limit, fail_on_recompile_limit_hit=True))
        _running.append(limit)
        config.recompile_limit = max(_running)
    try:
        yield
    finally:
        with _lock:
            _running.remove(limit)
            if _running:
                config.recompile_limit = max(_running)
            else:
                _patched.close()
