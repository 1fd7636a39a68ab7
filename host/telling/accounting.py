"""What became of each selected block in one call of a model: it ran compiled, it ran eager, or it did not run."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from comfy.patcher_extension import WrappersMP
from torch import nn

from ...hotpath.template import Around

# More blocks than this are counted rather than named.
_FEW = 3

Reasons = dict[str, set[str]]
"""Names of blocks by the reason that they share."""


class CallAccount:
    """One call of a model with ``selected`` blocks, indices by kind.

    After ``close`` each of them is in exactly one of ``compiled``, ``eager`` and ``not_run``.
    """

    def __init__(self, selected: Mapping[str, Collection[int]]) -> None:
        self.selected = selected
        self.eager: Reasons = {}
        self.not_run: Reasons = {}
        self.entered = False
        self._compiled: set[tuple[str, int]] = set()
        self._eager: set[tuple[str, int]] = set()
        self._copied: set[tuple[str, int]] = set()

    def ran_compiled(self, kind: str, index: int) -> None:
        self.entered = True
        self._compiled.add((kind, index))

    def ran_eager(self, kind: str, index: int, reason: str, entered: bool = True) -> None:
        """``entered`` is off for a block that is known to run eager and was not entered."""
        self.entered |= entered
        self._eager.add((kind, index))
        self.eager.setdefault(reason, set()).add(block_name(kind, index))

    def weights_copied(self, kind: str, index: int) -> None:
        """The block runs with weights that are copied to the device for this call alone."""
        self._copied.add((kind, index))

    @property
    def copied(self) -> int:
        """For how many blocks weights were copied."""
        return len(self._copied)

    def all_eager(self, reason: str) -> None:
        """The model runs by code that this pack has no part in."""
        for kind, indices in self.selected.items():
            for index in indices:
                self.ran_eager(kind, index, reason)

    def close(self, options: Mapping[str, Any]) -> None:
        """The call has ended: find why what did not run did not, from the ``transformer_options`` of the call."""
        replaced = options.get("patches_replace", {}).get("dit", {})
        for kind, indices in self.selected.items():
            for index in indices:
                if (kind, index) in self._compiled or (kind, index) in self._eager:
                    continue
                if (f"{kind}_block", index) in replaced:
                    reason = "a patch of another node stands in its place"
                elif self.entered:
                    reason = "another node skipped it or ran something else in its place"
                else:
                    reason = f"another node gave this step's result without it{_who(options)}"
                self.not_run.setdefault(reason, set()).add(block_name(kind, index))

    @property
    def compiled(self) -> Counter[str]:
        """How many blocks of each kind ran compiled, and never otherwise."""
        return Counter(kind for kind, _ in sorted(self._compiled - self._eager))

    @property
    def whole(self) -> bool:
        """Whether all selected blocks ran, so that the time of the call is that of a whole step."""
        return self.entered and not self.not_run

    @property
    def counts(self) -> dict[str, int]:
        """How many blocks were selected, ran compiled, ran eager and did not run."""
        eager, not_run = (sum(map(len, reasons.values())) for reasons in (self.eager, self.not_run))
        selected = sum(map(len, self.selected.values()))
        return {"selected": selected, "compiled": self.compiled.total(), "eager": eager, "not_run": not_run}

    def line(self) -> str:
        """The three counts."""
        said = ["{compiled} of {selected} blocks compiled", "{eager} eager", "{not_run} did not run"]
        counts = self.counts
        told = [said[0]] + [text for text, name in zip(said[1:], ("eager", "not_run"), strict=True) if counts[name]]
        return ", ".join(told).format(**counts)


def block_name(kind: str, index: int) -> str:
    return f"{kind} block {index}"


def which(names: Collection[str]) -> str:
    """A few blocks by name, more by number."""
    return ", ".join(sorted(names)) if len(names) <= _FEW else f"{len(names)} blocks"


def _who(options: Mapping[str, Any]) -> str:
    """What else is around the diffusion model in this call, by the names that its nodes gave it; in brackets."""
    wrappers = options.get("wrappers", {}).get(WrappersMP.DIFFUSION_MODEL, {})
    names = sorted(str(key) for key, functions in wrappers.items() if functions and key)
    return f" ({', '.join(names)})" if names else ""


class Route(functools.partial[Any]):
    """How a block runs instead of by its forward; the block is the last of the arguments."""

    def to(self, block: nn.Module) -> Route:
        """The same for the same block of another clone of the model."""
        return Route(self.func, *self.args[:-1], block, **self.keywords)


def routes_to(others: Mapping[nn.Module, nn.Module]) -> dict[nn.Module, Route]:
    """For each block that is routed now, the route of the block of another clone that ``others`` has for it."""
    runs = {block: block.__dict__.get("forward") for block in others}
    return {others[block]: route.to(others[block]) for block, route in runs.items() if isinstance(route, Route)}


@contextmanager
def routed(runs: Mapping[nn.Module, Any]) -> Iterator[None]:
    """For the length of the scope each block runs by the function of its own that ``runs`` has.

    ``forward`` is an attribute of the instance, removed after; what another node put there meanwhile is left to it.
    """
    try:
        for block, run in runs.items():
            around = block.__dict__.get("forward")
            if isinstance(around, Around):
                around.inside = run
            else:
                block.forward = run
        yield
    finally:
        for block, run in runs.items():
            around = block.__dict__.get("forward")
            if isinstance(around, Around):
                around.inside = None
            elif around is run:
                del block.forward


def has_own_forward(block: nn.Module) -> bool:
    """Whether another node has put a ``forward`` of its own on this very block."""
    return "forward" in block.__dict__ and not isinstance(block.__dict__["forward"], Around)


class Untouched:
    """A scope in which a routed block looks as it was, to a plan, to a tracer and to whatever runs inside it; whether
    it was routed by its own ``forward``, and not within something around it."""

    # Entered before each call of a block.
    __slots__ = ("_block", "_forward")

    def __init__(self, block: nn.Module) -> None:
        self._block = block

    def __enter__(self) -> bool:
        self._forward = self._block.__dict__.pop("forward", None)
        return self._forward is not None

    def __exit__(self, *raised: object) -> None:
        if self._forward is not None:
            self._block.__dict__["forward"] = self._forward
