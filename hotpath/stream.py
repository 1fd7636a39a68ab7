"""Weights of blocks that are not resident on the device: copied there one block ahead of the compute, slot by slot.

While a block computes, a copy engine moves the weights of the next one over the bus, so that a step takes the larger of
compute time and transfer time (ZeRO-Infinity, arXiv:2104.07857, calls this the overlap-centric design). What is copied
when is a pure function, ``fetches``; ``Stream`` carries it out; ``predict`` times it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

ALIGNMENT = 512
ORDERS = ("spread", "first", "last")
_GOLDEN = (math.sqrt(5) - 1) / 2
# Small beside a layer, so that what left lies as the points do.
_SHARE = 2**24


class Fetch(NamedTuple):
    """Copy the weights of ``block`` into ``slot``."""

    block: int
    slot: int


def resident_blocks(sizes: Sequence[int], budget: float, order: str = "spread") -> frozenset[int]:
    """Which blocks stay on the device: as many as fit into ``budget`` bytes.

    ``sizes`` are the bytes of each block in the order in which they run. ``order``: ``first`` or ``last`` keeps a run
    of blocks there. ``spread`` takes the streamed ones at even distances, so that each transfer has the computes of
    several resident blocks to hide behind; in a run of streamed blocks each would have only one.

    Raises:
        ValueError: ``order`` is unknown.
    """
    _check(order)
    count = len(sizes)
    for streamed in range(count + 1):
        gone = {
            "spread": {(2 * turn + 1) * count // (2 * streamed) for turn in range(streamed)},
            "first": set(range(count - streamed, count)),
            "last": set(range(streamed)),
        }[order]
        stay = frozenset(range(count)) - gone
        if sum(sizes[block] for block in stay) <= budget:
            return stay
    return frozenset()


def leaving_order(blocks: Sequence[Sequence[int]], order: str = "spread") -> list[tuple[int, int]]:
    """In which order layers leave the device as memory gets less, as (block, layer); what leaves last stays longest.

    ``blocks`` are the bytes of each layer of each block in the order in which they run. ``order``: ``first`` or
    ``last`` keeps a run of blocks there. ``spread`` has the bytes that left at even distances in every prefix: each
    point of the golden ratio's low-discrepancy sequence (Kronecker's) lets ``_SHARE`` bytes of a block leave, its
    largest layers first.

    Raises:
        ValueError: ``order`` is unknown.
    """
    _check(order)
    if order != "spread":
        turns = reversed(range(len(blocks))) if order == "first" else range(len(blocks))
        return [(block, layer) for block in turns for layer in range(len(blocks[block]))]
    rest = [sorted(range(len(layers)), key=layers.__getitem__) for layers in blocks]
    credit = [0] * len(blocks)
    left: list[tuple[int, int]] = []
    turn = 0
    while any(rest):
        block = int(turn * _GOLDEN % 1 * len(blocks))
        turn += 1
        credit[block] += _SHARE
        while rest[block] and credit[block] >= blocks[block][rest[block][-1]]:
            layer = rest[block].pop()
            credit[block] -= blocks[block][layer]
            left.append((block, layer))
    return left


def _check(order: str) -> None:
    if order not in ORDERS:
        raise ValueError(f"resident: {order!r} is unknown. Choose one of {', '.join(ORDERS)}.")


def fetches(slots: Sequence[int | None], block: int, streamed: Sequence[int], ahead: int) -> list[Fetch]:
    """What to copy when ``block`` is about to compute, in order; the first may be ``block`` itself.

    ``slots`` tells which block each slot holds or will hold. ``streamed`` are all streamed blocks in the order in which
    they run, step after step; up to ``ahead`` of those that come next are fetched. A slot that holds one of them, or
    ``block``, is left alone.
    """
    turn = streamed.index(block)
    wanted = [streamed[(turn + distance) % len(streamed)] for distance in range(min(ahead, len(streamed) - 1) + 1)]
    free = [slot for slot, held in enumerate(slots) if held not in wanted]
    missing = [wanted_block for wanted_block in wanted if wanted_block not in slots]
    return [Fetch(wanted_block, slot) for wanted_block, slot in zip(missing, free, strict=False)]


class CopyEngine(Protocol):
    """What moves bytes to the device beside the compute. Marks and arrivals are opaque."""

    def copy(self, sources: Sequence[Tensor], targets: Sequence[Tensor], after: Any) -> Any:
        """Begin to copy each source into its target once the compute up to the mark ``after`` is done; gives the
        arrival. Copies into one target happen in the order in which they were asked for."""

    def wait(self, arrival: Any) -> None:
        """Let the compute that is queued from now on wait for ``arrival``."""

    def mark(self) -> Any:
        """The end of the compute that is queued so far."""

    def drain(self) -> None:
        """Return when no copy is under way."""


class InPlaceCopies:
    """A copy engine for devices that do one thing after another."""

    def copy(self, sources: Sequence[Tensor], targets: Sequence[Tensor], after: None) -> None:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)

    def wait(self, arrival: None) -> None:
        """Copies are done when ``copy`` returns."""

    def mark(self) -> None:
        """Compute is done when it returns."""

    def drain(self) -> None:
        """No copy is ever under way."""


class StreamCopies:
    """A copy engine of a side stream and events (CUDA, XPU); the device is never synchronized as a whole."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module = torch.get_device_module(device)
        self._side = self._module.Stream(device=device)

    def copy(self, sources: Sequence[Tensor], targets: Sequence[Tensor], after: Any) -> Any:
        if after is not None:
            self._side.wait_event(after)
        with self._module.stream(self._side):
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source, non_blocking=True)
            return self._side.record_event()

    def wait(self, arrival: Any) -> None:
        self._module.current_stream(self._device).wait_event(arrival)

    def mark(self) -> Any:
        return self._module.current_stream(self._device).record_event()

    def drain(self) -> None:
        self._side.synchronize()


