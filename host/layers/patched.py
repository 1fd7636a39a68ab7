"""LoRAs on quantized weights with dynamic VRAM.

As such a weight arrives on the device, the host adds the LoRA in full precision, multiplies by that, and quantizes it
again where it stays. From then on it multiplies by what is there, as if there were no LoRA.
"""

from __future__ import annotations

import weakref
from typing import Any

from comfy_aimdo.model_vbar import ModelVBAR, vbar_fault, vbar_signature_compare, vbar_unpin

# What the host did not keep whole once. It would again be a matter of the moment which of the weights stay, and of the
# mixture what a block is compiled as.
_STREAMED: weakref.WeakSet[ModelVBAR] = weakref.WeakSet()


def is_patched(layer: Any) -> bool:
    """Whether a LoRA is added to what arrives of ``layer`` on the device."""
    return any(getattr(layer, f"{name}_lowvram_function", None) for name in ("weight", "bias"))


def stays(layer: Any) -> bool:
    """Whether the host keeps on the device what it makes of a patched ``layer``, as all of the model."""
    vbar = layer.__dict__.get("_v", (None,))[0]
    if vbar is not None and vbar.get_watermark() < vbar.get_nr_pages():
        _STREAMED.add(vbar)
    return vbar is not None and vbar not in _STREAMED


def arrives(layer: Any) -> bool:
    """Whether the next use of a patched ``layer`` brings it to the device."""
    held = layer.__dict__
    if "_prefetch" in held:
        return not held["_prefetch"]["resident"]
    signature = vbar_fault(held["_v"])
    if signature is None:
        return True
    vbar_unpin(held["_v"])
    return not vbar_signature_compare(signature, held["_v_signature"])
