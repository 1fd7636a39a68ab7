"""LoRAs in bypass mode: a ``forward`` that the host puts on a layer adds an adapter's product to its output."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any, ClassVar

import torch
from comfy.weight_adapter import BypassForwardHook, LoHaAdapter, LoKrAdapter, LoRAAdapter
from torch import Tensor, nn

from ...hotpath.template import Addition, NotHoistable, is_class_forward

_Factors = Mapping[str, tuple[int, tuple[int, ...]]]


class _Bypassed(nn.Module):
    """``layer(x) + strength * product(x)``, the product by the code of the host's adapter.

    Parameters on the meta device: the adapter's factors, and ``strength`` (), which is float32 and holds the adapter's
    alpha over its rank too, so that neither is a constant of the code.
    """

    # Where each factor is in the host's tuple of an adapter's weights, and which of its dimensions are ranks.
    factors: ClassVar[_Factors] = {}

    # What the host's hook tells an adapter, here of strength 1.
    multiplier = 1.0
    is_conv = False
    conv_dim = 0

    def __init__(self, layer: nn.Module, adapter: Any) -> None:
        super().__init__()
        self.layer = layer
        for name, (slot, _) in self.factors.items():
            factor = adapter.weights[slot]
            meta = None if factor is None else nn.Parameter(torch.empty_like(factor, device="meta"), False)
            self.register_parameter(name, meta)
        self.strength = nn.Parameter(torch.empty((), dtype=torch.float32, device="meta"), False)

    @property
    def dynamic_dims(self) -> dict[str, tuple[int, ...]]:
        """Dimensions of parameters that differ from one LoRA to the next."""
        return {name: dims for name, (_, dims) in self.factors.items() if dims and self._parameters[name] is not None}

    def extra_repr(self) -> str:
        held = [name for name, parameter in self.named_parameters(recurse=False) if parameter is not None]
        return f"{', '.join(held)} beside {self.layer}"

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the dtype of ``x``."""
        out: Tensor = self.layer(x)
        product = self.product(x, out)
        # As a number would scale it, which no dtype of the product rounds.
        return out + (product.float() * self.strength).to(product.dtype)

    def product(self, x: Tensor, out: Tensor) -> Tensor:
        raise NotImplementedError

    @classmethod
    def rank(cls, weights: tuple[Any, ...]) -> float:
        """The rank, by which the adapter's alpha is divided."""
        raise NotImplementedError


class BypassedLora(_Bypassed):
    """``up @ mid @ down``, without ``mid`` in most files."""

    factors: ClassVar[_Factors] = {"up": (0, (1,)), "down": (1, (0,)), "mid": (3, (0, 1))}
    up: nn.Parameter
    down: nn.Parameter
    mid: nn.Parameter | None

    @property
    def weights(self) -> tuple[Tensor | None, ...]:
        """The host's tuple, without an alpha."""
        return self.up, self.down, None, self.mid, None, None

    def product(self, x: Tensor, out: Tensor) -> Tensor:
        product: Tensor = LoRAAdapter.h(self, x, out)
        return product

    @classmethod
    def rank(cls, weights: tuple[Any, ...]) -> float:
        return float(weights[1].shape[0])


class BypassedLoha(_Bypassed):
    """``(w1_a @ w1_b) * (w2_a @ w2_b)``, element by element."""

    factors: ClassVar[_Factors] = {"w1_a": (0, (1,)), "w1_b": (1, (0,)), "w2_a": (3, (1,)), "w2_b": (4, (0,))}
    w1_a: nn.Parameter
    w1_b: nn.Parameter
    w2_a: nn.Parameter
    w2_b: nn.Parameter

    def product(self, x: Tensor, out: Tensor) -> Tensor:
        # The host's code warns at each call, which can't be traced.
        factors = (factor.to(x.dtype) for factor in (self.w1_a, self.w1_b, self.w2_a, self.w2_b))
        w1_a, w1_b, w2_a, w2_b = factors
        return nn.functional.linear(x, (w1_a @ w1_b) * (w2_a @ w2_b))

    @classmethod
    def rank(cls, weights: tuple[Any, ...]) -> float:
        return float(weights[1].shape[0])


