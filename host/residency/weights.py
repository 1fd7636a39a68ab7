"""A block's weights wherever the host keeps them: resident, cast on the fly, patched by a LoRA, dynamic VRAM."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import PureWindowsPath
from typing import Any

import comfy.model_management
import comfy.model_prefetch
import comfy.ops
import comfy.quant_ops
import torch
from torch import Tensor, nn
from torch.nn import LayerNorm, Linear, RMSNorm

from ...hotpath.gelu import LogisticGelu
from ...hotpath.template import OWNED, NotHoistable, PlainLayer, own_bases
from ...hotpath.values import plain_tensor
from ..layers.bypass import bypass_weights
from ..layers.containers import HostsAttention, container_state, is_container, is_preference, preferred_attention
from ..layers.gguf import Gguf, gguf_linear, gguf_state, gguf_weights, is_gguf_layer, plain, refuse_unknown_form
from ..layers.quantized import (
    format_in_use,
    quantized_layer,
    quantized_weights,
    quantizes_activations_itself,
    refuse_arriving,
    state_in_use,
)

# The state of a mixed precision Linear that computes in no quantized format.
_CAST = "cast"
_MIXED_PRECISION_LINEAR = "mixed_precision_ops.<locals>.MixedPrecisionOps.Linear"


def plain_layer(module: Any, fuses: bool = False, preferred: nn.Module | None = None) -> nn.Module | None:
    """The layer with the same maths as a host layer, on the meta device; None for a container.

    ``fuses``: it is for a compiler that makes one kernel of many elementwise operations. ``preferred``: the block's
    ``preferred_attention``, whose function runs outside of the region.

    Raises:
        NotHoistable: the class is foreign, or its forward is not the one it was defined with.
    """
    kind = type(module)
    refuse_replaced_forward(kind)
    if _is_mixed_precision_linear(kind):
        if getattr(module, "pre_quant_scale", None) is not None:
            raise NotHoistable(f"a layer smooths its activations before it computes in {module.quant_format}")
        return _linear(module) if format_in_use(module) is None else quantized_layer(module)
    if fuses and kind is nn.GELU and module.approximate == "tanh":
        return LogisticGelu()
    base = next((known for known in (Linear, LayerNorm, RMSNorm) if issubclass(kind, known)), None)
    if base is None:
        if is_preference(module) and (module.function is None or module is preferred):
            return HostsAttention()
        if is_container(kind):
            return None
        raise NotHoistable(f"{class_name(kind)} is not a layer that HotPath knows")
    if is_gguf_layer(kind):
        refuse_unknown_form(kind, base, class_name(kind))
        dequantizes = gguf_linear(module) if base is Linear else None
        if dequantizes is not None:
            return dequantizes
    elif kind is not base and not _casts_like_the_host(kind, base):
        raise NotHoistable(f"{class_name(kind)} does not compute like torch.nn.{base.__name__}")
    if base is Linear:
        return _linear(module)
    if base is LayerNorm:
        affine, bias = module.elementwise_affine, module.bias is not None
        return _marked(LayerNorm(module.normalized_shape, module.eps, affine, bias, device="meta"))
    plain = RMSNorm(module.normalized_shape, module.eps, module.elementwise_affine, device="meta")
    plain.register_parameter("bias", None)
    return _marked(plain)


def plain_layers(block: nn.Module, fuses: bool) -> PlainLayer:
    """``plain_layer`` for the modules of ``block``."""
    return functools.partial(plain_layer, fuses=fuses, preferred=preferred_attention(block))


def layer_states(kind: type) -> Callable[[Any], Hashable] | None:
    """What tells how a layer of this class computes now, where that may change without it changing: in which quantized
    format, or with a weight that the host casts; the plain state of a module that this pack doesn't know."""
    if is_gguf_layer(kind):
        return lambda layer: gguf_state(layer) or _CAST
    if _is_mixed_precision_linear(kind):
        return lambda layer: state_in_use(layer) or _CAST
    return None if issubclass(kind, (Linear, LayerNorm, RMSNorm)) else container_state(kind)


def class_name(kind: type) -> str:
    """A class with its module; the host names a pack's module by its whole path, of which the folder is enough."""
    return f"{PureWindowsPath(kind.__module__).name}.{kind.__qualname__}"


def refuse_replaced_forward(kind: type) -> None:
    """Raise NotHoistable for a class whose forward is not code of the file that defines it."""
    # One may call that of a base.
    for owner in own_bases(kind):
        if "forward" in vars(owner):
            code = getattr(vars(owner)["forward"], "__code__", None)
            if code is None or code.co_filename != sys.modules[owner.__module__].__file__:
                raise NotHoistable(f"the forward of {class_name(kind)} was replaced")


# What classes of tensors have that compute as any tensor does, such as parameters.
_AS_TENSORS = {
    "__torch_function__": torch._C._disabled_torch_function_impl,
    "__torch_dispatch__": torch._C._disabled_torch_dispatch_impl,
}

Layers = Sequence[tuple[str, nn.Module, Hashable]]
"""Layers of a block that hold weights: path, layer, and its state as ``layer_states`` tells it."""


Arriving = Callable[[Sequence[nn.Module], torch.device], AbstractContextManager[bool]]
"""Brings weights of layers that the host left in RAM to a device; see ``arriving.Arrivals``."""


