"""Where blocks get the regions from that they run as: one that fits is taken, loaded, or made to be compiled."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...hotpath.artifacts import NotKept
from ...hotpath.attention import Attend
from ...hotpath.compiled import Bind, Region
from ...hotpath.failures import RegionFailed, belongs_to_host, reason_of
from ...hotpath.region_store import RegionStore
from ...hotpath.settings import CompileSettings
from ...hotpath.template import BlockPlan, NotHoistable
from ...hotpath.values import input_kinds
from ..families.kinds import BlockKind
from .artifacts import kept_region, unsupported
from .boundary import GettingCode
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

    def of(
        self,
        kind: BlockKind,
        plan: BlockPlan,
        bind: Bind,
        weights: dict[str, Tensor],
        inputs: dict[str, Any],
        attend: Attend | None,
        ahead: bool,
    ) -> tuple[Region, Hashable]:
        """The region for a block with this ``plan`` and these arguments, and its key.

        Args:
            ahead: it is to be compiled ahead of time, whether it is kept or not.

        Raises:
            NotHoistable: it failed before in this run.
            RegionFailed: there is none to be had.
        """
        name = f"{kind.name} block" if attend is None else f"patched {kind.name} block"
        device = inputs[kind.activation].device
        kinds = input_kinds(inputs, shapes=self._settings.dynamic == "never")
        dtypes = tuple(weight.dtype for weight in weights.values())
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
