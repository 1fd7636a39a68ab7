"""Compiled regions: one ``torch.compile`` of a template, run with any block's weights.

    region(weights, inputs) -> activations

Regions hold no weights, so they outlive the MODEL that first needed them and serve the next one of the same
structure. They live in a bounded store for the whole process.
"""

from __future__ import annotations

import functools
import itertools
import logging
import time
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from .artifacts import Kept, NotKept
from .counters import breaks_since, breaks_so_far, graphs_so_far, guard_failures, why_compiled_again
from .failures import RegionFailed, Uncompiled, belongs_to_host, failure_of, reason_of, went_through
from .first_run import first_run
from .graphs import Graph, compile_graph, load_graph
from .inductor import may_lack_instructions, region_options
from .internals.compiler import forget_compiler, trust_compiler
from .limits import compiling
from .memory import peak_bytes
from .placing import call_placed, places_in
from .reasons import plain_reason
from .settings import CompileSettings
from .starting import start_workers
from .stats import NO_COST, Cost, RegionStats
from .turns import Turn
from .values import Copies, bounded, device_of, mark_dynamic, tensors_in, varying_dims

log = logging.getLogger(__name__)
_NUMBERS = itertools.count()

Bind = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Turns a region's inputs into the keyword arguments of the block's forward. Traced with the region."""


class Region:
    """One compiled function for all blocks that share a structure, settings and kind of inputs.

    ``streams`` is how many inputs have a token count of their own. With ``kept``, graphs are compiled ahead of time
    and outlive the process, unless it is ``NotKept``; ``later`` is given the work of storing them.
    """

    def __init__(
        self,
        name: str,
        template: nn.Module,
        bind: Bind,
        settings: CompileSettings,
        streams: int = 1,
        kept: Kept | NotKept | None = None,
        later: Callable[[Callable[[], None]], None] = lambda work: work(),
    ) -> None:
        self.name = name
        self.bind = bind
        self.settings = settings
        self.streams = streams
        self.stats = RegionStats()
        self.compiled = False
        places, any_batch = places_in(template), settings.dynamic == "always"

        def region(weights: dict[str, Tensor], inputs: dict[str, Any]) -> Any:
            if not torch.compiler.is_compiling():
                raise Uncompiled
            return call_placed(template, places, weights, bind(bounded(inputs) if any_batch else inputs))

        self._region: Any = region
        self._dynamic = False if settings.dynamic == "never" else None
        self._use(probe=False)
        self._limit = settings.graph_limit(streams)
        self._kept = kept
        self._turn = Turn(self.kept.path if self.kept else None)
        self._closure = {"template": template, "bind": bind, "places": places, "any_batch": any_batch}
        self._graphs: list[Graph] = []
        self._guard_failure = ""
        self._varying = varying_dims(template)
        self._later = later
        # Compiled ahead of the first run, each with the facts that it was made under.
        self._prepared: list[tuple[Graph, Mapping[str, str]]] = []
        self._ahead = NO_COST

    def _use(self, probe: bool) -> None:
        """Have graphs made with Inductor's options from now on, and forget those that Dynamo holds; see
        ``region_options``."""
        inductor = self.settings.backend == "inductor"
        self._options = region_options(self.settings.mode, probe) if inductor else {}
        self._probed = probe or not inductor
        # Dynamo keeps its cache and its recompile limit per code object, and per name which sizes it has seen vary, so
        # that a model of another width would make the sizes of weights dynamic. Each region gets both of its own.
        own, name = self._region, f"hotpath_{self.name.replace(' ', '_')}_{next(_NUMBERS)}"
        self._code = own.__code__.replace(co_name=name)
        self._function = types.FunctionType(self._code, own.__globals__, name, None, own.__closure__)
        self._compiled_before = torch._dynamo.run(self._function)
        self._has_run = False
        self.__dict__.pop("_compiled", None)

    @functools.cached_property
    def _compiled(self) -> Callable[[dict[str, Tensor], dict[str, Any]], Any]:
        # Made where it is called: this alone imports most of the compiler.
        chosen, options, dynamic = self.settings, self._options, self._dynamic
        return torch.compile(
            self._function, backend=chosen.backend, options=options, fullgraph=chosen.fullgraph, dynamic=dynamic
        )

    @property
    def kept(self) -> Kept | None:
        """Where its graphs are kept; None when they are not."""
        return None if isinstance(self._kept, NotKept) else self._kept

    @property
    def ahead(self) -> bool:
        """Whether its graphs are compiled ahead of time, so that their guards can be asked."""
        return self._kept is not None

    def loads(self, weights: dict[str, Tensor], inputs: dict[str, Any]) -> bool:
        """Load what an earlier process compiled; whether it accepts these arguments, so that nothing is compiled."""
        kept = self.kept
        if kept is None:
            return False
        started = time.perf_counter()
        try:
            stored = [] if torch._dynamo.config.disable else kept.read()
            self._graphs = [load_graph(data, self._function, self._closure, kept.store.folder) for data in stored]
        # Whatever is wrong with what was stored, it can be made again.
        except Exception as error:
            self._graphs = []
            kept.refuse(reason_of(error))
        self.stats.loaded = len(self._graphs)
        self.compiled = self.graph_for(weights, inputs) is not None
        if self._graphs:
            if not self.compiled:
                kept.state = f"miss: {plain_reason(self._graphs[0].why_not(weights, inputs))}"
            self.stats.load_seconds = time.perf_counter() - started
            log.info("%s region loaded in %.2f s", self.name, self.stats.load_seconds)
        self.stats.cache = kept.state
        return self.compiled

    def graph_for(self, weights: dict[str, Tensor], inputs: dict[str, Any]) -> Graph | None:
        """A graph compiled ahead of time whose guards hold for these arguments, which runs the block as it is."""
        for graph in self._graphs:
            if graph.accepts(weights, inputs):
                return graph
        return None

    def _compiling(self) -> AbstractContextManager[None]:
        return compiling(self._limit, any_size=self.settings.dynamic == "always")

    def find(self, weights: dict[str, Tensor], inputs: dict[str, Any]) -> bool:
        """Whether there is code for these arguments; what is stored by now is loaded where there was none."""
        with self._compiling():
            if self.graph_for(weights, inputs) is not None:
                return True
            if found := self.loads(weights, inputs):
                self._ahead = Cost(self._ahead.seconds, self.stats.load_seconds)
            return found

    def prepare(
        self,
        weights: dict[str, Tensor],
        inputs: dict[str, Any],
        dynamic_dims: Mapping[str, Sequence[int]],
        before_compiling: Callable[[], None] = lambda: None,
    ) -> None:
        """Load or compile what ``run`` would need for these arguments, whose data is not looked at; nothing runs.
        Without ``kept`` the compiler is imported. Raises what compiling raises; ``run`` then tries anew."""
        with self._compiling():
            if self._kept is None:
                _ = self._compiled
                return
            if self.graph_for(weights, inputs) is not None or (not self._graphs and self.find(weights, inputs)):
                return
            before_compiling()
            started, graphs = time.perf_counter(), graphs_so_far()
            mark_dynamic(weights, inputs, self._varying, dynamic_dims, self.settings.dynamic)
            if not self._probed:
                trust_compiler()
            graph, facts = self._compile_ahead(weights, inputs)
            if graph is None or facts is None:
                return
            self._prepared.append((graph, facts))
            self.compiled = True
            seconds = time.perf_counter() - started
            self.stats.seconds += seconds
            self.stats.graphs += graphs_so_far() - graphs
            self._ahead = Cost(self._ahead.seconds + seconds, self._ahead.load_seconds)
            log.info("%s region compiled ahead in %.1f s", self.name, seconds)

    def keep_prepared(self) -> None:
        """Keep what ``prepare`` compiled and what has not run, with all variants of its kernels."""
        prepared, self._prepared = self._prepared, []
        for graph, facts in prepared:
            self._keep(graph, facts)

    def proven_graph(self, weights: dict[str, Tensor], inputs: dict[str, Any]) -> Graph | None:
        """``graph_for`` these arguments where it has run before: what it raises is no fault of its code."""
        graph = self.graph_for(weights, inputs)
        return graph if graph is not None and graph.has_run else None

    def __call__(
        self, weights: dict[str, Tensor], inputs: dict[str, Any], dynamic_dims: Mapping[str, Sequence[int]]
    ) -> Any:
        """What ``run`` gives, without its cost."""
        return self.run(weights, inputs, dynamic_dims)[0]

    def run(
        self,
        weights: dict[str, Tensor],
        inputs: dict[str, Any],
        dynamic_dims: Mapping[str, Sequence[int]],
        before_compiling: Callable[[], None] = lambda: None,
    ) -> tuple[Any, Cost]:
        """Run the block; what it gives, and what that cost.

        Args:
            weights: the block's, by the template's parameter names, on the device and in the dtype to compute in.
            inputs: tensors, None, or lists, tuples and dataclasses of them.
            dynamic_dims: name of a tensor among the inputs -> its token dimensions.
            before_compiling: called each time before something is compiled, but with ``fullgraph`` off the first time
                alone. What it raises ends the call.

        Raises:
            RegionFailed: no code could be had, or it failed when it first ran. The inputs are as they were.
        """
        with suppress(Uncompiled):
            return self._run_proven(weights, inputs, dynamic_dims), NO_COST
        # Not before, since another thread's compiling may take long.
        with self._compiling(), first_run(inputs) as first, self._turn:
            try:
                out, cost = self._run_proven(weights, inputs, dynamic_dims), NO_COST
            except Uncompiled:
                out, cost = self._run_new(weights, inputs, before_compiling)
        return (self._run_proven(weights, inputs, dynamic_dims) if first.again() else out), cost

    def _run_proven(
        self, weights: dict[str, Tensor], inputs: dict[str, Any], dynamic_dims: Mapping[str, Sequence[int]]
    ) -> Any:
        """Run the block by code that has run before, whose errors are none of ours. Raises Uncompiled without any."""
        graph = self.proven_graph(weights, inputs)
        if graph is not None:
            return graph(weights, inputs)
        mark_dynamic(weights, inputs, self._varying, dynamic_dims, self.settings.dynamic)
        if self._has_run and self.settings.fullgraph:
            return self._compiled_before(weights, inputs)
        raise Uncompiled

    def _run_new(
        self, weights: dict[str, Tensor], inputs: dict[str, Any], before_compiling: Callable[[], None]
    ) -> tuple[Any, Cost]:
        """Run the block by code that is not known to work, which is loaded or compiled where it is missing."""
        ahead, self._ahead = self._ahead, NO_COST
        load_seconds = ahead.load_seconds
        try:
            if not self.compiled and not self._graphs and self.loads(weights, inputs):
                load_seconds = self.stats.load_seconds
            graph, first = self.graph_for(weights, inputs), not self.compiled
            graphs, breaks = graphs_so_far(), breaks_so_far()
            peak = peak_bytes(device_of(inputs)) if first else 0
            self._guard_failure, failures = "", len(guard_failures(self._code))
            if graph is None and (first or self.settings.fullgraph):
                before_compiling()
                if not self._graphs and self._turn.take() and self.loads(weights, inputs):
                    graph, first, load_seconds = self.graph_for(weights, inputs), False, self.stats.load_seconds
            started = time.perf_counter()
            # Blocks update their inputs in place, and what fails may have done so by half.
            copies = Copies(inputs)
        except RegionFailed:
            raise
        except Exception as error:
            raise failure_of(self.name, error) from error
        try:
            out = self._run_once(graph, weights, inputs)
        except RegionFailed:
            copies.restore()
            raise
        except FailOnRecompileLimitHit as error:
            copies.restore()
            self.stats.limit_reached = True
            last = why_compiled_again(self._code, failures, self._guard_failure)
            reason = f"the limit of {self._limit} graphs was reached; last {last}"
            raise RegionFailed(self.name, reason) from error
        made = graphs_so_far() - graphs
        if not made and not first:
            return out, Cost(ahead.seconds, load_seconds)
        seconds = time.perf_counter() - started
        self.stats.seconds += seconds
        self.stats.graphs += made
        for broke in breaks_since(breaks):
            self.stats.breaks.append(broke)
            log.warning("%s region has a graph break: %s", self.name, broke)
        if first:
            self.stats.peak_growth = peak_bytes(device_of(inputs)) - peak
            self.compiled = True
            log.info("%s region compiled in %.1f s (%s)", self.name, seconds, self.settings.backend)
            return out, Cost(seconds, load_seconds)
        reason = why_compiled_again(self._code, failures, self._guard_failure)
        self.stats.recompiles.append(reason)
        log.info("%s region compiled again in %.1f s: %s", self.name, seconds, reason)
        return out, Cost(seconds, load_seconds, (reason,))

    def _run_once(self, graph: Graph | None, weights: dict[str, Tensor], inputs: dict[str, Any]) -> Any:
        """Run ``graph``, or what is compiled here, for the first time. Raises RegionFailed where that failed, whose
        code is not used again, or FailOnRecompileLimitHit where there are as many graphs as there may be."""
        facts = None
        try:
            if graph is None and not self._probed:
                trust_compiler()
            if graph is None and self._kept is not None:
                graph, facts = self._compile_ahead(weights, inputs)
            if graph is None:
                out = self._compiled(weights, inputs)
                self._has_run = True
                return out
        except FailOnRecompileLimitHit:
            raise
        except Exception as error:
            ran = went_through(error, self._code.co_name)
            if ran and belongs_to_host(error):
                raise
            lacking = not ran and not self._probed and may_lack_instructions(error)
            if lacking:
                forget_compiler()
            self._use(probe=self._probed or lacking)
            if lacking:
                return self._run_once(None, weights, inputs)
            raise failure_of(self.name, error, ran) from error
        try:
            out = graph(weights, inputs)
        except Exception as error:
            if belongs_to_host(error):
                raise
            self._graphs.remove(graph)
            raise failure_of(self.name, error, ran=True) from error
        graph.has_run = True
        for prepared in [prepared for prepared in self._prepared if prepared[0] is graph]:
            self._prepared.remove(prepared)
            facts = prepared[1]
        if facts is not None:
            # Only now, as Triton chooses between variants of a kernel when it first runs.
            self._later(self._turn.then(functools.partial(self._keep, graph, facts)))
        return out

    def _compile_ahead(
        self, weights: dict[str, Tensor], inputs: dict[str, Any]
    ) -> tuple[Graph | None, Mapping[str, str] | None]:
        """One more graph, and the facts that it was made under; None when only the ordinary way is left."""
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
        assert self._kept is not None
        facts = None
        try:
            start_workers(device_of(inputs))
            facts = self._kept.facts()
            made = compile_graph(self._function, self._closure, weights, inputs, sizes, self._options, self._dynamic)
        except Exception as reason:
            # What the store raises costs no more than what is kept, whatever it is.
            if facts is not None and isinstance(reason, (TorchDynamoException, FailOnRecompileLimitHit)):
                raise
            self._keep_no_more(reason_of(reason))
            return None, None
        self._graphs.append(made)
        return made, facts

    def _keep(self, made: Graph, facts: Mapping[str, str]) -> None:
        if (kept := self.kept) is None:
            return
        try:
            with compiling():
                graph = made.to_bytes()
            kept.add(graph, facts)
            self.stats.cache = kept.state
        # The block has run; what can't be kept is compiled again at the next start.
        except Exception as error:
            self._keep_no_more(reason_of(error))

    def _keep_no_more(self, reason: str) -> None:
        self.stats.cache = f"off: {reason}"
        if self.kept is not None:
            log.warning("%s region can't be kept for the next start: %s", self.name, reason)
        self._kept = None
