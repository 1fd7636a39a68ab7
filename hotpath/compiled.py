"""Compiled regions: one ``torch.compile`` of a template, run with any block's weights.

    region(weights, inputs) -> activations

Regions hold no weights, so they outlive the MODEL that first needed them and serve the next one of the same
structure. They live in a bounded store for the whole process.
"""

from __future__ import annotations

import logging
import threading
import time
import types
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.func import functional_call

from .counters import Counts, graphs_so_far, last_guard_failure
from .reasons import plain_reason

log = logging.getLogger(__name__)

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
DYNAMIC = ("auto", "always", "never")
CUDA_GRAPH_MODES = frozenset({"reduce-overhead", "max-autotune"})

Bind = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Turns a region's inputs into the keyword arguments of the block's forward. Traced with the region."""


class CompileSettingsError(ValueError):
    """A combination of settings that can't work; the message says what to choose."""


@dataclass(frozen=True)
class CompileSettings:
    """Arguments of ``torch.compile``, plus how dimensions become dynamic.

    ``dynamic``: ``auto`` makes the token dimensions dynamic from the first graph on and lets Dynamo widen the
    batch when it changes; ``always`` makes the batch dynamic from the start too; ``never`` compiles one graph
    for each shape.

    Raises:
        CompileSettingsError: an unknown mode or ``dynamic``, or a mode given to a backend without modes.
    """

    mode: str = "default"
    backend: str = "inductor"
    fullgraph: bool = True
    dynamic: str = "auto"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise CompileSettingsError(f"mode: {self.mode!r} is unknown. Choose one of {', '.join(MODES)}.")
        if self.dynamic not in DYNAMIC:
            raise CompileSettingsError(f"dynamic: {self.dynamic!r} is unknown. Choose one of {', '.join(DYNAMIC)}.")
        if self.mode != "default" and self.backend != "inductor":
            raise CompileSettingsError(
                f"mode: {self.mode!r} is a setting of the inductor backend. With {self.backend!r} choose 'default'."
            )

    def check_device(self, device: torch.device) -> None:
        """Raise CompileSettingsError for a mode that can't be both right and faster on ``device``."""
        if device.type == "cuda" and self.mode in CUDA_GRAPH_MODES:
            raise CompileSettingsError(
                f"mode: {self.mode!r} records CUDA graphs. A region takes each block's weights as inputs, which a CUDA "
                "graph would copy whole at every replay. Choose 'default' or 'max-autotune-no-cudagraphs'."
            )


@dataclass
class RegionStats:
    """What one region has cost so far. ``seconds`` is wall time of the calls that compiled; ``recompiles`` are the
    reasons for all graphs after the first, in plain words."""

    graphs: int = 0
    breaks: int = 0
    seconds: float = 0.0
    recompiles: list[str] = field(default_factory=list)


class RegionFailed(RuntimeError):
    """A region could not be compiled. With fullgraph, nothing of it has run. The cause is the compiler's own error."""

    def __init__(self, name: str, cause: Exception) -> None:
        # What a backend raised says more than Dynamo's sentence around it.
        error = getattr(cause, "inner_exception", cause)
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        super().__init__(f"the {name} region could not be compiled: {reason}")


