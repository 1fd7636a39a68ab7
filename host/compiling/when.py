"""When the blocks of one node are compiled: ahead of the first step, in it, or in another process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping

import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from ...hotpath.compiled import Region
from ...hotpath.examples import describe_tensors
from ...hotpath.failures import RegionFailed
from ...hotpath.later import Later
from ...hotpath.preflight import compile_problems
from ...hotpath.starting import start_compiler
from ...hotpath.template import BlockPlan, NotHoistable
from ..families.kinds import BlockKind
from ..residency.weights import Layers
from ..telling.progress import running_prompt
from .artifacts import store
from .behind import Behind, Job
from .warming import Arguments, Prepare, Warming, examples_of

WHEN = ("wait", "background")
# Storing, which no step waits for.
LATER = Later()


class When:
    """``wait``: a thread loads or compiles from when the node is executed on, and the first step waits for it.
    ``background``: a helper process compiles, and prompts sample eager until it has. Neither: the first step does."""

    def __init__(self, when: str) -> None:
        self._behind = Behind() if when == "background" else None
        self._warming = Warming()

    def begin(
        self,
        model: ModelPatcher,
        selected: Mapping[BlockKind, Collection[int]],
        planned: Callable[[BlockKind, nn.Module], tuple[BlockPlan, Layers]],
        prepare: Prepare,
    ) -> None:
        """Have what the ``selected`` blocks of ``model`` will need compiled; ``prepare`` gets it to ``get_ready``.

        Where it can't be told, and nothing at all is stored, the compiler is started.
        """
        examples, device = examples_of(model, selected, planned), model.load_device
        self._warming.begin(examples, device, prepare)
        if not examples and self._behind is None:
            self._warming.start(functools.partial(_start_first, device))

    def cancel(self) -> None:
        self._warming.cancel()

    def begin_run(self) -> None:
        """A sampling run begins."""
        if self._behind is not None:
            self._behind.begin(running_prompt())

    def get_ready(self, region: Region, given: Arguments, check: Callable[[], None]) -> None:
        """Compile ``region`` for these arguments ahead, or have it compiled; ``check`` is called before."""
        if self._behind is not None:
            self._behind.ready(region, functools.partial(_job, region, given), given.weights, given.inputs)
            return

        def begin() -> None:
            check()
            self._warming.compiles(given.kind)
            start_compiler(given.device)

        region.prepare(given.weights, given.inputs, given.token_dims, begin)

    def settle(
        self, region: Region, given: Arguments, announce: Callable[[], None], check: Callable[[], None]
    ) -> Callable[[], None]:
        """Before ``region`` runs in a step: what to call before it is compiled there, by default ``check``.

        Raises:
            NotHoistable: it runs eager in this prompt.
        """
        if self._behind is None:
            self._warming.wait(given.kind, announce)
            return check
        self._behind.require(region, functools.partial(_job, region, given), given.weights, given.inputs)
        return _never_here


def check_machine(region: Region, device: torch.device, dtypes: Collection[torch.dtype]) -> None:
    """Say what is missing before a compiler is asked to work, whose own words are harder to act on."""
    if problems := compile_problems(region.settings.backend, device, dtypes):
        raise RegionFailed(region.name, "; ".join(problems))


def _start_first(device: torch.device) -> None:
    if store().is_empty():
        start_compiler(device)


def _job(region: Region, given: Arguments) -> Job:
    kept = region.kept
    assert kept is not None
    return Job(
        name=region.name,
        template=given.plan.template,
        bind=region.bind,
        settings=region.settings,
        streams=region.streams,
        region=kept.region,
        folder=kept.store.folder,
        facts=dict(kept.facts()),
        device=str(given.device),
        threads=torch.get_num_threads(),
        weights=describe_tensors(given.weights),
        inputs=describe_tensors(given.inputs),
        token_dims=given.token_dims,
        inference=torch.is_inference_mode_enabled(),
        patched=given.attend is not None,
    )


def _never_here() -> None:
    """Called before compiling here, where the graph that was there a moment ago no longer holds."""
    raise NotHoistable("what was compiled in the background no longer fits")
