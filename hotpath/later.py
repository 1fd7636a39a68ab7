"""Work that a step does not wait for: one thread does it after the step, and the process does not end without it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

log = logging.getLogger(__name__)


class Later:
    """Work gathers until ``begin``, and is done in order in a thread that PyTorch's compiler may be used in.

    Python waits for it when it ends.
    """

    def __init__(self) -> None:
        self._gathered: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="hotpath-later")
        self._last: Future[None] | None = None

    def add(self, work: Callable[[], None]) -> None:
        with self._lock:
            self._gathered.append(work)

    def begin(self) -> None:
        """Have what was gathered so far done."""
        with self._lock:
            gathered, self._gathered = self._gathered, []
            for work in gathered:
                self._last = self._worker.submit(_done, work)

    def wait(self) -> None:
        """Wait until all that was added is done."""
        self.begin()
        if self._last is not None:
            self._last.result()


def _done(work: Callable[[], None]) -> None:
    try:
        work()
    except Exception:
        log.exception("work after a step failed")
