"""A small stand-in for the pack that loads GGUF files, ComfyUI-GGUF, whose code is not here.

Its layers, tensors and MODEL have the facts that HotPath knows that pack's by, traps included: a tensor whose ``shape``
is not that of its memory and whose ``detach`` and ``clone`` give itself, LoRAs as ``patches`` that are applied in each
call, a MODEL of a class of its own. Tests and the GPU benchmark run it where ``HOTPATH_GGUF`` does not name a folder
that holds the real one. Its dequantization is that of ``hotpath.ggml``, run eager, which other tests compare with the
package ``gguf``.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import comfy.lora
import comfy.ops
import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from hotpath_pack.hotpath.ggml import KINDS
from torch import Tensor, nn

FOLDER = "HOTPATH_GGUF"
_FLOATS = (None, "F32", "F16")
# Made here, so that a compiler that traces a layer finds no module being made.
_FORMATS = {name: kind(1, kind.BLOCK, None, None) for name, kind in KINDS.items()}
# By which factor of a block's scale its minimum makes the mean of random bits zero.
_MINIMA = {"Q4_1": -7.5, "Q5_1": -15.5, "Q4_K": 7.5, "Q5_K": 15.5, "Q2_K": 1.5}


class GGMLType(NamedTuple):
    """A type of ggml, such as ``Q4_K``, as the package ``gguf`` has it in an enumeration."""

    name: str


def _quantized(tensor: Any) -> bool:
    kind = getattr(tensor, "tensor_type", None)
    return kind is not None and kind.name not in _FLOATS


class GGMLTensor(Tensor):
    """Bytes of a weight."""

    tensor_type: GGMLType
    tensor_shape: torch.Size
    patches: list[Any]

    @staticmethod
    def of(data: Tensor, kind: str, shape: tuple[int, ...]) -> GGMLTensor:
        tensor: Any = data.as_subclass(GGMLTensor)
        tensor.tensor_type, tensor.tensor_shape, tensor.patches = GGMLType(kind), torch.Size(shape), []
        return tensor

    def to(self, *args: Any, **kwargs: Any) -> Any:
        moved: Any = super().to(*args, **kwargs)
        for name in ("tensor_type", "tensor_shape"):
            if hasattr(self, name):
                setattr(moved, name, getattr(self, name))
        moved.patches = list(getattr(self, "patches", []))
        return moved

    def detach(self) -> Any:
        return self

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        return self

    @property
    def shape(self) -> Any:  # type: ignore[override]
        return self.tensor_shape if hasattr(self, "tensor_shape") else self.size()


class GGMLLayer(nn.Module):
    """A layer that dequantizes its weight in each call."""

    comfy_cast_weights = True
    dequant_dtype: Any = None
    patch_dtype: Any = None
    weight: Any
    bias: Any

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        for name in ("weight", "bias"):
            value = state.get(f"{prefix}{name}")
            if value is not None:
                setattr(self, name, nn.Parameter(value, requires_grad=False))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # Of the host's counting of bytes alone.
        for name, parameter in self._parameters.items():
            if parameter is not None:
                destination[prefix + name] = torch.zeros_like(parameter, device="meta")

    def get_weight(self, tensor: Any, dtype: torch.dtype) -> Any:
        kind: Any = getattr(tensor, "tensor_type", None)
        with torch._C.DisableTorchFunctionSubclass():
            data = Tensor.detach(tensor).as_subclass(Tensor)
        quantized = _quantized(tensor)
        weight = self._dequantized(kind.name, data, tensor.shape, dtype) if quantized else data.to(dtype)
        for patches, key in getattr(tensor, "patches", []):
            loras = [tuple(_moved(item, data.device) for item in patch) for patch in patches]
            intermediate = {} if self.patch_dtype is None else {"intermediate_dtype": self.patch_dtype}
            weight = comfy.lora.calculate_weight(loras, weight, key, **intermediate)
        return weight

    def _dequantized(self, kind: str, data: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if kind == "BF16":
            return data.view(torch.bfloat16).to(dtype)
        compute = dtype if self.dequant_dtype == "target" else self.dequant_dtype or torch.float16
        layer = _FORMATS[kind]
        blocks, halves = data.reshape(-1, layer.BYTES), data.view(torch.float16).reshape(-1, layer.BYTES // 2)
        return layer._values(blocks, halves, compute).reshape(tuple(shape)).to(dtype)

    def cast_bias_weight(self, input: Tensor) -> tuple[Any, Any]:
        bias = None if self.bias is None else self.get_weight(self.bias.to(input.device), input.dtype)
        return self.get_weight(self.weight.to(input.device), input.dtype), bias

    def forward_comfy_cast_weights(self, input: Any) -> Any:
        if _quantized(self.weight) or _quantized(self.bias):
            return self.forward_ggml_cast_weights(input)
        out = super().forward_comfy_cast_weights(input)  # type: ignore[misc]
        return out.as_subclass(Tensor)

    def forward_ggml_cast_weights(self, input: Tensor) -> Tensor:
        raise NotImplementedError


def _moved(item: Any, device: torch.device) -> Any:
    if isinstance(item, (tuple, list)):
        return type(item)(_moved(inner, device) for inner in item)
    return item.to(device) if isinstance(item, Tensor) else item


class GGMLOps(comfy.ops.manual_cast):
    """The host's layers over GGUF weights."""

    class Linear(GGMLLayer, comfy.ops.manual_cast.Linear):
        def __init__(self, in_features: int, out_features: int, *_: Any, **__: Any) -> None:
            nn.Module.__init__(self)
            self.in_features, self.out_features = in_features, out_features
            self.weight = self.bias = None

        def forward_ggml_cast_weights(self, input: Tensor) -> Tensor:
            return nn.functional.linear(input, *self.cast_bias_weight(input))

    class LayerNorm(GGMLLayer, comfy.ops.manual_cast.LayerNorm):
        normalized_shape: Any
        eps: Any

        def forward_ggml_cast_weights(self, input: Tensor) -> Tensor:
            return nn.functional.layer_norm(input, self.normalized_shape, *self.cast_bias_weight(input), self.eps)


