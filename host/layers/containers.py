"""Modules of the host that a template takes without knowing them, by what they are: no weights, plain state, and a
forward that keeps nothing.

ComfyUI's blocks gain such modules from one release to the next, and none of their names is in this pack.
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableSequence, Set
from copy import copy
from dataclasses import is_dataclass
from types import FunctionType
from typing import Any

import comfy.ldm.flux.layers
import comfy.ldm.modules.attention
from torch import nn

from ...hotpath.template import NotHoistable, codes_of, constants, functions_of, is_plain, own_bases, own_state

_HOST = "comfy"
# Their state is set when they are made; asking for it at each call of each block would cost time.
_SETTLED = (comfy.ldm.flux.layers.__name__, "torch.nn.modules")
# What the host leaves on modules whose weights it has loaded whole, for itself alone.
BOOKKEEPING = ("comfy_patched_weights",)
_KEEPERS = (Mapping, MutableSequence, Set)
_PREFERENCE, _PREFERENCE_CLASS = "comfy_attention", "ComfyAttention"
# Run by what loads and saves, never by a forward.
_NO_PART_OF_FORWARD = ("_load_", "_save_", "_register_", "__init__", "__setstate__", "__getstate__", "__repr__")


class HostsAttention(nn.Module):
    """In a template, in place of the host's ``ComfyAttention``, by which a block prefers an attention function of its
    own (a checkpoint or a LoRA brings it): in a region none is preferred. One that is runs outside of it; see
    ``preferred_attention``."""

    config = None
    function = None


def preferred_attention(block: nn.Module) -> Any:
    """The ``ComfyAttention`` of ``block`` that holds a function for its attention to prefer; None where none does."""
    module = block._modules.get(_PREFERENCE)
    return None if module is None or getattr(module, "function", None) is None else module


def is_preference(module: nn.Module) -> bool:
    """Whether ``module`` is what the host's blocks say by which attention they prefer."""
    return type(module) is getattr(comfy.ldm.modules.attention, _PREFERENCE_CLASS, None)


def is_container(kind: type) -> bool:
    """Whether a template may copy a module of this class as it is, as long as it holds no weights and plain state.

    Raises:
        NotHoistable: it is the host's, and a copy would not do: it keeps something, or looks itself up.
    """
    if kind.__module__.startswith(_SETTLED):
        return True
    if kind.__module__.partition(".")[0] != _HOST:
        return False
    more = _keeps(kind, tuple(_methods(kind)))
    if more:
        raise NotHoistable(f"{kind.__module__}.{kind.__qualname__} {more}, which a template can't copy")
    return True


def container_state(kind: type) -> Callable[[Any], Hashable] | None:
    """What tells whether a module of this class that was copied is as it was; None where that can't change."""
    if kind.__module__.startswith(_SETTLED) or kind.__module__.partition(".")[0] != _HOST:
        return None
    return _state


def _state(module: nn.Module) -> Hashable:
    return tuple((name, value if is_plain(value) else id(value)) for name, value in attributes_of(module))


def attributes_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What a module was given beyond what every module has, and what the host leaves for itself."""
    return ((name, value) for name, value in own_state(module).items() if name not in BOOKKEEPING)


def plain_state(module: nn.Module) -> dict[str, Any]:
    """What ``module`` computes by beside its weights; of a layer, on which the host has notes of its own, what PyTorch
    reads of it."""
    if module._parameters:
        return {name: module.__dict__[name] for name in constants(type(module)) if name in module.__dict__}
    return {name: value for name, value in attributes_of(module) if is_plain(value)}


def held_state(module: nn.Module) -> dict[str, Any]:
    """What ``module`` computes by that others may change in place: dataclasses and lists of plain values, as copies.
    Of a layer, on which the host has notes of its own, nothing."""
    held = () if module._parameters else attributes_of(module)
    return {name: copy(value) for name, value in held if _is_made_of_plain(value)}


def _is_made_of_plain(value: Any) -> bool:
    if isinstance(value, list):
        return is_plain(tuple(value))
    return is_dataclass(value) and not isinstance(value, type)


def _methods(kind: type) -> Iterator[FunctionType]:
    """All functions of the class that may run within its forward."""
    for base in own_bases(kind):
        if base.__module__.startswith(_SETTLED):
            # PyTorch's own, of which the host's may be a kind: what of it stores never runs in a forward.
            continue
        for name, function in functions_of(base):
            if not name.startswith(_NO_PART_OF_FORWARD):
                yield function


@functools.lru_cache(maxsize=256)
def _keeps(kind: type, methods: tuple[FunctionType, ...]) -> str:
    """What a forward of the class does beyond its arguments and its own plain state, in words; empty for nothing.

    A template stands for all blocks of its structure. What one call leaves on it the next block would find, and what
    is kept by module would be looked up by another. All else that a forward reads Dynamo guards.
    """
    for function in methods:
        for code in codes_of(function.__code__):
            for step in dis.get_instructions(code):
                if step.opname in ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL"):
                    return f"changes {step.argval} in its {function.__name__}"
                if step.opname == "LOAD_GLOBAL" and isinstance(function.__globals__.get(step.argval), _KEEPERS):
                    return f"reads {step.argval} of its file in its {function.__name__}"
                if step.opname in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(
                    getattr(kind, step.argval, None), _KEEPERS
                ):
                    return f"reads {step.argval} of its class in its {function.__name__}"
    return ""
