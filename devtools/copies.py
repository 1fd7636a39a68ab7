"""A bus that provokes races: copies come late and in any order, as far as a copy engine's promises let them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(eq=False)
class _Copy:
    sources: Sequence[Tensor]
    targets: Sequence[Tensor]
    arrival: list[bool]


class LateCopies:
    """A copy engine on which any copy may happen at any time between what it must come after and what waits for it.

    Compute is done when it returns, as on a CPU. Until a copy has arrived its target is filled with 255.
    """

    def __init__(self, seed: int = 0) -> None:
        self.pending: list[_Copy] = []
        self._random = random.Random(seed)
        self._marks = 0

    def copy(self, sources: Sequence[Tensor], targets: Sequence[Tensor], after: int) -> list[bool]:
        if not 0 < after <= self._marks:
            raise RuntimeError(f"a copy into a slot that is in use: after {after}, computed up to {self._marks}")
        mine = {target.data_ptr() for target in targets}
        # What is overwritten before anything waited for it.
        for earlier in [copy for copy in self.pending if mine & {target.data_ptr() for target in copy.targets}]:
            self.pending.remove(earlier)
        for target in targets:
            target.fill_(255)
        arrival = [False]
        self.pending.append(_Copy(sources, targets, arrival))
        self.some()
        return arrival

    def some(self) -> None:
        """Any number of pending copies happen, in any order."""
        self._random.shuffle(self.pending)
        for _ in range(self._random.randint(0, len(self.pending))):
            self._do(self.pending.pop())

    def wait(self, arrival: list[bool]) -> None:
        while not arrival[0]:
            self.some()
        self.some()

    def mark(self) -> int:
        self._marks += 1
        return self._marks

    def drain(self) -> None:
        while self.pending:
            self._do(self.pending.pop())

    def _do(self, copy: _Copy) -> None:
        for source, target in zip(copy.sources, copy.targets, strict=True):
            target.copy_(source)
        copy.arrival[0] = True
