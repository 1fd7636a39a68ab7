"""Quantize the repeated blocks of a loaded MODEL: a second model beside it that shares all other weights."""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.utils
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from ...hotpath.template import NotHoistable, own_state
from ...hotpath.values import sampled
from ..families import family_of, named_blocks, require_family
from ..layers.containers import is_preference
from ..layers.gguf import gguf_type, is_gguf_layer
from ..models import require_model
from ..residency.weights import plain_layer
from ..telling.progress import NodeText
from .changed import changed, refuse_bound, refuse_changed, states_of
from .formats import VECTOR_FORMAT, Format, require_format

log = logging.getLogger(__name__)

# As much of texts that fit nothing as an error repeats.
_FEW, _QUOTED = 3, 40
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Quantization:
    """What was done to a model: how many layers of which kind, and the bytes of its blocks' weights."""

    layers: Mapping[str, int]
    bytes_before: int
    bytes_after: int

    def summary(self) -> str:
        """One line for the node and the report."""
        layers = ", ".join(f"{count} {kind}" for kind, count in self.layers.items())
        before, after = self.bytes_before, self.bytes_after
        return f"quantized: blocks {before / 2**20:.0f} -> {after / 2**20:.0f} MiB ({after / before:.2f}); {layers}"


@dataclass(frozen=True)
class _Quantized:
    """``formats``: of each layer, by its name in the diffusion model.

    ``patcher`` owns the quantized model; MODELs of it are clones and share its bookkeeping of patched weights.
    ``content`` and ``states`` are those of the full-precision model, of which another node may change some in place.
    """

    formats: Mapping[str, Format]
    patcher: ModelPatcher
    done: Quantization
    content: Tensor
    states: Mapping[str, Mapping[str, Any]]


# By the full-precision model: its last quantized one, so that changing a LoRA before the node does not quantize again.
_LAST: weakref.WeakKeyDictionary[BaseModel, _Quantized] = weakref.WeakKeyDictionary()
# By the quantized model.
_DONE: weakref.WeakKeyDictionary[BaseModel, Quantization] = weakref.WeakKeyDictionary()


def quantize_repeated_blocks(model: ModelPatcher, format: str, skip: str, text: NodeText) -> ModelPatcher:
    """A MODEL like ``model`` whose blocks' Linear layers are quantized; ``model`` itself stays as it is.

    LoRAs and other patches of ``model`` come along and apply to the quantized weights. All other weights are shared.
    The quantized weights are kept for as long as the full-precision model is, so that a second call with the same
    inputs is immediate; another format or ``skip`` replaces them.

    Args:
        format: a name of ``FORMATS``, or ``auto`` for the first of those that this machine can run.
        skip: comma-separated names or patterns of layers to leave alone, such as ``img_mlp.2, single_blocks.0.*``.

    Raises:
        ValueError: ``model`` is no MODEL, has no repeated blocks, is quantized already or was changed by another node
            in a way that would be lost; this machine can't run ``format``; a name in ``skip`` fits no layer, or
            nothing is left to quantize.
    """
    require_model(model)
    require_family(model, "quantize")
    diffusion_model = model.get_model_object("diffusion_model")
    wanted = require_format(format, model.load_device)
    refuse_bound(model)
    formats, counts = choose(diffusion_model, wanted, skip)
    content = sampled(_as_loaded(model, f"diffusion_model.{name}") for name, _ in diffusion_model.named_parameters())
    with model.use_ejected():
        states = states_of(model)
    last = _LAST.get(model.model)
    same = last is not None and (last.formats, last.states) == (formats, states) and torch.equal(last.content, content)
    if last is None or not same or last.patcher.load_device != model.load_device:
        with text.guarded():
            twin, done = _quantize(model, formats, counts, states, text)
            last = _LAST[model.model] = _Quantized(formats, twin, done, content, states)
        _DONE[last.patcher.model] = last.done
    text.show(last.done.summary())
    return _clone_onto(model, last.patcher, format, skip)


def quantization(model: ModelPatcher) -> Quantization | None:
    """What Quantize Repeated Blocks did to this MODEL; None when it did nothing."""
    return _DONE.get(model.model)


def quantizations() -> list[Quantization]:
    """What it did to all models that are alive, the last one last."""
    return list(_DONE.values())


def weight_bytes(tensor: Tensor) -> int:
    """Bytes of a weight, with the scales of a quantized one."""
    if isinstance(tensor, QuantizedTensor):
        names, _ = tensor.__tensor_flatten__()
        return sum(getattr(tensor, name).nbytes for name in names)
    return tensor.nbytes


