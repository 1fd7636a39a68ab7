"""Processes that share a store take turns to compile a region: one compiles, the others wait and load what it stored.

The system takes a turn back when its process ends, however that happens. A process that has one waits for no other, so
that no two wait for each other, and none waits longer than ``PATIENCE``: then it compiles as if it were alone.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from .waiting import POLL, ask

# Seconds. Kernels that are looked for one by one take minutes.
PATIENCE = 600.0
# What a system says of a lock that another process has; anything else is of a file system without locks.
_TAKEN = (errno.EAGAIN, errno.EACCES)

_held: set[Path] = set()
_lock = threading.Lock()


class Turn:
    """The turn of this process to compile what goes into the file ``path``; without one there is none to take.

    As a context it is left at its end, or when the work of ``then`` is done.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = None if path is None else path.with_suffix(".turn")
        self._descriptor: int | None = None
        self._busy = False

    def take(self, patience: float | None = None) -> bool:
        """Wait for the turn, ``PATIENCE`` seconds by default; whether the file may have been written meanwhile. Raises
        what ends the wait."""
        path = self._path
        with _lock:
            if path is None or self._descriptor is not None or path in _held:
                return False
            alone = not _held
        ends = time.monotonic() + ((PATIENCE if patience is None else patience) if alone else 0)
        # Without a folder or its locks there is nothing to wait for, and storing says so.
        with suppress(OSError), ExitStack() as unless_taken:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
            unless_taken.callback(os.close, descriptor)
            while not _try_lock(descriptor):
                if time.monotonic() >= ends:
                    return True
                ask()
                time.sleep(POLL)
            unless_taken.pop_all()
            with _lock:
                self._descriptor = descriptor
                _held.add(path)
        return True

    def then(self, work: Callable[[], None]) -> Callable[[], None]:
        """``work``, after which the turn is left."""
        self._busy = True

        def do() -> None:
            try:
                work()
            finally:
                self._busy = False
                self.leave()

        return do

    def leave(self) -> None:
        """Let another process have it."""
        with _lock:
            if self._descriptor is not None and self._path is not None:
                os.close(self._descriptor)
                self._descriptor = None
                _held.discard(self._path)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        if not self._busy:
            self.leave()


def _try_lock(descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
        return False
    return True
