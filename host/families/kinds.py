"""What a family of models is to this pack, as data: its repeated blocks, how they are called, what they read."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...hotpath.attention import Attend
from ...hotpath.compiled import Bind
from ...hotpath.template import NotHoistable, refuse_bolted_on
from ..residency.weights import class_name, refuse_replaced_forward
from .reads import ANY, options_read


@dataclass(frozen=True)
class Interface:
    """How blocks are called and what they read, the same for all kinds of a family.

    Attributes:
        attention_for: how the attention of this block must run under these options, its ``preferred_attention``
            honoured; None when it can be traced with it. Raises NotHoistable where the host's attention was replaced.
        bind_for: how the blocks are traced with that attention, on the device of this tensor.
        region_inputs: (inputs, activation, dynamic) -> the block's arguments as a region takes them: tensors and what
            stays the same from step to step, with token counts as sizes that are ``dynamic``.
        token_dims: the token dimensions of those of these inputs that have any.
        reads: the options that ``attention_for``, ``bind_for`` and ``region_inputs`` take care of, of those that blocks
            read themselves.
        vector: the input that modulation is made from, where it can be made ahead of time.
    """

    attention_for: Callable[[Mapping[str, Any], nn.Module], Attend | None]
    bind_for: Callable[[Attend | None, Tensor], Bind]
    region_inputs: Callable[[Mapping[str, Any], Tensor, bool], dict[str, Any]]
    token_dims: Callable[[Mapping[str, Any]], dict[str, tuple[int, ...]]]
    vector: str = ""
    reads: tuple[str, ...] = ("patches",)


@dataclass(frozen=True)
class BlockKind:
    """A list of repeated blocks of the diffusion model.

    Attributes:
        name: what the node and the log call it.
        attribute: the ``nn.ModuleList`` of the diffusion model.
        block: the host's class of its blocks.
        activation: the input whose device and dtype the block computes in.
        streams: how many of its inputs have a token count of their own.
        interface: how its blocks are called.
        selected_by: the input of Compile Repeated Blocks that selects among them; kinds with the same are counted on.
        owned: parameters that its modules have outside of layers, which the host casts where it reads them.
        unread: attributes that differ from block to block and that a forward of the host does not read.
    """

    name: str
    attribute: str
    block: type[nn.Module]
    activation: str
    streams: int
    interface: Interface
    selected_by: str
    owned: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    @functools.cached_property
    def parameters(self) -> tuple[str, ...]:
        """Names of the forward's parameters after ``self``, in order."""
        return tuple(inspect.signature(self.block.forward).parameters)[1:]

    def blocks(self, diffusion_model: nn.Module) -> list[nn.Module]:
        """The model's blocks of this kind; empty when it has none that the host's code of this family defines."""
        blocks = getattr(diffusion_model, self.attribute, None)
        if isinstance(blocks, nn.ModuleList) and any(isinstance(block, self.block) for block in blocks):
            return list(blocks)
        return []

    @functools.cached_property
    def ignored(self) -> frozenset[str]:
        """Those of ``unread`` that the forward of this version of the host does not name."""
        return frozenset(self.unread) - set(self.block.forward.__code__.co_names)

    @functools.cached_property
    def unknown_options(self) -> frozenset[str]:
        """Options that the blocks of this version of the host read and that a region would not give them."""
        return options_read(self.block).difference(self.interface.reads)

    def refuse_unknown(self, options: Mapping[str, Any]) -> None:
        """Raise NotHoistable where ``options`` hold what ``unknown_options`` names."""
        if not self.unknown_options:
            return
        given = sorted(self.unknown_options.intersection(options))
        if given or (ANY in self.unknown_options and options):
            read = f"the option {given[0]}" if given else "options"
            raise NotHoistable(f"in this version of ComfyUI it reads {read} in a way that HotPath does not know")

    def refuse_foreign(self, block: nn.Module) -> None:
        """Raise NotHoistable for a block of another class, or with another forward than the host's."""
        if type(block) is not self.block:
            raise NotHoistable(f"{class_name(type(block))} is not the host's block")
        refuse_replaced_forward(self.block)
        refuse_bolted_on("", block)


