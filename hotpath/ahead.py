"""Outputs made ahead of time, kept by the exact content of the vector that they were made from.

The modulation layers of a block see one vector a step (timestep, guidance, pooled text) and never the image (adaLN of
Peebles and Xie, "Scalable Diffusion Models with Transformers", arXiv:2212.09748). So what they give can be made for a
whole schedule at once, and their weights need not be on the device after that.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from .values import tensors_in


def content_key(vector: Tensor) -> Hashable:
    """Shape, dtype and every bit of ``vector``. On a GPU it waits for what is queued before it."""
    plain = vector.detach().contiguous().cpu()
    return tuple(vector.shape), vector.dtype, plain.view(torch.uint8).numpy().tobytes()


class Table:
    """Outputs of layers by key, those used longest ago dropped first where they take more than ``capacity`` bytes."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.bytes = 0
        self._rows: OrderedDict[Hashable, tuple[Mapping[str, Any], int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._rows

    def get(self, key: Hashable) -> Mapping[str, Any] | None:
        """The outputs of each layer by its name, or None."""
        if key not in self._rows:
            return None
        self._rows.move_to_end(key)
        return self._rows[key][0]

    def put(self, key: Hashable, outputs: Mapping[str, Any]) -> None:
        """Keep ``outputs``: tensors, or lists, tuples and dataclasses of them, that share no memory with other rows."""
        self.drop(key)
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors_in(outputs)}
        size = sum(storage.nbytes() for storage in storages.values())
        self._rows[key] = outputs, size
        self.bytes += size
        while self.bytes > self.capacity and len(self._rows) > 1:
            self.drop(next(iter(self._rows)))

    def drop(self, key: Hashable) -> None:
        _, size = self._rows.pop(key, ({}, 0))
        self.bytes -= size

    def clear(self) -> None:
        self._rows.clear()
        self.bytes = 0
