"""What a step takes without compiled blocks, where it was measured in this process."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from contextlib import AbstractContextManager
from typing import Any

from comfy.model_base import BaseModel
from torch import nn

from ..families import named_blocks
from ..model_call import ModelCall
from ..telling.accounting import Route, Untouched, has_own_forward, routed
from ..telling.progress import StepClock

# By model, which is the same for clones with other patches.
_SECONDS: weakref.WeakKeyDictionary[BaseModel, dict[Hashable, float]] = weakref.WeakKeyDictionary()


class EagerSteps:
    """A wrapper around ``apply_model`` of a MODEL that nothing compiles: its steps are timed and kept."""

    def __init__(self) -> None:
        self._clock = StepClock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A wrapper of the host's ``apply_model``; arguments are passed on untouched."""
        call = ModelCall.read(*args, **kwargs)
        missing: set[nn.Module] = set()

        def whole() -> bool:
            return not missing

        with _noting(call.model.diffusion_model, missing):
            out = self._clock.time(call.x.device, call.run, call.structure, whole)
        if (last := self._clock.last()) is not None:
            note_quickest(_SECONDS.setdefault(call.model, {}), *last)
        return out


def _noting(diffusion_model: nn.Module, missing: set[nn.Module]) -> AbstractContextManager[None]:
    """A scope at whose end ``missing`` are the repeated blocks that did not run: a step cache left them out."""

    def run(block: Any, *args: Any, **kwargs: Any) -> Any:
        missing.discard(block)
        with Untouched(block):
            return block.forward(*args, **kwargs)

    blocks = [block for _, block in named_blocks(diffusion_model) if not has_own_forward(block)]
    missing.update(blocks)
    return routed({block: Route(run, block) for block in blocks})


def note_quickest(known: dict[Hashable, float], seconds: float, kind: Hashable) -> float:
    """Keep the least seconds of each kind, those of an undisturbed step; returns those of ``kind``."""
    known[kind] = min(known.get(kind, seconds), seconds)
    return known[kind]


def eager_seconds(model: BaseModel, kind: Hashable) -> float | None:
    """The least that an eager step of ``model`` of this kind took; None if none was measured."""
    return _SECONDS.get(model, {}).get(kind)
