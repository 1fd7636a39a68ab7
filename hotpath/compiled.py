"""Compiled regions: one ``torch.compile`` of a template, run with any block's weights.

    region(weights, inputs) -> activations

Regions hold no weights, so they outlive the MODEL that first needed them and serve the next one of the same
structure. They live in a bounded store for the whole process.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
import types
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.func import functional_call

from .artifacts import Kept
from .counters import breaks_since, breaks_so_far, graphs_so_far, last_guard_failure, source_line
from .graphs import Graph, NotAhead, compile_graph, load_graph
from .inductor import forget_compiler, may_lack_instructions, region_options, trust_compiler
from .limits import graph_limit
from .memory import peak_bytes
from .reasons import plain_reason

log = logging.getLogger(__name__)

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
DYNAMIC = ("auto", "always", "never")
CUDA_GRAPH_MODES = frozenset({"reduce-overhead", "max-autotune"})
_NUMBERS = itertools.count()

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

    def graph_limit(self, streams: int) -> int:
        """How many graphs a region may have before something must be wrong.

        Expected are one for the first batch size (``auto``), one for any, and as Dynamo gives a dimension of size 1 a
        graph of its own, one for each dynamic dimension that may be 1. Twice that, since graphs depend on switches
        of the process too, such as TF32, which a node may turn.

        Args:
            streams: how many inputs have a token count of their own.
        """
        if self.dynamic == "never":
            return 2
        batches = 3 if self.dynamic == "auto" else 2
        return 2 * batches * 2**streams


@dataclass
class RegionStats:
    """What one region has cost so far.

    ``seconds`` is wall time of the calls that compiled, and ``peak_growth`` how many bytes those calls raised the peak
    memory of the device (on a CPU, of this process). ``breaks`` and ``recompiles`` are the reasons for graph breaks
    and for all graphs after the first, in plain words. ``loaded`` graphs were compiled by an earlier process, and
    ``cache`` says what came of looking for them.
    """

    graphs: int = 0
    seconds: float = 0.0
    loaded: int = 0
    load_seconds: float = 0.0
    cache: str = "off"
    peak_growth: int = 0
    limit_reached: bool = False
    breaks: list[str] = field(default_factory=list)
    recompiles: list[str] = field(default_factory=list)


class RegionFailed(RuntimeError):
    """A region could not be compiled. With fullgraph, nothing of it has run. The cause is the compiler's own error."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"the {name} region could not be compiled: {reason}")


