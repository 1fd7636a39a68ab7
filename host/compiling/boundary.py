"""The boundary between getting code for a block, whose failures make it run eager, and the host's own computation."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import torch

from ...hotpath.failures import RegionFailed, reason_of
from ...hotpath.template import NotHoistable
from ...hotpath.values import Copies

_PASSED = (NotHoistable, RegionFailed, comfy.model_management.InterruptProcessingException)


class GettingCode:
    """A scope in which whatever is raised comes from getting code for the block ``name``: RegionFailed.

    Memory too: what a block takes as a whole may not be there where there is enough for one layer at a time.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, _PASSED):
            raise RegionFailed(self._name, reason_of(error)) from error


class MemoryMayEnd:
    """A scope in which memory that ends is a reason to run a block eager, as the host does with one layer's weights at
    a time, on ``inputs`` as they were: blocks update theirs in place."""

    def __init__(self, inputs: Any) -> None:
        self._copies = Copies(inputs)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            self._copies.restore()
            raise NotHoistable("the GPU has no memory left to run it compiled") from error
