"""Where blocks get the regions from that they run as: one that fits is taken, loaded, or made to be compiled."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import torch

from ...hotpath.artifacts import NotKept
from ...hotpath.compiled import Bind, Region
from ...hotpath.failures import RegionFailed, belongs_to_host, reason_of
from ...hotpath.region_store import RegionStore
from ...hotpath.settings import CompileSettings
from ...hotpath.template import NotHoistable
from ...hotpath.values import input_kinds
from .artifacts import kept_region, unsupported
from .boundary import GettingCode
from .warming import Arguments
from .when import LATER

REGIONS = RegionStore(capacity=64)


class RegionSource:
    """The regions of one compile node, shared with others, and which of them failed in this run.

    ``cache``: ``auto`` looks for kept ones and keeps what is compiled, ``off`` does neither.
    """

    def __init__(self, settings: CompileSettings, cache: str) -> None:
        self._settings = settings
        self._cache = cache
        self._failed: dict[Hashable, str] = {}

    def retry(self) -> None:
        """Try again what failed."""
        self._failed.clear()

    def of(self, given: Arguments, bind: Bind, ahead: bool) -> tuple[Region, Hashable]:
        """The region to call as ``given`` with inputs that ``bind`` binds, and its key.

        Args:
            ahead: it is to be compiled ahead of time, whether it is kept or not.

        Raises:
            NotHoistable: it failed before in this run.
            RegionFailed: there is none to be had.
        """
        kind, plan, device = given.kind, given.plan, given.device
        name = f"{kind.name} block" if given.attend is None else f"patched {kind.name} block"
        kinds = input_kinds(given.inputs, shapes=self._settings.dynamic == "never")
        dtypes = tuple(weight.dtype for weight in given.weights.values())
        key = (plan.key, bind, self._settings, kinds, dtypes, torch.is_inference_mode_enabled(), self._cache, ahead)
        if key in self._failed:
            raise NotHoistable(self._failed[key])

        def make() -> Region:
            kept, why_not = None, ""
            unkept = NotKept() if ahead and not unsupported(self._settings, device) else None
            if self._cache == "auto":
                try:
                    kept = kept_region(name, plan.template, bind, self._settings, kinds, dtypes, device)
                # It can be compiled all the same.
                except Exception as reason:
                    why_not = f": {reason_of(reason)}"
            region = Region(name, plan.template, bind, self._settings, kind.streams, kept or unkept, LATER.add)
            region.stats.cache += why_not
            return region

        with self.failing_once(key), GettingCode(f"{kind.name} block"):
            return REGIONS.get(key, make), key

    @contextmanager
    def failing_once(self, key: Hashable) -> Iterator[None]:
        """A scope in which the region with this ``key`` may fail, for the last time in this run: trying again for each
        of the other blocks would fail as slowly each time."""
        try:
            yield
        except RegionFailed as failure:
            if not belongs_to_host(failure):
                self._failed[key] = str(failure)
            raise
