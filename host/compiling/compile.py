"""Compile the repeated blocks of a MODEL while it samples."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor, nn

from ...hotpath.attention import attention_scope
from ...hotpath.compiled import Bind, Region
from ...hotpath.failures import RegionFailed, belongs_to_host
from ...hotpath.internals.state import any_global_hook
from ...hotpath.settings import CompileSettings
from ...hotpath.template import NotHoistable
from ...hotpath.waiting import while_waiting
from ..families import require_family, selected_blocks
from ..families.kinds import BlockKind
from ..model_call import ModelCall
from ..models import WHOLE_MODEL, compiled_by_another, is_compiled, require_model
from ..residency.arriving import Arrivals
from ..residency.offload import KEY as OFFLOAD_KEY
from ..residency.weights import block_weights, in_place, is_away
from ..telling.accounting import Route, Untouched, block_name, routed
from ..telling.ledger import Ledger
from ..telling.progress import NodeText
from .artifacts import require_kept, unsupported
from .boundary import GettingCode, MemoryMayEnd
from .call import Call
from .hosts_compiler import hosts_compiler_off
from .known import KnownBlocks
from .plans import Plans
from .regions import RegionSource
from .replay import NOT_AHEAD, Replays, unsafe_weights
from .warming import Arguments, Example
from .when import LATER, When, check_machine

WRAPPER_KEY = "hotpath_compile"
_WHOLE = "another node compiles the whole model; remove one of the two"
_SINGLE = "another node compiles this block by itself; remove one of the two"
# What each compile node last made, by node id.
LATEST: weakref.WeakValueDictionary[str | None, CompiledBlocks] = weakref.WeakValueDictionary()


def compile_repeated_blocks(
    model: ModelPatcher,
    settings: CompileSettings,
    double_blocks: str,
    single_blocks: str,
    on_failure: str,
    text: NodeText,
    cache: str = "off",
    cuda_graphs: str = "auto",
    when: str = "",
    other_blocks: str = "all",
) -> ModelPatcher:
    """A clone of ``model`` whose selected blocks run compiled; ``model`` itself stays as it is.

    ``on_failure``: ``eager`` samples without what can't be compiled and says so, ``error`` ends the prompt. ``cache``:
    ``auto`` keeps what is compiled for the next start of ComfyUI, ``off`` neither keeps nor looks for it.
    ``cuda_graphs``: one of ``replay.CHOICES``. ``when``: ``wait`` begins to compile at once, and the first step waits
    for it; ``background`` has prompts sample eager until another process has compiled; without either, the first step
    compiles.

    A later call on the result replaces the settings of an earlier one.

    Raises:
        ValueError: ``model`` is no MODEL or has no repeated blocks, a block is outside it, nothing is selected, or
            nothing can be kept and ``when`` is ``background``.
    """
    require_model(model)
    require_family(model, "compile")
    selection = {"double_blocks": double_blocks, "single_blocks": single_blocks, "blocks": other_blocks}
    selected = selected_blocks(model.get_model_object("diffusion_model"), selection)
    if not any(selected.values()):
        used = {kind.selected_by: repr(selection[kind.selected_by]) for kind in selected}
        raise ValueError(
            f"{', '.join(used)}: {' and '.join(used.values())} leave no block of this model to compile. Set one of "
            "them to 'all' or a range, or bypass this node."
        )
    if when == "background":
        require_kept(settings, model.load_device, cache)
    compiled = model.clone()
    blocks = CompiledBlocks(settings, selected, on_failure, text, cache, cuda_graphs, when)
    compiled.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, WRAPPER_KEY)
    compiled.add_wrapper_with_key(WrappersMP.APPLY_MODEL, WRAPPER_KEY, blocks)
    for event, callback in (
        (CallbacksMP.ON_PRE_RUN, blocks.start),
        (CallbacksMP.ON_CLEANUP, blocks.replays.end),
        (CallbacksMP.ON_DETACH, blocks.unload),
    ):
        compiled.remove_callbacks_with_key(event, WRAPPER_KEY)
        compiled.add_callback_with_key(event, WRAPPER_KEY, callback)
    if when and cache == "auto" and not unsupported(settings, model.load_device):
        blocks.when.begin(model, selected, blocks.plans.of, blocks.prepare)
    return compiled


def compiled_blocks(model: ModelPatcher) -> CompiledBlocks | None:
    """What Compile Repeated Blocks put on ``model``; None without it."""
    found = model.get_wrappers(WrappersMP.APPLY_MODEL, WRAPPER_KEY)
    return found[0] if found else None


class CompiledBlocks(Ledger):
    """The wrapper around ``apply_model``: for the length of one call the selected blocks run as regions.

    Blocks are those of the model that executes, which may not be the one the node saw (multi-GPU and non-dynamic
    clones), so one object may serve several models, in several threads, and keeps none of them alive. ``selected`` are
    indices of blocks by kind.
    """

    def __init__(
        self,
        settings: CompileSettings,
        selected: Mapping[BlockKind, Collection[int]],
        on_failure: str,
        text: NodeText,
        cache: str = "off",
        cuda_graphs: str = "auto",
        when: str = "",
    ) -> None:
        super().__init__(settings, text, Replays(settings, cuda_graphs))
        self.selected = selected
        self.on_failure = on_failure
        self._source = RegionSource(settings, cache)
        self.plans = Plans(fuses=settings.backend == "inductor")
        self._known = KnownBlocks()
        self._arrivals = Arrivals()
        self._offloads = False
        self._blocks: weakref.WeakKeyDictionary[nn.Module, dict[str, list[Any]]] = weakref.WeakKeyDictionary()
        self.when = When(when)
        if earlier := LATEST.get(text.node_id):
            earlier.when.cancel()
        LATEST[text.node_id] = self

    def start(self, patcher: ModelPatcher) -> None:
        """A sampling run begins: what failed before is tried again, and blocks are those that are there now."""
        self.start_run()
        self._source.retry()
        self.plans.look_again()
        self.replays.start()
        self.when.begin_run()
        diffusion_model: Any = patcher.model.diffusion_model
        blocks = {kind.name: kind.blocks(diffusion_model) for kind in self.selected}
        self._blocks[diffusion_model] = {name: [weakref.ref(it) for it in each] for name, each in blocks.items()}
        self._offloads = bool(patcher.get_wrappers(WrappersMP.APPLY_MODEL, OFFLOAD_KEY))
        self._arrivals.start(patcher, functools.partial(self.plans.layers, self.selected, diffusion_model))

    def unload(self, patcher: ModelPatcher, unpatch_all: bool) -> None:
        """The host unloads the model, for good when ``unpatch_all``, and wants memory for another."""
        if unpatch_all:
            self.replays.drop()
            self._arrivals.drop(patcher.load_device)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A wrapper of the host's ``apply_model``; arguments are passed on as they are, conditioning on the device."""
        asked, call = ModelCall.read(*args, **kwargs), Call(self.selected)
        device, spent, kind = asked.x.device, self.seconds, asked.structure
        self.replays.begin(call.graphs, device, asked.options)
        asked.move_conditioning()

        def step() -> Any:
            out = asked.run()
            call.account.close(asked.options)
            return out

        def counts() -> bool:
            # What a step took that compiled something says nothing of the next.
            return call.account.whole and self.seconds == spent

        others = compiled_by_another(asked.options)
        with self.text.guarded(), hosts_compiler_off():
            if WHOLE_MODEL in others:
                self.tell(_WHOLE, "the model")
                call.account.all_eager(_WHOLE)
                out = step()
            else:
                with self._swapped(asked.model.diffusion_model, call, others):
                    out = self.clock.time(device, step, (kind, call.account), counts)
        LATER.begin()
        self.close(call.account)
        self.show(asked.model, call.account, kind)
        return out

    @contextmanager
    def _swapped(self, diffusion_model: nn.Module, call: Call, others: Collection[str]) -> Iterator[None]:
        """Route the selected blocks, but those that ``others`` names as compiled by another node, through regions."""
        runs: dict[nn.Module, Callable[..., Any]] = {}
        for kind, indices in self.selected.items():
            blocks = self._blocks_of(kind, diffusion_model)
            for index in indices:
                block = blocks[index] if index < len(blocks) else None
                if block is None:
                    continue
                path = f"diffusion_model.{kind.attribute}.{index}."
                try:
                    if is_compiled(block) or any(f"{other}.".startswith(path) for other in others):
                        raise NotHoistable(_SINGLE)
                    kind.refuse_foreign(block)
                except NotHoistable as reason:
                    self._note_eager(call, kind, index, str(reason), entered=False)
                    continue
                if not self.regions:
                    self.plans.ahead(kind, block)
                runs[block] = Route(self._run_block, call, kind, index, block)
        call.begin(diffusion_model, runs)
        with routed(runs), call.stretches.of_this_thread():
            yield

    def _blocks_of(self, kind: BlockKind, diffusion_model: nn.Module) -> list[nn.Module | None]:
        """The blocks of ``kind``; those of the run's start where another node has put fewer in their place."""
        blocks = kind.blocks(diffusion_model)
        before = self._blocks.get(diffusion_model, {}).get(kind.name, [])
        return [block() for block in before] if len(blocks) < len(before) else list(blocks)

    def _run_block(self, call: Call, kind: BlockKind, index: int, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with Untouched(block) as routed_here:
            if torch.compiler.is_compiling():
                return block.forward(*args, **kwargs)
            comfy.model_management.throw_exception_if_processing_interrupted()
            try:
                return self._run_as_region(call, kind, index, block, not routed_here, args, kwargs)
            except NotHoistable as reason:
                self._note_eager(call, kind, index, str(reason))
            except RegionFailed as failure:
                # One that a patch raised, around whose attention the block runs, has nothing to do with this block.
                if belongs_to_host(failure):
                    raise
                if self.on_failure == "error":
                    if failure.may_be_blocks_own:
                        # Then it is to be told in its own words.
                        block.forward(*args, **kwargs)
                    raise
                self._note_eager(call, kind, index, str(failure))
            return block.forward(*args, **kwargs)

    def _run_as_region(
        self, call: Call, kind: BlockKind, index: int, block: nn.Module, streamed: bool, args: Any, kwargs: Any
    ) -> Any:
        """Run the block compiled.

        What is raised before it runs comes from getting its code, whoever raises it, and what it raises itself when it
        runs is left as it is.

        Raises:
            NotHoistable, RegionFailed: it can't run so. Its inputs are as they were.
        """
        getting_code = GettingCode(f"{kind.name} block")
        with ExitStack() as scope:
            with getting_code:
                inputs = dict(zip(kind.parameters[: len(args)], args, strict=True))
                inputs.update(kwargs)
                activation = inputs[kind.activation]
                if torch.is_grad_enabled():
                    raise NotHoistable("gradients are being recorded, and weights enter a region without theirs")
                if any_global_hook():
                    raise NotHoistable("a hook is around every module, and a region has modules of its own")
                options = inputs.get("transformer_options", {})
                kind.refuse_unknown(options)
                attend = kind.interface.attention_for(options, block)
                call.enter(attend, options)
                plan, layers = self.plans.of(kind, block)
            if plan.given:
                vector = kind.interface.vector
                inputs[vector] = {path: block.get_submodule(path)(inputs[vector]) for path in plan.given}
            with getting_code:
                taken = kind.interface.region_inputs(inputs, activation, self.settings.dynamic != "never")
                bind = kind.interface.bind_for(attend, activation)
                way = bind, torch.is_inference_mode_enabled(), activation.device
                known = None if streamed else self._known.found(plan, way, layers, taken, scope)
            replay = functools.partial(self.replays.run, call.graphs, kind.name, index, plan, layers, attend)
            if attend is not None:
                scope.enter_context(attention_scope(attend))
            if known is not None:
                out = replay(streamed, known.graph, known.weights, taken, known.addresses)
                call.account.ran_compiled(kind.name, index)
                return out
            with getting_code:
                streamed |= (arrived := scope.enter_context(in_place(layers, activation, self._arrivals.arriving)))
                if not self._offloads and (arrived or any(is_away(it, activation.device) for _, it, _ in layers)):
                    call.account.weights_copied(kind.name, index)
                # What other packs' attention did can't be done twice.
                if arrived and attend is None and self.on_failure == "eager":
                    scope.enter_context(MemoryMayEnd(taken))
                weights = block_weights(layers, activation)
                if len(weights) != plan.weights:
                    raise NotHoistable("a layer has other weights than when it was planned")
                like = plan.key, *way
                region = call.regions.get(like)
                # For whatever else is in the key of a region its graphs have guards.
                graph = None if region is None else region.proven_graph(weights, taken)
                if graph is None:
                    given = Arguments(kind, plan, attend, weights, taken)
                    region, key, check = self._region(given, bind)
                    check = self.when.settle(region, given, functools.partial(self._announce, region), check)
                    graph = region.proven_graph(weights, taken)
                    dims = given.token_dims
            assert region is not None
            call.regions[like] = region
            if graph is not None:
                out = replay(streamed, graph, weights, taken)
                self.regions.setdefault(region)
                if not streamed and unsafe_weights(layers, activation.device) is None:
                    self._known.note(plan, way, layers, graph, weights)
            else:
                interrupt = comfy.model_management.throw_exception_if_processing_interrupted
                with self._source.failing_once(key), while_waiting(interrupt):
                    out, cost = region.run(weights, taken, dims, check)
                self.note_cost(region, cost)
                if not region.ahead and self.replays.records_on(activation.device):
                    call.graphs.note(kind.name, index, NOT_AHEAD)
                if not (region.stats.graphs or region.stats.loaded):
                    why = region.stats.breaks[-1] if region.stats.breaks else "no part of it can be traced"
                    self._note_eager(call, kind, index, f"PyTorch compiled nothing of it: {why}")
                    return out
        call.account.ran_compiled(kind.name, index)
        return out

    def prepare(self, example: Example, weights: dict[str, Tensor], inputs: dict[str, Any]) -> None:
        """Have compiled what a block like ``example`` will need, ahead of it."""
        kind, activation = example.kind, inputs[example.kind.activation]
        taken = kind.interface.region_inputs(inputs, activation, self.settings.dynamic != "never")
        given = Arguments(kind, example.plan, example.attend, weights, taken)
        region, _, _ = self._region(given, kind.interface.bind_for(given.attend, activation))
        self.when.get_ready(region, given, functools.partial(check_machine, region, given.device, given.dtypes))

    def _region(self, given: Arguments, bind: Bind) -> tuple[Region, Hashable, Callable[[], None]]:
        """The region that the block runs as, its key, and what to do before it is compiled.

        Raises:
            NotHoistable, RegionFailed: as ``RegionSource.of``.
        """
        # What is recorded needs guards that can be asked, as those of graphs compiled ahead of time can.
        region, key = self._source.of(given, bind, ahead=self.replays.records_on(given.device))

        def check() -> None:
            if not region.compiled:
                check_machine(region, given.device, given.dtypes)
            self._announce(region)

        return region, key, check

    def _announce(self, region: Region) -> None:
        number = len(self.regions) + 1
        total = max(number, self.plans.structures())
        done, place = 2 * (" again",) if region.compiled else (f" ({number}/{total})", f" ({number} of {total})")
        self.text.show(f"compiling {region.name} region{done} ...", "compiling", region=f"{region.name}{place}")

    def _note_eager(self, call: Call, kind: BlockKind, index: int, reason: str, entered: bool = True) -> None:
        call.stretches.goes_on(False)
        self.tell(reason, block_name(kind.name, index))
        call.account.ran_eager(kind.name, index, reason, entered)
