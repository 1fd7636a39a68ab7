"""Where the weights of a MODEL with dynamic VRAM lie in the range of addresses that the host gives them.

The host keeps what lies low in that range, up to a watermark that sinks as memory is wanted elsewhere, and brings the
rest at each step. By itself it puts the largest layers lowest, so that it fetches a run of like blocks, each of which
has one other to hide behind.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Hashable
from typing import Any

import comfy.model_management
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher, ModelPatcherDynamic

from ...hotpath.stream import leaving_order
from .budget import GIB, Budget
from .streaming import streamable_layers

log = logging.getLogger(__name__)

KEY = "hotpath_layout"
# The share of the weights that were there, from which on it is no page more or less.
_WORTH_MOVING = 0.1
# What the host keeps on a module of where its weights are.
_PLACE = ("_v", "_v_signature", "_v_weight", "_v_bias")
# By model and device, since clones share where its weights are.
_LAYOUTS: weakref.WeakKeyDictionary[BaseModel, Hashable] = weakref.WeakKeyDictionary()


class LaidOut(ModelPatcherDynamic):
    """A MODEL whose weights lie in the order in which they are to stay: what is no block's, then the blocks' layers
    by ``leaving_order``, then modulation that is made ahead. Its attachment is (which stay, made ahead or not)."""

    def load(self, device_to: Any = None, *args: Any, **kwargs: Any) -> None:
        """The host's load, after which weights lie in that order, also those that were loaded in another."""
        wanted = self.get_attachment(KEY), device_to
        if _LAYOUTS.get(self.model) != wanted:
            self._forget_places()
            _LAYOUTS[self.model] = wanted
        super().load(device_to, *args, **kwargs)

    def _forget_places(self) -> None:
        self.model.dynamic_vbars.pop(self.load_device, None)
        for module in self.model.modules():
            for name in _PLACE:
                module.__dict__.pop(name, None)

    def _load_list(self, *args: Any, **kwargs: Any) -> list[Any]:
        turns = self._turns()
        # The host sorts it, and reads entries from their end.
        return [(*turns.get(name_of(entry), (0, 0)), *entry) for entry in super()._load_list(*args, **kwargs)]

    def _turns(self) -> dict[str, tuple[int, int]]:
        """By path of a layer: 1 and its turn among the blocks' layers, or 2 for modulation made ahead."""
        order, ahead = self.get_attachment(KEY)
        diffusion_model = self.model.diffusion_model
        blocks = [list(layers.items()) for layers in streamable_layers(diffusion_model, ahead).values()]
        size = comfy.model_management.module_size
        leaving = leaving_order([[size(layer) for _, layer in block] for block in blocks], order)
        turns = {blocks[block][layer][0]: (1, -turn) for turn, (block, layer) in enumerate(leaving)}
        for layers in streamable_layers(diffusion_model, False).values():
            turns.update({path: (2, 0) for path in layers if path not in turns})
        return {f"diffusion_model.{path}": turn for path, turn in turns.items()}


def name_of(entry: tuple[Any, ...]) -> str:
    """The path of the module of an entry of the host's load list, the only text in it."""
    return next(item for item in entry if isinstance(item, str))


def lay_out(model: ModelPatcher, resident: str, ahead: bool) -> None:
    """Have the weights of ``model``, a clone with dynamic VRAM, lie in the order of ``LaidOut``.

    A MODEL of another pack's class manages its memory as it likes, and stays as it is.
    """
    if type(model) is ModelPatcherDynamic:
        model.__class__ = LaidOut
    if type(model) is LaidOut:
        model.set_attachments(KEY, (resident, ahead))


class Kept:
    """What the host keeps on the device of MODELs with dynamic VRAM: no more than ``budget``, and no less than it once
    kept where that much is free."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._most: weakref.WeakKeyDictionary[BaseModel, int] = weakref.WeakKeyDictionary()

    def limit(self, patcher: ModelPatcher) -> None:
        """Bound what is kept of a loaded MODEL, until the host loads it again.

        The host's own bound for it, ``set_watermark_limit``, is a lower bound: below it nothing is ever given up, not
        even when memory has run out.
        """
        vbar = patcher._vbar_get()
        wanted = self._budget.bytes(patcher.model_size())
        if vbar is not None and wanted < vbar.max_size:
            vbar.set_watermark(int(wanted))

    def regain(self, patcher: ModelPatcher) -> None:
        """After a step: let weights come back that were given up while something else had the memory.

        The host's watermark only sinks until it loads the MODEL again, so that it would stream them at each step.
        """
        loaded, vbar = patcher.loaded_size(), patcher._vbar_get()
        seen = self._most[patcher.model] = max(loaded, self._most.get(patcher.model, 0))
        # What streams may be there beside the budget, and is not to stay.
        most = min(seen, self._budget.bytes(patcher.model_size()))
        if vbar is None or most - loaded <= _WORTH_MOVING * most:
            return
        # What PyTorch keeps for the next step's activations is not free for weights.
        free, kept = comfy.model_management.get_free_memory(patcher.load_device, torch_free_too=True)
        if free - kept - comfy.model_management.extra_reserved_memory() < most - loaded:
            return
        log.info("weights that were given up for want of memory come back: %.1f GiB", (most - loaded) / GIB)
        vbar.prioritize()
        self.limit(patcher)