def block_bytes(diffusion_model: nn.Module) -> int:
    """Bytes of all weights of the repeated blocks."""
    parameters = (tensor for _, block in named_blocks(diffusion_model) for tensor in block.parameters())
    return sum(weight_bytes(tensor) for tensor in parameters)


def choose(diffusion_model: nn.Module, wanted: Format, skip: str) -> tuple[dict[str, Format], Counter[str]]:
    """The format of each layer to quantize, and how many layers of which kind that is and are left.

    Raises:
        ValueError: a layer is quantized already or of a foreign class, or nothing is left to quantize.
    """
    patterns = [pattern for pattern in map(str.strip, skip.split(",")) if pattern]
    unused, names = set(patterns), []
    formats: dict[str, Format] = {}
    counts: Counter[str] = Counter()
    family: Any = family_of(diffusion_model)
    for prefix, block in named_blocks(diffusion_model):
        vector = family.vector_layers(block)
        for name, layer in _linears(prefix, block):
            names.append(name)
            full = f"{prefix}.{name}"
            fits = {pattern for pattern in patterns if fnmatchcase(name, pattern) or fnmatchcase(full, pattern)}
            unused -= fits
            format = VECTOR_FORMAT if name in vector and not wanted.weight_only else wanted
            if fits:
                counts["left alone as asked"] += 1
            elif not _large_enough(layer, format):
                counts[f"too small for {format.name}"] += 1
            else:
                formats[full] = format
                counts[f"{'modulation ' if name in vector else ''}layers in {format.name}"] += 1
    if unused:
        unknown = ", ".join(pattern[:_QUOTED] for pattern in sorted(unused)[:_FEW])
        raise ValueError(
            f"skip: {unknown} fits no layer of this model's blocks. They are called "
            f"{', '.join(dict.fromkeys(names))}, each after its block, such as double_blocks.0."
        )
    if not formats:
        why = ", ".join(f"{count} {what}" for what, count in counts.items())
        raise ValueError(f"skip, format: nothing is left to quantize ({why}). Skip less, or bypass this node.")
    return formats, counts


def _linears(prefix: str, block: nn.Module) -> Iterator[tuple[str, Any]]:
    """The block's Linear layers by name.

    Raises:
        ValueError: one of them is quantized already or of a foreign class.
    """
    for name, module in block.named_modules():
        if not any(True for _ in module.parameters()):
            continue
        try:
            plain = plain_layer(module)
        except NotHoistable as reason:
            raise ValueError(
                f"model: {prefix}.{name} can't be quantized: {reason}. Load the full-precision model with ComfyUI's "
                "own loader, or bypass this node."
            ) from None
        if is_gguf_layer(type(module)):
            raise ValueError(
                f"model: it is of a GGUF file ({prefix}.{name} is {gguf_type(module.weight)}), which is quantized "
                "already. Load the full-precision model with ComfyUI's own loader, or bypass this node."
            )
        weight = getattr(module, "weight", None)
        if isinstance(weight, QuantizedTensor) or (weight is not None and weight.dtype not in _FLOATS):
            kept = getattr(module, "quant_format", None) or str(weight.dtype).removeprefix("torch.")
            raise ValueError(
                f"model: its blocks are quantized already ({prefix}.{name} is {kept}). Load the full-precision model "
                "with weight_dtype 'default', or bypass this node."
            )
        if isinstance(plain, nn.Linear):
            yield name, module


def _large_enough(layer: Any, format: Format) -> bool:
    sides = (layer.in_features, layer.out_features)
    return min(sides) >= format.smallest and not any(side % format.multiple for side in sides)


def _quantize(
    model: ModelPatcher,
    formats: Mapping[str, Format],
    counts: Mapping[str, int],
    states: Mapping[str, Mapping[str, Any]],
    text: NodeText,
) -> tuple[ModelPatcher, Quantization]:
    source = model.model
    twin = _empty_twin(source)
    modules = dict(twin.diffusion_model.named_modules())
    progress = comfy.utils.ProgressBar(len(formats))
    text.show(f"quantizing {len(formats)} layers ...", "working")
    with model.use_ejected():
        _make_room(model, formats)
        for name, module in source.diffusion_model.named_modules():
            comfy.model_management.throw_exception_if_processing_interrupted()
            twin_module = modules.pop(name, None)
            # As loaded, where an object patch is in its place.
            module = model.object_patches_backup.get(f"diffusion_model.{name}", module)
            refuse_changed(name, module, twin_module, states[name])
            _share(module, twin_module, model, f"diffusion_model.{name}".rstrip("."))
            if name in formats:
                _quantize_layer(twin_module, formats[name], source.get_dtype_inference(), model)
                progress.update(1)
    if modules:
        raise changed(next(iter(modules)), "is missing")
    done = Quantization(
        dict(Counter(counts).most_common()), block_bytes(source.diffusion_model), block_bytes(twin.diffusion_model)
    )
    log.info("%s", done.summary())
    return type(model)(twin, model.load_device, model.offload_device), done


