"""Compile the blocks of a MODEL while its workflow loads: from its structure, before there are weights or inputs."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ...hotpath.attention import Attend
from ...hotpath.examples import Described, describe_tensors, example_inputs, example_weights
from ...hotpath.limits import compiling
from ...hotpath.template import BlockPlan
from ..families import family_of, kinds_of
from ..families.kinds import BlockKind
from ..residency.offload import as_it_runs
from ..residency.weights import Layers
from ..splitting.copies import KEY as SPLIT

log = logging.getLogger(__name__)

# What most images have: sizes are dynamic, but kernels are laid out for the first.
_LATENT = (128, 128)
_TOKENS = 512
_SECONDS = 0.1
# PyTorch's compiler serves one thread at a time. Python joins this one at exit.
_WORKER = ThreadPoolExecutor(1, thread_name_prefix="hotpath-warming")


@dataclass(frozen=True)
class Example:
    """A block of ``kind``, and what it will be called with, as far as the MODEL tells."""

    kind: BlockKind
    plan: BlockPlan
    attend: Attend | None
    weights: Mapping[str, Described]
    inputs: Mapping[str, Any]


@dataclass(frozen=True)
class Arguments:
    """What a region of a block of ``kind`` is called with, and ``attend`` where its attention runs outside of it."""

    kind: BlockKind
    plan: BlockPlan
    attend: Attend | None
    weights: dict[str, Tensor]
    inputs: dict[str, Any]

    @property
    def token_dims(self) -> dict[str, tuple[int, ...]]:
        return self.kind.interface.token_dims(self.inputs)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.inputs[self.kind.activation].device
        return device

    @property
    def dtypes(self) -> set[torch.dtype]:
        return {weight.dtype for weight in self.weights.values()}


Prepare = Callable[[Example, dict[str, Any], dict[str, Any]], None]
"""Has the region of an example with these weights and inputs compiled."""


@dataclass
class Warming:
    """What is under way for one node; ``cancel`` when it is executed again."""

    _futures: dict[str, Future[None]] = field(default_factory=dict)
    _compiling: set[str] = field(default_factory=set)

    def begin(self, examples: list[Example], device: torch.device, prepare: Prepare) -> None:
        """Have ``prepare``, a method, called for each of ``examples`` in another thread, which does not keep its
        object."""
        weak = weakref.WeakMethod(prepare)
        inference = torch.is_inference_mode_enabled()
        for example in examples:
            work = functools.partial(_prepare, weak, example, device, inference)
            self._futures[example.kind.name] = _WORKER.submit(work)

    def start(self, work: Callable[[], None]) -> None:
        """Have ``work`` done in that thread, which nobody waits for."""
        _WORKER.submit(_quietly, work)

    def wait(self, kind: BlockKind, show: Callable[[], None]) -> None:
        """Wait until the region of ``kind`` is ready or given up; what has not begun is left to the caller.

        ``show`` is called where it compiles. Raises the host's interrupt.
        """
        future = self._futures.pop(kind.name, None)
        if future is None or future.done() or future.cancel():
            return
        shown = False
        while not future.done():
            comfy.model_management.throw_exception_if_processing_interrupted()
            if kind.name in self._compiling and not shown:
                show()
                shown = True
            with suppress(NotYet):
                future.exception(_SECONDS)

    def compiles(self, kind: BlockKind) -> None:
        """What is under way for ``kind`` compiles, and does not only load."""
        self._compiling.add(kind.name)

    def cancel(self) -> None:
        for future in self._futures.values():
            future.cancel()


def examples_of(
    model: ModelPatcher,
    selected: Mapping[BlockKind, Collection[int]],
    planned: Callable[[BlockKind, nn.Module], tuple[BlockPlan, Layers]],
) -> list[Example]:
    """One example for each kind of the ``selected`` blocks of ``model``; fewer where they can't be told."""
    try:
        return list(_examples(model, selected, planned))
    except Exception as error:
        log.debug("the blocks can't be compiled ahead: %s", error)
        return []


