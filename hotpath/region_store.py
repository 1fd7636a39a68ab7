"""All compiled regions of the process."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator

from .compiled import Region


class RegionStore:
    """Compiled regions by key, the least recently used dropped first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._regions: OrderedDict[Hashable, Region] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Region]) -> Region:
        with self._lock:
            region = self._regions.get(key)
            if region is None:
                region = self._regions[key] = make()
                while len(self._regions) > self.capacity:
                    self._regions.popitem(last=False)
            self._regions.move_to_end(key)
            return region

    def __iter__(self) -> Iterator[Region]:
        with self._lock:
            return iter(list(self._regions.values()))
