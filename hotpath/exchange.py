"""Keys and values of tokens that other devices compute: one node in the graph, a meeting of threads when it runs.

A device gives what it has to all others and gets theirs, so that its queries see the whole sequence. The thread that
arrives last issues the copies of all, each on a stream of the device that gives, and has every device wait for
those that it takes part in: nothing is copied twice, nobody meets twice, and memory that is used again at the next
block (see ``pieces.py``) needs no other care.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from .first_run import stands_in, waiting_for_others


class Abandoned(RuntimeError):
    """Another device ended before it gave what this one waits for."""


class Streams:
    """A stream of each CUDA device, made when it is first asked for."""

    def __init__(self) -> None:
        self._made: dict[torch.device, torch.cuda.Stream] = {}

    def of(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._made:
            self._made[device] = torch.cuda.Stream(device)
        return self._made[device]


class _Arrival(NamedTuple):
    """Rows that a device gives, and those in which it wants all; on CUDA the stream that it computes on, and where that
    was."""

    mine: Tensor
    all: Tensor
    stream: torch.cuda.Stream | None
    reached: torch.cuda.Event | None


class Exchange:
    """Where the devices of one forward meet, which all fill equally often. Nobody waits for one that has left.

    One of their threads runs at a time, up to where it waits for rows: threads that all run would wait for Python's
    lock at each operator, while what they launch runs on all devices anyway. And no CUDA graph can be recorded while
    another thread gives memory back, which would become a part of it.

    Args:
        counts: rows of each device.
        streams: those that rows leave on.
    """

    def __init__(self, counts: Sequence[int], streams: Streams) -> None:
        self._counts = counts
        self._streams = streams
        # Nobody arrives for the next turn before all have for this one.
        self._turn = 0
        self._arrived: dict[int, _Arrival] = {}
        self._failed = False
        self._left: set[int] = set()
        # Who runs, who may run next, in order, and who waits for rows.
        self._running: int | None = None
        self._ready: deque[int] = deque()
        self._waiting: list[int] = []
        self._go = [threading.Lock() for _ in counts]
        for held in self._go:
            held.acquire()
        self._guard = threading.Lock()

    @contextmanager
    def taking_part(self, place: int) -> Iterator[None]:
        """A scope in which this thread computes on the device at ``place``; it begins once it may."""
        with self._guard:
            first = self._running is None
            if first:
                self._running = place
            else:
                self._ready.append(place)
        if not first:
            self._go[place].acquire()
        try:
            yield
        finally:
            self.leave(place)

    def fill(self, place: int, mine: Tensor, all: Tensor) -> None:
        """Write rows of all devices to ``all`` (rows of all, ...) of the device at ``place``: its own first, which are
        ``mine`` (rows, ...), then those of the others in order.

        Raises:
            Abandoned: a device that has not given left.
            ValueError: rows are missing.
        """
        if (len(mine), len(all)) != (self._counts[place], sum(self._counts)):
            raise ValueError(f"{len(mine)} of {len(all)} tokens are not those of this device")
        arrival = _arrival(mine, all)
        all[: len(mine)].copy_(mine)
        turn = self._turn
        self._arrived[place] = arrival
        if len(self._arrived) == len(self._counts):
            self._complete()
            return
        with self._guard:
            if self._failed or self._left - self._arrived.keys():
                raise Abandoned("another device ended before this one")
            self._waiting.append(place)
            self._next()
        self._go[place].acquire()
        if self._turn == turn:
            raise Abandoned("another device ended before this one")

    def leave(self, place: int) -> None:
        """The device at ``place`` gives nothing more."""
        with self._guard:
            self._left.add(place)
            # An interrupt may end it while it waits.
            for places in (self._waiting, self._ready):
                if place in places:
                    places.remove(place)
            if self._failed or place not in self._arrived:
                self._resume()
            if self._running in (None, place):
                self._next()

    def _complete(self) -> None:
        try:
            self._move()
        except BaseException:
            self._failed = True
            raise
        with self._guard:
            self._arrived.clear()
            self._turn += 1
            self._resume()

    def _resume(self) -> None:
        """Those that wait for rows may run, within the guard."""
        self._ready.extend(self._waiting)
        self._waiting.clear()

    def _next(self) -> None:
        """Let the next thread run, within the guard."""
        self._running = self._ready.popleft() if self._ready else None
        if self._running is not None:
            self._go[self._running].release()

    def _move(self) -> None:
        arrived = self._arrived
        for source, given in arrived.items():
            if given.stream is None:
                self._give(source, given.mine)
                continue
            leaving = self._streams.of(given.mine.device)
            for other in arrived.values():
                if other.reached is not None:
                    leaving.wait_event(other.reached)
            with torch.cuda.stream(leaving):
                self._give(source, given.mine)
                given_away = leaving.record_event()
            for other in arrived.values():
                if other.stream is not None:
                    other.stream.wait_event(given_away)

    def _give(self, source: int, rows: Tensor) -> None:
        for place, wanted in self._arrived.items():
            if place != source:
                start = sum(self._counts[:source]) + (self._counts[place] if place > source else 0)
                wanted.all[start : start + len(rows)].copy_(rows, non_blocking=True)


def _arrival(mine: Tensor, all: Tensor) -> _Arrival:
    if not mine.is_cuda:
        return _Arrival(mine, all, None, None)
    stream = torch.cuda.current_stream(mine.device)
    return _Arrival(mine, all, stream, stream.record_event())


class _Current(threading.local):
    def __init__(self) -> None:
        self.at: tuple[Exchange, int] | None = None


_current = _Current()


@contextmanager
def exchanging(exchange: Exchange, place: int) -> Iterator[None]:
    """Let what runs within this scope, on this thread, meet others at ``exchange``, as the device at ``place``."""
    before, _current.at = _current.at, (exchange, place)
    try:
        with waiting_for_others(), exchange.taking_part(place):
            yield
    finally:
        _current.at = before


@torch.library.custom_op("hotpath::exchange", mutates_args=("all",), schema="(Tensor mine, Tensor(a0!) all) -> ()")
def exchange_rows(mine: Tensor, all: Tensor) -> None:
    """``Exchange.fill`` at the innermost ``exchanging``; where nobody may be waited for, rows of others are zeros.

    Raises:
        RuntimeError: while a CUDA graph records it.
    """
    if stands_in():
        all[: len(mine)].copy_(mine)
        all[len(mine) :].zero_()
        return
    if mine.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("devices exchange keys and values in it")
    assert _current.at is not None, "no devices to exchange with"
    exchange, place = _current.at
    exchange.fill(place, mine, all)


def exchanged(k: Tensor, v: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values of all devices, those of this one first; may be traced.

    Args:
        k, v: (batch, heads, tokens of this device, head dim).
        tokens: of all devices.

    Returns:
        Keys and values (batch, heads, tokens, head dim), not contiguous.
    """
    mine = torch.stack([x.permute(2, 0, 1, 3) for x in (k, v)], 1)
    all = mine.new_empty(tokens, *mine.shape[1:])
    exchange_rows(mine, all)
    return all[:, 0].permute(1, 2, 0, 3), all[:, 1].permute(1, 2, 0, 3)