def in_place(layers: Layers, like: Tensor, arriving: Arriving) -> AbstractContextManager[bool]:
    """A scope in which the ``block_weights`` of ``layers`` stay valid on ``like``'s device; whether any of them are
    there for its length alone.

    Raises:
        NotHoistable: the host computes with them in another way in this very call.
    """
    if like.is_cpu:
        return nullcontext(False)
    for _, layer, state in layers:
        refuse_arriving(layer, state)
    dynamic = [layer for _, layer, _ in layers if "_v" in layer.__dict__]
    if not dynamic:
        return arriving([layer for _, layer, _ in layers], like.device)
    missing = [layer for layer in dynamic if "_prefetch" not in layer.__dict__]
    return _faulted_in(missing, like.device) if missing else nullcontext(False)


def is_away(layer: nn.Module, device: torch.device) -> bool:
    """Whether the host has to copy weights of ``layer``, in use on ``device``, there each time they are used."""
    prefetch = layer.__dict__.get("_prefetch")
    if prefetch is not None:
        return prefetch["signature"] is None
    return any(value is not None and value.device != device for value in layer._parameters.values())


def block_weights(layers: Layers, like: Tensor) -> dict[str, Tensor]:
    """The weights of ``layers`` as the host would use them now, by parameter path.

    They are on ``like``'s device and, where the host casts, in its dtype, with all weight functions (LoRA in
    low VRAM mode, wrappers) applied.

    Quantized layers give their data and scales.

    Raises:
        NotHoistable: the host would not use a quantized weight as it is kept or as the layer asks.
    """
    weights = {}
    for path, layer, state in layers:
        if state == OWNED:
            own = {name: value for name, value in layer._parameters.items() if value is not None}
            weights.update({f"{path}.{name}".lstrip("."): _as_loaded(value, like) for name, value in own.items()})
            continue
        if "forward" in layer.__dict__:
            path, added = bypass_weights(path, layer, like)
            weights.update({name: plain_tensor(tensor) for name, tensor in added.items()})
        if state is not None and state != _CAST:
            if isinstance(state, Gguf):
                tensors = gguf_weights(layer, state, like)
            else:
                tensors = quantized_weights(layer, state, like)
            weights.update({f"{path}.{name}": plain_tensor(tensor) for name, tensor in tensors.items()})
            continue
        weight, bias = _weight_and_bias(layer, like, state == _CAST)
        for tensor in (weight, bias):
            if tensor is not None and _computes_itself(type(tensor)) and not is_gguf_layer(type(layer)):
                raise NotHoistable(f"{path} has a weight of {class_name(type(tensor))}, which computes in its own way")
        if weight is not None:
            weights[f"{path}.weight"] = plain_tensor(plain(weight))
        if bias is not None:
            weights[f"{path}.bias"] = plain_tensor(plain(bias))
    return weights


@contextmanager
def _faulted_in(layers: Sequence[nn.Module], device: torch.device) -> Iterator[bool]:
    """Keep the dynamic VRAM weights of a whole block in place until the block has run.

    Casting layer by layer would let the host reuse one layer's cast buffer for the next, since in eager mode a
    layer is done with its weights before the next one starts. The host's prefetch takes a block at a time.
    """
    queue = [None, nn.ModuleList(layers), None]
    comfy.model_prefetch.PREFETCH_QUEUES.append(queue)
    comfy.model_prefetch.prefetch_queue_pop(queue, device, None)
    try:
        yield False
    finally:
        comfy.model_prefetch.prefetch_queue_pop(queue, device, None)
        comfy.model_prefetch.PREFETCH_QUEUES.remove(queue)


def _weight_and_bias(layer: Any, like: Tensor, cast: bool) -> tuple[Tensor | None, Tensor | None]:
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if weight is None or not (cast or _host_casts(layer)):
        return weight, bias
    weight, bias = comfy.ops.cast_bias_weight(layer, like)
    if isinstance(weight, comfy.quant_ops.QuantizedTensor):
        if quantizes_activations_itself(layer):
            raise NotHoistable(f"this ComfyUI multiplies in {layer.quant_format} where full precision is asked for")
        weight = weight.dequantize()
    return weight, bias


@functools.cache
def _computes_itself(kind: type) -> bool:
    bases = kind.__mro__[: kind.__mro__.index(Tensor)]
    return any(vars(base).get(name, plain) is not plain for base in bases for name, plain in _AS_TENSORS.items())


def _as_loaded(parameter: Tensor, like: Tensor) -> Tensor:
    """A parameter outside of layers, which the host keeps where it loaded it and casts where it is read."""
    return plain_tensor(parameter.to(like.device))


def _host_casts(layer: Any) -> bool:
    return isinstance(layer, comfy.ops.CastWeightBiasOp) and bool(
        layer.comfy_cast_weights or layer.weight_function or layer.bias_function
    )


def _is_mixed_precision_linear(kind: type) -> bool:
    return kind.__module__ == comfy.ops.__name__ and kind.__qualname__ == _MIXED_PRECISION_LINEAR


def _casts_like_the_host(kind: Any, base: type) -> bool:
    """Whether ``kind`` is the host's layer with its plain maths: not its fp8 matmul, not a class of another pack."""
    host = getattr(comfy.ops.disable_weight_init, base.__name__)
    return (
        issubclass(kind, host)
        and kind.forward is host.forward
        and kind.forward_comfy_cast_weights is host.forward_comfy_cast_weights
    )


def _linear(module: Any) -> nn.Module:
    return _marked(Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta"))


def _marked(plain: Any) -> nn.Module:
    """``plain`` with what the host's own code asks of a layer whose weight it reads from outside."""
    plain.comfy_cast_weights, plain.weight_function, plain.bias_function = False, (), ()
    return plain
