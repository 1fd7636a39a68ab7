"""Blocks whose weights are where they last were: they run again without asking the host for each of them."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from contextlib import ExitStack
from typing import Any, NamedTuple

from torch import Tensor

from ...hotpath.internals.memory import recordable, unowned
from ...hotpath.recorded import Addresses, Graph, addresses_of
from ...hotpath.template import BlockPlan
from ..residency.places import Places
from ..residency.weights import Layers


class Known(NamedTuple):
    """How a block last ran: its ``graph``, and its ``weights`` as tensors that keep none of their memory."""

    graph: Graph
    weights: dict[str, Tensor]
    addresses: Addresses
    places: Places


class KnownBlocks:
    """By plan, which is held weakly, and by all else that decides how a block runs."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[BlockPlan, dict[Hashable, Known]] = weakref.WeakKeyDictionary()

    def note(self, plan: BlockPlan, way: Hashable, layers: Layers, graph: Graph, weights: dict[str, Tensor]) -> None:
        """The block ran ``way`` by ``graph``; of weights that were made for this use nothing is known later."""
        if not recordable():
            return
        places = Places(layers)
        if places.cover(weights):
            lent = {name: unowned(weight) for name, weight in weights.items()}
            self._known.setdefault(plan, {})[way] = Known(graph, lent, addresses_of(lent), places)

    def found(
        self, plan: BlockPlan, way: Hashable, layers: Layers, inputs: dict[str, Any], scope: ExitStack
    ) -> Known | None:
        """What is known of a block that would run the same way on ``inputs``; its weights stay until ``scope`` ends."""
        known = self._known.get(plan, {}).get(way)
        if known is None or not known.places.hold(layers, scope) or not known.graph.accepts(known.weights, inputs):
            return None
        return known
