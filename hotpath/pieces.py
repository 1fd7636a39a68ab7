"""Recordings in pieces, where a recording can't take memory: graphs, with calls of operators between them.

With cudaMallocAsync, which ComfyUI has PyTorch use, memory that is taken while a CUDA graph is recorded is there only
once the graph runs, and Triton launches no kernel on it. So Inductor's code is lent memory that is there (``Arena``).
The result of attention, which takes its own, is copied there, and what else takes its own is called between two graphs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .exchange import give, take
from .internals.memory import lends, storage_at, unowned, unseen
from .values import extent, lying_in

# As memory of its own would be.
_ALIGNMENT = 512
# Operators that write memory which they are given, and that a CUDA graph can hold; pointwise ones are, too.
_WRITES = {"mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "_int_mm", "_addmm_activation", "copy_", "fill_", "zero_"}
# Operators that take memory which only they and copies read, so that a CUDA graph may take it.
_ATTENTION = ("aten::_scaled_dot_product_", "aten::_flash_attention", "aten::_efficient_attention")
# Operators that wait for other threads.
_GIVES, _TAKES = "hotpath::give", "hotpath::take"
_DEPENDS_ON_DATA = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Unrecordable(RuntimeError):
    """What was launched can't be recorded; the message says what."""


class Piece(Protocol):
    def replay(self) -> None: ...

    def reset(self) -> None: ...


class Capture(Protocol):
    """Records what is launched from ``begin`` to ``end``, within its ``stream``."""

    def stream(self) -> AbstractContextManager[None]: ...

    def begin(self) -> None: ...

    def end(self) -> Piece: ...

    def abandon(self, error: BaseException) -> None:
        """Forget what was begun, after ``error``."""


