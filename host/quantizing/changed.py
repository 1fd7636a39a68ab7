"""What another node did to a MODEL that a quantized model beside it would not have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import comfy.ops
from comfy.model_patcher import ModelPatcher
from torch import nn

from ...hotpath.fingerprint import PACK
from ...hotpath.template import NotHoistable, refuse_bolted_on, refuse_hidden
from ..layers.containers import held_state, is_preference, plain_state
from ..residency.weights import class_name

# How far code of other nodes is followed to what it holds.
_DEPTH = 6


def refuse_bound(model: ModelPatcher) -> None:
    """Raise ValueError for what is bound to the full-precision model and would bring it back, or be lost."""
    if model.injections:
        named = ", ".join(model.injections)
        raise ValueError(
            f"model: what another node puts into the layers while the model samples ({named}, as a bypass LoRA) "
            "belongs to the model as it was loaded. Put Quantize Repeated Blocks before that node."
        )
    for name, patch in model.object_patches.items():
        if is_preference(patch):
            # By which a LoRA prefers an attention; it holds no weights.
            continue
        if name.startswith("diffusion_model.") or isinstance(getattr(patch, "__self__", None), nn.Module):
            raise ValueError(
                f"model: another node replaces {name}, which belongs to the model as it was loaded. Put Quantize "
                "Repeated Blocks before that node."
            )
    # Not what the model samples by beside it, which computes alike for both.
    modules = {id(module) for module in (model.model, *model.model.diffusion_model.modules())}
    for place, held in (("a wrapper", model.wrappers), ("a callback", model.callbacks), ("code", model.model_options)):
        if _holds(held, modules):
            raise ValueError(
                f"model: {place} of another node works on the model as it was loaded, and would not reach the "
                "quantized one. Put Quantize Repeated Blocks before that node."
            )


def _holds(value: Any, modules: set[int]) -> bool:
    """Whether code, or what contains code, holds one of ``modules`` for itself."""
    found, seen = [value], {id(value)}
    for _ in range(_DEPTH):
        found = [item for each in found for item in _held(each) if id(item) not in seen]
        seen.update(map(id, found))
        # What torch.compile made of one stands for it.
        held = [item for item in found if isinstance(item, nn.Module)]
        if any(id(it) in modules or id(it._modules.get("_orig_mod")) in modules for it in held):
            return True
    return False


def _held(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from value
    elif isinstance(value, partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, MethodType):
        yield value.__func__
        yield value.__self__ if isinstance(value.__self__, nn.Module) else _attributes(value.__self__)
    elif isinstance(value, FunctionType):
        yield from (value.__defaults__, value.__kwdefaults__)
        for cell in value.__closure__ or ():
            # Of a function that is not yet defined there is nothing in it.
            with suppress(ValueError):
                yield cell.cell_contents
    elif callable(value):
        yield _attributes(value)


def _attributes(value: Any) -> dict[str, Any]:
    """Those of an object of another node."""
    kind = type(value).__module__
    own = kind.partition(".")[0] in ("torch", "comfy", "builtins") or kind.startswith(PACK)
    return {} if own else getattr(value, "__dict__", {})


def states_of(model: ModelPatcher) -> dict[str, dict[str, Any]]:
    """What each module of the diffusion model, by its name, computes by beside its weights, by which it may differ from
    a twin's; as loaded, where an object patch of another clone is in its place.

    Raises:
        ValueError: another node did something to one in place that a twin would not have.
    """
    states, before = {}, model.object_patches_backup
    for name, module in model.model.diffusion_model.named_modules():
        path = f"diffusion_model.{name}".rstrip(".")
        module = before.get(path, module)
        patched = {key.rpartition(".")[2]: value for key, value in before.items() if key.rpartition(".")[0] == path}
        try:
            refuse_hidden(name, module, patched)
        except NotHoistable as reason:
            raise changed(name, str(reason)) from None
        state = {**(plain_state(module) if name else {}), **held_state(module)}
        states[name] = {key: patched.get(key, value) for key, value in state.items()}
    return states


def refuse_changed(name: str, module: nn.Module, twin: nn.Module | None, state: Mapping[str, Any]) -> None:
    """Raise ValueError for what another node did in place to a module, which computes by ``state``, and the twin would
    not have."""
    try:
        refuse_bolted_on(name, module)
    except NotHoistable as reason:
        raise changed(name, str(reason)) from None
    kind = type(module)
    same = kind is type(twin) or (kind.__module__ == comfy.ops.__name__ and kind.__name__ == type(twin).__name__)
    if not same or _names(module) != _names(twin):
        raise changed(name, f"is {class_name(kind)} with other contents than ComfyUI gives it")
    if any(vars(twin).get(key, value) != value for key, value in state.items()):
        raise changed(name, "computes by other values than ComfyUI gives it")


def _names(module: Any) -> set[str]:
    """What the module holds besides a weight, which the host's mixed precision layers have only once loaded."""
    held = {**module._parameters, **module._buffers}
    return {name for name, tensor in held.items() if tensor is not None} - {"weight"}


def changed(name: str, how: str) -> ValueError:
    return ValueError(
        f"model: another node changed this model in place ({name or 'the diffusion model'}: {how}), which would be "
        "lost. Put Quantize Repeated Blocks before that node."
    )
