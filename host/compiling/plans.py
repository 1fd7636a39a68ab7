"""The plans of a MODEL's blocks, made once for each block that stays as it is."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping
from contextlib import suppress

from torch import nn

from ...hotpath.template import BlockPlan, NotHoistable, plan_block
from ..families.kinds import BlockKind
from ..layers.bypass import bypass_addition
from ..layers.containers import BOOKKEEPING
from ..residency.weights import Layers, layer_states, plain_layers


class Plans:
    """Plans by block, which keep no block alive. ``fuses``: they are for a compiler that fuses operations."""

    def __init__(self, fuses: bool) -> None:
        self._fuses = fuses
        self._plans: weakref.WeakKeyDictionary[nn.Module, BlockPlan] = weakref.WeakKeyDictionary()

    def of(self, kind: BlockKind, block: nn.Module) -> tuple[BlockPlan, Layers]:
        """The plan of ``block``, made anew where the block is not as it was, and its layers."""
        plan = self._plans.get(block)
        if plan is not None:
            try:
                return plan, plan.layers(block)
            except NotHoistable:
                del self._plans[block]
        known = (layer_states, bypass_addition, kind.ignored, kind.owned, BOOKKEEPING)
        plan = self._plans[block] = plan_block(block, plain_layers(block, self._fuses), *known)
        return plan, plan.layers(block)

    def look_again(self) -> None:
        """A run begins: all of a block is looked at anew, once."""
        for plan in self._plans.values():
            plan.look_again()

    def ahead(self, kind: BlockKind, block: nn.Module) -> None:
        """Plan ahead, to know how many regions there will be; what can't be planned says so when it runs."""
        with suppress(Exception):
            self.of(kind, block)

    def layers(
        self, selected: Mapping[BlockKind, Collection[int]], diffusion_model: nn.Module
    ) -> list[list[nn.Module]]:
        """The layers of each of the ``selected`` blocks that can be planned."""
        found = []
        for kind, indices in selected.items():
            for index, block in enumerate(kind.blocks(diffusion_model)):
                if index in indices:
                    with suppress(Exception):
                        found.append([layer for _, layer, _ in self.of(kind, block)[1]])
        return found

    def structures(self) -> int:
        """How many structures the blocks have."""
        return len({plan.key for plan in self._plans.values()})
