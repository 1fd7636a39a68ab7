"""Tensors and nests of them: a region's weights, inputs and results."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

# No tensor has so many elements.
_LARGEST = 2**48
# Of how many places of a tensor how many bytes are compared: of a model so few that PyTorch starts no thread for it.
_PLACES, _RUN = 16, 8


def plain_tensor(value: Tensor) -> Tensor:
    """``value``'s memory as a tensor that is no Parameter and of the kind made now, in or out of inference mode.

    Dynamo guards on both, so that weights of one block would not fit the graph of another.
    """
    if value.is_inference() == torch.is_inference_mode_enabled():
        # And not detach(): of a Parameter made in inference mode and moved outside of it nothing could be done with it.
        return value.data
    # Its stubs leave out that set_ takes a tensor alone, which is the quickest.
    twin: Any = torch.empty(0, dtype=value.dtype, device=value.device)
    return twin.set_(value)


def extent(shape: Sequence[int], stride: Sequence[int], itemsize: int) -> int:
    """Bytes from the first element of such a tensor to behind its last."""
    if 0 in shape:
        return 0
    return (sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + 1) * itemsize


def lying_in(storage: Any, start: int, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor in ``storage``, from element ``start`` of its ``dtype`` on."""
    tensor: Any = torch.empty(0, dtype=dtype, device=storage.device)
    return tensor.set_(storage, start, tuple(shape), tuple(stride))


def sampled(tensors: Iterable[Tensor]) -> Tensor:
    """Bytes of each of ``tensors`` from 16 places spread over its memory, on the CPU: what scales a weight in place, or
    adds a LoRA to it, changes some of them, also where PyTorch counts no changes, as of what was made in inference
    mode. On a GPU it waits for what is queued before it. Of a tensor of another class nothing is read."""
    places: dict[Hashable, list[Tensor]] = {}
    for tensor in tensors:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_meta:
            continue
        dense = tensor.is_contiguous()
        size = tensor.nbytes if dense else extent(tensor.shape, tensor.stride(), tensor.itemsize)
        start = int(tensor.storage_offset()) * tensor.itemsize
        shape, stride = ((_PLACES, _RUN), (size // _PLACES, 1)) if size > _PLACES * _RUN else ((size,), (1,))
        place = lying_in(tensor.untyped_storage(), start, shape, stride, torch.uint8)
        places.setdefault((tensor.device, place.ndim), []).append(place)
    parts = [torch.cat(each).flatten().cpu() for each in places.values()]
    return torch.cat([torch.empty(0, dtype=torch.uint8), *parts])


def plainly_strided(value: Tensor) -> Tensor:
    """``value``, a tensor of three dimensions, with the usual strides where it is contiguous.

    Of a dimension of one the stride may be any number, as in a slice of a longer tensor of batch 1, and Dynamo guards
    on it all the same.
    """
    _, rows, columns = value.shape
    usual = (rows * columns, columns, 1)
    return value if value.stride() == usual or not value.is_contiguous() else value.as_strided(value.shape, usual)


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in a nest of mappings, lists, tuples and dataclasses."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in _items(value) for tensor in tensors_in(item)]


def mapped(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """Such a nest, with what ``change`` makes of each value of ``kind``, called in the order of ``tensors_in``."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, Mapping):
        return {name: mapped(item, kind, change) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [mapped(item, kind, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if is_dataclass(value) and not isinstance(value, type):
        changed = {item.name: mapped(getattr(value, item.name), kind, change) for item in fields(value)}
        return replace(value, **changed)
    return value


def device_of(inputs: Mapping[str, Any]) -> torch.device:
    return next(iter(tensors_in(inputs))).device


def input_kinds(value: Any, shapes: bool) -> Hashable:
    """What a trace depends on in ``value``: structure, dtypes, devices and ranks; with ``shapes`` sizes too."""
    if isinstance(value, Tensor):
        kind = (value.dtype, value.device, value.ndim, value.is_inference())
        return (*kind, tuple(value.shape)) if shapes else kind
    if isinstance(value, Mapping):
        return tuple((name, input_kinds(item, shapes)) for name, item in value.items())
    return (type(value), *(input_kinds(item, shapes) for item in _items(value)))


def varying_dims(template: nn.Module) -> dict[str, tuple[int, ...]]:
    """Dimensions of weights that differ from one set to the next, by the names of the weights."""
    return {
        f"{path}.{name}": dims
        for path, module in template.named_modules()
        for name, dims in getattr(module, "dynamic_dims", {}).items()
    }


def mark_dynamic(
    weights: Mapping[str, Tensor],
    inputs: Mapping[str, Any],
    weight_dims: Mapping[str, Sequence[int]],
    input_dims: Mapping[str, Sequence[int]],
    dynamic: str,
) -> None:
    """Have Dynamo take these dimensions for any size, with ``dynamic`` at ``always`` the batch too."""
    # Newer PyTorch tells marked tensors from others, also in a graph that was compiled for either.
    if dynamic != "never":
        for name, dims in input_dims.items():
            torch._dynamo.maybe_mark_dynamic(inputs[name], list(dims))
        for name, dims in weight_dims.items():
            torch._dynamo.maybe_mark_dynamic(weights[name], list(dims))
    if dynamic == "always":
        tensors = tensors_in(inputs)
        batch = max((tensor.shape[0] for tensor in tensors if tensor.ndim > 2), default=0)
        for tensor in tensors:
            # A mask or an embedding that all images share stays one, and a count that travels as a size is no batch.
            if tensor.ndim and tensor.shape[0] == batch:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)


def bounded(inputs: dict[str, Any]) -> dict[str, Any]:
    """``inputs``, of which a trace is told that sizes are below the number that stands for the end of a slice without
    one: Inductor can't see it of a size that may be anything."""
    for tensor in inputs.values():
        if isinstance(tensor, Tensor):
            for size in tensor.shape:
                torch._check(size < _LARGEST)
    return inputs


class Copies:
    """The content of the tensors in a nest, to put back where code that updates them in place has failed."""

    def __init__(self, value: Any) -> None:
        # What repeats its memory can't be updated in place; sizes that travel as tensors are of that kind.
        self._pairs = [(tensor, tensor.clone()) for tensor in tensors_in(value) if not _repeats(tensor)]

    def restore(self) -> None:
        for tensor, content in self._pairs:
            tensor.copy_(content)


def _repeats(tensor: Tensor) -> bool:
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _items(value: Any) -> Sequence[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple)):
        return value
    if is_dataclass(value):
        return [getattr(value, item.name) for item in fields(value)]
    return ()