def copy_engine(device: torch.device) -> CopyEngine:
    """The copy engine of ``device``."""
    return StreamCopies(device) if device.type in ("cuda", "xpu") else InPlaceCopies()


class Slots:
    """``count`` slots of ``size`` bytes on ``device``, into which is copied beside the compute that reads them."""

    def __init__(self, engine: CopyEngine, device: torch.device, size: int, count: int) -> None:
        self._engine = engine
        # Written in and out of inference mode.
        with torch.inference_mode(False):
            self.memory = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(count)]
        # The compute that may still read a slot. A new slot's memory may have had another use, too.
        self._last_use: list[Any] = [engine.mark()] * count

    def copy(self, slot: int, sources: Sequence[tuple[Tensor, int]]) -> Any:
        """Begin to copy ``sources``, flat uint8 tensors with the offset of each, once nothing reads the slot any more;
        gives the arrival."""
        memory = self.memory[slot]
        targets = [memory[offset : offset + source.numel()] for source, offset in sources]
        return self._engine.copy([source for source, _ in sources], targets, self._last_use[slot])

    @contextmanager
    def read(self, slot: int, arrival: Any) -> Iterator[None]:
        """A scope in which compute is queued that reads the slot after ``arrival``."""
        self._engine.wait(arrival)
        try:
            yield
        finally:
            self._last_use[slot] = self._engine.mark()


class Stream:
    """Streamed blocks in slots of ``size`` bytes on ``device``; a block may compute within ``present``.

    ``sources`` gives the weights of a block as flat uint8 tensors with the offset of each in the slot. They must not
    change before ``drain``. What it refers to must not hold the ``Stream``: its slots are to go with its last user.
    Blocks may come in any order; those that come in the order of ``streamed`` were fetched while earlier ones computed.
    """

    def __init__(
        self,
        engine: CopyEngine,
        device: torch.device,
        size: int,
        streamed: Sequence[int],
        ahead: int,
        sources: Callable[[int], Sequence[tuple[Tensor, int]]],
    ) -> None:
        self.streamed = tuple(streamed)
        self.ahead = ahead
        self.bytes_copied = 0
        self._engine = engine
        self._sources = sources
        count = min(ahead + 1, len(self.streamed))
        self._slots = Slots(engine, device, size, count)
        self.slots = self._slots.memory
        self._held: list[int | None] = [None] * count
        self._arrivals: list[Any] = [None] * count

    @contextmanager
    def present(self, block: int) -> Iterator[int]:
        """The slot in which the weights of ``block`` are, for the compute that is queued within the scope."""
        for fetch in fetches(self._held, block, self.streamed, self.ahead):
            self._fetch(fetch)
        slot = self._held.index(block)
        with self._slots.read(slot, self._arrivals[slot]):
            yield slot

    def _fetch(self, fetch: Fetch) -> None:
        sources = self._sources(fetch.block)
        # If the copy fails to start the slot holds neither.
        self._held[fetch.slot] = None
        self._arrivals[fetch.slot] = self._slots.copy(fetch.slot, sources)
        self._held[fetch.slot] = fetch.block
        self.bytes_copied += sum(source.numel() for source, _ in sources)

    def drain(self) -> None:
        """Wait for the copies that are under way, and take the slots as empty: sources may change after it."""
        self._engine.drain()
        self._held = [None] * len(self.slots)


def predict(
    sizes: Sequence[float],
    seconds: Sequence[float],
    bandwidth: float,
    streamed: Sequence[int],
    ahead: int,
    steps: int = 3,
) -> float:
    """Seconds of one step, once it repeats, when blocks ``streamed`` come over a bus of ``bandwidth`` bytes a second.

    ``sizes`` are bytes and ``seconds`` the compute times of the blocks in the order in which they run. Copies run one
    after another, each once it was asked for and the slot's last user is done; a block computes after the one before it
    and after its own copy. What is asked for when is what ``Stream`` asks for.
    """
    count = min(ahead + 1, len(streamed))
    held: list[int | None] = [None] * count
    arrived, last_use = [0.0] * count, [0.0] * count
    bus, compute, ended = 0.0, 0.0, [0.0]
    for _ in range(steps):
        for block, duration in enumerate(seconds):
            if block in streamed:
                for fetch in fetches(held, block, streamed, ahead):
                    # Asked for when the block's turn is queued, which a GPU's queue does long before.
                    bus = max(bus, last_use[fetch.slot]) + sizes[fetch.block] / bandwidth
                    arrived[fetch.slot], held[fetch.slot] = bus, fetch.block
                slot = held.index(block)
                compute = max(compute, arrived[slot]) + duration
                last_use[slot] = compute
            else:
                compute += duration
        ended.append(compute)
    return ended[-1] - ended[-2]
