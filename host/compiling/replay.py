"""Which blocks run as recorded CUDA graphs, and whose memory that is.

A graph is worth recording where the device waits for Python: at small sizes, and with weights in 8 bits. It needs
weights that stay where they are and blocks that Python has no part in.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...hotpath.attention import Attend
from ...hotpath.cuda_graphs import CudaGraphs, Recorder
from ...hotpath.internals.memory import recordable
from ...hotpath.recorded import Addresses, Graph, Recordings
from ...hotpath.settings import CUDA_GRAPH_MODES, CompileSettings
from ..layers.bypass import in_bypass
from ..layers.gguf import FINISHED
from ..residency.weights import Layers, is_away

CHOICES = ("auto", "off")
# The host asks for a tenth more memory than it expects to need; what is kept between runs is to fit into that.
_SPARE = 0.1
# The option that the host gives each thread where it shares out conditions over devices.
_OF_A_DEVICE = "multigpu_thread_device"
_RECORDINGS: dict[torch.device, Recordings] = {}
_lock = threading.Lock()

OPAQUE = "patches around attention are Python, which a recording would leave out"
STREAMED = "its weights are streamed"
CAST = "its weights are cast or copied to the device each time they are used"
NOT_AHEAD = "PyTorch can't compile them ahead of time, so that nothing tells whether a recording still holds"
FUNCTIONS = "LoRAs or other functions are applied to its weights each time they are used"
OTHERS = "another device computes at the same time"
BYPASS = "a LoRA is in bypass mode"


def recorder_for(device: torch.device) -> Recorder | None:
    """What records on ``device``; None where nothing can."""
    if device.type != "cuda" or not comfy.model_management.is_nvidia() or not recordable():
        return None
    return CudaGraphs(device)


def recordings_on(device: torch.device) -> Recordings | None:
    """All recordings of this process on ``device``; None where it can't record."""
    with _lock:
        if device not in _RECORDINGS:
            recorder = recorder_for(device)
            if recorder is None:
                return None
            _RECORDINGS[device] = Recordings(recorder, partial(_affords, device))
        return _RECORDINGS[device]


def _affords(device: torch.device, size: int) -> bool:
    """Whether the host would find so many bytes free, beside what it leaves to others."""
    return comfy.model_management.get_free_memory(device) - comfy.model_management.extra_reserved_memory() >= size


class Replayed:
    """What ran as recordings in one call: how many ``blocks`` of each kind, and ``why_not`` of the others, by reason.
    One that runs on several devices counts once. It is ``alone`` where nothing else computes in this process."""

    def __init__(self) -> None:
        self.alone = True
        # In their order, by kind and number.
        self._ran: dict[tuple[str, int], None] = {}
        self._others: dict[str, dict[tuple[str, int], None]] = {}

    @property
    def blocks(self) -> Counter[str]:
        return Counter(kind for kind, _ in self._ran)

    @property
    def why_not(self) -> dict[str, Counter[str]]:
        return {reason: Counter(kind for kind, _ in blocks) for reason, blocks in self._others.items()}

    def ran(self, kind: str, index: int) -> None:
        self._ran[kind, index] = None

    def note(self, kind: str, index: int, reason: str) -> None:
        self._others.setdefault(reason, {})[kind, index] = None