def _empty_twin(source: BaseModel) -> Any:
    """A model of the same architecture with the host's mixed precision layers, whose weights are to be filled in."""
    config: Any = source.model_config
    kind: Any = type(config)
    dtype = source.get_dtype_inference()
    # The class's __getattr__ keeps copy.copy from working.
    twin_config = kind.__new__(kind)
    twin_config.__dict__.update(config.__dict__)
    twin_config.unet_config = dict(config.unet_config)
    twin_config.custom_operations = comfy.ops.mixed_precision_ops({}, dtype)
    # As for a quantized checkpoint, so that the host counts what dequantized weights take.
    twin_config.manual_cast_dtype = dtype
    return twin_config.get_model(source.state_dict(), "diffusion_model.")


def _make_room(model: ModelPatcher, formats: Mapping[str, Format]) -> None:
    """Ask the host for what quantizing the largest layer takes."""
    modules = dict(model.model.diffusion_model.named_modules())
    needed = max(format.peak_bytes(modules[name].weight) for name, format in formats.items())
    if not comfy.model_management.is_device_cpu(model.load_device):
        comfy.model_management.free_memory(needed, model.load_device)


def _share(module: nn.Module, twin: Any, model: ModelPatcher, path: str) -> None:
    """Give ``twin`` the weights of ``module``, without the LoRAs that the host may have baked into them, and the
    attention that it prefers."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            tensor = _as_loaded(model, f"{path}.{name}").detach()
            if tensor.is_meta:
                # The host's loader leaves what a file lacks for later, as zeros.
                tensor = torch.zeros_like(tensor, device=model.offload_device)
            setattr(twin, name, nn.Parameter(tensor.to(model.offload_device), requires_grad=False))
    if is_preference(module):
        twin.__dict__.update(own_state(module))


def _as_loaded(model: ModelPatcher, key: str) -> Tensor:
    """A weight without the LoRAs that the host may have baked into it."""
    backup = model.backup.get(key)
    weight: Tensor = comfy.utils.get_attr(model.model, key) if backup is None else backup.weight
    return weight


def _quantize_layer(layer: Any, format: Format, dtype: torch.dtype, model: ModelPatcher) -> None:
    """Replace the weight of one of the host's mixed precision Linears."""
    try:
        weight = format.quantize(layer.weight.to(model.load_device), dtype)
    except torch.OutOfMemoryError:
        log.warning("%s has no memory left to quantize a layer; it is quantized in RAM", model.load_device)
        weight = format.quantize(layer.weight.to(model.offload_device), dtype)
    weight = weight.to(model.offload_device)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.quant_format = format.host_name
    layer.layout_type = format.layout
    layer._full_precision_mm = layer._full_precision_mm_config = format.weight_only


def _clone_onto(model: ModelPatcher, base: ModelPatcher, format: str, skip: str) -> ModelPatcher:
    """A clone of ``model``, patches and all, on the model that ``base`` owns."""
    clone = model.clone(model_override=base.get_clone_model_override())
    # What belongs to the weights of the model that it was cloned from.
    clone.parent = base
    clone.size = base.model_size()
    clone.hook_backup, clone.cached_hook_patches, clone.current_hooks = {}, {}, None
    load = model.cached_patcher_init
    clone.cached_patcher_init = None if load is None else (_load_again, (load, format, skip))
    return clone


def _load_again(load: tuple[Any, ...], format: str, skip: str, disable_dynamic: bool = False) -> ModelPatcher:
    """What the host calls for a second copy of a MODEL (multi-GPU, without dynamic VRAM)."""
    create, arguments, *which = load
    loaded = create(*arguments, disable_dynamic=disable_dynamic)
    for index in which:
        loaded = loaded[index]
    return quantize_repeated_blocks(loaded, format, skip, NodeText(None))
