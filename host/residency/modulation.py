"""Modulation ahead of time: what the blocks' modulation layers give for a whole schedule, made on its first step."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from functools import partial
from operator import is_
from typing import Any

import comfy.model_management
import torch
from comfy.model_base import BaseModel, convert_tensor
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from ...hotpath.ahead import Table, content_key
from ...hotpath.internals.state import anything_around
from ...hotpath.template import Given, NotHoistable, functions_of, own_bases, refuse_bolted_on
from ...hotpath.values import sampled
from ..families import family_of, named_modulations
from ..layers.gguf import is_gguf_layer
from ..layers.quantized import as_multiplied
from ..model_call import ModelCall
from ..models import to_device, why_untouched
from ..telling.progress import PartText
from .pieces import tensors_of
from .weights import refuse_replaced_forward

log = logging.getLogger(__name__)

# Flux.1 in bf16 takes 2.1 MB a vector, so 127 of them.
CAPACITY = 2**28


def modulation_layers(diffusion_model: nn.Module) -> dict[str, Any]:
    """The Linear layers of all blocks' modulation, by their path in the diffusion model."""
    return {
        f"{path}.{name}.lin": module.lin
        for path, _, modulations in named_modulations(diffusion_model)
        for name, module in modulations.items()
    }


class ModulationAhead:
    """The wrapper around ``apply_model``: for the length of one call the blocks' modulation comes from a table.

    A vector that is not in the table is computed as it comes, together with those that the schedule will bring under
    the same conditioning, with one layer's weight on the device at a time. Vectors are never batched, so that each
    result has the very bits that the layer in its place would have given.
    """

    def __init__(self, text: PartText) -> None:
        self.text = text
        self.in_place: set[str] = set()
        self._states: weakref.WeakKeyDictionary[BaseModel, _State] = weakref.WeakKeyDictionary()
        LATEST[text.node_id] = self

    def start(self, patcher: ModelPatcher) -> None:
        """A sampling run begins: the node shows its text again, and what memory didn't allow is tried again."""
        self.in_place.clear()
        for state in self._states.values():
            state.no_room = False
        self.text.again()

    def stop(self, patcher: ModelPatcher, unpatch_all: bool) -> None:
        """The host unloads the model, or with ``unpatch_all`` off makes room for another clone of it."""
        if unpatch_all:
            self._states.pop(patcher.model, None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A wrapper of the host's ``apply_model``; arguments are passed on untouched.

        Raises:
            RuntimeError: a patch on blocks changed the conditioning vector in place.
        """
        call = ModelCall.read(*args, **kwargs)
        model, patcher, options = call.model, call.patcher, call.options
        why_not = _why_in_place(patcher, options)
        if why_not:
            self.tell(why_not)
            out = call.run()
            self.text.show(self.summary())
            return out
        state = self._states.setdefault(model, _State(self))
        foresee = partial(_foresee, model, call.t, options.get("sample_sigmas"), call.extra)
        with self.text.guarded(), state.given(model.diffusion_model, patcher, foresee):
            out = call.run()
            if options.get("patches_replace", {}).get("dit"):
                state.refuse_changed_vector()
        self.text.show(self.summary())
        return out

    @property
    def vectors(self) -> int:
        """How many vectors are in the tables."""
        return sum(len(state.table) for state in self._states.values())

    @property
    def table_bytes(self) -> int:
        """What the tables take on the devices."""
        return sum(state.table.bytes for state in self._states.values())

    def summary(self) -> str:
        """One line for the node and the report."""
        made = f"modulation made ahead for {self.vectors} vectors ({self.table_bytes / 2**20:.1f} MiB)"
        reasons = [f"modulation in place: {reason}" for reason in sorted(self.in_place)]
        return "; ".join([made] * bool(self.vectors) + reasons)

    def tell(self, reason: str) -> None:
        """Note why modulation is computed in place."""
        if reason not in self.in_place:
            self.in_place.add(reason)
            log.info("modulation in place: %s", reason)


# What each offload node last made, by node id.
LATEST: weakref.WeakValueDictionary[str | None, ModulationAhead] = weakref.WeakValueDictionary()


class _State:
    """The table of one model, and what stands in for its modulation modules while it runs."""

    def __init__(self, owner: ModulationAhead) -> None:
        self.table = Table(CAPACITY)
        self._owner = owner
        self._made_from: Hashable = None
        self._parameters: list[weakref.ref[nn.Parameter]] = []
        self._content = sampled([])
        self._givens: dict[str, Given] = {}
        self._modules: dict[str, Any] = {}
        self._fill: Callable[[Hashable, Tensor], Mapping[str, Any]]
        self._begin: Callable[[], None]
        self._seen: tuple[Tensor, Hashable] | None = None
        self._row: Mapping[str, Any] = {}
        self.no_room = False

    @contextmanager
    def given(
        self, diffusion_model: nn.Module, patcher: ModelPatcher, foresee: Callable[[], Iterable[Tensor]]
    ) -> Iterator[None]:
        """Modulation modules hand out what the table has; their ``forward`` is an attribute, removed after."""
        self._modules = self._usable(diffusion_model, patcher)
        self._fill = partial(self._compute, patcher, foresee)
        self._begin = partial(self._forget_what_was, patcher)
        try:
            for path, module in self._modules.items():
                known = self._givens.get(path)
                if known is None or not known.stands_for(module):
                    known = self._givens[path] = Given(module, partial(self._give, path))
                module.forward = known
            yield
        finally:
            for module in self._modules.values():
                module.__dict__.pop("forward", None)
            self._modules, self._seen, self._row = {}, None, {}
            del self._fill, self._begin

    def refuse_changed_vector(self) -> None:
        """Raise RuntimeError where the vector is no longer what the table was asked for."""
        if self._seen is not None and content_key(self._seen[0]) != self._seen[1]:
            raise RuntimeError(
                "A patch of another node on Flux blocks changes their conditioning vector in place, which modulation "
                "ahead of time can't follow. Set modulation to 'in place' on Offload Repeated Blocks."
            )

    def _give(self, path: str, vector: Tensor) -> Any:
        # The host hands one vector to all blocks, and looking at its content waits for the device.
        if self._seen is None or vector is not self._seen[0]:
            if self._seen is None:
                # Not before, as a wrapper of another node around the model may change what it computes by.
                self._begin()
            self.refuse_changed_vector()
            key = content_key(vector)
            self._row = self.table.get(key) or self._filled(key, vector)
            self._seen = vector, key
        if path not in self._row:
            module = self._modules[path]
            return type(module).forward(module, vector)
        return self._row[path]

    def _filled(self, key: Hashable, vector: Tensor) -> Mapping[str, Any]:
        """The row of ``key``, made now; nothing where memory or code around it doesn't allow it."""
        if anything_around():
            self._owner.tell("another node has something around every module or function")
            return {}
        if not self.no_room:
            try:
                return self._fill(key, vector)
            except torch.OutOfMemoryError:
                self.no_room = True
        self._owner.tell("the GPU has no memory left to make it ahead")
        return {}

    def _compute(
        self, patcher: ModelPatcher, foresee: Callable[[], Iterable[Tensor]], key: Hashable, vector: Tensor
    ) -> Mapping[str, Any]:
        wanted = {key: vector}
        row = sum(module.lin.out_features for module in self._modules.values()) * vector.nbytes // vector.shape[-1]
        for foreseen in foresee():
            if len(wanted) >= self.table.capacity // row:
                break
            if foreseen.shape == vector.shape and foreseen.dtype == vector.dtype:
                wanted.setdefault(content_key(foreseen), foreseen)
        wanted = {known: value for known, value in wanted.items() if known not in self.table}
        self._owner.text.show(f"making modulation for {len(wanted)} vectors ahead ...", "working")
        rows: dict[Hashable, dict[str, Any]] = {known: {} for known in wanted}
        for path, module in self._modules.items():
            comfy.model_management.throw_exception_if_processing_interrupted()
            with _resident(module.lin, f"diffusion_model.{path}.lin", patcher, vector):
                for known, value in wanted.items():
                    rows[known][path] = type(module).forward(module, value)
        for known, outputs in rows.items():
            self.table.put(known, outputs)
        return rows[key]

    def _usable(self, diffusion_model: nn.Module, patcher: ModelPatcher) -> dict[str, Any]:
        """The modulation modules by path, but of blocks where one would not compute as the host defines it."""
        found, any_of_their_own = {}, False
        for prefix, _, modulations in named_modulations(diffusion_model):
            modules = {f"{prefix}.{name}": module for name, module in modulations.items()}
            any_of_their_own |= bool(modules)
            try:
                for path, module in modules.items():
                    _refuse_changed(path, module, patcher)
            except NotHoistable as reason:
                self._owner.tell(str(reason))
            else:
                found.update(modules)
        if not any_of_their_own:
            family: Any = family_of(diffusion_model)
            known = family.conditioning_vector is not None
            why = "the blocks of this model have no modulation layers of their own"
            self._owner.tell(why if known else f"that of {family.name} is not made ahead")
        return found

    def _forget_what_was(self, patcher: ModelPatcher) -> None:
        """Empty the table when it was made from other weights or patches, or by other code, than would be used now."""
        layers = [module.lin for module in self._modules.values()]
        parameters = [
            parameter for layer in layers for parameter in layer._parameters.values() if parameter is not None
        ]
        versions = tuple(map(_version, parameters))
        device = patcher.load_device
        code: list[Any] = [torch.nn.functional.linear, torch.nn.functional.silu]
        for kind in {kind for module in self._modules.values() for kind in (type(module), type(module.lin))}:
            code += [function for base in own_bases(kind) for _, function in functions_of(base)]
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        computed_by = tuple(self._modules), frozenset(code), autocast, anything_around()
        made_from = patcher.patches_uuid, device, versions, computed_by
        known = [ref() for ref in self._parameters]
        same = len(known) == len(parameters) and all(map(is_, known, parameters))
        content = sampled(tensor for parameter in parameters for tensor in tensors_of(parameter))
        if self._made_from != made_from or not same or not torch.equal(content, self._content):
            self.table.clear()
            self._made_from, self._content = made_from, content
            self._parameters = [weakref.ref(parameter) for parameter in parameters]


def with_given(block: nn.Module, patcher: ModelPatcher) -> nn.Module:
    """A block of the MODEL as it is while its modulation is given: other modules with its weights.

    Raises:
        NotHoistable: a modulation module would not compute as the host defines it.
    """
    blocks = named_modulations(patcher.get_model_object("diffusion_model"))
    prefix, modules = next((path, modules) for path, here, modules in blocks if here is block)
    for name, module in modules.items():
        _refuse_changed(f"{prefix}.{name}", module, patcher)
        if isinstance(module.lin.weight, QuantizedTensor) and patcher.patches:
            raise NotHoistable("a LoRA on quantized modulation layers")
    return _copied(block, set(modules.values()))


def _copied(module: nn.Module, given: set[nn.Module]) -> nn.Module:
    twin = copy(module)
    twin.__dict__["_modules"] = {name: child and _copied(child, given) for name, child in module._modules.items()}
    if module in given:
        twin.forward = Given(twin, lambda vector: None)
    return twin


def _why_in_place(patcher: ModelPatcher | None, options: Mapping[str, Any]) -> str | None:
    """Why nothing can come from a table in this call."""
    if patcher is not None and patcher.current_hooks is not None:
        return why_untouched(patcher, options) or "LoRAs change while sampling (hooks)"
    return why_untouched(patcher, options)


def _refuse_changed(path: str, module: Any, patcher: ModelPatcher) -> None:
    refuse_bolted_on(path, module)
    refuse_bolted_on(f"{path}.lin", module.lin)
    refuse_replaced_forward(type(module))
    refuse_replaced_forward(type(module.lin))
    if any(f"diffusion_model.{path}.lin.{name}" in patcher.weight_wrapper_patches for name in ("weight", "bias")):
        raise NotHoistable(f"{path}.lin has a weight function of another node")
    patched = getattr(module.lin, "weight_lowvram_function", None) is not None
    if patched and isinstance(module.lin.weight, QuantizedTensor):
        raise NotHoistable("a LoRA on quantized modulation layers")


def _foresee(model: BaseModel, t: Tensor, sigmas: Tensor | None, conds: Mapping[str, Any]) -> Iterator[Tensor]:
    """The vectors that the schedule will bring under this call's conditioning, as the host makes them."""
    dtype = model.get_dtype_inference()
    family: Any = family_of(model.diffusion_model)
    given = {name: convert_tensor(cond, dtype, t.device) for name, cond in conds.items() if isinstance(cond, Tensor)}
    for sigma in [] if sigmas is None else sigmas:
        timesteps = model.model_sampling.timestep(torch.ones_like(t) * sigma).float()
        yield family.conditioning_vector(model.diffusion_model, timesteps, given, dtype)


@contextmanager
def _resident(layer: Any, key: str, patcher: ModelPatcher, like: Tensor) -> Iterator[None]:
    """Let ``layer`` compute as if the host had put it on the device of ``like`` whole, for as long as the scope lasts:
    many vectors of its kind by one weight, brought and dequantized once."""
    dynamic, device = "_v" in layer.__dict__, like.device
    # A GGUF layer does so wherever it is.
    if is_gguf_layer(type(layer)) or (not dynamic and not hasattr(layer, "prev_comfy_cast_weights")):
        yield
        return
    parameters, attributes = dict(layer._parameters), dict(layer.__dict__)
    try:
        for name, parameter in parameters.items():
            functions = list(getattr(layer, f"{name}_function"))
            if parameter is None:
                continue
            if dynamic:
                lora = getattr(layer, f"{name}_lowvram_function", None)
                functions = [*([] if lora is None else [lora]), *functions]
                value = parameter
            else:
                functions = []
                value = patcher.patch_weight_to_device(f"{key}.{name}", device_to=device, return_weight=True)
            value = as_multiplied(layer, to_device(value, device).to(device, non_blocking=True), like.dtype)
            layer._parameters[name] = nn.Parameter(value, requires_grad=False)
            layer.__dict__[f"{name}_function"] = functions
        layer.__dict__.pop("_v", None)
        yield
    finally:
        layer._parameters.update(parameters)
        layer.__dict__.clear()
        layer.__dict__.update(attributes)


def _version(parameter: nn.Parameter) -> int | None:
    """What counts changes in place, where PyTorch does: not of what was made in inference mode, even where it was moved
    outside of it, as the host does on unloading."""
    try:
        return parameter._version
    except RuntimeError:
        return None