@dataclass(frozen=True)
class SharedForward:
    """The method of a diffusion model that has its tokens as sequences and computes them one by one but for attention,
    so that several devices can each run it on some of the tokens.

    Attributes:
        name: of the method.
        classes: those of the family's diffusion models whose method it is, by module and name.
        streams: arguments (batch, tokens, ...) of each stream of tokens, streams in their order at attention. What it
            returns is (batch, tokens, ...) of the last one.
        mask: the argument (..., query tokens, key tokens) over all streams.
        control: the argument that has lists of tensors (batch, tokens, ...) for the last stream.
        refuse: (arguments, options) -> why this very call can't be shared out, or nothing.
    """

    name: str
    classes: tuple[str, ...]
    streams: tuple[tuple[str, ...], ...]
    mask: str
    control: str
    refuse: Callable[[Mapping[str, Any], Mapping[str, Any]], str]

    def of(self, diffusion_model: nn.Module) -> bool:
        """Whether this is the method of ``diffusion_model``."""
        return _is_one_of(diffusion_model, self.classes)

    def is_hosts(self, diffusion_model: nn.Module) -> bool:
        """Whether no other node has replaced it."""
        code = getattr(getattr(diffusion_model, self.name), "__code__", None)
        own = inspect.getfile(type(diffusion_model))
        return self.name not in diffusion_model.__dict__ and code is not None and code.co_filename == own


@dataclass(frozen=True)
class Family:
    """Models whose blocks are of the same kinds.

    Attributes:
        name: of the family, for messages.
        models: what is supported of it, for messages.
        classes: the host's classes of its diffusion models, by module and name; one that merely has such blocks
            may call them in another way, and is none.
        kinds: its lists of blocks.
        conditioning: (diffusion model, tokens) -> random text of so many tokens and all else that the host's
            conditioning holds for it.
        vector_layers: a block's Linear layers that see one vector a step, by name.
        modulations: a block's own modulation modules that can be made ahead, by name, each with its Linear layer as
            ``lin``; none where all blocks share theirs or have none.
        conditioning_vector: (diffusion model, timesteps, conditioning, dtype) -> the vector that the host gives the
            blocks of this family at these timesteps (batch,); only for those that have ``modulations``.
        shared: how its tokens can be shared out over several devices; None where that is not known.
    """

    name: str
    models: str
    classes: tuple[str, ...]
    kinds: tuple[BlockKind, ...]
    conditioning: Callable[[Any, int], tuple[Tensor, dict[str, Any]]]
    vector_layers: Callable[[nn.Module], Mapping[str, nn.Module]]
    modulations: Callable[[nn.Module], dict[str, Any]] = lambda block: {}
    conditioning_vector: Callable[[Any, Tensor, Mapping[str, Any], torch.dtype], Tensor] | None = None
    shared: SharedForward | None = None

    def has(self, diffusion_model: nn.Module) -> bool:
        """Whether ``diffusion_model`` is of this family."""
        known = _is_one_of(diffusion_model, self.classes)
        return known and any(each.blocks(diffusion_model) for each in self.kinds)

    def runs_itself(self, diffusion_model: nn.Module, blocks: Collection[nn.Module]) -> bool:
        """Whether ``blocks`` are all of ``diffusion_model`` and no code runs between them but the host's, unless a call
        brings some along."""
        every = sum(len(kind.blocks(diffusion_model)) for kind in self.kinds)
        hosts = self.shared is not None and self.shared.of(diffusion_model) and self.shared.is_hosts(diffusion_model)
        return hosts and len(blocks) == every


def _is_one_of(diffusion_model: nn.Module, classes: tuple[str, ...]) -> bool:
    """Whether its class is one of ``classes``, by module and name; no class of a pack's is called so."""
    kind = type(diffusion_model)
    return f"{kind.__module__}.{kind.__qualname__}" in classes


def random_tensor(*shape: int) -> Tensor:
    """Normal numbers, the same at each call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
