"""Stretches of a model's call in which no code runs but the host's from one block to the next, so that what was asked
before a block, and copied for it, need not be for those after it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from .first_run import waits_for_others


class Stretches:
    """Those of one call, of which ``now`` stands for the one that goes on; None where none does."""

    def __init__(self) -> None:
        self.now: object = None

    def goes_on(self, alone: bool) -> None:
        """A block is about to run. ``alone``: no code has run but the host's since the block before, whose own was all
        traced, and none will within this one."""
        if not alone:
            self.now = None
        elif self.now is None:
            self.now = object()

    @contextmanager
    def of_this_thread(self) -> Iterator[None]:
        """A scope in which blocks that run on this thread are of this call."""
        before = _current.stretches
        _current.stretches = self
        try:
            yield
        finally:
            _current.stretches = before


class _Current(threading.local):
    stretches: Stretches | None = None


_current = _Current()


def stretch() -> object:
    """What stands for the stretch that this thread is in; None where other code may have run since the block before.

    Between blocks that wait for other devices there is none but the host's.
    """
    waits = waits_for_others()
    return waits if waits is not None or _current.stretches is None else _current.stretches.now
