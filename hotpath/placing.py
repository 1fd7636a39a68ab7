"""A template called with weights that it does not hold, in as few steps as can be: Dynamo traces each of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

Places = tuple[tuple[str, nn.Module, str], ...]
"""Each weight of a template: its path, the module that it is of, and its name there."""


def places_in(template: nn.Module) -> Places:
    return tuple(
        (f"{path}.{name}" if path else name, module, name)
        for path, module in template.named_modules()
        for name, weight in module._parameters.items()
        if weight is not None
    )


def call_placed(template: nn.Module, places: Places, weights: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    """``template(**given)`` with ``weights`` by their paths in the place of its own, which are back afterwards.

    As ``torch.func.functional_call``, whose search for names takes Dynamo a fifth of the time that it traces a block.
    """
    own = []
    for path, module, name in places:
        own.append(module._parameters[name])
        module._parameters[name] = weights[path]
    try:
        return template(**given)
    finally:
        for (_, module, name), before in zip(places, own, strict=True):
            module._parameters[name] = before
