"""Layers of GGUF files, which a pack loads: what they are known by, what they hold, how they compute now.

That pack (ComfyUI-GGUF) keeps a weight as a tensor of a class of its own: raw bytes, with ``tensor_type``,
``tensor_shape`` and the LoRA ``patches`` to apply as attributes. Its layers dequantize it in each call.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Any, NamedTuple

import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn
from torch.func import functional_call

from ...hotpath.ggml import BF16, KINDS, GgmlLinear
from ...hotpath.template import NotHoistable

_LAYER, _PATCHER = "GGMLLayer", "GGUFModelPatcher"
# What a layer or its weight of the form that is known has.
_METHODS = ("cast_bias_weight", "forward_ggml_cast_weights", "forward_comfy_cast_weights", "get_weight")
_FACTS = ("tensor_type", "tensor_shape")
_AS_IT_IS = ("F32", "F16")
_TARGET = "target"


class Gguf(NamedTuple):
    """How a layer with a quantized weight computes now.

    ``kind`` is a name of ``KINDS``, or None where the layer itself is to finish its weight: with LoRAs, or of a type
    that only the package ``gguf`` can read. ``compute`` is the dtype of the arithmetic, None for that of activations.
    """

    kind: str | None
    compute: torch.dtype | None = None


FINISHED = Gguf(None)
# By class: the states in which its layers were seen to compute as the engine does.
_AGREES: weakref.WeakKeyDictionary[type, set[Hashable]] = weakref.WeakKeyDictionary()


def is_gguf_layer(kind: type) -> bool:
    """Whether layers of this class hold weights of GGUF files."""
    return any(base.__name__ == _LAYER for base in kind.__mro__)


def is_gguf_patcher(kind: type[ModelPatcher]) -> bool:
    """Whether this is the class of MODELs of GGUF files."""
    return kind.__name__ == _PATCHER


def gguf_type(tensor: Any) -> str:
    """The name of the type that a weight is kept in; F32 for what is no tensor of a GGUF file."""
    kind = getattr(tensor, "tensor_type", None)
    return "F32" if kind is None else getattr(kind, "name", str(kind))


def gguf_state(layer: Any) -> Gguf | None:
    """How ``layer`` computes now; None where its weights are floats, which the host casts."""
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    kind = gguf_type(weight)
    if kind in _AS_IT_IS and gguf_type(bias) in _AS_IT_IS:
        return None
    patched = getattr(weight, "patches", None) or getattr(bias, "patches", None)
    if patched or kind not in KINDS or gguf_type(bias) not in _AS_IT_IS or not isinstance(layer, nn.Linear):
        return FINISHED
    compute: Any = layer.dequant_dtype
    return Gguf(kind, None if compute == _TARGET else compute or torch.float16)


def refuse_unknown_form(kind: Any, base: type, name: str) -> None:
    """Raise NotHoistable for a class of GGUF layers, called ``name``, that is not made as the one that is known."""
    host: Any = getattr(comfy.ops.disable_weight_init, base.__name__)
    missing = [method for method in _METHODS if not callable(getattr(kind, method, None))]
    if missing or not hasattr(kind, "dequant_dtype"):
        raise NotHoistable(
            f"{name} is a GGUF layer of another form than HotPath knows: it has no {(*missing, 'dequant_dtype')[0]}"
        )
    if not issubclass(kind, host) or kind.forward is not host.forward:
        raise NotHoistable(f"{name} is a GGUF layer of another form than HotPath knows: it overrides forward")


def gguf_linear(layer: Any) -> GgmlLinear | None:
    """The layer with the same maths as a GGUF Linear, on the meta device; None where it multiplies by floats.

    Raises:
        NotHoistable: its weight is not as such layers have it.
    """
    state = gguf_state(layer)
    if state is None or state.kind is None:
        return None
    kind, shape = KINDS[state.kind], (layer.out_features, layer.in_features)
    missing = next((fact for fact in _FACTS if not hasattr(layer.weight, fact)), None)
    packed = plain(layer.weight).nbytes * kind.BLOCK == shape[0] * shape[1] * kind.BYTES
    if missing or tuple(layer.weight.tensor_shape) != shape or not packed:
        raise NotHoistable(f"a GGUF weight in {state.kind} has no {missing or f'shape {shape}'}")
    return kind(*shape, None if layer.bias is None else layer.bias.dtype, state.compute)


def gguf_weights(layer: Any, state: Gguf, like: Tensor) -> dict[str, Tensor]:
    """The tensors of ``layer`` by the names of the parameters of its plain layer, for activations like ``like``.

    Raises:
        NotHoistable: the layer computes something else from its weight than the engine would.
    """
    if state.kind is None:
        weight, bias = layer.cast_bias_weight(like)
        tensors = {"weight": weight, "bias": bias}
        return {name: plain(tensor) for name, tensor in tensors.items() if tensor is not None}
    tensors = _tensors(layer, state.kind, like.device)
    known = _AGREES.setdefault(type(layer), set())
    how = state, like.dtype, like.device.type
    if how not in known:
        _refuse_other_maths(layer, tensors, like)
        known.add(how)
    return tensors


def plain(tensor: Tensor) -> Tensor:
    """The memory of ``tensor`` as a tensor of PyTorch's own class, which no operation on a
    GGUF file's tensor returns."""
    if type(tensor) in (Tensor, nn.Parameter):
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return Tensor.detach(tensor).as_subclass(Tensor)