def _examples(
    model: ModelPatcher,
    selected: Mapping[BlockKind, Collection[int]],
    planned: Callable[[BlockKind, nn.Module], tuple[BlockPlan, Layers]],
) -> Iterator[Example]:
    if model.get_wrappers(WrappersMP.APPLY_MODEL, SPLIT):
        # What its blocks are called with on each device is not known before there are sizes.
        return
    diffusion_model: Any = model.get_model_object("diffusion_model")
    dtype = model.model.get_dtype_inference()
    calls = block_calls(model, diffusion_model, dtype)
    options = model.model_options.get("transformer_options", {})
    for kind, indices in selected.items():
        if not indices or kind.name not in calls:
            continue
        block = kind.blocks(diffusion_model)[min(indices)]
        kind.refuse_foreign(block)
        block = as_it_runs(block, model)
        plan, layers = planned(kind, block)
        inputs, twin = calls[kind.name]
        if plan.given:
            vector = kind.interface.vector
            inputs = {**inputs, vector: {path: twin.get_submodule(path)(inputs[vector]) for path in plan.given}}
        attend = kind.interface.attention_for(options, block)
        yield Example(kind, plan, attend, _weights(plan, layers, dtype), describe_tensors(inputs))


def block_calls(model: ModelPatcher, diffusion_model: Any, dtype: torch.dtype) -> dict[str, tuple[dict[str, Any], Any]]:
    """What the host's own code gives to a block of each kind, on the meta device, and a block there, by kind."""
    whole = model.model.model_config.unet_config
    if "depth" not in whole:
        return {}
    config = {**whole, "depth": 1, "depth_single_blocks": 1, "dtype": dtype}
    # Not of the host's layers: where it has dynamic VRAM, they have no weights before some are loaded.
    twin = type(diffusion_model)(**config, device="meta", operations=nn)
    calls: dict[str, tuple[dict[str, Any], Any]] = {}

    def note(kind: BlockKind, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inputs = {**dict(zip(kind.parameters[: len(args)], args, strict=False)), **kwargs}
        calls[kind.name] = {name: value for name, value in inputs.items() if name != "transformer_options"}, block
        activation = inputs[kind.activation]
        return (activation, inputs["txt"]) if kind.streams == 2 else activation

    for kind in kinds_of(twin):
        for block in kind.blocks(twin):
            block.forward = functools.partial(note, kind, block)
    family, latent = family_of(diffusion_model), model.get_model_object("latent_format")
    assert family is not None
    text, conditioning = family.conditioning(diffusion_model, _TOKENS)
    empty = functools.partial(torch.empty, dtype=dtype, device="meta")
    pooled = conditioning.get("pooled_output")
    given = {} if pooled is None else {"y": empty(pooled.shape)}
    side = [8 * size // latent.spacial_downscale_ratio for size in _LATENT]
    with torch.inference_mode():
        twin(
            empty(1, config["in_channels"], *side),
            torch.empty(1, device="meta"),
            context=empty(text.shape),
            guidance=empty(1),
            transformer_options={},
            **given,
        )
    return calls


def _weights(plan: BlockPlan, layers: Layers, dtype: torch.dtype) -> dict[str, Described]:
    """The weights of a block as ``block_weights`` will give them when the host computes in ``dtype``."""
    inference, told = torch.is_inference_mode_enabled(), {}
    for path, layer, _ in layers:
        template = plan.template.get_submodule(path)
        plain = isinstance(template, (nn.Linear, nn.RMSNorm, nn.LayerNorm))
        casts = isinstance(layer, comfy.ops.CastWeightBiasOp)
        for name, weight in template.named_parameters(recurse=False):
            if plain:
                own: Any = getattr(layer, name)
                kind = dtype if casts else own.dtype
            else:
                kind = dtype if name == "bias" else weight.dtype
            told[f"{path}.{name}"] = Described(tuple(weight.shape), weight.stride(), kind, inference)
    return told


def _prepare(weak: weakref.WeakMethod[Prepare], example: Example, device: torch.device, inference: bool) -> None:
    prepare = weak()
    if prepare is None:
        return

    def work() -> None:
        prepare(example, example_weights(example.weights, device), example_inputs(example.inputs, device))

    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    # Its memory goes within it: what is freed while another thread records a CUDA graph may end the process.
    with torch.inference_mode(inference), on_device, compiling():
        _quietly(work)


def _quietly(work: Callable[[], None]) -> None:
    """What fails here is tried again in the first step, and told there."""
    try:
        work()
    except Exception as error:
        log.debug("compiling ahead failed: %s", error)
