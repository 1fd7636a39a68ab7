"""Inputs that stay where they are: what a recorded block reads and writes, shared by all blocks of a kind and size.

Inputs come as a nest of mappings, lists, tuples and dataclasses. Tensors of one storage, such as the chunks of a
modulation, keep their places to one another, so that a storage is one copy, and what overlapped still does.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .internals.memory import users
from .values import extent, lying_in, mapped

_ALIGNMENT = 64
# Of what is no nest, the most frequent.
_PLAIN = {type(None), bool, int, float, str}


class _Span(NamedTuple):
    """The bytes of one storage that tensors lie in."""

    start: int
    end: int
    storage: Any


class _Brought(NamedTuple):
    """Where the content of one storage was last brought from, in which call; the storage from the second time on."""

    call: Hashable
    start: int
    storage: StorageWeakRef | None


class Layout(NamedTuple):
    """Tensors of some inputs, each with the number of its span and its offset there in bytes. ``key`` is equal for
    inputs that fit the same static ones."""

    tensors: list[Tensor]
    spans: list[_Span]
    places: list[tuple[int, int]]
    key: Hashable


def layout(inputs: Any) -> Layout:
    """The tensors of ``inputs`` and where they lie."""
    tensors: list[Tensor] = []
    structure: list[Hashable] = []
    _flatten(inputs, tensors, structure)
    number: dict[int, int] = {}
    spans: list[_Span] = []
    described: list[Hashable] = []
    starts = []
    # Asked before each call of a block.
    for tensor in tensors:
        storage, start, shape, stride = tensor.untyped_storage(), tensor.data_ptr(), tensor.shape, tensor.stride()
        end = start + (tensor.nbytes if tensor.is_contiguous() else extent(shape, stride, tensor.element_size()))
        group = number.setdefault(storage.data_ptr(), len(spans))
        if group == len(spans):
            spans.append(_Span(start, end, storage))
        else:
            known = spans[group]
            if start < known.start or end > known.end:
                spans[group] = _Span(min(start, known.start), max(end, known.end), storage)
        starts.append((group, start))
        described += (tensor.dtype, shape, stride, tensor.is_inference())
    places = [(group, start - spans[group].start) for group, start in starts]
    sizes = [(span.end - span.start, span.start % _ALIGNMENT) for span in spans]
    return Layout(tensors, spans, places, (*structure, *described, *places, *sizes))


class StaticInputs:
    """Twins of ``inputs`` in memory of their own, into which later inputs of an equal ``layout`` are brought."""

    def __init__(self, inputs: Any, found: Layout) -> None:
        device = found.tensors[0].device
        self.memory = [_memory(span, device) for span in found.spans]
        self._starts = [memory.data_ptr() for memory in self.memory]
        self._storages = [memory.untyped_storage() for memory in self.memory]
        self.twins = [self._twin(*pair) for pair in zip(found.tensors, found.places, strict=True)]
        self.nest = rebuilt(inputs, self.twins)
        self._own = self._users()
        self._brought: dict[int, _Brought] = {}
        self._groups = [group for group, _ in found.places]

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._storages)

    def _twin(self, tensor: Tensor, place: tuple[int, int]) -> Tensor:
        group, offset = place
        storage, start = self._storages[group], self.memory[group].storage_offset() + offset
        with torch.inference_mode(tensor.is_inference()):
            return lying_in(storage, start // tensor.element_size(), tensor.shape, tensor.stride(), tensor.dtype)

    def held(self, found: Layout) -> bool:
        """Whether someone else still holds a tensor in memory that these inputs would overwrite."""
        users = self._users()
        return any(users[group] > self._own[group] for group in self._foreign(found))

    def bring(self, found: Layout, call: Hashable = None, written: Container[int] = ()) -> list[int]:
        """Copy inputs here that are elsewhere; gives the numbers of the storages that were.

        Args:
            call: where given, nobody writes inputs while it is the same but those in the storages ``written``, and what
                was brought is not brought again.
        """
        foreign = self._foreign(found)
        for group in foreign:
            if call is None or group in written:
                self._brought.pop(group, None)
            elif self._is_here(group, found.spans[group], call):
                continue
            self.memory[group].copy_(_bytes_of(found.spans[group]))
        return foreign

    def _is_here(self, group: int, span: _Span, call: Hashable) -> bool:
        """Whether ``span`` was brought in this ``call``; that it was is noted from the second time on."""
        brought = self._brought.get(group)
        if brought is None or (brought.call, brought.start) != (call, span.start):
            self._brought[group] = _Brought(call, span.start, None)
            return False
        if brought.storage is None:
            # Other memory may come to lie there once it is gone.
            self._brought[group] = brought._replace(storage=StorageWeakRef(span.storage))
            return False
        return not brought.storage.expired()

    def give_back(self, found: Layout, groups: Iterable[int]) -> None:
        """Copy what is in the storages ``groups`` to where it was brought from."""
        for group in groups:
            _bytes_of(found.spans[group]).copy_(self.memory[group])

    def group_of(self, place: int) -> int:
        """The number of the storage of the twin with this number."""
        return self._groups[place]

    def place_of(self, tensor: Tensor) -> int | None:
        """The number of the twin that ``tensor`` is a view of, element for element; None when it is a view of none."""
        for index, twin in enumerate(self.twins):
            if tensor.data_ptr() == twin.data_ptr() and _same_geometry(tensor, twin):
                return index
        return None

    def _foreign(self, found: Layout) -> list[int]:
        return [group for group, span in enumerate(found.spans) if span.start != self._starts[group]]

    def _users(self) -> list[int]:
        return [users(storage) for storage in self._storages]


def flatten(value: Any) -> tuple[list[Tensor], Hashable]:
    """The tensors in a nest, and all else of it."""
    tensors: list[Tensor] = []
    structure: list[Hashable] = []
    _flatten(value, tensors, structure)
    return tensors, tuple(structure)


def rebuilt(value: Any, tensors: Sequence[Tensor]) -> Any:
    """The nest ``value`` with ``tensors`` in the places of its own."""
    given = iter(tensors)
    return mapped(value, Tensor, lambda _: next(given))


def _flatten(value: Any, tensors: list[Tensor], structure: list[Hashable]) -> None:
    if type(value) in _PLAIN:
        structure.append((type(value), value))
    elif isinstance(value, Tensor):
        tensors.append(value)
        structure.append(Tensor)
    elif isinstance(value, Mapping):
        structure.append(tuple(value))
        for item in value.values():
            _flatten(item, tensors, structure)
    elif isinstance(value, (list, tuple)):
        structure.append((type(value), len(value)))
        for item in value:
            _flatten(item, tensors, structure)
    elif is_dataclass(value) and not isinstance(value, type):
        structure.append(type(value))
        for item in fields(value):
            _flatten(getattr(value, item.name), tensors, structure)
    else:
        # 1, 1.0 and True are equal, and traced otherwise.
        structure.append((type(value), value))


def _memory(span: _Span, device: torch.device) -> Tensor:
    """As many bytes as ``span`` has, as far behind a multiple of the alignment."""
    shift = span.start % _ALIGNMENT
    with torch.inference_mode(False):
        return torch.empty(shift + span.end - span.start, dtype=torch.uint8, device=device)[shift:]


def _same_geometry(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.stride() == other.stride()


def _bytes_of(span: _Span) -> Tensor:
    start = span.start - span.storage.data_ptr()
    return lying_in(span.storage, start, (span.end - span.start,), (1,), torch.uint8)
