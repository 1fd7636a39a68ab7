"""Keys and values of tokens that other devices compute: two nodes in the graph, a meeting of threads when they run.

A device gives what it has to all others and takes theirs, so that its queries see the whole sequence; what it computes
between the two, such as attention to its own, needs nobody. The thread that gives last issues the copies of all, each
on streams of its own, and a device that takes waits for all of them: nothing is copied twice, nobody meets twice, and
memory that is used again at the next block (see ``pieces.py``) needs no other care.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .attention import called_out
from .first_run import stands_in, waiting_for_others
from .peers import Streams


class Abandoned(RuntimeError):
    """Another device ended before it gave what this one waits for."""


class WithinOperator(RuntimeError):
    """Another device is to be waited for within an operator, which those that take turns on one thread can't do."""


class Turns(Protocol):
    """How those who take part let one another run; by their places."""

    within_operators: bool

    def sleep(self, place: int) -> None:
        """Return once it is woken, which it may have been before."""

    def wake(self, place: int) -> None: ...


class Threads:
    """Turns of threads."""

    within_operators = True

    def __init__(self, count: int) -> None:
        self._go = [threading.Lock() for _ in range(count)]
        for held in self._go:
            held.acquire()

    def sleep(self, place: int) -> None:
        self._go[place].acquire()

    def wake(self, place: int) -> None:
        self._go[place].release()


class _Arrival(NamedTuple):
    """Rows that a device gives, and memory for those of all others; on CUDA the stream that it computes on and an event
    after which both are there."""

    mine: Tensor
    theirs: Tensor
    stream: torch.cuda.Stream | None
    reached: torch.cuda.Event | None


class Exchange:
    """Where the devices of one forward meet, which all give and take equally often, in turns. Nobody waits for one that
    has left.

    One of them runs at a time, up to where it waits for rows: threads that all run would wait for Python's lock at each
    operator, while what they launch runs on all devices anyway. And no CUDA graph can be recorded while another thread
    gives memory back, which would become a part of it.

    Args:
        counts: rows of each device.
        streams: those that rows are copied on.

    ``by_operators`` is whether any gave or took within an operator, and not between the pieces of a recording alone.
    """

    def __init__(self, counts: Sequence[int], streams: Streams, turns: Turns) -> None:
        self.by_operators = False
        self._counts = counts
        self._streams = streams
        self._turns = turns
        # How often each has given, and all have. Nobody gives again before it took.
        self._given = [0 for _ in counts]
        self._complete = 0
        self._arrived: dict[int, _Arrival] = {}
        self._own: dict[int, _Arrival] = {}
        self._copied: list[torch.cuda.Event] = []
        self._failed = False
        self._left: set[int] = set()
        # Who runs, who may run next, in order, and who waits for rows.
        self._running: int | None = None
        self._ready: deque[int] = deque()
        self._waiting: list[int] = []
        self._guard = threading.Lock()

    @contextmanager
    def taking_part(self, place: int) -> Iterator[None]:
        """A scope that computes on the device at ``place``; it begins once it may."""
        with self._guard:
            first = self._running is None
            if first:
                self._running = place
            else:
                self._ready.append(place)
        if not first:
            self._turns.sleep(place)
        try:
            yield
        finally:
            self.leave(place)

    def give(self, place: int, mine: Tensor, theirs: Tensor) -> None:
        """Give ``mine`` (rows, ...) of the device at ``place`` to all others; nothing may write either tensor before
        ``take``.

        Args:
            theirs: (rows of all others, ...), where they will be in the order of the devices.

        Raises:
            ValueError: rows are missing.
        """
        rows, others = self._counts[place], sum(self._counts) - self._counts[place]
        if (mine.shape[0], theirs.shape[0]) != (rows, others):
            raise ValueError(f"{mine.shape[0]} rows and {theirs.shape[0]} of others are not {rows} and {others}")
        stream = reached = None
        if mine.is_cuda:
            stream, reached = self._streams.current(mine.device), self._streams.event(place)
            reached.record(stream)
        arrival = _Arrival(mine, theirs, stream, reached)
        self._given[place] += 1
        self._arrived[place] = self._own[place] = arrival
        if len(self._arrived) == len(self._counts):
            self._give_all()

    def take(self, place: int) -> Tensor:
        """``theirs``, as given, once the rows of all others are in it for what the current stream runs next.

        Raises:
            Abandoned: a device that has not given left.
        """
        if self._given[place] > self._complete:
            with self._guard:
                if self._failed or self._left - self._arrived.keys():
                    raise Abandoned("another device ended before this one")
                self._waiting.append(place)
                self._next()
            self._turns.sleep(place)
            if self._given[place] > self._complete:
                raise Abandoned("another device ended before this one")
        own = self._own.pop(place)
        # What is given is read till then, so that a device waits for its own too.
        for copied in self._copied:
            copied.wait(own.stream)
        return own.theirs

    def within_operator(self) -> None:
        """Rows are given or taken within an operator.

        Raises:
            WithinOperator: they can't be.
        """
        self.by_operators = True
        if not self._turns.within_operators:
            raise WithinOperator("a block that waits for other devices was not recorded")

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

    def _give_all(self) -> None:
        arrived = self._arrived
        # By turns, as each device can give and get at once.
        pairs = [(source, place) for place in arrived for source in arrived if place != source]
        try:
            with _streams_as_before(arrived.values()):
                self._copied = [copied for pair in pairs if (copied := self._copy(*pair)) is not None]
        except BaseException:
            self._failed = True
            raise
        with self._guard:
            self._arrived.clear()
            self._complete += 1
            self._resume()

    def _copy(self, source: int, place: int) -> torch.cuda.Event | None:
        given, wanted = self._arrived[source], self._arrived[place]
        start = sum(self._counts[:source]) - (self._counts[place] if place < source else 0)
        rows = wanted.theirs.narrow(0, start, given.mine.shape[0])
        if given.reached is None or wanted.reached is None:
            rows.copy_(given.mine)
            return None
        leaving, arriving = self._streams.way(source, given.mine.device, place, rows.device)
        arriving.wait_event(given.reached)
        arriving.wait_event(wanted.reached)
        # PyTorch copies on the current stream of the source, after and before that of the target.
        torch.cuda.set_stream(leaving)
        torch.cuda.set_stream(arriving)
        rows.copy_(given.mine, non_blocking=True)
        copied = self._streams.event((source, place))
        copied.record(arriving)
        return copied

    def _resume(self) -> None:
        """Those that wait for rows may run, within the guard."""
        self._ready.extend(self._waiting)
        self._waiting.clear()

    def _next(self) -> None:
        """Let the next run, within the guard."""
        self._running = self._ready.popleft() if self._ready else None
        if self._running is not None:
            self._turns.wake(self._running)


