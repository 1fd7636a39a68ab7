"""Waits that whoever began them may end: for another process's turn, or for a thread that compiles."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

POLL = 0.1
"""Seconds after which a wait asks again."""


class _Asked(threading.local):
    ask: Callable[[], None] | None = None


_asked = _Asked()


@contextmanager
def while_waiting(ask: Callable[[], None]) -> Iterator[None]:
    """Have waits of this thread within the scope call ``ask`` all the time; what it raises ends them."""
    before, _asked.ask = _asked.ask, ask
    try:
        yield
    finally:
        _asked.ask = before


def ask() -> None:
    """Called all the time by who waits. Raises what ends the wait."""
    if _asked.ask is not None:
        _asked.ask()