class Region:
    """One compiled function for all blocks that share a structure, settings and kind of inputs."""

    def __init__(self, name: str, template: nn.Module, bind: Bind, settings: CompileSettings) -> None:
        self.name = name
        self.settings = settings
        self.stats = RegionStats()
        self.compiled = False

        def region(weights: dict[str, Tensor], inputs: dict[str, Any]) -> Any:
            return functional_call(template, weights, (), dict(bind(inputs)))

        # Dynamo keeps its cache and its recompile limit per code object: each region gets one of its own.
        self._code = region.__code__.replace(co_name=f"hotpath_{name.replace(' ', '_')}")
        own = types.FunctionType(self._code, region.__globals__, self._code.co_name, None, region.__closure__)
        self._compiled = torch.compile(
            own,
            backend=settings.backend,
            mode=settings.mode if settings.backend == "inductor" else None,
            fullgraph=settings.fullgraph,
            dynamic=False if settings.dynamic == "never" else None,
        )
        # With fullgraph, Dynamo raises at its recompile limit; without, it would go on eager and say nothing.
        self._scope: AbstractContextManager[Any] = (
            nullcontext() if settings.fullgraph else dynamo_config.patch(fail_on_recompile_limit_hit=True)
        )

    def __call__(
        self, weights: dict[str, Tensor], inputs: dict[str, Any], dynamic_dims: Mapping[str, Sequence[int]]
    ) -> Any:
        """Run the block.

        Args:
            weights: the block's weights by the template's parameter names, on the device and in the dtype to
                compute in.
            inputs: tensors, None, or lists, tuples and dataclasses of them.
            dynamic_dims: name of a tensor among the inputs -> its token dimensions.

        Raises:
            RegionFailed: it had to be compiled and could not be.
        """
        if self.settings.dynamic != "never":
            for name, dims in dynamic_dims.items():
                torch._dynamo.maybe_mark_dynamic(inputs[name], list(dims))
        if self.settings.dynamic == "always":
            for tensor in tensors_in(inputs):
                if tensor.ndim:
                    torch._dynamo.maybe_mark_dynamic(tensor, 0)
        graphs = graphs_so_far()
        if self.compiled:
            started = time.perf_counter()
            out = self._run(weights, inputs)
            if graphs_so_far() != graphs:
                self._recompiled(graphs_so_far() - graphs, time.perf_counter() - started)
            return out
        return self._first_call(weights, inputs)

    def _first_call(self, weights: dict[str, Tensor], inputs: dict[str, Any]) -> Any:
        before, started = Counts.now(), time.perf_counter()
        out = self._run(weights, inputs)
        after = Counts.now()
        self.stats.graphs += after.graphs - before.graphs
        self.stats.breaks += after.breaks - before.breaks
        self.stats.seconds += time.perf_counter() - started
        self.compiled = True
        log.info("%s region compiled in %.1f s (%s)", self.name, self.stats.seconds, self.settings.backend)
        return out

    def _run(self, weights: dict[str, Tensor], inputs: dict[str, Any]) -> Any:
        try:
            with self._scope:
                return self._compiled(weights, inputs)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            raise RegionFailed(self.name, error) from error

    def _recompiled(self, graphs: int, seconds: float) -> None:
        reason = plain_reason(last_guard_failure(self._code))
        self.stats.graphs += graphs
        self.stats.seconds += seconds
        self.stats.recompiles.append(reason)
        log.warning("%s region compiled again in %.1f s: %s", self.name, seconds, reason)


class RegionStore:
    """Compiled regions by key, the least recently used dropped first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._regions: OrderedDict[Hashable, Region] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Region]) -> Region:
        with self._lock:
            region = self._regions.get(key)
            if region is None:
                region = self._regions[key] = make()
                while len(self._regions) > self.capacity:
                    self._regions.popitem(last=False)
            self._regions.move_to_end(key)
            return region

    def __iter__(self) -> Iterator[Region]:
        with self._lock:
            return iter(list(self._regions.values()))


def plain_tensor(value: Tensor) -> Tensor:
    """``value``'s memory as a tensor that is no Parameter and of the kind made now, in or out of inference mode.

    Dynamo guards on both, so that weights of one block would not fit the graph of another.
    """
    if value.is_inference() == torch.is_inference_mode_enabled():
        return value.detach()
    twin = torch.empty(0, dtype=value.dtype, device=value.device)
    return twin.set_(value.untyped_storage(), value.storage_offset(), value.shape, value.stride())


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in a nest of mappings, lists, tuples and dataclasses."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in _items(value) for tensor in tensors_in(item)]


def input_kinds(value: Any, shapes: bool) -> Hashable:
    """What a trace depends on in ``value``: structure, dtypes, devices and ranks; with ``shapes`` sizes too."""
    if isinstance(value, Tensor):
        kind = (value.dtype, value.device, value.ndim, value.is_inference())
        return (*kind, tuple(value.shape)) if shapes else kind
    if isinstance(value, Mapping):
        return tuple((name, input_kinds(item, shapes)) for name, item in value.items())
    return (type(value), *(input_kinds(item, shapes) for item in _items(value)))


def _items(value: Any) -> Sequence[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple)):
        return value
    if is_dataclass(value):
        return [getattr(value, item.name) for item in fields(value)]
    return ()