@contextmanager
def _streams_as_before(arrived: Iterable[_Arrival]) -> Iterator[None]:
    """A scope after which each device's current stream is that on which it computes, and the current device as before.

    Entering and leaving ``torch.cuda.stream`` for each copy takes longer than to launch it.
    """
    streams = [arrival.stream for arrival in arrived if arrival.stream is not None]
    if not streams:
        yield
        return
    device = torch.cuda.current_device()
    try:
        yield
    finally:
        for stream in streams:
            torch.cuda.set_stream(stream)
        torch.cuda.set_device(device)


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


@contextmanager
def exchanging_by_turns() -> Iterator[None]:
    """A scope on this thread of which each ``exchanging`` is one of several; each that goes on is to ``resume``."""
    before = _current.at
    try:
        with waiting_for_others():
            yield
    finally:
        _current.at = before


def resume(exchange: Exchange, place: int) -> None:
    """What runs next on this thread is ``exchanging`` as the device at ``place``."""
    _current.at = exchange, place


def give(mine: Tensor, theirs: Tensor) -> None:
    """``Exchange.give`` at the innermost ``exchanging``; nothing where nobody may be waited for.

    Raises:
        RuntimeError: while a CUDA graph records it.
    """
    if stands_in():
        theirs.zero_()
        return
    exchange, place = _at(theirs)
    exchange.give(place, mine, theirs)


def take(theirs: Tensor) -> None:
    """``Exchange.take`` of what was given with ``theirs``."""
    if not stands_in():
        exchange, place = _at(theirs)
        exchange.take(place)


def _at(theirs: Tensor) -> tuple[Exchange, int]:
    if theirs.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("devices exchange keys and values in it")
    assert _current.at is not None, "no devices to exchange with"
    return _current.at


# Rows of others are on their way in memory that a graph sees from ``take`` on only, as it may copy what an operator
# writes. What is given is said to be written, so that what reads it comes after, and is taken, as it is used till then.


@torch.library.custom_op("hotpath::give", mutates_args=("mine",), schema="(Tensor(a0!) mine, SymInt others) -> ()")
def _given(mine: Tensor, others: int) -> None:
    if not stands_in():
        _at(mine)[0].within_operator()
    give(mine, mine.new_empty(others, *mine.shape[1:]))


@torch.library.custom_op(
    "hotpath::take", mutates_args=(), schema="(Tensor mine, SymInt others, Tensor? after) -> Tensor"
)
def _taken(mine: Tensor, others: int, after: Tensor | None) -> Tensor:
    if stands_in():
        return mine.new_zeros(others, *mine.shape[1:])
    exchange, place = _at(mine)
    return exchange.take(place)


@_taken.register_fake
def _(mine: Tensor, others: int, after: Tensor | None) -> Tensor:
    return mine.new_empty(others, *mine.shape[1:])


class GivenRows:
    """Keys and values of this device, which are given to all others; may be traced.

    Args:
        k, v: (batch, heads, tokens of this device, head dim).
        others: tokens of all other devices.

    ``mine``: both (tokens, 2, batch, heads, head dim).
    """

    def __init__(self, k: Tensor, v: Tensor, others: int) -> None:
        self.mine = torch.stack([x.permute(2, 0, 1, 3) for x in (k, v)], 1)
        self._others = others
        self._theirs: Tensor | None = None
        if torch.compiler.is_compiling() or called_out():
            _given(self.mine, others)
        else:
            # An operator takes longer to call than to run.
            self._theirs = self.mine.new_empty(others, *self.mine.shape[1:])
            give(self.mine, self._theirs)

    def take(self, after: Tensor | None = None) -> Tensor:
        """Those of the others (tokens of others, 2, batch, heads, head dim) in the order of the devices, once
        ``after`` is launched; zeros where nobody may be waited for."""
        if self._theirs is None:
            return _taken(self.mine, self._others, after)
        take(self._theirs)
        return self._theirs


def keys_and_values(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens, 2, batch, heads, head dim) -> keys and values (batch, heads, tokens, head dim), not contiguous."""
    keys, values = rows.permute(1, 2, 3, 0, 4).unbind()
    return keys, values


def exchanged(k: Tensor, v: Tensor, others: int) -> tuple[Tensor, Tensor]:
    """Keys and values (batch, heads, tokens of all devices, head dim), those of this one first. Arguments are those of
    ``GivenRows``."""
    rows = GivenRows(k, v, others)
    return keys_and_values(torch.cat([rows.mine, rows.take()]))
