"""A MODEL's copies on other devices, in the host's accounting, with the patches that the MODEL has when it samples."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ...hotpath.template import hidden_by
from ..layers.containers import held_state, is_preference, plain_state
from ..residency.weights import class_name
from ..telling.accounting import Route

KEY = "hotpath_split"
# Elements of a weight that are compared with its copy's, and how far, for its mean square, a LoRA may round otherwise.
_ELEMENTS = 64
_ROUNDING = 0.005
# By model, its copies by device: a LoRA that changes before the node does not load them again.
_COPIES: weakref.WeakKeyDictionary[BaseModel, dict[torch.device, ModelPatcher]] = weakref.WeakKeyDictionary()


def copy_on(model: ModelPatcher, device: torch.device) -> ModelPatcher:
    """A MODEL with weights of its own for ``device``, made by the loader of ``model`` as the host's multi-GPU nodes do.

    Raises:
        RuntimeError: the loader can't make a second one.
    """
    known = _COPIES.setdefault(model.model, {})
    if device not in known:
        made = model.deepclone_multigpu(new_load_device=device)
        # Of what it was made from it would keep the model alive whose copy it is.
        owner = type(made)(made.model, device, made.offload_device, made.model_size())
        owner.clone_base_uuid, owner.cached_patcher_init = made.clone_base_uuid, made.cached_patcher_init
        known[device] = owner
    return known[device]


def match(model: ModelPatcher) -> list[ModelPatcher]:
    """The copies that ``model`` brings along, with the patches of its weights that it has now."""
    matched = []
    for copy in model.get_additional_models_with_key(KEY):
        clone = model.clone(model_override=copy.get_clone_model_override())
        clone.parent = copy
        clone.load_device, clone.offload_device = copy.load_device, copy.offload_device
        clone.hook_backup, clone.additional_models = {}, {}
        clone.object_patches = {name: patch for name, patch in clone.object_patches.items() if is_preference(patch)}
        matched.append(clone)
    model.set_additional_models(KEY, matched)
    return matched


def why_not_copied(model: ModelPatcher) -> str:
    """Why ``model`` as it is now can't be had on other devices too; empty where it can."""
    if model.injections:
        return f"what another node puts into the layers ({', '.join(model.injections)}, as a bypass LoRA) is there once"
    if model.hook_patches:
        return "weights that change while the model samples are there once"
    foreign = [
        name
        for name, patch in model.object_patches.items()
        if name.startswith("diffusion_model.") and not is_preference(patch)
    ]
    foreign += model.weight_wrapper_patches
    if foreign:
        return f"another node replaces {foreign[0]}, which is there once"
    for copy in model.get_additional_models_with_key(KEY):
        changed = _changed_module(model.model.diffusion_model, copy.model.diffusion_model)
        if changed:
            return f"another node {changed}, which is there once"
    return ""


def is_its_own(module: nn.Module) -> bool:
    """Whether ``module`` computes by the forward of its class, or by what this pack has put there."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    return not hooked and isinstance(module.__dict__.get("forward"), (Route, type(None)))


def _changed_module(ours: nn.Module, theirs: nn.Module) -> str:
    """What was done in place to a module that the one made by the same loader has not; empty where nothing was."""
    others = dict(theirs.named_modules())
    for path, module in ours.named_modules():
        other = others.get(path)
        if not is_its_own(module):
            return f"hooks into {path or 'the model'} or replaces its forward"
        if other is None or class_name(type(module)) != class_name(type(other)):
            return f"replaces {path}"
        if path and (plain_state(module) != plain_state(other) or hidden_by(module)):
            return f"changed {path}"
        if held_state(module) != held_state(other):
            return f"changed {path or 'the model'}"
    return ""


class AsItBegan:
    """What the modules of a model were when a run began."""

    def __init__(self, diffusion_model: nn.Module) -> None:
        named = [(path, module) for path, module in diffusion_model.named_modules() if path]
        self._each = [(path, module, plain_state(module)) for path, module in named]

    def changed(self) -> str:
        """What was done in place to one of them since; empty where nothing was."""
        # Asked at each step.
        for path, module, state in self._each:
            held = module.__dict__
            if not is_its_own(module) or any(held.get(name, self) != value for name, value in state.items()):
                return f"changed {path} in mid-run"
        return ""


def changed_weight(model: ModelPatcher, copy: ModelPatcher) -> str:
    """The name of a weight of ``model`` that is another in ``copy``, both loaded; empty where none is.

    What changes a weight in place changes it all over, so that some elements tell.
    """
    others = dict(copy.model.diffusion_model.named_modules())
    # By where they are, as not all may be on their device.
    found: dict[tuple[torch.device, torch.device], list[tuple[str, Tensor, Tensor]]] = {}
    for path, layer in model.model.diffusion_model.named_modules():
        theirs = _readable(others[path])
        for name, weight in _readable(layer).items():
            other = theirs.get(name)
            if other is not None and (weight.is_cpu == other.is_cpu or model.load_device.type == "cpu"):
                found.setdefault((weight.device, other.device), []).append((f"{path}.{name}", weight, other))
    for each in found.values():
        names, *sides = zip(*each, strict=True)
        ours, copied = (torch.stack([_some(weight) for weight in side]).cpu().float() for side in sides)
        far = (ours - copied).abs() > _ROUNDING * ours.square().mean(1, keepdim=True).sqrt()
        for name, share in zip(names, far.float().mean(1).tolist(), strict=True):
            if share > 0.5:
                return name
    return ""


def _readable(layer: Any) -> dict[str, Tensor]:
    """The weights of ``layer`` whose elements can be read, and have their patches on."""
    if getattr(layer, "weight_function", None) or getattr(layer, "bias_function", None):
        return {}
    held = ((name, weight) for name, weight in layer._parameters.items() if weight is not None)
    return {name: weight for name, weight in held if type(weight.data) is Tensor and weight.numel() >= _ELEMENTS}


def _some(weight: Tensor) -> Tensor:
    """``_ELEMENTS`` of any weight, in its dtype."""
    apart = weight.numel() // _ELEMENTS
    return weight.detach().reshape(-1)[: apart * _ELEMENTS : apart]
