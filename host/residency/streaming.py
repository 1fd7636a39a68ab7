"""Blocks whose weights stay in RAM: pinned copies of them, and their arrival on the device while a MODEL samples."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.model_management
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from ...hotpath.stream import Stream, copy_engine
from ...hotpath.template import Around
from ...hotpath.values import sampled
from ..families import named_blocks, named_modulations
from ..model_call import ModelCall
from ..models import why_untouched
from ..telling.progress import PartText
from .budget import GIB
from .pieces import Piece, flat, pieces_of, placed, put_in, within

log = logging.getLogger(__name__)


def streamable_layers(diffusion_model: nn.Module, ahead: bool) -> dict[str, dict[str, Any]]:
    """By block, the layers whose weights can be streamed, by their path in the diffusion model: Linear layers that
    the host can cast where they are used. With ``ahead`` modulation layers are none of them."""
    found: dict[str, dict[str, Any]] = {}
    for path, block, modulations in named_modulations(diffusion_model):
        apart = {id(module.lin) for module in modulations.values()} if ahead else set()
        found[path] = {
            f"{path}.{name}": layer
            for name, layer in block.named_modules()
            if hasattr(layer, "comfy_cast_weights") and hasattr(layer, "out_features") and id(layer) not in apart
        }
    return found


class PinnedCopies:
    """Weights of blocks in one pinned buffer a block, so that each is one quick copy; the layers' own parameters become
    views of it, bit by bit what they were, so that nothing is in RAM twice."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._pinned: set[str] = set()

    def hold(self, path: str, layers: Sequence[Any]) -> None:
        """Pin the weights of ``layers``, which are in RAM, unless they are or the host can't pin any more."""
        pieces, size = pieces_of(layers)
        on_cpu = all(tensor.device.type == "cpu" for piece in pieces for tensor in piece.tensors)
        if not pieces or not on_cpu or self.buffer(path, pieces) is not None:
            return
        # Never written again: what is a view of an older one, such as the host's backup of a weight, stays as it is.
        self._drop(path)
        with torch.inference_mode(False):
            buffer = torch.empty(size, dtype=torch.uint8)
        if comfy.model_management.pin_memory(buffer):
            self._pinned.add(path)
        elif not comfy.model_management.is_device_cpu(comfy.model_management.get_torch_device()):
            return
        self._buffers[path] = buffer
        for tensor, offset in placed(pieces):
            buffer[offset : offset + tensor.nbytes].copy_(flat(tensor))
        for piece in pieces:
            piece.layer._parameters[piece.name] = within(buffer, piece)

    def buffer(self, path: str, pieces: Sequence[Piece]) -> Tensor | None:
        """The pinned buffer in which ``pieces`` are; None when some are elsewhere now."""
        buffer = self._buffers.get(path)
        if buffer is None:
            return None
        start = buffer.data_ptr()
        inside = all(tensor.data_ptr() == start + offset for tensor, offset in placed(pieces))
        return buffer if inside else None

    def release(self) -> None:
        """Unpin; the memory itself goes with the parameters."""
        for path in list(self._buffers):
            self._drop(path)

    def _drop(self, path: str) -> None:
        buffer = self._buffers.pop(path, None)
        if path in self._pinned:
            self._pinned.remove(path)
            comfy.model_management.unpin_memory(buffer)


@dataclass(frozen=True)
class Residency:
    """What a MODEL's last load left in RAM: paths of streamed blocks, in order."""

    streamed: tuple[str, ...]
    blocks: int
    resident_bytes: int
    streamed_bytes: int


# By model, since clones share its weights and where they are.
RESIDENCY: weakref.WeakKeyDictionary[BaseModel, Residency] = weakref.WeakKeyDictionary()
_PINNED: weakref.WeakKeyDictionary[BaseModel, PinnedCopies] = weakref.WeakKeyDictionary()


def pinned_copies(model: BaseModel) -> PinnedCopies:
    """The pinned copies of ``model``, which go with it."""
    copies = _PINNED.get(model)
    if copies is None:
        copies = _PINNED[model] = PinnedCopies()
        weakref.finalize(model, copies.release).atexit = False
    return copies


