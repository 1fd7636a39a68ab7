"""What PyTorch keeps to itself of memory, and recordings need: where Inductor's code takes it, cuBLAS's workspaces, who
uses a storage.

Where a newer PyTorch lacks any of it nothing is recorded (``recordable``), and where Inductor's code is of another kind
it is not compiled ahead of time, which all that is recorded is.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from ..values import extent, lying_in

_NEEDED = (
    "_DisableTorchDispatch",
    "_construct_storage_from_data_pointer",
    "_cuda_clearCublasWorkspaces",
    "_cuda_endAllocateToPool",
    "_cuda_getCurrentRawStream",
    "_storage_Use_Count",
)
# The globals of Inductor's code, by what calls it.
_code: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def recordable() -> bool:
    """Whether this PyTorch has all that follows, as one built for CUDA should."""
    return all(hasattr(torch._C, name) for name in _NEEDED)


def note_code(module: Any) -> None:
    """``module`` was loaded from Inductor's code."""
    if hasattr(module, "call"):
        with _lock:
            _code[getattr(module, "runner", module.call)] = vars(module)


def any_code() -> bool:
    return bool(_code)


@contextmanager
def lends(device: torch.device, lend: Callable[[Sequence[int], Sequence[int], torch.dtype], Tensor]) -> Iterator[None]:
    """Have all of Inductor's code that runs in this thread take memory of ``device`` from ``lend(size, stride, dtype)``
    within the scope.

    Raises:
        RuntimeError: Inductor's code takes its memory in a way that is not known here.
    """
    name, thread = f"empty_strided_{device.type}", threading.get_ident()
    with _lock:
        before = [(code, code.get(name)) for code in _code.values()]
    if not all(callable(plain) for _, plain in before):
        raise RuntimeError("Inductor takes memory in a way that is not known here")

    def taking(plain: Any) -> Callable[..., Tensor]:
        def take(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
            return lend(size, stride, dtype) if threading.get_ident() == thread else plain(size, stride, dtype)

        return take

    try:
        for code, plain in before:
            code[name] = taking(plain)
        yield
    finally:
        for code, plain in before:
            code[name] = plain


def storage_at(address: int, device: torch.device, count: int) -> Any:
    """``count`` bytes at an address as a storage that does not own them."""
    return torch._C._construct_storage_from_data_pointer(address, device, count)


def unowned(tensor: Tensor) -> Tensor:
    """``tensor`` as one that does not keep its memory: for as long as that is known to be there."""
    if not tensor.numel():
        return tensor
    count = extent(tensor.shape, tensor.stride(), tensor.element_size())
    storage = storage_at(tensor.data_ptr(), tensor.device, count)
    return lying_in(storage, 0, tensor.shape, tensor.stride(), tensor.dtype)


def users(storage: Any) -> int:
    """How many tensors and others hold ``storage``."""
    return torch._C._storage_Use_Count(storage._cdata)


def unseen() -> AbstractContextManager[Any]:
    """A scope in which no ``TorchDispatchMode`` sees operators."""
    return torch._C._DisableTorchDispatch()


def clear_workspaces() -> None:
    """Give back the memory that cuBLAS works in; it takes new when it needs it."""
    torch._C._cuda_clearCublasWorkspaces()


def leave_pool(device: torch.device, pool: Any) -> None:
    """Have the allocator of ``device`` take memory as ever after a capture into ``pool`` that failed."""
    torch._C._cuda_endAllocateToPool(device.index, pool)


def current_stream(device: torch.device) -> int:
    """The address of the stream that is current on ``device``."""
    return torch._C._cuda_getCurrentRawStream(device.index)
