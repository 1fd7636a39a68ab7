"""Code that runs for the first time, which it does while no other thread may compile, and attention that waits for
other threads. The two together would wait for ever, so what runs first waits for nobody, and runs again after. So does
what runs once more than in other threads, as all meet equally often.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

from .values import Copies

T = TypeVar("T")


class _Current(threading.local):
    def __init__(self) -> None:
        self.waits: object = None
        self.alone = False
        self.run: FirstRun | None = None


_current = _Current()


class FirstRun:
    """A run under the lock of compiling; ``inputs`` are what it may write over."""

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        self._copies = Copies(inputs) if _current.waits is not None else None
        self._stood_in = False

    def again(self) -> bool:
        """Whether something stood in for what other threads give, so that the result is of no use. Then the inputs are
        put back."""
        if self._stood_in and self._copies is not None:
            self._copies.restore()
        return self._stood_in

    def stand_in(self) -> bool:
        """Whether something may stand in for what other threads give."""
        self._stood_in = self._stood_in or self._copies is not None
        return self._stood_in


@contextmanager
def _holding(name: str, value: T) -> Iterator[T]:
    """A scope in which this thread's ``_current`` holds ``value``."""
    before = getattr(_current, name)
    setattr(_current, name, value)
    try:
        yield value
    finally:
        setattr(_current, name, before)


def waiting_for_others() -> AbstractContextManager[object]:
    """A scope in which attention on this thread waits for other threads."""
    return _holding("waits", object())


def waits_for_others() -> object:
    """What stands for the scope in which attention on this thread waits for other threads; None where it doesn't."""
    return _current.waits


def first_run(inputs: Mapping[str, Any]) -> AbstractContextManager[FirstRun]:
    """A scope in which code runs under the lock of compiling."""
    return _holding("run", FirstRun(inputs))


def alone() -> AbstractContextManager[bool]:
    """A scope in which attention on this thread waits for nobody, since what it gives is only compared."""
    return _holding("alone", True)


def stands_in() -> bool:
    """Whether attention that runs now on this thread must not wait for others: anything of its shape and dtype does, as
    the block runs again when it has."""
    return _current.alone or (_current.run is not None and _current.run.stand_in())
