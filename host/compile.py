"""Compile the repeated blocks of a MODEL while it samples."""

from __future__ import annotations

import functools
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from types import MappingProxyType
from typing import Any

import comfy.model_management
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrapperExecutor, WrappersMP
from torch import Tensor, nn

from ..hotpath.artifacts import FIRST_TIME
from ..hotpath.attention import Attend, attention_scope
from ..hotpath.compiled import Bind, CompileSettings, Region, RegionFailed, RegionStore, input_kinds
from ..hotpath.fingerprint import NotPortable
from ..hotpath.graphs import Graph
from ..hotpath.preflight import compile_problems
from ..hotpath.reasons import how_to_avoid
from ..hotpath.selection import select_blocks
from ..hotpath.template import Around, BlockPlan, NotHoistable, plan_block
from .artifacts import kept_region
from .eager_steps import eager_seconds, note_quickest, step_kind
from .families import kinds_of, require_family
from .families.kinds import BlockKind
from .models import compiles_whole_model, require_model, to_device
from .progress import NodeText, StepClock
from .replay import Replays
from .weights import Layers, block_weights, in_place, layer_states, plain_layers

log = logging.getLogger(__name__)

WRAPPER_KEY = "hotpath_compile"
# More blocks than this are counted rather than named.
_FEW = 3
REGIONS = RegionStore(capacity=64)
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
) -> ModelPatcher:
    """A clone of ``model`` whose selected blocks run compiled; ``model`` itself stays as it is.

    ``on_failure``: ``eager`` samples without what can't be compiled and says so, ``error`` ends the prompt. ``cache``:
    ``auto`` keeps what is compiled for the next start of ComfyUI, ``off`` neither keeps nor looks for it.
    ``cuda_graphs``: one of ``replay.CHOICES``.

    A later call on the result replaces the settings of an earlier one.

    Raises:
        ValueError: ``model`` is no MODEL or has no repeated blocks, a block is outside it, nothing is selected, or
            the mode can't work on the model's device.
    """
    require_model(model)
    require_family(model, "compile")
    diffusion_model = model.get_model_object("diffusion_model")
    selection = {"double_blocks": double_blocks, "single_blocks": single_blocks}
    if not any(blocks for _, blocks in selected_blocks(diffusion_model, selection)):
        raise ValueError(
            f"double_blocks, single_blocks: {double_blocks!r} and {single_blocks!r} leave no block of this model to "
            "compile. Set one of them to 'all' or a range, or bypass this node."
        )
    settings.check_device(model.load_device)
    compiled = model.clone()
    compiled.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, WRAPPER_KEY)
    blocks = CompiledBlocks(settings, selection, on_failure, text, cache, cuda_graphs)
    compiled.add_wrapper_with_key(WrappersMP.APPLY_MODEL, WRAPPER_KEY, blocks)
    callbacks = {
        CallbacksMP.ON_PRE_RUN: blocks.start,
        CallbacksMP.ON_CLEANUP: blocks.replays.end,
        CallbacksMP.ON_DETACH: blocks.replays.unload,
    }
    for event, callback in callbacks.items():
        compiled.remove_callbacks_with_key(event, WRAPPER_KEY)
        compiled.add_callback_with_key(event, WRAPPER_KEY, callback)
    return compiled


def selected_blocks(
    diffusion_model: nn.Module, selection: Mapping[str, str]
) -> list[tuple[BlockKind, dict[int, nn.Module]]]:
    """The kinds of blocks of the model, each with the blocks selected by index.

    Raises:
        ValueError: a block is outside the model.
    """
    found = []
    for kind in kinds_of(diffusion_model):
        blocks = kind.blocks(diffusion_model)
        chosen = select_blocks(kind.selected_by, selection[kind.selected_by], len(blocks))
        found.append((kind, {index: blocks[index] for index in sorted(chosen)}))
    return found


def compiled_blocks(model: ModelPatcher) -> CompiledBlocks | None:
    """What Compile Repeated Blocks put on ``model``; None without it."""
    found = model.get_wrappers(WrappersMP.APPLY_MODEL, WRAPPER_KEY)
    return found[0] if found else None


