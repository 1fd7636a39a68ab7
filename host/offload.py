"""Keep weights of the repeated blocks off the device while a MODEL samples."""

from __future__ import annotations

from typing import Any

import comfy.model_management
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import nn

from .flux import require_blocks
from .models import require_model
from .modulation import ModulationAhead, modulation_layers
from .progress import NodeText
from .weights import class_name

KEY = "hotpath_offload"
MODULATION = ("ahead", "in place")


def offload_repeated_blocks(model: ModelPatcher, modulation: str, text: NodeText) -> ModelPatcher:
    """A clone of ``model`` that keeps weights of its blocks off the device; ``model`` itself stays as it is.

    A later call on the result replaces the settings of an earlier one.

    Args:
        modulation: ``ahead`` makes what the blocks' modulation layers give once for a whole schedule, and leaves their
            weights out of the load; ``in place`` computes them in each block.

    Raises:
        ValueError: ``model`` is no MODEL or has no repeated blocks, its memory is managed by another pack, or
            ``modulation`` is unknown.
    """
    require_model(model)
    if modulation not in MODULATION:
        raise ValueError(f"modulation: {modulation!r} is unknown. Choose one of {', '.join(MODULATION)}.")
    layers = modulation_layers(require_blocks(model, "offload"))
    offloaded = model.clone()
    offloaded.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY)
    for callback in (CallbacksMP.ON_PRE_RUN, CallbacksMP.ON_DETACH):
        offloaded.remove_callbacks_with_key(callback, KEY)
    offloaded.remove_attachments(KEY)
    if type(offloaded) is LeavesOut:
        offloaded.__class__ = ModelPatcher
    if modulation == "ahead":
        _leave_out(offloaded, layers)
        ahead = ModulationAhead(text)
        # Outermost, so that modulation is already given when others look at the blocks.
        others = offloaded.wrappers.get(WrappersMP.APPLY_MODEL, {})
        offloaded.wrappers[WrappersMP.APPLY_MODEL] = {KEY: [ahead], **others}
        offloaded.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, ahead.start)
        offloaded.add_callback_with_key(CallbacksMP.ON_DETACH, KEY, ahead.stop)
    return offloaded


def _leave_out(patcher: ModelPatcher, layers: dict[str, nn.Module]) -> None:
    """Have the host load ``patcher`` without ``layers``."""
    if not layers or patcher.is_dynamic():
        # With dynamic VRAM the host faults in what is used, and these are not.
        return
    if type(patcher) is not ModelPatcher:
        raise ValueError(
            f"model: {class_name(type(patcher))} of another pack manages its memory. Set modulation to 'in place', or "
            "load the model with ComfyUI's own loader."
        )
    patcher.set_attachments(KEY, frozenset(f"diffusion_model.{path}" for path in layers))
    patcher.__class__ = LeavesOut


class LeavesOut(ModelPatcher):
    """A MODEL whose load leaves out the layers that its attachment names.

    To the host they are layers that did not fit: kept on the offload device, pinned where it pins, cast when used. What
    it counts as loaded is what is there.
    """

    _listed: bool = False

    def clone(self, *args: Any, **kwargs: Any) -> ModelPatcher:
        """The host's, whose size is not to be made smaller once more."""
        clone = super().clone(*args, **kwargs)
        clone.size = 0
        return clone

    def model_size(self) -> int:
        """Bytes of what is to be loaded."""
        return super().model_size() - sum(map(comfy.model_management.module_size, self._left_out()))

    def _load_list(self, *args: Any, **kwargs: Any) -> list[Any]:
        left_out = self._names()
        return [entry for entry in super()._load_list(*args, **kwargs) if (entry[-3] in left_out) == self._listed]

    def load(
        self,
        device_to: Any = None,
        lowvram_model_memory: float = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        """The host's load, without the layers. A full load would move them too, so it is one with enough memory."""
        self._unload_left_out()
        super().load(device_to, 1e32 if full_load else lowvram_model_memory, force_patch_weights, full_load=False)
        for layer in self._left_out():
            if not hasattr(layer, "prev_comfy_cast_weights"):
                # Unloaded from where they are, they are as the host has what did not fit.
                layer.comfy_patched_weights = True
                self.model.model_loaded_weight_memory += comfy.model_management.module_size(layer)
        self._unload_left_out()
        # So that the host loads the layers for a clone that wants them.
        self.model.model_lowvram = True

    def partially_load(self, device_to: Any, extra_memory: float = 0, force_patch_weights: bool = False) -> Any:
        """The host's, after unloading what another clone of the model loaded."""
        self._unload_left_out()
        return super().partially_load(device_to, extra_memory, force_patch_weights)

    def _names(self) -> frozenset[str]:
        return self.get_attachment(KEY) or frozenset()

    def _left_out(self) -> list[Any]:
        return [self.get_model_object(name) for name in self._names()]

    def _unload_left_out(self) -> None:
        if any(getattr(layer, "comfy_patched_weights", False) for layer in self._left_out()):
            self._listed = True
            try:
                super().partially_unload(self.offload_device, 1e32)
            finally:
                self._listed = False