class BypassedLokr(_Bypassed):
    """The Kronecker product of ``w1`` or ``w1_a @ w1_b`` and ``w2`` or ``w2_a @ w2_b``."""

    factors: ClassVar[_Factors] = {
        "w1": (0, ()),
        "w2": (1, ()),
        "w1_a": (3, (1,)),
        "w1_b": (4, (0,)),
        "w2_a": (5, (1,)),
        "w2_b": (6, (0,)),
    }
    w1: nn.Parameter | None
    w2: nn.Parameter | None
    w1_a: nn.Parameter | None
    w1_b: nn.Parameter | None
    w2_a: nn.Parameter | None
    w2_b: nn.Parameter | None

    @property
    def weights(self) -> tuple[Tensor | None, ...]:
        """The host's tuple, without an alpha."""
        return self.w1, self.w2, None, self.w1_a, self.w1_b, self.w2_a, self.w2_b, None, None

    def product(self, x: Tensor, out: Tensor) -> Tensor:
        product: Tensor = LoKrAdapter.h(self, x, out)
        return product

    @classmethod
    def rank(cls, weights: tuple[Any, ...]) -> float:
        w1, w2, alpha, _, w1_b, _, w2_b, *_ = weights
        return float(alpha if w1 is not None and w2 is not None else (w1_b if w1 is None else w2_b).shape[0])


_LAYERS: Mapping[type, type[_Bypassed]] = {
    LoRAAdapter: BypassedLora,
    LoHaAdapter: BypassedLoha,
    LoKrAdapter: BypassedLokr,
}
# Each as the host defines it, which another pack may replace.
_BYPASS_FORWARD = BypassForwardHook._bypass_forward
_METHOD_NAMES = ("h", "g", "bypass_forward")
_METHODS = {kind: [getattr(kind, name) for name in _METHOD_NAMES] for kind in _LAYERS}


def bypass_addition(module: nn.Module) -> Addition | None:
    """What the host's bypass mode adds to ``module``; None for another ``forward``.

    Raises:
        NotHoistable: an adapter that is not understood is in bypass mode.
    """
    adapters = _adapters(module)
    if adapters is None:
        return None
    structure = tuple(_structure(adapter) for adapter in adapters)

    def around(layer: nn.Module) -> nn.Module:
        for adapter in reversed(adapters):
            layer = _LAYERS[type(adapter)](layer, adapter)
        return layer

    return Addition(structure, around)


def in_bypass(module: nn.Module) -> bool:
    """Whether adapters that ``bypass_addition`` understands are on ``module``."""
    return "forward" in module.__dict__ and bool(_adapters(module))


def bypass_weights(path: str, module: nn.Module, like: Tensor) -> tuple[str, dict[str, Tensor]]:
    """The parameters of what is around the layer at ``path`` in bypass mode, and where the layer's own are in it."""
    weights = {}
    for adapter in _adapters(module) or ():
        kind = _LAYERS[type(adapter)]
        for name, (slot, _) in kind.factors.items():
            factor = adapter.weights[slot]
            if factor is not None:
                weights[f"{path}.{name}"] = factor
        alpha = adapter.weights[2]
        scale = 1.0 if alpha is None else float(alpha) / kind.rank(adapter.weights)
        weights[f"{path}.strength"] = like.new_full((), scale * adapter.multiplier, dtype=torch.float32)
        path = f"{path}.layer"
    return path, weights


def _adapters(module: nn.Module) -> list[Any] | None:
    """The adapters on ``module`` in bypass mode, the outermost first; None where there is another ``forward`` too."""
    found: list[Any] = []
    hooks: set[Any] = set()
    forward: Any = module.__dict__.get("forward")
    while not is_class_forward(module, forward):
        hook: Any = getattr(forward, "__self__", None)
        if type(hook) is not BypassForwardHook or forward.__func__ is not _BYPASS_FORWARD:
            return None
        # The host removes the first of two on a layer first, after which one may wrap itself.
        if hook.module is not module or hook in hooks:
            return None
        hooks.add(hook)
        found.append(hook.adapter)
        forward = hook.original_forward
    return found


def _structure(adapter: Any) -> tuple[type, tuple[int | None, ...]]:
    kind = type(adapter)
    layer = _LAYERS.get(kind)
    if layer is None:
        raise NotHoistable(
            f"{kind.__name__} in bypass mode is not known to HotPath. Load the LoRA with a node without bypass"
        )
    methods = [getattr(getattr(adapter, name), "__func__", None) for name in _METHOD_NAMES]
    if methods != _METHODS[kind] or not isinstance(adapter.multiplier, Real):
        raise NotHoistable(f"{kind.__name__} in bypass mode was altered by another pack")
    factors = (adapter.weights[slot] for slot, _ in layer.factors.values())
    return kind, tuple(None if factor is None else factor.ndim for factor in factors)
