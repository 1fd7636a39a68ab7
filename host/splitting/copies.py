"""A MODEL's copies on other devices, in the host's accounting, with the patches that the MODEL has when it samples."""

from __future__ import annotations

import weakref

import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher

from ..layers.containers import is_preference

KEY = "hotpath_split"
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
    """Why the weights of ``model`` as they are now can't be had on other devices too; empty where they can."""
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
    return f"another node replaces {foreign[0]}, which is there once" if foreign else ""