def _sources(
    pinned: PinnedCopies,
    paths: Sequence[str],
    layers: Sequence[Sequence[Any]],
    slot_size: int,
    copied: dict[int, _Copied],
    index: int,
) -> list[tuple[Tensor, int]]:
    """What to copy into a slot for the block of ``paths`` and ``layers`` at ``index``, noted in ``copied``."""
    pieces, size = pieces_of(layers[index])
    copied[index] = _Copied([tensor for tensor, _ in placed(pieces)])
    buffer = pinned.buffer(paths[index], pieces)
    if size > slot_size:
        raise RuntimeError(
            f"{paths[index]} grew while sampling, which Offload Repeated Blocks can't follow. Set its budget to "
            "'100 %'."
        )
    if buffer is not None:
        return [(buffer[:size], 0)]
    return [(flat(tensor), offset) for tensor, offset in placed(pieces)]


class StreamedBlocks:
    """The wrapper around ``apply_model``: for the length of one call the weights of blocks that the load left in RAM
    arrive on the device before each of them computes."""

    def __init__(self, text: PartText, prefetch_blocks: int, ahead: bool) -> None:
        self.text = text
        self.prefetch_blocks = prefetch_blocks
        self.not_streamed: set[str] = set()
        self.residency: Residency | None = None
        self.bytes_copied = 0
        self.calls = 0
        self.on_device: tuple[int, int] | None = None
        self.in_full = 0
        self.after_step: Callable[[ModelPatcher], None] = lambda patcher: None
        self._ahead = ahead
        self._no_room = False
        self._runs: weakref.WeakKeyDictionary[BaseModel, _Run] = weakref.WeakKeyDictionary()
        LATEST[text.node_id] = self

    def start(self, patcher: ModelPatcher) -> None:
        """A sampling run begins."""
        self.not_streamed.clear()
        self._no_room = False
        self.bytes_copied = self.calls = self.in_full = 0
        self.text.again()
        self.stop(patcher)

    def stop(self, patcher: ModelPatcher, *_: Any) -> None:
        """A run ended, or the host unloads the model: the slots are freed."""
        self._end(patcher.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A wrapper of the host's ``apply_model``; arguments are passed on untouched."""
        call = ModelCall.read(*args, **kwargs)
        patcher = call.patcher
        self.residency = None if patcher is None or patcher.is_dynamic() else RESIDENCY.get(call.model)
        why_not = why_untouched(patcher, call.options)
        with ExitStack() as stack:
            run = None
            if why_not:
                self.tell(why_not)
            elif self.residency is not None and self.residency.streamed:
                run = self._run(patcher, self.residency, call.x.device)
            if run is not None:
                stack.enter_context(run.arriving(changing=bool(patcher.hook_patches)))
            before = 0 if run is None else run.stream.bytes_copied
            out = call.run()
        if run is not None:
            self.bytes_copied += run.stream.bytes_copied - before
            self.calls += 1
        dynamic = patcher is not None and patcher.is_dynamic()
        self.on_device = (patcher.loaded_size(), patcher.model_size()) if dynamic else None
        if dynamic:
            self.after_step(patcher)
        self.text.show(self.summary())
        return out

    def summary(self) -> str:
        """One line for the node and the report."""
        parts = []
        done = self.residency
        if self.on_device is not None:
            there, whole = self.on_device
            parts.append(f"{there / GIB:.1f} of {whole / GIB:.1f} GiB on the GPU")
        if done is not None and done.streamed:
            parts.append(
                f"{done.blocks - len(done.streamed)} of {done.blocks} blocks resident, {len(done.streamed)} streamed "
                f"({done.streamed_bytes / GIB:.2f} GiB a step)"
            )
        elif done is not None:
            parts.append(f"all {done.blocks} blocks resident")
        if done is not None and self.in_full:
            parts.append(f"a LoRA is added to the quantized weights of {self.in_full} of them without rounding it")
        return "; ".join(parts + [f"not streamed: {reason}" for reason in sorted(self.not_streamed)])

    def tell(self, reason: str) -> None:
        """Note why blocks are not streamed, which the host then casts layer by layer."""
        if reason not in self.not_streamed:
            self.not_streamed.add(reason)
            log.info("blocks are not streamed: %s", reason)

    def _end(self, model: BaseModel) -> None:
        run = self._runs.pop(model, None)
        if run is not None:
            run.stream.drain()

    def _run(self, patcher: ModelPatcher, residency: Residency, device: torch.device) -> _Run | None:
        """The run of the model of ``patcher``; None where there is no memory for its slots."""
        model = patcher.model
        run = self._runs.get(model)
        if run is None or run.residency is not residency or run.device != device:
            self._end(model)
            if self._no_room:
                return None
            try:
                run = self._runs[model] = _Run(model, residency, device, self.prefetch_blocks, self._ahead)
                self.in_full = run.with_quantized(patcher.patches)
            except torch.OutOfMemoryError:
                self._no_room = True
                self.tell("the GPU has no memory left for blocks that arrive ahead; set prefetch_blocks to 0")
        return run


# What each offload node last made, by node id.
LATEST: weakref.WeakValueDictionary[str | None, StreamedBlocks] = weakref.WeakValueDictionary()


class _Copied:
    """What was copied, to see whether it has changed in place since."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._content = sampled(tensors)

    def is_stale(self) -> bool:
        return not torch.equal(sampled(self._tensors), self._content)


class _Run:
    """The slots of one sampling run of one model."""

    def __init__(
        self, model: BaseModel, residency: Residency, device: torch.device, prefetch_blocks: int, ahead: bool
    ) -> None:
        self.residency = residency
        self.device = device
        blocks = dict(named_blocks(model.diffusion_model))
        layers = streamable_layers(model.diffusion_model, ahead)
        self._blocks = [blocks[path] for path in residency.streamed]
        self._named = [layers[path] for path in residency.streamed]
        self._layers = [list(each.values()) for each in self._named]
        size = max(pieces_of(layers)[1] for layers in self._layers)
        self._views: dict[tuple[int, int], list[tuple[Piece, nn.Parameter]]] = {}
        self._copied: dict[int, _Copied] = {}
        order = range(len(self._blocks))
        sources = partial(_sources, pinned_copies(model), residency.streamed, self._layers, size, self._copied)
        self.stream = Stream(copy_engine(device), device, size, order, prefetch_blocks, sources)

    def with_quantized(self, patches: Mapping[str, Any]) -> int:
        """How many of the blocks have quantized weights that are in ``patches``. The host rounds such a weight anew
        where it loads it, and not where it is used."""
        return sum(
            any(
                isinstance(layer.weight, QuantizedTensor) and f"diffusion_model.{path}.weight" in patches
                for path, layer in layers.items()
            )
            for layers in self._named
        )

    @contextmanager
    def arriving(self, changing: bool) -> Iterator[None]:
        """Let blocks have their weights when they run. ``changing``: between calls the weights may change."""
        around = []
        try:
            for index, block in enumerate(self._blocks):
                # What another pack put there runs as it is, and the host casts.
                if "forward" not in block.__dict__:
                    block.forward = Around(block, partial(self._present, index))
                    around.append(block)
            yield
        except BaseException:
            self.stream.drain()
            raise
        finally:
            for block in around:
                block.__dict__.pop("forward", None)
        if changing:
            self.stream.drain()

    @contextmanager
    def _present(self, index: int) -> Iterator[None]:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._refuse_stale(index)
        with self.stream.present(index) as slot, put_in(self._in_slot(index, slot)):
            yield

    def _refuse_stale(self, index: int) -> None:
        """Fetch anew when the block has other parameters than at its last arrival, or others in them."""
        copied = self._copied.get(index)
        if copied is not None and copied.is_stale():
            self.stream.drain()
        for slot in range(len(self.stream.slots)):
            views = self._views.get((index, slot), ())
            if any(piece.layer._parameters[piece.name] is not piece.parameter for piece, _ in views):
                self.stream.drain()
                self._views.clear()

    def _in_slot(self, index: int, slot: int) -> list[tuple[Piece, nn.Parameter]]:
        views = self._views.get((index, slot))
        if views is None:
            buffer = self.stream.slots[slot]
            views = [(piece, within(buffer, piece)) for piece in pieces_of(self._layers[index])[0]]
            self._views[index, slot] = views
        return views
