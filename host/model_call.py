"""One call of the host's ``BaseModel.apply_model``, as wrappers around it read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from comfy.model_base import BaseModel
from comfy.patcher_extension import WrapperExecutor
from torch import Tensor

from .models import to_device

_NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass
class ModelCall:
    """Arguments of the call by the names that the host gives them, to be passed on as they came.

    ``x`` is the latent, with the batch first; ``extra`` the conditioning that a family of models takes beside
    ``c_crossattn``, the text, and ``c_concat``.
    """

    executor: WrapperExecutor
    x: Tensor
    t: Tensor
    c_concat: Tensor | None = None
    c_crossattn: Tensor | None = None
    control: Any = None
    options: Mapping[str, Any] = field(default_factory=lambda: _NONE)
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(
        cls,
        executor: WrapperExecutor,
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,
        control: Any = None,
        transformer_options: Mapping[str, Any] = _NONE,
        **extra: Any,
    ) -> ModelCall:
        """What the host gave a wrapper of ``apply_model``, whose signature this is."""
        return cls(executor, x, t, c_concat, c_crossattn, control, transformer_options, extra)

    @property
    def model(self) -> BaseModel:
        """The model that executes, which may be another than a node was given."""
        model: BaseModel = self.executor.class_obj
        return model

    @property
    def patcher(self) -> Any:
        """The ModelPatcher that samples; None outside of sampling."""
        return self.model.current_patcher

    @property
    def structure(self) -> tuple[Any, ...]:
        """What two calls must have in common for their time to be compared: the patches of now, and sizes."""
        text = None if self.c_crossattn is None else self.c_crossattn.shape
        return getattr(self.patcher, "patches_uuid", None), self.x.shape, self.x.dtype, self.x.device, text

    def move_conditioning(self) -> None:
        """Put conditioning that is in RAM on the device of ``x``."""
        device = self.x.device
        self.c_concat, self.c_crossattn = (to_device(cond, device) for cond in (self.c_concat, self.c_crossattn))
        self.extra = {name: to_device(cond, device) for name, cond in self.extra.items()}

    def run(self) -> Any:
        """What the model gives, or the next wrapper."""
        given = (self.x, self.t, self.c_concat, self.c_crossattn, self.control, self.options)
        return self.executor(*given, **self.extra)