def moved(parameter: nn.Parameter, data: Tensor) -> nn.Parameter:
    """``parameter`` of a GGUF layer over ``data``, the same bytes elsewhere."""
    twin = data.as_subclass(type(parameter))
    vars(twin).update(vars(parameter))
    return nn.Parameter(twin, requires_grad=False)


def take_patches(twin: nn.Parameter, parameter: nn.Parameter) -> None:
    """Give what ``moved`` made of ``parameter`` the LoRAs that it has now."""
    if "patches" in vars(parameter):
        vars(twin)["patches"] = vars(parameter)["patches"]


def patch_left_out(patcher: ModelPatcher, path: str, layer: Any) -> None:
    """Put LoRAs on a layer that the host's load left out, as the pack does on all that it loads: in a weight function,
    where the host has them else, such a layer would not look for them."""
    if not is_gguf_layer(type(layer)) or gguf_state(layer) is None:
        return
    if f"{path}.weight" in patcher.patches:
        patcher.patch_weight_to_device(f"{path}.weight")
    if f"{path}.bias" in patcher.patches and f"{path}.bias" not in patcher.backup:
        patcher.patch_weight_to_device(f"{path}.bias")


def _tensors(layer: Any, kind: str, device: torch.device) -> dict[str, Tensor]:
    data = plain(layer.weight).to(device).view(torch.uint8).reshape(layer.out_features, -1)
    if KINDS[kind] is BF16:
        tensors = {"weight": data.view(torch.bfloat16)}
    else:
        tensors = {"weight": data, "halves": data.view(torch.float16)}
    if layer.bias is not None:
        tensors["bias"] = plain(layer.bias).to(device)
    return tensors


def _refuse_other_maths(layer: Any, tensors: dict[str, Tensor], like: Tensor) -> None:
    """Raise NotHoistable where ``layer`` itself gives another bit than its plain layer for a row of noise.

    Its dequantization is another pack's, of which there are forks: that it has the same names says little.
    """
    noise = torch.randn(1, layer.in_features, generator=torch.Generator().manual_seed(0))
    row = noise.to(like.device, like.dtype)
    ours: Any = gguf_linear(layer)
    want, got = layer.forward_comfy_cast_weights(row), functional_call(ours, tensors, (row,))
    if not torch.equal(plain(want), got):
        name = f"{type(layer).__qualname__} of another pack"
        raise NotHoistable(f"{name} computes something else from a weight in {gguf_type(layer.weight)} than HotPath")