class Arena:
    """Memory that is lent to tensors, and lent again once nothing uses them, in the order in which they were made."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.bytes = size
        self._memory = torch.empty(size, dtype=torch.uint8, device=device)
        self._start = self._memory.data_ptr()
        self._lent: list[tuple[int, int, StorageWeakRef]] = []

    def lend(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Raises:
        _Full: there is no room for it.
        """
        count = extent(size, stride, dtype.itemsize)
        self._lent = [lent for lent in self._lent if not lent[2].expired()]
        place = start = 0
        while place < len(self._lent) and start + count > self._lent[place][0]:
            start = self._lent[place][1]
            place += 1
        end = start + -(-count // _ALIGNMENT) * _ALIGNMENT
        if end > self.bytes:
            raise _Full(end)
        tensor = lying_in(storage_at(self._start + start, self._memory.device, count), 0, size, stride, dtype)
        if count:
            self._lent.insert(place, (start, end, StorageWeakRef(tensor.untyped_storage())))
        return tensor


class InPieces:
    """What was recorded."""

    def __init__(self, pieces: Sequence[Piece], arena: Arena) -> None:
        self._pieces = pieces
        self._arena: Arena | None = arena

    def replay(self) -> None:
        assert self._arena is not None, "replayed after it was forgotten"
        for piece in self._pieces:
            piece.replay()

    def reset(self) -> None:
        for piece in self._pieces:
            piece.reset()
        self._pieces, self._arena = (), None

    def lies_in(self, arena: Arena) -> bool:
        return self._arena is arena


class PieceRecorder:
    """Records on ``device`` by ``capture``, in memory that all recordings share, as they run one after another."""

    def __init__(self, device: torch.device, capture: Capture) -> None:
        self._device = device
        self._capture = capture
        self._arena = Arena(0, device)
        self._arenas: weakref.WeakSet[Arena] = weakref.WeakSet()

    @property
    def bytes(self) -> int:
        return sum(arena.bytes for arena in self._arenas)

    def outgrown(self, recording: Any) -> bool:
        """Whether ``recording`` keeps memory of its own, since what was recorded later needed more."""
        return not recording.lies_in(self._arena)

    def forget(self) -> None:
        self._arena = Arena(0, self._device)

    def record(self, run: Callable[[dict[str, Tensor]], None], weights: dict[str, Tensor]) -> InPieces:
        """Record ``run(weights)`` without running it, but for operators that make their own results, whose results
        are not used.

        Raises:
            Unrecordable: it does what can't be recorded.
        """
        while True:
            session = _Session(self._device, self._capture, self._arena)
            try:
                return InPieces(session.record(run, weights), self._arena)
            except _Full as full:
                needed = full.needed
            self._arena = Arena(needed, self._device)
            self._arenas.add(self._arena)


class _Full(Exception):
    def __init__(self, needed: int) -> None:
        super().__init__(needed)
        self.needed = needed


class _Call:
    """An operator, and where its results go: pairs of a number among its results and memory."""

    def __init__(self, operator: Any, args: Any, kwargs: Any, places: Sequence[tuple[int, Tensor]]) -> None:
        self._call: tuple[Any, Any, Any] | None = (operator, args, kwargs)
        self._places = places

    def replay(self) -> None:
        assert self._call is not None
        operator, args, kwargs = self._call
        results = operator(*args, **kwargs)
        for number, place in self._places:
            place.copy_(tree_leaves(results)[number])

    def reset(self) -> None:
        self._call, self._places = None, ()


class _Session(TorchDispatchMode):
    """One recording as it is made. Its mode sees each operator that the code calls, but for Inductor's kernels."""

    def __init__(self, device: torch.device, capture: Capture, arena: Arena) -> None:
        super().__init__()
        self._device = device
        self._capture = capture
        self._arena = arena
        self._pieces: list[Piece] = []
        self._begun = False
        # Where rows of others are on their way.
        self._theirs: Tensor | None = None

    def record(self, run: Callable[[dict[str, Tensor]], None], weights: dict[str, Tensor]) -> list[Piece]:
        try:
            with self._capture.stream():
                self._begin()
                with lends(self._device, self._lend), self:
                    run(weights)
                self._end()
        except BaseException as error:
            if self._begun:
                with self._capture.stream():
                    self._capture.abandon(error)
            for piece in self._pieces:
                piece.reset()
            raise
        return self._pieces

    def __torch_dispatch__(
        self, func: Any, types: Iterable[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, schema = kwargs or {}, func._schema
        aliases = [value.alias_info for value in schema.returns]
        if not schema.is_mutable and any(alias is not None for alias in aliases):
            return func(*args, **kwargs)
        elsewhere = any(tensor.device != self._device for tensor in _tensors((args, kwargs)))
        if elsewhere or _DEPENDS_ON_DATA.intersection(func.tags):
            raise Unrecordable(f"{schema.name} makes Python wait for the device")
        if schema.name == _GIVES:
            return self._gives(*args)
        if schema.name == _TAKES:
            return self._takes()
        if not schema.is_mutable:
            recorded = schema.name.startswith(_ATTENTION)
            return (self._within if recorded else self._between)(func, args, kwargs)
        written = all(alias is not None and alias.is_write for alias in aliases)
        if (written and schema.name.removeprefix("aten::") in _WRITES) or torch.Tag.pointwise in func.tags:
            return func(*args, **kwargs)
        raise Unrecordable(f"{schema.name} may take memory or wait for the device")

    def _between(self, operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        self._end()
        # In memory in which nothing was computed yet: whatever floats are, numbers of elements have to be right.
        made = operator(*tree_map(_harmless, args), **tree_map(_harmless, kwargs))
        out, places = self._lent_for(operator, made)
        # Else it would be given back within what is recorded next.
        del made
        self._pieces.append(_Call(operator, tree_map(_unowned, args), tree_map(_unowned, kwargs), places))
        self._begin()
        return out

    def _gives(self, mine: Tensor, others: int) -> None:
        theirs = mine.new_empty(others, *mine.shape[1:], device="meta")
        self._theirs = self._arena.lend(theirs.shape, theirs.stride(), theirs.dtype)
        self._meets(give, mine, self._theirs)

    def _takes(self) -> Tensor:
        theirs, self._theirs = self._theirs, None
        assert theirs is not None, "taken without having been given"
        self._meets(take, theirs)
        return theirs

    def _meets(self, operator: Callable[..., None], *tensors: Tensor) -> None:
        """It is not run: the other threads may not be here."""
        self._end()
        self._pieces.append(_Call(operator, tuple(map(unowned, tensors)), {}, ()))
        self._begin()

    def _within(self, operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        made: Any = operator(*args, **kwargs)
        out, failed = None, None
        try:
            out, places = self._lent_for(operator, made)
            for number, place in places:
                place.copy_(tree_leaves(made)[number])
        except Exception as error:
            # Frames that it went through hold what was taken, which has to be given back before the recording ends.
            failed = error.with_traceback(None)
        made = None
        try:
            if failed is not None:
                raise failed
        finally:
            # It holds this frame.
            failed = None
        return out

    def _lent_for(self, operator: Any, made: Any) -> tuple[Any, list[tuple[int, Tensor]]]:
        """Lent memory for what ``operator`` made, and which of its results goes where."""
        places: list[tuple[int, Tensor]] = []
        numbers = iter(range(len(tree_leaves(made))))
        seeded = torch.Tag.nondeterministic_seeded in operator.tags

        def lent(result: Any) -> Any:
            number = next(numbers)
            if not isinstance(result, Tensor):
                return result
            # Beside what it computes it may give the state of random numbers, which nothing here reads.
            state = seeded and not result.is_floating_point()
            if result.device != self._device and not state:
                raise Unrecordable(f"{operator._schema.name} makes a tensor on another device")
            memory = self._arena.lend(result.shape, result.stride(), result.dtype)
            if result.numel() and not state:
                places.append((number, _unowned(memory)))
            return memory

        return tree_map(lent, made), places

    def _lend(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        # What is within is not of what is recorded.
        with unseen():
            return self._arena.lend(size, stride, dtype)

    def _begin(self) -> None:
        self._capture.begin()
        self._begun = True

    def _end(self) -> None:
        self._begun = False
        self._pieces.append(self._capture.end())


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _harmless(value: Any) -> Any:
    if isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex():
        return torch.zeros_like(value)
    return value


def _unowned(value: Any) -> Any:
    return unowned(value) if isinstance(value, Tensor) else value
