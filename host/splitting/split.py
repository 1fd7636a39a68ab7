"""Share out the tokens of a MODEL over several devices while it samples.

For the length of a call the forward of the diffusion model that has its tokens as sequences (``SharedForward``) is
routed here. Each device runs it with its own copy of the model, on its share of each stream, in a thread of its own; at
attention they exchange keys and values (``hotpath/split.py``). All around it runs once, as without: samplers, CFG,
wrappers and step caches of other packs see whole tensors. Blocks that are compiled are compiled in the copies alike,
with the exchange as one operator in the graph, so that a structure is one graph for each device.

What can't be shared out runs on one device, with the reason on the node: patches and attention of other packs, whole
model compile, Offload Repeated Blocks, the host's own CFG split, hooks. So does the rest of a run in which a device
failed, and the forward in which it did runs again.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import comfy.model_management
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrapperExecutor, WrappersMP
from torch import Tensor, nn

from ...hotpath.internals.state import anything_around
from ...hotpath.split import Crew, DeviceFailed, NotShared, places_of, share_of_mask, shares
from ..compiling.compile import compiled_blocks
from ..families import FAMILIES, kinds_of, require_family
from ..families.attention import SharedAttention
from ..families.kinds import SharedForward
from ..model_call import ModelCall
from ..models import require_model, why_untouched
from ..residency.offload import KEY as OFFLOAD
from ..telling.accounting import Route, routed, routes_to
from ..telling.progress import NodeText
from .copies import KEY, AsItBegan, changed_weight, copy_on, is_its_own, match, why_not_copied

log = logging.getLogger(__name__)

_CALLBACKS = (CallbacksMP.ON_PRE_RUN, CallbacksMP.ON_CLEANUP)
_SHARED = ", ".join(family.name for family in FAMILIES if family.shared is not None)


def chosen_devices(model: ModelPatcher, devices: str) -> list[torch.device]:
    """The devices that ``devices`` names, the one of ``model`` first, which always takes part.

    Args:
        devices: ``all``, or numbers of GPUs with commas between.

    Raises:
        ValueError: it is neither, or this machine has no such GPU.
    """
    there = comfy.model_management.get_all_torch_devices()
    text = devices.strip()
    if text == "all":
        numbers = list(range(len(there)))
    else:
        try:
            numbers = [int(number) for number in text.split(",")]
        except ValueError:
            raise ValueError(f"devices: {devices!r} is none. Write all, or numbers such as '0, 1'.") from None
    unknown = [number for number in numbers if not 0 <= number < len(there)]
    if unknown:
        raise ValueError(
            f"devices: this machine has {len(there)} (0 to {len(there) - 1}) and no {unknown[0]}. Write all, or "
            "those that it has."
        )
    return list(dict.fromkeys([model.load_device, *(there[number] for number in numbers)]))


def split_repeated_blocks(model: ModelPatcher, devices: str, text: NodeText) -> ModelPatcher:
    """A clone of ``model`` whose tokens are shared out over ``devices`` (see ``chosen_devices``) for the length of its
    blocks; ``model`` itself stays as it is. With one device, or a loader that makes no second model, it is a clone that
    samples as ``model`` does.

    A later call on the result replaces the devices of an earlier one.

    Raises:
        ValueError: ``model`` is no MODEL or of no family whose tokens can be shared out, or ``devices`` are none.
    """
    require_model(model)
    shared = require_family(model, "split").shared
    if shared is None or not shared.of(model.get_model_object("diffusion_model")):
        raise ValueError(
            f"model: the tokens of {type(model.model).__name__} can't be shared out over devices. Those of {_SHARED} "
            "models such as Flux.1, Flux.2 and Chroma can."
        )
    chosen = chosen_devices(model, devices)
    split = model.clone()
    for kind in (WrappersMP.APPLY_MODEL, WrappersMP.PREPARE_SAMPLING):
        split.remove_wrappers_with_key(kind, KEY)
    for event in _CALLBACKS:
        split.remove_callbacks_with_key(event, KEY)
    split.remove_additional_models(KEY)
    if len(chosen) == 1:
        text.show(f"one device ({chosen[0]}): nothing is shared out", "one_device")
        return split
    text.show(f"loading the model for {len(chosen) - 1} more device(s) ...", "working")
    try:
        with text.guarded():
            copies = [copy_on(split, device) for device in chosen[1:]]
    # In the host's words, as its own multi-GPU nodes log them.
    except RuntimeError as reason:
        log.warning("Split Repeated Blocks: %s", reason)
        text.show(f"on one device: {reason}", "one_device")
        return split
    blocks = SplitBlocks(split.model, shared, text)
    split.set_additional_models(KEY, copies)
    split.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, blocks.prepare)
    split.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, blocks)
    for event, callback in zip(_CALLBACKS, (blocks.start, blocks.end), strict=True):
        split.add_callback_with_key(event, KEY, callback)
    text.show(f"ready on {', '.join(map(str, chosen))}")
    return split


class SplitBlocks:
    """The wrappers and callbacks of one node: what a run computes with, and what became of it.

    ``why_not`` is why this run is on one device, ``steps`` how many of its calls were shared out.
    """

    def __init__(self, model: BaseModel, shared: SharedForward, text: NodeText) -> None:
        self.text = text
        self.why_not = ""
        self.steps = 0
        self._model = weakref.ref(model)
        self._shared = shared
        self._crew: Crew | None = None
        self._between = False
        self._copies: list[ModelPatcher] = []
        self._began: AsItBegan | None = None
        self._told = ""

    def prepare(self, executor: WrapperExecutor, model: ModelPatcher, *args: Any, **kwargs: Any) -> Any:
        """A wrapper of the host's ``prepare_sampling``: the copies are loaded with ``model``, patched as it is now."""
        self.why_not, self.steps, self._told = self._why_not_at_all(model), 0, ""
        if not self.why_not:
            copies = match(model)
            try:
                return executor(model, *args, **kwargs)
            except torch.OutOfMemoryError as error:
                self.why_not = f"loading the model for {len(copies)} more device(s) failed: {error}"
        known = model.get_additional_models_with_key(KEY)
        model.remove_additional_models(KEY)
        try:
            return executor(model, *args, **kwargs)
        finally:
            model.set_additional_models(KEY, known)

    def start(self, patcher: ModelPatcher) -> None:
        """A run begins, of a model or of one of its copies."""
        copies = patcher.get_additional_models_with_key(KEY)
        if not copies or self.why_not:
            return
        self.end(patcher)
        self._copies = copies
        for copy in copies:
            copy.pre_run()
            changed = changed_weight(patcher, copy)
            if changed:
                self.why_not = f"another node changed {changed} in place, which is there once"
                return
        self._began = AsItBegan(patcher.model.diffusion_model)
        devices = [patcher.load_device, *(copy.load_device for copy in copies)]
        self._crew = Crew(devices, comfy.model_management.set_torch_device, self._between)

    def end(self, patcher: ModelPatcher) -> None:
        """A run ended, of a model or of one of its copies."""
        if patcher.model is not self._model():
            return
        crew, copies = self._crew, self._copies
        self._crew, self._copies, self._began = None, [], None
        if crew is not None:
            self._between = crew.between
            crew.end()
        for copy in copies:
            copy.cleanup()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A wrapper of the host's ``apply_model``; arguments are passed on untouched."""
        call = ModelCall.read(*args, **kwargs)
        diffusion_model: Any = call.model.diffusion_model
        steps, why_not = self.steps, self.why_not or self._why_not_now(call.model, call.options)
        route = None
        if not why_not:
            route = partial(self._forward, diffusion_model, getattr(diffusion_model, self._shared.name))
            setattr(diffusion_model, self._shared.name, route)
        try:
            out = call.run()
        finally:
            if route is not None and diffusion_model.__dict__.get(self._shared.name) is route:
                delattr(diffusion_model, self._shared.name)
        if self.steps == steps and not (why_not or self.why_not) and not self._told:
            why_not = "another node gave this step's result without the model's own forward"
        self._tell(why_not)
        return out

    def _why_not_at_all(self, model: ModelPatcher) -> str:
        """Why a run of ``model`` is on one device; empty where it may be on several."""
        if model.model is not self._model():
            return (
                "another node made another model of this one. Put Split Repeated Blocks after Quantize Repeated Blocks"
            )
        if model.get_wrappers(WrappersMP.APPLY_MODEL, OFFLOAD):
            return "Offload Repeated Blocks keeps the weights in RAM. Remove one of the two nodes"
        if model.get_additional_models_with_key("multigpu"):
            return "MultiGPU CFG Split computes with the same devices. Remove one of the two nodes"
        found = compiled_blocks(model)
        if found is not None and not found.settings.fullgraph:
            return "Compile Repeated Blocks has fullgraph off, with which one device at a time computes"
        return why_not_copied(model)

    def _why_not_now(self, model: BaseModel, options: Mapping[str, Any]) -> str:
        """Why a call of ``model`` with these options is on one device; empty where it may be on several."""
        diffusion_model = model.diffusion_model
        why_not = why_untouched(model.current_patcher, options)
        if why_not:
            return why_not
        if self._crew is None or model is not self._model():
            return "the model is called outside of a run of its own"
        if not self._shared.is_hosts(diffusion_model):
            return f"another node replaces {self._shared.name} of the model"
        foreign = [block for block in _blocks(diffusion_model) if not is_its_own(block)]
        return "another node hooks into a block or replaces its forward" if foreign else ""

    def _forward(
        self, diffusion_model: nn.Module, original: Callable[..., Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        """What the routed forward gives: shared out where it can be, else from one device."""
        arguments = inspect.signature(original).bind(*args, **kwargs).arguments
        if not self.why_not:
            options = arguments.get("transformer_options", {})
            why_not = self._shared.refuse(arguments, options)
            if not why_not:
                try:
                    return self._share_out(diffusion_model, original, arguments)
                except NotShared as reason:
                    why_not = str(reason)
                except DeviceFailed as failure:
                    # The others are asked no more in this run: what failed once may take long to fail.
                    self.why_not = why_not = str(failure)
                    log.warning("on one device from now on: %s", failure, exc_info=failure)
            self._tell(why_not)
        return original(*args, **kwargs)

    def _share_out(
        self, diffusion_model: nn.Module, original: Callable[..., Tensor], arguments: Mapping[str, Any]
    ) -> Tensor:
        """Raises NotShared, before anything runs, or DeviceFailed, with ``arguments`` as they were."""
        crew, began = self._crew, self._began
        assert crew is not None and began is not None
        if changed := began.changed():
            raise NotShared(f"another node {changed}, which is there once")
        if anything_around() or any(torch.is_autocast_enabled(it.type) for it in crew.devices):
            raise NotShared("another node has something around every module or function of this thread")
        count = len(crew.devices)
        cuts = {names: shares(arguments[names[0]].shape[1], count) for names in self._shared.streams}
        places = places_of(list(cuts.values()))
        given = [self._share(arguments, cuts, places, place) for place in range(count)]
        forwards = [original, *(getattr(copy.model.diffusion_model, self._shared.name) for copy in self._copies)]
        routes: dict[nn.Module, Route] = {}
        own = _blocks(diffusion_model)
        for copy in self._copies:
            others = _blocks(copy.model.diffusion_model)
            if list(map(type, own)) != list(map(type, others)):
                raise NotShared("another node puts other blocks in place of the model's")
            routes |= routes_to(dict(zip(own, others, strict=True)))

        counts = [sum(each.stop - each.start for each in place) for place in places]

        def work(place: int, tensors: tuple[Tensor, ...]) -> Tensor:
            mine = _filled(given[place], iter(tensors))
            attention = SharedAttention(sum(counts) - counts[place])
            options = {**mine.get("transformer_options", {}), "optimized_attention_override": attention}
            return forwards[place](**{**mine, "transformer_options": options})

        with routed(routes):
            parts = crew.run([_tensors(each) for each in given], counts, work)
        self.steps += 1
        tokens = " + ".join(map(str, counts))
        self._tell("", f"tokens shared out over {', '.join(map(str, crew.devices))} ({tokens})")
        return torch.cat(parts, dim=1)

    def _share(
        self,
        arguments: Mapping[str, Any],
        cuts: Mapping[tuple[str, ...], Sequence[slice]],
        places: Sequence[Sequence[slice]],
        place: int,
    ) -> dict[str, Any]:
        """The arguments of the forward of one device, on the first device still."""
        mine = dict(arguments)
        for names, parts in cuts.items():
            for name in names:
                if mine.get(name) is not None:
                    mine[name] = mine[name][:, parts[place]]
        last = list(cuts.values())[-1][place]
        control = mine.get(self._shared.control)
        if control is not None:
            mine[self._shared.control] = {
                name: [None if added is None else added[:, last] for added in each] for name, each in control.items()
            }
        if mine.get(self._shared.mask) is not None:
            mine[self._shared.mask] = share_of_mask(mine[self._shared.mask], places, place)
        return mine

    def _tell(self, why_not: str, done: str = "") -> None:
        said = done or (f"on one device: {why_not}" if why_not else "")
        if said and said != self._told:
            self._told = said
            self.text.show(said, "one_device" if why_not else "done")
            if why_not:
                log.warning("Split Repeated Blocks: %s", said)


def _blocks(diffusion_model: nn.Module) -> list[nn.Module]:
    return [block for kind in kinds_of(diffusion_model) for block in kind.blocks(diffusion_model)]


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of the arguments of a forward, but those of its options, which nothing in it reads."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for name, item in value.items() if name != "transformer_options" for tensor in _tensors(item)]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (list, tuple)) else []


def _filled(value: Any, tensors: Any) -> Any:
    """``value`` with its ``_tensors`` replaced by these."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, Mapping):
        return {name: item if name == "transformer_options" else _filled(item, tensors) for name, item in value.items()}
    return type(value)(_filled(item, tensors) for item in value) if isinstance(value, (list, tuple)) else value
