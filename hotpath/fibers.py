"""Work that takes turns on one thread: fibers of the package greenlet, where it is installed.

Threads that take turns wake up for each, and what they share moves from one core's cache to another's. A switch of
fibers takes a microsecond. But it moves the stack, of which PyTorch's operators hold addresses, so that nobody may be
waited for within one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import copy_context
from functools import cache
from typing import Any


@cache
def available() -> bool:
    """Whether there are fibers. Asked before each forward, and what is not installed is looked for at each import."""
    with suppress(ImportError):
        import greenlet  # noqa: F401

        return True
    return False


class Fibers:
    """Turns (see ``exchange.py``) of fibers.

    ``resumed`` is called with the number of a fiber, in it, each time that it goes on.
    """

    within_operators = False

    def __init__(self, resumed: Callable[[int], None]) -> None:
        self._resumed = resumed
        self._due: deque[int] = deque()
        self._hub: Any = None

    def run(self, parts: Sequence[Callable[[], None]]) -> None:
        """Run all ``parts``, none of which may raise."""
        from greenlet import getcurrent, greenlet

        self._hub = getcurrent()
        fibers = [greenlet(part) for part in parts]
        for fiber in fibers:
            fiber.gr_context = copy_context()
            fiber.switch()
        while self._due:
            fibers[self._due.popleft()].switch()

    def sleep(self, place: int) -> None:
        self._hub.switch()
        self._resumed(place)

    def wake(self, place: int) -> None:
        self._due.append(place)
