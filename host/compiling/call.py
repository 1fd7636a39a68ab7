"""One call of the model through Compile Repeated Blocks."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from typing import Any

from torch import nn

from ...hotpath.attention import Attend
from ...hotpath.compiled import Region
from ...hotpath.stretch import Stretches
from ..families import family_of
from ..families.attention import has_patches
from ..families.kinds import BlockKind
from ..telling.accounting import CallAccount
from .replay import Replayed


class Call:
    """What became of its blocks, and the region that each kind of block had in it."""

    def __init__(self, selected: Mapping[BlockKind, Collection[int]]) -> None:
        self.account = CallAccount({kind.name: indices for kind, indices in selected.items()})
        self.regions: dict[Hashable, Region] = {}
        self.graphs = Replayed()
        self.stretches = Stretches()
        self._hosts = False

    def begin(self, diffusion_model: nn.Module, routed: Collection[nn.Module]) -> None:
        """The call enters ``diffusion_model``, of which the blocks ``routed`` run through the node."""
        family = family_of(diffusion_model)
        self._hosts = family is not None and family.runs_itself(diffusion_model, routed)

    def enter(self, attend: Attend | None, options: Mapping[str, Any]) -> None:
        """A block is about to run, with attention by ``attend`` and under these options of the host."""
        self.stretches.goes_on(self._hosts and attend is None and not has_patches(options))