class CompiledBlocks:
    """The wrapper around ``apply_model``: for the length of one call the selected blocks run as regions.

    Blocks are those of the model that executes, which may not be the one the node saw (multi-GPU and non-dynamic
    clones), so one object may serve several models and keeps none of them alive.
    """

    def __init__(
        self,
        settings: CompileSettings,
        selection: Mapping[str, str],
        on_failure: str,
        text: NodeText,
        cache: str = "off",
        cuda_graphs: str = "auto",
    ) -> None:
        self.settings = settings
        self.selection = selection
        self.on_failure = on_failure
        self.text = text
        self.cache = cache
        self.replays = Replays(settings, cuda_graphs)
        self.regions: dict[Region, None] = {}
        self.compiled: Counter[str] = Counter()
        self.eager: dict[str, set[str]] = {}
        self.seconds = 0.0
        self.load_seconds = 0.0
        self.recompiles: list[str] = []
        self._shown_before = 0
        self._failed: dict[Region, str] = {}
        self._recent: dict[Hashable, Region] = {}
        self._told: set[str] = set()
        self._plans: weakref.WeakKeyDictionary[nn.Module, BlockPlan] = weakref.WeakKeyDictionary()
        self._clock = StepClock()
        self._quickest: dict[Hashable, float] = {}
        LATEST[text.node_id] = self

    def start(self, patcher: ModelPatcher) -> None:
        """A sampling run begins: what failed before is tried again, and the node shows what is new."""
        self._failed.clear()
        self.replays.start(patcher)
        self._shown_before = len(self.recompiles)

    def __call__(
        self,
        executor: WrapperExecutor,
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,
        control: Any = None,
        transformer_options: Mapping[str, Any] = MappingProxyType({}),
        **kwargs: Any,
    ) -> Any:
        """A wrapper of the host's ``apply_model``; arguments are passed on as they are, conditioning on the device."""
        self.compiled.clear()
        self.eager.clear()
        self._recent.clear()
        self.replays.begin(x.device)
        spent, kind = self.seconds, step_kind(executor.class_obj, x, c_crossattn)
        c_concat, c_crossattn = (to_device(cond, x.device) for cond in (c_concat, c_crossattn))
        kwargs = {name: to_device(cond, x.device) for name, cond in kwargs.items()}

        def step() -> Any:
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

        with self.text.guarded():
            if compiles_whole_model(transformer_options):
                self._note_eager("another node compiles the whole model; remove one of the two", "the model")
                out = self._clock.time(x.device, step, kind)
            else:
                with self._swapped(executor.class_obj.diffusion_model):
                    out = self._clock.time(x.device, step, kind)
        if self.seconds > spent:
            # What a step took that compiled something says nothing of the next.
            self._clock.forget()
        self._show(executor.class_obj)
        return out

    def summary(self) -> str:
        """One line for the node: what is compiled, what it took, what runs eager and why."""
        parts = []
        if self.compiled:
            blocks = " and ".join(f"{count} {name}" for name, count in self.compiled.items())
            took = [f"compiled in {self.seconds:.1f} s"] if self.seconds else []
            took += [f"loaded in {self.load_seconds:.2f} s"] if self.load_seconds else []
            parts.append(f"{blocks} blocks run as {len(self.regions)} regions, {', '.join(took) or 'compiled earlier'}")
            # That nothing was stored yet is no news.
            states = {region.stats.cache.removeprefix(FIRST_TIME).removeprefix("; ") for region in self.regions}
            parts += [f"cache {state}" for state in sorted(states) if state.startswith(("miss", "not stored"))]
        if self.recompiles:
            parts.append(f"compiled again: {', '.join(self.recompiles[-_FEW:])}{self._advice()}")
        for reason, names in self.eager.items():
            parts.append(f"eager: {reason} ({self._which(names)})")
        if self.replays.summary():
            parts.append(self.replays.summary())
        return "; ".join(parts)

    @contextmanager
    def _swapped(self, diffusion_model: nn.Module) -> Iterator[None]:
        """Route the selected blocks through regions; ``forward`` is an attribute of the instance, removed after."""
        mine: list[nn.Module] = []
        try:
            for kind, selected in selected_blocks(diffusion_model, self.selection):
                for index, block in selected.items():
                    try:
                        kind.refuse_foreign(block)
                    except NotHoistable as reason:
                        self._note_eager(str(reason), f"{kind.name} block {index}")
                        continue
                    if not self.regions:
                        self._plan(block)
                    run = functools.partial(self._run_block, kind, index, block)
                    around = block.__dict__.get("forward")
                    if isinstance(around, Around):
                        around.inside = run
                    else:
                        block.forward = run
                    mine.append(block)
            yield
        finally:
            for block in mine:
                around = block.__dict__.get("forward")
                if isinstance(around, Around):
                    around.inside = None
                else:
                    block.__dict__.pop("forward", None)

    def _run_block(self, kind: BlockKind, index: int, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # The block must look untouched to the plan, to a tracer and to whatever runs inside it.
        swapped = block.__dict__.pop("forward", None)
        try:
            if torch.compiler.is_compiling():
                return block.forward(*args, **kwargs)
            comfy.model_management.throw_exception_if_processing_interrupted()
            inputs = dict(zip(kind.parameters[: len(args)], args, strict=True))
            inputs.update(kwargs)
            activation = inputs[kind.activation]
            try:
                if torch.is_grad_enabled():
                    raise NotHoistable("gradients are being recorded, and weights enter a region without theirs")
                attend = kind.interface.attention_for(inputs.get("transformer_options", {}), block)
                plan, layers = self._planned(block)
                if plan.given:
                    vector = kind.interface.vector
                    inputs[vector] = {path: block.get_submodule(path)(inputs[vector]) for path in plan.given}
                taken = kind.interface.region_inputs(inputs, activation, self.settings.dynamic != "never")
                if attend is None:
                    out = self.replays.again(kind.name, plan, layers, taken, activation.device)
                    if out is not None:
                        self.compiled[kind.name] += 1
                        return out
                replay = functools.partial(self.replays.run, kind.name, plan, layers, attend, swapped is None)
                with in_place(layers, activation):
                    weights = block_weights(layers, activation)
                    return self._run_compiled(kind, plan, weights, taken, attend, replay)
            except NotHoistable as reason:
                self._note_eager(str(reason), f"{kind.name} block {index}")
            except RegionFailed as failure:
                # Without fullgraph, a part before a graph break may have run, and blocks update their inputs in place.
                if self.on_failure == "error" or not self.settings.fullgraph:
                    raise
                self._note_eager(str(failure), f"{kind.name} block {index}")
            return block.forward(*args, **kwargs)
        finally:
            if swapped is not None:
                block.__dict__["forward"] = swapped

    def _planned(self, block: nn.Module) -> tuple[BlockPlan, Layers]:
        """The plan of ``block``, made anew where the block is not as it was, and its layers."""
        plan = self._plans.get(block)
        if plan is not None:
            try:
                return plan, plan.layers(block)
            except NotHoistable:
                del self._plans[block]
        layer_for = plain_layers(block, fuses=self.settings.backend == "inductor")
        plan = self._plans[block] = plan_block(block, layer_for, layer_states)
        return plan, plan.layers(block)

    def _plan(self, block: nn.Module) -> None:
        """Plan ahead, to know how many regions there will be; what can't be planned says why when it runs."""
        with suppress(NotHoistable):
            self._planned(block)

    def _run_compiled(
        self,
        kind: BlockKind,
        plan: BlockPlan,
        weights: dict[str, Tensor],
        inputs: dict[str, Any],
        attend: Attend | None,
        replay: Callable[[Graph, dict[str, Tensor], dict[str, Any]], Any],
    ) -> Any:
        """Run the block as its region: the one that a block like it had in this step, or the one of its key."""
        bind = kind.interface.bind_for(attend, inputs[kind.activation])
        like = plan.key, bind, torch.is_inference_mode_enabled()
        region = self._recent.get(like)
        # For whatever else is in the key of a region its graphs have guards.
        graph = None if region is None else region.graph_for(weights, inputs)
        if graph is not None:
            with nullcontext() if attend is None else attention_scope(attend):
                out = replay(graph, weights, inputs)
        else:
            out, self._recent[like] = self._run_region(kind, plan, bind, weights, inputs, attend, replay)
        self.compiled[kind.name] += 1
        return out

    def _run_region(
        self,
        kind: BlockKind,
        plan: BlockPlan,
        bind: Bind,
        weights: dict[str, Tensor],
        inputs: dict[str, Any],
        attend: Attend | None,
        replay: Callable[[Graph, dict[str, Tensor], dict[str, Any]], Any],
    ) -> tuple[Any, Region]:
        name = f"{kind.name} block" if attend is None else f"patched {kind.name} block"
        device = inputs[kind.activation].device
        kinds = input_kinds(inputs, shapes=self.settings.dynamic == "never")
        dtypes = tuple(weight.dtype for weight in weights.values())
        key = (plan.key, bind, self.settings, kinds, dtypes, torch.is_inference_mode_enabled(), self.cache)

        def make() -> Region:
            kept, why_not = None, ""
            if self.cache == "auto":
                try:
                    kept = kept_region(name, plan.template, bind, self.settings, kinds, dtypes, device)
                except NotPortable as reason:
                    why_not = f": {reason}"
            region = Region(name, plan.template, bind, self.settings, kind.streams, kept)
            region.stats.cache += why_not
            return region

        region = REGIONS.get(key, make)
        if region in self._failed:
            raise NotHoistable(self._failed[region])
        first, spent, recompiles = not region.compiled, region.stats.seconds, len(region.stats.recompiles)
        try:
            if first and not region.loads(weights, inputs):
                self._check_machine(region, device, dtypes)
                self._announce(region)
            graph = None if first else region.graph_for(weights, inputs)
            with nullcontext() if attend is None else attention_scope(attend):
                if graph is not None:
                    out = replay(graph, weights, inputs)
                else:
                    dims = kind.interface.token_dims(inputs)
                    out = region(weights, inputs, dims, functools.partial(self._announce, region))
        except RegionFailed as failure:
            # Trying again for each of the other blocks would fail as slowly each time.
            self._failed[region] = str(failure)
            raise
        if first and self.settings.dynamic == "never" and any(known.name == name for known in self.regions):
            self._note_recompile("another size")
        for reason in region.stats.recompiles[recompiles:]:
            self._note_recompile(reason)
        if first:
            self.load_seconds += region.stats.load_seconds
        self.regions.setdefault(region)
        self.seconds += region.stats.seconds - spent
        return out, region

    def _note_recompile(self, reason: str) -> None:
        if reason not in self.recompiles:
            self.recompiles.append(reason)
            log.warning("compiled again: %s%s", reason, self._advice())

    def _advice(self) -> str:
        """The settings that would have kept the model from compiling again, in brackets."""
        advice = {how_to_avoid(reason, self.settings.dynamic) for reason in self.recompiles} - {""}
        return f" ({'; '.join(sorted(advice))})" if advice else ""

    def _check_machine(self, region: Region, device: torch.device, dtypes: Collection[torch.dtype]) -> None:
        """Say what is missing before a compiler is asked to work, whose own words are harder to act on."""
        problems = compile_problems(self.settings.backend, device, dtypes)
        if problems:
            raise RegionFailed(region.name, "; ".join(problems))

    def _announce(self, region: Region) -> None:
        expected = len({plan.key for plan in self._plans.values()})
        number = len(self.regions) + 1
        done, place = f" ({number}/{max(number, expected)})", f" ({number} of {max(number, expected)})"
        if region.compiled:
            done = place = " again"
        self.text.show(f"compiling {region.name} region{done} ...", "compiling", region=f"{region.name}{place}")

    def _note_eager(self, reason: str, block: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            log.warning("%s runs without HotPath: %s", block, reason)
        self.eager.setdefault(reason, set()).add(block)

    def _show(self, model: BaseModel) -> None:
        """Tell the node what the step was, and its gain where an eager one of its kind was measured."""
        facts: dict[str, str | float] = {}
        if self.compiled:
            facts["blocks"] = ", ".join(f"{count} {name}" for name, count in self.compiled.items())
            facts["graphs"] = sum(region.stats.graphs + region.stats.loaded for region in self.regions)
        if self.seconds:
            facts["compile_seconds"] = self.seconds
        if self.load_seconds:
            facts["load_seconds"] = self.load_seconds
        last = self._clock.last()
        if last is not None:
            facts["step_seconds"], kind = last
            eager = eager_seconds(model, kind)
            quickest = note_quickest(self._quickest, *last)
            if eager is not None and not self.eager:
                facts["eager_step_seconds"] = eager
                facts["gain"] = eager / quickest
        reasons = [
            (f"compiled again: {reason}", how_to_avoid(reason, self.settings.dynamic))
            for reason in self.recompiles[self._shown_before :][-_FEW:]
        ]
        state = "recompiled" if reasons else "compiled"
        if self.eager:
            state = "eager"
            reasons += [(f"{self._which(names)} eager: {reason}", "") for reason, names in self.eager.items()]
        self.text.show(self.summary(), state, reasons, **facts)

    @staticmethod
    def _which(names: Collection[str]) -> str:
        return ", ".join(sorted(names)) if len(names) <= _FEW else f"{len(names)} blocks"
