"""Keys and values of tokens that other devices compute: one node in the graph, a meeting of threads when it runs.

A device gives what it has to all others and gets theirs, so that its queries see the whole sequence. The last of the
threads to arrive issues the copies of all, each on a stream of the device that gives, and has every device wait for
those that it takes part in: nothing is copied twice, nobody meets twice, and memory that is used again at the next
block (see ``pieces.py``) needs no other care.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from .first_run import stands_in, waiting_for_others


class Abandoned(RuntimeError):
    """Another device ended before it gave what this one waits for."""


class _Arrival(NamedTuple):
    """Rows that a device gives, and those in which it wants all; on CUDA the stream that it computes on, and where that
    was."""

    mine: Tensor
    all: Tensor
    stream: torch.cuda.Stream | None
    reached: torch.cuda.Event | None


class Exchange:
    """Where the devices of one forward meet, which all fill equally often. Nobody waits for one that has left.

    Args:
        counts: rows of each device.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self._counts = counts
        self._turns = [0] * len(counts)
        self._done = 0
        self._arrived: dict[int, dict[int, _Arrival]] = {}
        self._left: set[int] = set()
        self._ready: dict[int, Callable[[], bool]] = {}
        self._singles: list[int] = []
        self._failed = False
        self._changed = threading.Condition()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

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
        with self._changed:
            turn = self._turns[place]
            self._turns[place] += 1
            arrived = self._arrived.setdefault(turn, {})
            arrived[place] = arrival
            if len(arrived) < len(self._counts):
                # Until this holds it is at rest.
                self._ready[place] = lambda: bool(self._done > turn or self._failed or self._left - arrived.keys())
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._ready[place]() or self._stuck())
                del self._ready[place]
                if self._done <= turn:
                    raise Abandoned("another device ended before this one")
                return
            try:
                self._move(arrived)
                self._done = turn + 1
            except BaseException:
                self._failed = True
                raise
            finally:
                del self._arrived[turn]
                self._changed.notify_all()

    @contextmanager
    def single(self, place: int) -> Iterator[None]:
        """A scope in which no device computes but that at ``place``: the others wait for its rows or for such a scope.

        Raises:
            Abandoned: a device left.
        """
        others = [other for other in range(len(self._counts)) if other != place]

        with self._changed:
            self._singles.append(place)
            self._changed.notify_all()
            try:
                self._changed.wait_for(
                    lambda: self._failed or self._left or (self._singles[0] == place and all(map(self._rests, others)))
                )
                if self._failed or self._left:
                    raise Abandoned("another device ended before this one")
            except BaseException:
                self._singles.remove(place)
                raise
        try:
            yield
        finally:
            with self._changed:
                self._singles.remove(place)
                self._changed.notify_all()

    def _rests(self, place: int) -> bool:
        """Whether the device waits for rows, or for others to end such a scope."""
        return place in self._singles[1:] or (place in self._ready and not self._ready[place]())

    def _stuck(self) -> bool:
        """Whether all wait for one another: the rows of one that is in such a scope itself."""
        return all(map(self._rests, range(len(self._counts))))

    def leave(self, place: int) -> None:
        """The device at ``place`` gives nothing more."""
        with self._changed:
            self._left.add(place)
            self._changed.notify_all()

    def _move(self, arrived: Mapping[int, _Arrival]) -> None:
        for source, given in arrived.items():
            leaving = None if given.stream is None else self._stream(given.mine.device)
            if leaving is None:
                self._give(source, given.mine, arrived)
                continue
            for other in arrived.values():
                if other.reached is not None:
                    leaving.wait_event(other.reached)
            with torch.cuda.stream(leaving):
                self._give(source, given.mine, arrived)
                given_away = torch.cuda.Event()
                given_away.record(leaving)
            for other in arrived.values():
                if other.stream is not None:
                    other.stream.wait_event(given_away)

    def _give(self, source: int, rows: Tensor, arrived: Mapping[int, _Arrival]) -> None:
        for place, wanted in arrived.items():
            if place != source:
                start = self._counts[place] + sum(self._counts[:source])
                start -= self._counts[place] if place < source else 0
                wanted.all[start : start + len(rows)].copy_(rows, non_blocking=True)

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


def _arrival(mine: Tensor, all: Tensor) -> _Arrival:
    if not mine.is_cuda:
        return _Arrival(mine, all, None, None)
    stream, reached = torch.cuda.current_stream(mine.device), torch.cuda.Event()
    reached.record(stream)
    return _Arrival(mine, all, stream, reached)


class _Current(threading.local):
    def __init__(self) -> None:
        self.at: tuple[Exchange, int] | None = None


_current = _Current()


@contextmanager
def exchanging(exchange: Exchange, place: int) -> Iterator[None]:
    """Let what runs within this scope, on this thread, meet others at ``exchange``."""
    before, _current.at = _current.at, (exchange, place)
    try:
        with waiting_for_others():
            yield
    finally:
        _current.at = before


def others_at_rest() -> AbstractContextManager[None]:
    """A scope in which no other thread of the innermost ``exchanging`` computes."""
    if _current.at is None:
        return nullcontext()
    exchange, place = _current.at
    return exchange.single(place)


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