class Region:
    """One compiled function for all blocks that share a structure, settings and kind of inputs.

    ``streams`` is how many inputs have a token count of their own. With ``kept``, graphs are compiled ahead of time
    and outlive the process.
    """

    def __init__(
        self,
        name: str,
        template: nn.Module,
        bind: Bind,
        settings: CompileSettings,
        streams: int = 1,
        kept: Kept | None = None,
    ) -> None:
        self.name = name
        self.settings = settings
        self.stats = RegionStats()
        self.compiled = False

        def region(weights: dict[str, Tensor], inputs: dict[str, Any]) -> Any:
            # Defaults that are left out would be two more dependencies of each graph.
            return functional_call(template, weights, (), dict(bind(inputs)), tie_weights=True, strict=False)

        # Dynamo keeps its cache and its recompile limit per code object, and per name which sizes it has seen vary, so
        # that a model of another width would make weights of any size. Each region gets both of its own.
        self._code = region.__code__.replace(co_name=f"hotpath_{name.replace(' ', '_')}_{next(_NUMBERS)}")
        self._function = types.FunctionType(
            self._code, region.__globals__, self._code.co_name, None, region.__closure__
        )
        self._dynamic = False if settings.dynamic == "never" else None
        self._use(probe=False)
        self._limit = settings.graph_limit(streams)
        self._kept = kept
        self._closure = {"template": template, "bind": bind}
        self._graphs: list[Graph] = []
        self._guard_failure = ""

    def _use(self, probe: bool) -> None:
        """Have graphs made with Inductor's options from now on; see ``region_options``."""
        inductor = self.settings.backend == "inductor"
        self._options = region_options(self.settings.mode, probe) if inductor else {}
        self._probed = probe or not inductor
        self._compiled = torch.compile(
            self._function,
            backend=self.settings.backend,
            options=self._options,
            fullgraph=self.settings.fullgraph,
            dynamic=self._dynamic,
        )

    @property
    def kept(self) -> Kept | None:
        """Where its graphs are kept; None when they can't be."""
        return self._kept

    def loads(self, weights: dict[str, Tensor], inputs: dict[str, Any]) -> bool:
        """Load what an earlier process compiled; whether that does for these arguments, so that nothing is compiled."""
        if self._kept is None:
            return False
        started = time.perf_counter()
        try:
            stored = [] if torch._dynamo.config.disable else self._kept.read()
            self._graphs = [load_graph(data, self._function, self._closure, self._kept.store.folder) for data in stored]
        except NotAhead as reason:
            self._kept.refuse(str(reason))
        self.stats.loaded = len(self._graphs)
        self.compiled = self.graph_for(weights, inputs) is not None
        if self._graphs:
            if not self.compiled:
                self._kept.state = f"miss: {plain_reason(self._graphs[0].why_not(weights, inputs))}"
            self.stats.load_seconds = time.perf_counter() - started
            log.info("%s region loaded in %.2f s", self.name, self.stats.load_seconds)
        self.stats.cache = self._kept.state
        return self.compiled

    def graph_for(self, weights: dict[str, Tensor], inputs: dict[str, Any]) -> Graph | None:
        """A graph compiled ahead of time whose guards hold for these arguments, which runs the block as it is."""
        for graph in self._graphs:
            if graph.accepts(weights, inputs):
                return graph
        return None

    def __call__(
        self,
        weights: dict[str, Tensor],
        inputs: dict[str, Any],
        dynamic_dims: Mapping[str, Sequence[int]],
        announce: Callable[[], None] = lambda: None,
    ) -> Any:
        """Run the block.

        Args:
            weights: the block's weights by the template's parameter names, on the device and in the dtype to
                compute in.
            inputs: tensors, None, or lists, tuples and dataclasses of them.
            dynamic_dims: name of a tensor among the inputs -> its token dimensions.
            announce: called before it is compiled once more, where that is known before: with ``kept``.

        Raises:
            RegionFailed: it had to be compiled and could not be.
        """
        graph = self.graph_for(weights, inputs)
        if graph is not None:
            return graph(weights, inputs)
        if self._graphs and self._kept is not None:
            announce()
        # Newer PyTorch tells marked tensors from others, also in a graph that was compiled for either.
        if self.settings.dynamic != "never":
            for name, dims in dynamic_dims.items():
                torch._dynamo.maybe_mark_dynamic(inputs[name], list(dims))
        if self.settings.dynamic == "always":
            for tensor in tensors_in(inputs):
                if tensor.ndim:
                    torch._dynamo.maybe_mark_dynamic(tensor, 0)
        first, graphs, breaks = not self.compiled, graphs_so_far(), breaks_so_far()
        peak = peak_bytes(_device(inputs)) if first else 0
        started = time.perf_counter()
        out = self._run(weights, inputs)
        if first or graphs_so_far() != graphs:
            seconds = time.perf_counter() - started
            self.stats.seconds += seconds
            self.stats.graphs += graphs_so_far() - graphs
            for broke in breaks_since(breaks):
                self.stats.breaks.append(broke)
                log.warning("%s region has a graph break: %s", self.name, broke)
            if first:
                self.stats.peak_growth = peak_bytes(_device(inputs)) - peak
                self.compiled = True
                log.info("%s region compiled in %.1f s (%s)", self.name, seconds, self.settings.backend)
            else:
                reason = self._why_compiled_again()
                self.stats.recompiles.append(reason)
                log.info("%s region compiled again in %.1f s: %s", self.name, seconds, reason)
        return out

    def _why_compiled_again(self) -> str:
        return plain_reason(self._guard_failure or last_guard_failure(self._code))

    def _run(self, weights: dict[str, Tensor], inputs: dict[str, Any]) -> Any:
        if not self._probed:
            trust_compiler()
        try:
            if self._kept is not None:
                kept, facts = self._kept, self._kept.facts()
                made = self._compile_ahead(weights, inputs)
                if made is not None:
                    out = made(weights, inputs)
                    # Only now, as Triton chooses between variants of a kernel when it first runs.
                    self._keep(kept, made, facts)
                    return out
            with graph_limit(self._limit):
                return self._compiled(weights, inputs)
        except FailOnRecompileLimitHit as error:
            self.stats.limit_reached = True
            reason = f"the limit of {self._limit} graphs was reached; last {self._why_compiled_again()}"
            raise RegionFailed(self.name, reason) from error
        except TorchDynamoException as error:
            if not self._probed and may_lack_instructions(error):
                forget_compiler()
                self._use(probe=True)
                return self._run(weights, inputs)
            # What a backend raised says more than Dynamo's sentence around it.
            inner = getattr(error, "inner_exception", error)
            first_line = next(iter(str(inner).strip().splitlines()), type(inner).__name__)
            raise RegionFailed(self.name, first_line + source_line(getattr(error, "real_stack", ()))) from error

    def _compile_ahead(self, weights: dict[str, Tensor], inputs: dict[str, Any]) -> Graph | None:
        """One more graph; None when only the ordinary way is left."""
        if self._graphs:
            self._guard_failure = self._graphs[-1].why_not(weights, inputs)
            if len(self._graphs) >= self._limit:
                raise FailOnRecompileLimitHit
        tensors = tensors_in(inputs)
        sizes = tuple(tuple(tensor.shape) for tensor in tensors)
        if self.settings.dynamic == "auto":
            # As Dynamo does by itself: what has changed once may be anything.
            for graph in self._graphs:
                for tensor, before in zip(tensors, graph.sizes, strict=True):
                    changed = [dim for dim, size in enumerate(before) if size != tensor.shape[dim]]
                    torch._dynamo.maybe_mark_dynamic(tensor, changed)
        try:
            made = compile_graph(self._function, self._closure, weights, inputs, sizes, self._options, self._dynamic)
        except NotAhead as reason:
            self._keep_no_more(reason)
            return None
        self._graphs.append(made)
        return made

    def _keep(self, kept: Kept, made: Graph, facts: Mapping[str, str]) -> None:
        try:
            kept.add(made.to_bytes(), facts)
            self.stats.cache = kept.state
        except NotAhead as reason:
            self._keep_no_more(reason)

    def _keep_no_more(self, reason: NotAhead) -> None:
        self.stats.cache = f"off: {reason}"
        log.warning("%s region can't be kept for the next start: %s", self.name, reason)
        self._kept = None


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
        # And not detach(): of a Parameter made in inference mode and moved outside of it nothing could be done with it.
        return value.data
    # Its stubs leave out that set_ takes a tensor alone, which is the quickest.
    twin: Any = torch.empty(0, dtype=value.dtype, device=value.device)
    return twin.set_(value)


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in a nest of mappings, lists, tuples and dataclasses."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in _items(value) for tensor in tensors_in(item)]


def _device(inputs: Mapping[str, Any]) -> torch.device:
    return next(iter(tensors_in(inputs))).device


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
