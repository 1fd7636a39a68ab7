"""Blocks as recordings: all that a block launches, launched again as one, with its weights where they lie.

A recording holds addresses. It is replayed only when the graph that was recorded still accepts the call (its guards:
shapes, dtypes, options, the switches of the process) and all that it reads and writes is where it was:

- Weights: the address, shape and stride of each. Their content is read at each replay, so that a LoRA that was written
  over them in place, or a page that came back with dynamic VRAM, needs nothing; a weight elsewhere does.
- Activations: blocks of one kind and size share their inputs (``static.py``), into which is copied what is elsewhere.
  What a block writes over its input stays there and is the next block's input, so that no block owns activations.

The first recording of each kind and size is compared with what it recorded, to the bit.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .cuda_graphs import Busy, Recorder, Recording
from .first_run import alone, waits_for_others
from .reasons import first_line
from .static import Layout, StaticInputs, flatten, layout, rebuilt
from .stretch import stretch

log = logging.getLogger(__name__)

# Equal calls of a block before it is recorded: the first may be of a prompt with one step.
_CALLS_BEFORE = 2
# Times that a block is recorded anew because its weights moved, before it is left alone until they are forgotten.
_MOVES = 4
# A block's activations are at most about so many times its largest input, in any format.
_ACTIVATIONS = 24
# Calls after which it is known whether the device waits for Python, and the share of them in which it must.
_ASKED = 4
_WAITED = 0.25

NO_MEMORY = "recording it takes more memory than the device has free"
MOVED = "its weights are elsewhere at each call"
HELD = "another node keeps the output of a block"
DIFFERS = "its recording computes something else"
OTHER_KIND = "its inputs are of a kind that can't be kept in place"

Addresses = tuple[tuple[int, torch.Size, tuple[int, ...]], ...]


class Graph(Protocol):
    """What computes a block; see ``graphs.py``. Each of its outputs is an input that it wrote over, or new."""

    def accepts(self, weights: dict[str, Tensor], inputs: dict[str, Any]) -> bool:
        """Whether its guards hold."""

    def __call__(self, weights: dict[str, Tensor], inputs: dict[str, Any]) -> Any: ...


def addresses_of(weights: Mapping[str, Tensor]) -> Addresses:
    """Where ``weights`` lie, and how."""
    return tuple((weight.data_ptr(), weight.shape, weight.stride()) for weight in weights.values())


class Replayed(NamedTuple):
    """The output of a block that ran as its recording, or why it did not; both None where it may yet."""

    output: Any = None
    why_not: str | None = None


@dataclass
class _Block:
    """One block in a frame."""

    addresses: Addresses
    calls: int = 1
    moves: int = 0
    recording: Recording | None = None


@dataclass
class _Frame:
    """What all blocks of one graph and one size share. ``outputs`` are numbers of inputs, where the block wrote its
    output over them, or memory that each block's output is copied to and handed out from as a copy; ``written`` are the
    numbers of the storages of inputs that a block writes, though it may be with what was there. ``thread.ran`` is there
    on each thread that ran the graph."""

    graph: Graph
    static: StaticInputs | None = None
    outputs: list[int | Tensor] | None = None
    written: set[int] = field(default_factory=set)
    shape: Any = None
    why_not: str | None = None
    asked: int = 0
    waited: int = 0
    blocks: weakref.WeakKeyDictionary[Any, _Block] = field(default_factory=weakref.WeakKeyDictionary)
    thread: Any = field(default_factory=threading.local)

    @property
    def bytes(self) -> int:
        buffers = [output for output in self.outputs or () if isinstance(output, Tensor)]
        return (self.static.bytes if self.static else 0) + sum(buffer.nbytes for buffer in buffers)

    def reset(self) -> None:
        for block in self.blocks.values():
            if block.recording is not None:
                block.recording.reset()
        self.blocks.clear()
        self.static = self.outputs = None


class Recordings:
    """All recordings of one device; the sizes that were not used for longest go first.

    Args:
        affords: whether the device has so many bytes free.
        capacity: how many sizes of a kind of block are kept.
    """

    def __init__(self, recorder: Recorder, affords: Callable[[int], bool], capacity: int = 12) -> None:
        self.capacity = capacity
        self._recorder = recorder
        self._affords = affords
        self._frames: OrderedDict[Hashable, _Frame] = OrderedDict()
        self._mark: Any = None
        self._made = False
        self._lock = threading.RLock()

    @property
    def bytes(self) -> int:
        """Bytes of the device that are kept for recordings."""
        with self._lock:
            return self._recorder.pool_bytes() + sum(frame.bytes for frame in self._frames.values())

    @property
    def count(self) -> int:
        with self._lock:
            blocks = [block for frame in self._frames.values() for block in frame.blocks.values()]
        return sum(block.recording is not None for block in blocks)

    def begin(self) -> None:
        """A call of the model begins: what the device did before says nothing of it."""
        with self._lock:
            self._mark = None
            if self._made:
                self._made = False
                self._recorder.settle()

    def run(
        self,
        block: Any,
        graph: Graph,
        weights: dict[str, Tensor],
        inputs: dict[str, Any],
        always: bool,
        unsafe: Callable[[], str | None] = lambda: None,
        addresses: Addresses | None = None,
    ) -> Replayed:
        """Run ``block`` as its recording, or record it; where it is not, the caller has to run ``graph``.

        Args:
            block: stands for the block; held weakly, and its recordings go with it.
            graph: what computes it, whose guards hold for ``weights`` and ``inputs``.
            always: record also where the device does not wait for Python.
            unsafe: asked before it is recorded: why it must not be.
            addresses: the ``addresses_of`` its weights, where they are known.
        """
        with self._lock:
            found = layout(inputs)
            frame = self._frame(graph, found)
            return self._run(frame, block, found, weights, addresses or addresses_of(weights), inputs, always, unsafe)

    def drop(self) -> None:
        """Forget all recordings, and let their memory go."""
        with self._lock:
            for frame in self._frames.values():
                frame.reset()
            self._frames.clear()
            self._recorder.forget()

    def retry(self) -> None:
        """Try again what failed."""
        with self._lock:
            for frame in self._frames.values():
                if frame.why_not == NO_MEMORY:
                    frame.why_not = None
                for block in frame.blocks.values():
                    block.moves = 0

    def _run(
        self,
        frame: _Frame,
        key: Any,
        found: Layout,
        weights: dict[str, Tensor],
        addresses: Addresses,
        inputs: dict[str, Any],
        always: bool,
        unsafe: Callable[[], str | None],
    ) -> Replayed:
        if frame.why_not is not None:
            return Replayed(why_not=frame.why_not)
        block = frame.blocks.get(key)
        if block is None:
            block = frame.blocks[key] = _Block(addresses)
        elif block.addresses != addresses:
            if block.recording is not None:
                block.recording.reset()
            block = frame.blocks[key] = _Block(addresses, moves=block.moves + 1)
        else:
            block.calls += 1
        if block.moves > _MOVES:
            return Replayed(why_not=MOVED)
        if block.recording is not None and self._recorder.outgrown(block.recording):
            block.recording.reset()
            block.recording = None
        if block.recording is None:
            # Of several devices each waits for Python at all others.
            if block.calls < _CALLS_BEFORE or not (always or waits_for_others() is not None or self._waits(frame)):
                return Replayed()
            why_not = unsafe()
            return Replayed(why_not=why_not) if why_not else self._record(frame, block, found, weights, inputs)
        return self._replayed(frame, block, found)

    def _replayed(self, frame: _Frame, block: _Block, found: Layout) -> Replayed:
        static = frame.static
        assert static is not None and block.recording is not None
        if static.held(found):
            return Replayed(why_not=HELD)
        groups = static.bring(found, stretch(), frame.written)
        block.recording.replay()
        self._mark = None
        return Replayed(_outputs(frame, found, groups))

    def _frame(self, graph: Graph, found: Layout) -> _Frame:
        key = (id(graph), found.key, torch.is_inference_mode_enabled(), self._recorder.stream())
        frame = self._frames.get(key)
        if frame is None:
            frame = self._frames[key] = _Frame(graph)
            while len(self._frames) > self.capacity:
                _, oldest = self._frames.popitem(last=False)
                oldest.reset()
        self._frames.move_to_end(key)
        return frame

    def _waits(self, frame: _Frame) -> bool:
        """Whether the device has often been done with a block before the next one was launched."""
        if self._mark is not None:
            frame.asked += 1
            frame.waited += self._recorder.idle(self._mark)
        return frame.asked >= _ASKED and frame.waited >= _WAITED * frame.asked

    def ran(self) -> None:
        """A block was launched without its recording."""
        self._mark = self._recorder.mark()

    def _record(
        self, frame: _Frame, block: _Block, found: Layout, weights: dict[str, Tensor], inputs: dict[str, Any]
    ) -> Replayed:
        try:
            return self._recorded(frame, block, found, weights, inputs)
        except Busy:
            return Replayed()
        except torch.OutOfMemoryError:
            why_not = NO_MEMORY
        except Exception as error:
            why_not = f"it can't be recorded ({first_line(error)})"
            log.warning("a block runs without a CUDA graph: %s", why_not)
        return self._refuse(frame, why_not)

    def _recorded(
        self, frame: _Frame, block: _Block, found: Layout, weights: dict[str, Tensor], inputs: dict[str, Any]
    ) -> Replayed:
        if frame.static is None:
            whole = sum(span.end - span.start for span in found.spans)
            largest = max(span.end - span.start for span in found.spans)
            if not self._affords(whole + _ACTIVATIONS * largest):
                return self._refuse(frame, NO_MEMORY)
            frame.static = StaticInputs(inputs, found)
        static = frame.static
        if not frame.graph.accepts(weights, static.nest):
            return self._refuse(frame, OTHER_KIND)
        if static.held(found):
            return Replayed(why_not=HELD)
        groups = static.bring(found)
        want = None
        if frame.outputs is None:
            want = _computed(frame, static, weights)
        elif not hasattr(frame.thread, "ran"):
            # Handles and plans of CUDA's libraries belong to a thread; one made within a recording would break it off.
            with _as_before(static):
                frame.graph(weights, static.nest)
        frame.thread.ran = True
        graph, nest, places = frame.graph, static.nest, frame.outputs or []

        def launch(weights: dict[str, Tensor]) -> None:
            outputs, _ = flatten(graph(weights, nest))
            for output, place in zip(outputs, places, strict=True):
                if isinstance(place, Tensor):
                    place.copy_(output)

        recording = self._recorder.record(launch, weights)
        self._made = True
        if want is not None and not _computes(recording, frame, static, want):
            log.warning("a block runs without a CUDA graph: %s", DIFFERS)
            return self._refuse(frame, DIFFERS)
        recording.replay()
        block.recording = recording
        self._mark = None
        return Replayed(_outputs(frame, found, groups))

    @staticmethod
    def _refuse(frame: _Frame, why_not: str) -> Replayed:
        frame.reset()
        frame.why_not = why_not
        return Replayed(why_not=why_not)


def _computed(frame: _Frame, static: StaticInputs, weights: dict[str, Tensor]) -> list[Tensor]:
    """Run a block on the static inputs, which are afterwards as before: what it left in ``_written``, of which it finds
    out where the outputs are."""
    with _as_before(static) as before:
        made = frame.graph(weights, static.nest)
        outputs, _ = flatten(made)
        places = [static.place_of(output) for output in outputs]
        new = [output for output, place in zip(outputs, places, strict=True) if place is None]
        frame.outputs = [
            torch.empty_like(output) if place is None else place for output, place in zip(outputs, places, strict=True)
        ]
        frame.shape = rebuilt(made, [torch.empty(0)] * len(outputs))
        changed = [not _same_bits(*pair) for pair in zip(static.memory, before, strict=True)]
        frame.written = {group for group, differs in enumerate(changed) if differs}
        frame.written |= {static.group_of(place) for place in frame.outputs if not isinstance(place, Tensor)}
        return [memory.clone() for memory in (*static.memory, *new)]


def _computes(recording: Recording, frame: _Frame, static: StaticInputs, want: list[Tensor]) -> bool:
    """Whether ``recording`` leaves the bits of ``want`` in ``_written``; the static inputs are afterwards as before."""
    with _as_before(static):
        recording.replay()
        return all(_same_bits(*pair) for pair in zip(_written(frame, static), want, strict=True))


@contextmanager
def _as_before(static: StaticInputs) -> Iterator[list[Tensor]]:
    """A scope of a run that is only compared, after which the static inputs, which it gives, are put back."""
    before = [memory.clone() for memory in static.memory]
    try:
        with alone():
            yield before
    finally:
        for memory, bits in zip(static.memory, before, strict=True):
            memory.copy_(bits)


def _written(frame: _Frame, static: StaticInputs) -> list[Tensor]:
    """All memory that the blocks of ``frame`` may write."""
    return [*static.memory, *(output for output in frame.outputs or () if isinstance(output, Tensor))]


def _outputs(frame: _Frame, found: Layout, groups: list[int]) -> Any:
    """A block's outputs from where its recording left them. Where it wrote over its input in place, so it has there."""
    static, places = frame.static, frame.outputs
    assert static is not None and places is not None
    static.give_back(found, frame.written.intersection(groups))
    outputs = []
    for place in places:
        if isinstance(place, Tensor):
            outputs.append(place.clone())
        else:
            here = found.places[place][0] not in groups
            outputs.append(found.tensors[place] if here else static.twins[place].detach())
    return rebuilt(frame.shape, outputs)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))
