"""What a step takes without compiled blocks, where it was measured in this process."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Any

from comfy.model_base import BaseModel
from comfy.patcher_extension import WrapperExecutor
from torch import Tensor

from .progress import StepClock

# By model, which is the same for clones with other patches.
_SECONDS: weakref.WeakKeyDictionary[BaseModel, dict[Hashable, float]] = weakref.WeakKeyDictionary()


class EagerSteps:
    """A wrapper around ``apply_model`` of a MODEL that nothing compiles: its steps are timed and kept."""

    def __init__(self) -> None:
        self._clock = StepClock()

    def __call__(
        self,
        executor: WrapperExecutor,
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """A wrapper of the host's ``apply_model``; arguments are passed on untouched."""
        out = self._clock.time(x.device, lambda: executor(x, t, c_concat, c_crossattn, *args, **kwargs))
        seconds = self._clock.seconds()
        if seconds is not None:
            known = _SECONDS.setdefault(executor.class_obj, {})
            kind = _kind(executor.class_obj, x, c_crossattn)
            # The quickest: what a step takes when nothing is in its way.
            known[kind] = min(known.get(kind, seconds), seconds)
        return out


def eager_seconds(model: BaseModel, x: Tensor, c_crossattn: Tensor | None) -> float | None:
    """Seconds of an eager step of ``model`` with the patches it has now, on inputs like these; None if not measured."""
    return _SECONDS.get(model, {}).get(_kind(model, x, c_crossattn))


def _kind(model: BaseModel, x: Tensor, c_crossattn: Tensor | None) -> Hashable:
    patches = getattr(model.current_patcher, "patches_uuid", None)
    return patches, x.shape, x.dtype, x.device, None if c_crossattn is None else c_crossattn.shape