class GGUFModelPatcher(ModelPatcher):
    """A MODEL whose LoRAs are attributes of the weights."""

    def patch_weight_to_device(self, key: str, device_to: Any = None, inplace_update: bool = False) -> None:
        weight = comfy.utils.get_attr(self.model, key)
        if key not in self.patches or not _quantized(weight):
            super().patch_weight_to_device(key, device_to, inplace_update)
            return
        moved = weight.to(device_to)
        moved.patches = [(self.patches[key], key)]
        comfy.utils.set_attr_param(self.model, key, moved)

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
        for parameter in self.model.parameters() if unpatch_weights else ():
            if _quantized(parameter):
                parameter.patches = []
        super().unpatch_model(device_to=device_to, unpatch_weights=unpatch_weights)

    def load(self, *args: Any, force_patch_weights: bool = False, **kwargs: Any) -> None:
        super().load(*args, force_patch_weights=True, **kwargs)

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        mine = self.__class__
        self.__class__ = GGUFModelPatcher
        clone = super().clone(*args, **kwargs)
        self.__class__ = mine
        clone.__class__ = GGUFModelPatcher
        if mine is not GGUFModelPatcher:
            clone.size = 0
        return clone


class Pack(NamedTuple):
    """What is used of a pack that loads GGUF files."""

    tensor: Callable[[Tensor, str, tuple[int, ...]], Tensor]
    ops: type
    patcher: Any


def stand_in() -> Pack:
    return Pack(GGMLTensor.of, GGMLOps, GGUFModelPatcher)


def pack_name() -> str:
    """Of whose layers a MODEL is that ``load`` makes."""
    folder = os.environ.get(FOLDER)
    return Path(folder).name if folder else "stand-in"


def real_pack() -> Pack | None:
    """ComfyUI-GGUF in the folder of ``HOTPATH_GGUF``; None where it is not set."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return None
    import gguf

    name = Path(folder).name
    if name not in sys.modules:
        pack = types.ModuleType(name)
        pack.__path__ = [folder]
        sys.modules[name] = pack
    ops: Any = importlib.import_module(f"{name}.ops")
    nodes: Any = importlib.import_module(f"{name}.nodes")

    def tensor(data: Tensor, kind: str, shape: tuple[int, ...]) -> Any:
        return ops.GGMLTensor(data, tensor_type=gguf.GGMLQuantizationType[kind], tensor_shape=torch.Size(shape))

    return Pack(tensor, ops.GGMLOps, nodes.GGUFModelPatcher)


def load(
    weights: Mapping[str, Tensor],
    kind_of: Callable[[str], str],
    pack: Pack | None = None,
    compute: torch.dtype | None = None,
    **facts: Any,
) -> Any:
    """A MODEL of ``weights`` whose matrices in blocks are random ones of the type that ``kind_of`` gives their names,
    computing in ``compute``, by default what the host chooses.

    ``facts`` are class attributes of its layers, such as ``dequant_dtype``.
    """
    pack = pack or real_pack() or stand_in()
    held, generator = {}, None
    for name, weight in weights.items():
        kind = "F32"
        if weight.ndim == 2 and "_blocks." in name:
            generator = generator or torch.Generator(weight.device).manual_seed(0)
            kind = kind_of(name)
        data = random_weight(kind, weight, generator) if kind not in _FLOATS else weight.float()
        held[name] = pack.tensor(data.cpu(), kind, tuple(weight.shape))
    ops: Any = type("GGMLOps", (pack.ops,), {})
    ops.Linear = type("Linear", (pack.ops.Linear,), {**facts, "__module__": pack.ops.__module__})  # type: ignore[attr-defined]
    options = {"custom_operations": ops, **({} if compute is None else {"dtype": compute})}
    model = comfy.sd.load_diffusion_model_state_dict(held, model_options=options)
    assert model is not None, "the host did not recognize the checkpoint"
    return pack.patcher.clone(model)


def random_weight(kind: str, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Bytes (out, bytes of a row) of a weight in ``kind`` whose values spread as those of ``like`` (out, in)."""
    layer: Any = KINDS[kind](like.shape[0], like.shape[1], None, torch.float32)
    if kind == "BF16":
        return like.bfloat16().view(torch.uint8)
    shape = tuple(layer.weight.shape)
    data = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator, device=like.device)
    halves = data.view(torch.float16).view(-1, layer.BYTES // 2)
    places = [104] if kind == "Q6_K" else [54] if kind == "Q3_K" else [40, 41] if kind == "Q2_K" else [0, 1]
    halves[:, places[0]] = 1
    if kind in _MINIMA:
        halves[:, places[1]] = _MINIMA[kind]
    tensors = {"weight": data, "halves": data.view(torch.float16)}
    layer._parameters.update(tensors)
    scale = like.float().std() / layer.dequantized(torch.float32).std()
    halves[:, places[0]] = scale.half()
    if kind in _MINIMA:
        halves[:, places[1]] = (scale * _MINIMA[kind]).half()
    return data