class Replays:
    """The recorded blocks of one compile node.

    ``choice``: ``auto`` records where the mode asks for CUDA graphs, and in mode ``default`` where the device waits for
    Python; ``off`` never does.
    """

    def __init__(self, settings: CompileSettings, choice: str) -> None:
        self.always = settings.mode in CUDA_GRAPH_MODES
        self.wanted = (
            choice == "auto" and settings.backend == "inductor" and (self.always or settings.mode == "default")
        )
        self.last = Replayed()
        self._devices: set[torch.device] = set()

    @property
    def replayed(self) -> Counter[str]:
        """How many blocks of each kind ran as recordings in the last call."""
        return self.last.blocks

    @property
    def why_not(self) -> dict[str, Counter[str]]:
        """How many blocks of each kind did not in the last call, by reason."""
        return self.last.why_not

    def records_on(self, device: torch.device) -> bool:
        """Whether blocks on ``device`` may be recorded."""
        return self.wanted and recordings_on(device) is not None

    def begin(self, call: Replayed, device: torch.device, options: Mapping[str, Any]) -> None:
        """A call of the model begins on ``device``, with these options."""
        self.last = call
        call.alone = _OF_A_DEVICE not in options
        if self.wanted and recordings_on(device) is not None:
            self._devices.add(device)
        # Tokens may be shared out over those of earlier calls.
        for recordings in self._own():
            recordings.begin()

    def run(
        self,
        call: Replayed,
        kind: str,
        index: int,
        block: Any,
        layers: Layers,
        attend: Attend | None,
        streamed: bool,
        graph: Graph,
        weights: dict[str, Tensor],
        inputs: dict[str, Any],
        addresses: Addresses | None = None,
    ) -> Any:
        """Run ``block``, whose ``graph`` accepts these arguments: as its recording where it has one or may have.

        ``addresses``: those of ``weights`` that are known to be the layers' own, and to stay.
        """
        device = next(iter(weights.values())).device
        recordings = recordings_on(device) if self.wanted else None
        if recordings is None:
            return graph(weights, inputs)
        if attend is not None or streamed or not call.alone:
            call.note(kind, index, OPAQUE if attend is not None else STREAMED if streamed else OTHERS)
            return graph(weights, inputs)
        self._devices.add(device)
        unsafe = partial(unsafe_weights, layers, device) if addresses is None else lambda: None
        done = recordings.run(block, graph, weights, inputs, self.always, unsafe, addresses)
        if done.why_not is not None:
            call.note(kind, index, done.why_not)
        if done.output is not None:
            call.ran(kind, index)
            return done.output
        out = graph(weights, inputs)
        recordings.ran()
        return out

    def start(self) -> None:
        """A sampling run begins: what failed for want of memory is tried again."""
        for recordings in self._own():
            recordings.retry()

    def end(self, patcher: ModelPatcher) -> None:
        """A sampling run ended: recordings stay for the next one where the host has no use for their memory."""
        for device in self._devices:
            recordings = _RECORDINGS.get(device)
            if recordings is not None and recordings.bytes > _SPARE * comfy.model_management.get_free_memory(device):
                recordings.drop()

    def drop(self) -> None:
        """The host unloads the model, and wants memory for another."""
        for recordings in self._own():
            recordings.drop()

    @property
    def bytes(self) -> int:
        """Bytes that recordings keep on the devices that this node ran on."""
        return sum(recordings.bytes for recordings in self._own())

    def told(self) -> dict[str, Any]:
        """The last call in numbers, for the report."""
        why_not = {reason: dict(kinds) for reason, kinds in self.why_not.items()}
        return {"blocks": dict(self.replayed), "bytes": self.bytes, "why_not": why_not}

    def summary(self) -> str:
        """One line for the node and the report; empty when there is nothing to tell."""
        parts = []
        if self.replayed:
            blocks = " and ".join(f"{count} {kind}" for kind, count in self.replayed.items())
            parts.append(f"{blocks} blocks replayed as CUDA graphs, which keep {self.bytes / 2**20:.0f} MiB")
        for reason, kinds in self.why_not.items():
            blocks = " and ".join(f"{count} {kind}" for kind, count in kinds.items())
            parts.append(f"without CUDA graphs: {reason} ({blocks} blocks)")
        return "; ".join(parts)

    def _own(self) -> list[Recordings]:
        return [_RECORDINGS[device] for device in self._devices if device in _RECORDINGS]


def unsafe_weights(layers: Layers, device: torch.device) -> str | None:
    """Why the weights of ``layers``, in use on ``device``, will not stay where they are; None if they will."""
    for _, layer, state in layers:
        held: Any = layer.__dict__
        if state == FINISHED or held.get("weight_function") or held.get("bias_function"):
            return FUNCTIONS
        if in_bypass(layer):
            return BYPASS
        if is_away(layer, device):
            return CAST
    return None
