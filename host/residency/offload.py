"""Keep weights of the repeated blocks off the device while a MODEL samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import comfy.model_management
from comfy.model_patcher import LowVramPatch, ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import nn

from ...hotpath.stream import resident_blocks
from ..families import require_family
from ..layers.gguf import is_gguf_patcher, patch_left_out
from ..models import require_model
from ..telling.progress import NodeText, PartText
from . import dynamic_vram
from .budget import Budget
from .modulation import ModulationAhead, modulation_layers, with_given
from .streaming import RESIDENCY, Residency, StreamedBlocks, pinned_copies, streamable_layers
from .weights import class_name

KEY = "hotpath_offload"
MODULATION = ("ahead", "in place")
_EVERYTHING = 1e32


@dataclass(frozen=True)
class OffloadSettings:
    """What Offload Repeated Blocks keeps off the device.

    Attributes:
        budget: ``auto`` leaves in RAM what doesn't fit into the memory that the host has free for this size of image; a
            number of GiB, or a share of the MODEL such as ``50 %``, keeps less on the device.
        prefetch_blocks: how many blocks arrive ahead of the one that computes; each takes a slot on the device, and the
            one that computes another.
        pin_memory: copy what is streamed into pinned RAM once, from where it is moved at the full speed of the bus.
        modulation: ``ahead`` makes what the blocks' modulation layers give once for a whole schedule, and leaves their
            weights out of the load; ``in place`` computes them in each block.
        resident: which blocks stay, ``spread``, ``first`` or ``last``; see ``hotpath.stream.resident_blocks``.
    """

    budget: str = "auto"
    prefetch_blocks: int = 1
    pin_memory: bool = True
    modulation: str = "ahead"
    resident: str = "spread"

    def __post_init__(self) -> None:
        Budget.parse(self.budget)
        resident_blocks([], 0, self.resident)
        if self.modulation not in MODULATION:
            raise ValueError(f"modulation: {self.modulation!r} is unknown. Choose one of {', '.join(MODULATION)}.")
        if not isinstance(self.prefetch_blocks, int) or not 0 <= self.prefetch_blocks <= 8:
            raise ValueError(f"prefetch_blocks: {self.prefetch_blocks!r} is out of range. Choose a number from 0 to 8.")


def offload_repeated_blocks(model: ModelPatcher, settings: OffloadSettings, text: NodeText) -> ModelPatcher:
    """A clone of ``model`` that keeps weights of its blocks off the device; ``model`` itself stays as it is.

    A later call on the result replaces the settings of an earlier one.

    Raises:
        ValueError: ``model`` is no MODEL or has no repeated blocks, or its memory is managed by another pack.
    """
    require_model(model)
    require_family(model, "offload")
    offloaded = model.clone()
    offloaded.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY)
    for callback in (CallbacksMP.ON_PRE_RUN, CallbacksMP.ON_DETACH, CallbacksMP.ON_CLEANUP):
        offloaded.remove_callbacks_with_key(callback, KEY)
    offloaded.remove_attachments(KEY)
    offloaded.__class__ = _loads_all(type(offloaded))
    parts: dict[str, str] = {}
    ahead = settings.modulation == "ahead"
    streamed = StreamedBlocks(PartText(text.node_id, "blocks", parts, text), settings.prefetch_blocks, ahead)
    mine: list[Any] = [streamed]
    if ahead:
        made = ModulationAhead(PartText(text.node_id, "modulation", parts, text))
        mine.append(made)
        offloaded.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, made.start)
        offloaded.add_callback_with_key(CallbacksMP.ON_DETACH, KEY, made.stop)
    for callback in (CallbacksMP.ON_CLEANUP, CallbacksMP.ON_DETACH):
        offloaded.add_callback_with_key(callback, KEY, streamed.stop)
    offloaded.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, streamed.start)
    # Outermost, so that modulation is already given, and weights arrive, when others look at the blocks.
    others = offloaded.wrappers.get(WrappersMP.APPLY_MODEL, {})
    offloaded.wrappers[WrappersMP.APPLY_MODEL] = {KEY: mine, **others}
    if offloaded.is_dynamic():
        # The host brings what is used and not there while the block before computes.
        dynamic_vram.lay_out(offloaded, settings.resident, ahead)
        kept = dynamic_vram.Kept(Budget.parse(settings.budget))
        offloaded.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, kept.limit)
        streamed.after_step = kept.regain
        return offloaded
    if type(offloaded) is not ModelPatcher and not is_gguf_patcher(type(offloaded)):
        raise ValueError(
            f"model: {class_name(type(offloaded))} of another pack manages its memory. Load the model with ComfyUI's "
            "own loader, or remove this node."
        )
    offloaded.set_attachments(KEY, settings)
    kind: Any = type(offloaded)
    offloaded.__class__ = _leaves_out(kind)
    return offloaded


def as_it_runs(block: nn.Module, model: ModelPatcher) -> nn.Module:
    """What stands for a block of ``model`` as it is in a run, where this node is on the MODEL; else the block.

    Raises:
        NotHoistable: it can't be told.
    """
    wrappers = model.get_wrappers(WrappersMP.APPLY_MODEL, KEY)
    ahead = any(isinstance(wrapper, ModulationAhead) for wrapper in wrappers)
    return with_given(block, model) if ahead else block


def _loads_all(kind: type[ModelPatcher]) -> type[ModelPatcher]:
    """The class that a MODEL had before it left out anything."""
    return next(base for base in kind.__mro__ if not issubclass(base, LeavesOut))


@cache
def _leaves_out(kind: Any) -> type[LeavesOut]:
    """``LeavesOut`` for MODELs of ``kind``."""
    return LeavesOut if kind is ModelPatcher else type(LeavesOut.__name__, (LeavesOut, kind), {})


class LeavesOut(ModelPatcher):
    """A MODEL whose load leaves out layers as its attachment, an ``OffloadSettings``, says: those of modulation that is
    made ahead, and those of the blocks that don't fit into the budget or the memory that is free.

    To the host they are layers that did not fit: kept on the offload device, cast when used. What it counts as loaded
    is what is there.
    """

    _listed: bool = False
    _counting: bool = False

    def clone(self, *args: Any, **kwargs: Any) -> ModelPatcher:
        """The host's, without subtracting from its size once more."""
        clone = super().clone(*args, **kwargs)
        # GGUF's gives its own class.
        clone.__class__ = type(self)
        clone.size = 0
        return clone

    def model_size(self) -> int:
        """Bytes of what is to be loaded where memory allows."""
        sizes = self._block_sizes()
        fixed = self._fixed_bytes(sizes)
        stay = resident_blocks(list(sizes.values()), self._blocks_budget(fixed), self._settings.resident)
        return fixed + sum(size for turn, size in enumerate(sizes.values()) if turn in stay)

    def _load_list(self, *args: Any, **kwargs: Any) -> list[Any]:
        left_out = self._left_out()
        entries = super()._load_list(*args, **kwargs)
        return [entry for entry in entries if (dynamic_vram.name_of(entry) in left_out) == self._listed]

    def load(
        self,
        device_to: Any = None,
        lowvram_model_memory: float = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        """The host's load, without the layers. A full load would move them too, so it is one with enough memory."""
        rest = self._choose(_EVERYTHING if full_load else lowvram_model_memory)
        self._unload_left_out()
        layers = self._left_out()
        super().load(device_to, lowvram_model_memory=rest, force_patch_weights=force_patch_weights, full_load=False)
        for layer in layers.values():
            layer.comfy_force_cast_weights = self.force_cast_weights
            if not hasattr(layer, "prev_comfy_cast_weights"):
                # Unloaded from where they are, as the host leaves what did not fit.
                layer.comfy_patched_weights = True
                # It appends to lists that its load has made; until then they are the class's, of all its layers.
                layer.weight_function, layer.bias_function = [], []
                self.model.model_loaded_weight_memory += comfy.model_management.module_size(layer)
        self._unload_left_out()
        for path, layer in layers.items():
            patch_left_out(self, path, layer)
        # Not before: what GGUF's load moves once, to leave the file, would no longer be what is pinned.
        if self._settings.pin_memory:
            self._pin()
        # So that the host loads the layers for a clone that wants them.
        self.model.model_lowvram = True

    def loaded_size(self) -> int:
        """Bytes of what is on the device.

        The host's own count of them is for clones without this node and says 0: such a clone loads layers in another
        order, up to what is counted and what is free, beside those that are there.
        """
        size = comfy.model_management.module_size
        layers = self.model.modules()
        return sum(size(layer) for layer in layers if getattr(layer, "comfy_patched_weights", False))

    def partially_load(self, device_to: Any, extra_memory: float = 0, force_patch_weights: bool = False) -> Any:
        """The host's, after unloading what another clone of the model, or this one with more memory, loaded."""
        with self._counted():
            loaded = self.loaded_size()
            self._choose(loaded + extra_memory)
            self._unload_left_out()
            return super().partially_load(device_to, extra_memory + loaded - self.loaded_size(), force_patch_weights)

    def partially_unload(self, *args: Any, **kwargs: Any) -> Any:
        """The host's."""
        with self._counted():
            return super().partially_unload(*args, **kwargs)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """A scope in which the host's count of what is loaded is right."""
        if self._counting:
            yield
            return
        self._counting = True
        self.model.model_loaded_weight_memory = self.loaded_size()
        try:
            yield
        finally:
            self._counting = False
            self.model.model_loaded_weight_memory = 0

    def pin_weight_to_device(self, key: str) -> None:
        """The host's, but for blocks that are pinned as a whole or are not to be."""
        if key.rpartition(".")[0] not in self._streamed():
            super().pin_weight_to_device(key)

    @property
    def _settings(self) -> OffloadSettings:
        settings: OffloadSettings = self.get_attachment(KEY)
        return settings

    @property
    def _ahead(self) -> bool:
        return self._settings.modulation == "ahead"

    def _modulation(self) -> dict[str, Any]:
        """The layers of modulation made ahead, by their path in the model."""
        layers = modulation_layers(self.model.diffusion_model) if self._ahead else {}
        return {f"diffusion_model.{path}": layer for path, layer in layers.items()}

    def _streamed(self) -> dict[str, Any]:
        """The layers of blocks that are streamed, by their path in the model."""
        residency = RESIDENCY.get(self.model)
        if residency is None or not residency.streamed:
            return {}
        blocks = streamable_layers(self.model.diffusion_model, self._ahead)
        return {f"diffusion_model.{path}": layer for name in residency.streamed for path, layer in blocks[name].items()}

    def _left_out(self) -> dict[str, Any]:
        return {**self._modulation(), **self._streamed()}

    def _block_sizes(self) -> dict[str, int]:
        size = comfy.model_management.module_size
        blocks = streamable_layers(self.model.diffusion_model, self._ahead)
        return {path: sum(map(size, layers.values())) for path, layers in blocks.items()}

    def _fixed_bytes(self, sizes: Mapping[str, int]) -> int:
        """Bytes of what is always loaded, beside blocks of ``sizes``."""
        without = sum(map(comfy.model_management.module_size, self._modulation().values()))
        return super().model_size() - without - sum(sizes.values())

    def _blocks_budget(self, fixed: int) -> float:
        """Bytes of blocks that the settings allow on the device beside ``fixed``."""
        return Budget.parse(self._settings.budget).bytes(super().model_size()) - fixed

    def _choose(self, memory: float) -> float:
        """Choose the blocks to stream when ``memory`` bytes are free; gives the bytes for all that is loaded."""
        sizes = self._block_sizes()
        fixed = self._fixed_bytes(sizes)
        largest, budget = max(sizes.values()), self._blocks_budget(fixed)
        slots = 0
        if min(budget, memory - fixed) < sum(sizes.values()):
            slots = largest * (self._settings.prefetch_blocks + 1)
            budget = min(budget, memory - fixed - slots)
        stay = resident_blocks(list(sizes.values()), budget, self._settings.resident)
        streamed = tuple(path for turn, path in enumerate(sizes) if turn not in stay and sizes[path])
        streamed_bytes = sum(sizes[path] for path in streamed)
        resident = fixed + sum(sizes.values()) - streamed_bytes
        chosen = Residency(streamed, len(sizes), resident, streamed_bytes)
        if RESIDENCY.get(self.model) != chosen:
            RESIDENCY[self.model] = chosen
        return _EVERYTHING if resident + slots <= memory else max(memory - slots, 0.1)

    def _pin(self) -> None:
        copies = pinned_copies(self.model)
        blocks = streamable_layers(self.model.diffusion_model, self._ahead)
        for path in RESIDENCY[self.model].streamed:
            # Memory that is freed while it is pinned is copied to and from wrongly, if at all, once it is used again.
            for layer in blocks[path]:
                self.unpin_weight(f"diffusion_model.{layer}.weight")
                self.unpin_weight(f"diffusion_model.{layer}.bias")
            copies.hold(path, list(blocks[path].values()))

    def _unload_left_out(self) -> None:
        layers = self._left_out()
        loaded = {path: layer for path, layer in layers.items() if getattr(layer, "comfy_patched_weights", False)}
        if not loaded:
            return
        self._listed = True
        try:
            super().partially_unload(self.offload_device, _EVERYTHING)
        finally:
            self._listed = False
        for path, layer in loaded.items():
            for name in ("weight", "bias"):
                loras = [
                    function for function in getattr(layer, f"{name}_function") if isinstance(function, LowVramPatch)
                ]
                setattr(layer, f"{name}_function", [*loras, *self.weight_wrapper_patches.get(f"{path}.{name}", ())])
