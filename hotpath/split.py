"""One forward over a sequence of tokens, shared out over several devices of this process.

Each device has the weights and computes its share of each stream of tokens, all at the same time, each from a thread of
its own or, where blocks were recorded, all from one (``fibers.py``). All but attention is by token; at attention each
device gives its keys and values and gets the others' (``exchange.py``), so that each of its tokens sees the whole
sequence (sequence parallelism with gathered keys and values, as in Megatron's context parallelism). Where it can, it
attends to its own while the others' are on their way (``partial_attention.py``). What moves is two tensors (batch,
heads, tokens of the share, head dim) a block to each other device. Between blocks nothing is gathered.

Copies between CUDA devices are peer copies on streams of their own. NCCL would want a process or a communicator a
device, and gains nothing on what two to eight cards of one host give each other once a block.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from . import fibers
from .exchange import (
    Abandoned,
    Exchange,
    Threads,
    WithinOperator,
    exchanging,
    exchanging_by_turns,
    resume,
)
from .fibers import Fibers
from .peers import Given, PeerCopies, Streams, give
from .reasons import first_line

# A dimension of one is a structure of its own to a compiler, and none is no part of a sequence.
FEWEST_TOKENS = 2


class NotShared(ValueError):
    """What can't be shared out over devices, with why."""


class DeviceFailed(RuntimeError):
    """A device could not compute its share. The cause is the error behind it."""

    def __init__(self, device: torch.device, error: BaseException) -> None:
        super().__init__(f"{device} failed: {first_line(error)}")
        self.device = device


def shares(tokens: int, parts: int) -> list[slice]:
    """``tokens`` in ``parts`` ranges, in order, whose lengths differ by one at most.

    Raises:
        NotShared: a range would have less than ``FEWEST_TOKENS``.
    """
    if tokens < FEWEST_TOKENS * parts:
        raise NotShared(f"{tokens} tokens are too few to be shared out over {parts} devices")
    ends = [tokens * part // parts for part in range(parts + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def places_of(streams: Sequence[Sequence[slice]]) -> list[list[slice]]:
    """Where the tokens of each device lie in the whole sequence.

    Args:
        streams: of each stream, in the order in which they are in the sequence, its ``shares``.

    Returns:
        For each device its ranges of the sequence, one a stream.
    """
    found: list[list[slice]] = [[] for _ in streams[0]]
    offset = 0
    for stream in streams:
        for place, share in enumerate(stream):
            found[place].append(slice(offset + share.start, offset + share.stop))
        offset += stream[-1].stop
    return found


def share_of_mask(mask: Tensor, places: Sequence[Sequence[slice]], place: int) -> Tensor:
    """The rows of ``mask`` (..., query tokens, key tokens) for the queries of one device, its columns in the order in
    which that device has the keys: its own first. A dimension of 1, which is the same for all tokens, stays.

    Raises:
        NotShared: the mask is of another number of tokens.
    """
    total = places[-1][-1].stop
    others = [*places[:place], *places[place + 1 :]]
    for dim, ranges in ((-2, places[place]), (-1, [*places[place], *itertools.chain(*others)])):
        if mask.ndim < 2 or mask.shape[dim] not in (1, total):
            raise NotShared(f"a mask of {tuple(mask.shape)} is not one of {total} tokens")
        if mask.shape[dim] == total:
            mask = torch.cat([mask.narrow(dim, each.start, each.stop - each.start) for each in ranges], dim)
    return mask


class Crew:
    """What computes on ``devices`` at once: a thread for each but the first, whose thread is that of the caller.

    Where nobody waits for others within an operator, as where blocks have all been recorded or none is compiled, fibers
    of the caller's thread do, which take turns with less ado.
    ``enter`` is called with a device before this thread computes on it. ``between`` is whether the last forward was one
    of those, at first of an earlier crew.
    """

    def __init__(
        self, devices: Sequence[torch.device], enter: Callable[[torch.device], None], between: bool = False
    ) -> None:
        self.devices = tuple(devices)
        self.in_fibers = False
        self._enter = enter
        self._copies = [PeerCopies(device) for device in devices]
        self._streams = Streams()
        self._threads = [ThreadPoolExecutor(1, f"hotpath split {device}") for device in devices[1:]]
        self.between = between

    def run(
        self,
        tensors: Sequence[Sequence[Tensor]],
        counts: Sequence[int],
        work: Callable[[int, tuple[Tensor, ...]], Tensor],
    ) -> list[Tensor]:
        """Have each device do ``work(place, its tensors)`` at the same time; the results, on the first.

        Args:
            tensors: for each device what it gets, which is on the first; the same tensor may go to several.
            counts: how many tokens each device has, whose keys and values it exchanges.
            work: it may begin anew, and leaves its tensors as they were.

        Raises:
            DeviceFailed: on one of them. All have ended then.
        """
        self.in_fibers = self.between and fibers.available()
        if self.in_fibers:
            try:
                return self._run(tensors, counts, work)
            except DeviceFailed as failure:
                if not isinstance(failure.__cause__, WithinOperator):
                    raise
                self.in_fibers = False
        return self._run(tensors, counts, work)

    def _run(
        self,
        tensors: Sequence[Sequence[Tensor]],
        counts: Sequence[int],
        work: Callable[[int, tuple[Tensor, ...]], Tensor],
    ) -> list[Tensor]:
        turns = Fibers(lambda place: self._resume(exchange, place)) if self.in_fibers else Threads(len(counts))
        exchange = Exchange(counts, self._streams, turns)
        given = [give(each) for each in tensors]
        inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        errors: dict[int, BaseException] = {}
        done: dict[int, Given] = {}

        def part(place: int) -> None:
            try:
                if place or self.in_fibers:
                    self._enter(self.devices[place])
                # Modes of PyTorch belong to a thread.
                with torch.inference_mode(inference), torch.set_grad_enabled(grad), exchanging(exchange, place):
                    mine = self._copies[place].take(given[place]) if place else given[place].tensors
                    done[place] = give([work(place, mine)])
            # Told when the others have ended too.
            except BaseException as error:
                errors[place] = error
            finally:
                exchange.leave(place)

        if isinstance(turns, Fibers):
            self._in_fibers(turns, part)
        else:
            self._in_threads(exchange, part, errors)
        self.between = not (errors or exchange.by_operators)
        if errors:
            self._finish()
        self._raise_first(errors)
        return [self._copies[0].take(done[place])[0] for place in range(len(self.devices))]

    def _in_threads(self, exchange: Exchange, part: Callable[[int], None], errors: dict[int, BaseException]) -> None:
        others: list[Future[None]] = []
        try:
            for place, thread in enumerate(self._threads, 1):
                others.append(thread.submit(part, place))
            part(0)
        except BaseException as error:
            errors[0] = error
            # None waits for those that have not begun.
            for place in (0, *range(len(others) + 1, len(self.devices))):
                exchange.leave(place)
        for future in others:
            future.result()

    def _in_fibers(self, turns: Fibers, part: Callable[[int], None]) -> None:
        try:
            with exchanging_by_turns():
                turns.run([partial(part, place) for place in range(len(self.devices))])
        finally:
            self._enter(self.devices[0])

    def _resume(self, exchange: Exchange, place: int) -> None:
        self._enter(self.devices[place])
        resume(exchange, place)

    def _finish(self) -> None:
        """Wait until nothing is copied any more to memory that nobody took, which is used again."""
        for device in self.devices:
            if device.type == "cuda":
                # One that is broken can't copy either.
                with suppress(RuntimeError):
                    torch.cuda.synchronize(device)

    def _raise_first(self, errors: dict[int, BaseException]) -> None:
        """Raise what began it: an interrupt as it is, else the failure of a device that was not left by another."""
        for error in errors.values():
            if not isinstance(error, Exception):
                raise error
        for place, error in sorted(errors.items(), key=lambda item: isinstance(item[1], Abandoned)):
            raise DeviceFailed(self.devices[place], error) from error

    def end(self) -> None:
        """End the threads."""
        for thread in self._threads:
            thread.shutdown()
