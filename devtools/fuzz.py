"""Random graphs, each sampled compiled and eager: what differs is told as a test.

Graphs of one run share models, regions and the host's bookkeeping as prompts on one server do, so that what an earlier
one leaves behind shows in a later one. The same seed gives the same graphs.
"""

from __future__ import annotations

import gc
import itertools
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.hooks
import comfy.model_management
import comfy.sd
import torch
from torch import Tensor

from ..host.compiling import regions as host_regions
from ..host.compiling.compile import compile_repeated_blocks, compiled_blocks
from ..host.quantizing.quantize import quantize_repeated_blocks
from ..host.residency.offload import OffloadSettings, offload_repeated_blocks
from ..host.residency.streaming import streamable_layers
from ..host.splitting.copies import KEY as SPLIT
from ..host.splitting.split import split_repeated_blocks
from ..host.telling.progress import NodeText
from ..hotpath.counters import graphs_so_far
from ..hotpath.region_store import RegionStore
from ..hotpath.settings import CompileSettings
from .adapters import adapter
from .family_models import tiny
from .gpu_host import imitated_devices
from .graphs import FAMILIES, MODELS, ROUNDING_FORMATS, Graph, features, plainer, random_graph
from .patches import PATCHES
from .sampling import load, sample

TOLERANCE = 1e-4
# Where activations are rounded to 8 bits, what differs in the last bit of float32 may be rounded otherwise.
QUANTIZED_TOLERANCE = 0.05
# The seeds of graphs that come on models loaded anew are multiples of it.
_FRESH = 7
# Seconds between two lines of progress.
_QUIET = 10
# The compiler's own words, which no user should meet.
_GUARD_WORDS = re.compile(r"\b[LG]\[|___|\bunknown\b|\b(Eq|Ne|Mod)\(|\bs\d+\b|\.size\(\)|expected \d+, actual")


@dataclass(frozen=True)
class Failure:
    """What does not hold, and the fewest and plainest graphs found that show it in this order."""

    problem: str
    graphs: tuple[Graph, ...]

    def as_test(self) -> str:
        """A test to paste: it fails as long as the problem is there."""
        lines = "".join(f"        {graph!r},\n" for graph in self.graphs)
        return (
            "from hotpath_pack.devtools.fuzz import replay\n"
            "from hotpath_pack.devtools.graphs import Adapter, Graph\n\n\n"
            f"def test_{re.sub(r'[^a-z]+', '_', self.problem.lower()).strip('_')[:60]}():\n"
            f'    """{self.problem[:110]}"""\n    replay(\n{lines}    )\n'
        )


@dataclass
class Fuzzed:
    """What was seen. Counted in graphs are the reasons for which blocks ran ``eager``, for ``recompiles``, what eager
    itself raised (``refused``), and ``features``; ``shared`` are those that several devices computed."""

    seed: int
    graphs: int = 0
    compiled_graphs: int = 0
    largest_difference: float = 0.0
    not_finite: int = 0
    shared: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    eager: Counter[str] = field(default_factory=Counter)
    recompiles: Counter[str] = field(default_factory=Counter)
    features: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)


def fuzz(
    seed: int,
    seconds: float = float("inf"),
    graphs: float = float("inf"),
    show: Callable[[str], None] = lambda text: None,
    most_failures: int = 5,
    tries: int = 40,
    draw: Callable[[int, int], Graph] | None = None,
) -> Fuzzed:
    """Run random graphs until one of the limits is reached.

    Args:
        tries: as many runs look for the ``least`` that shows a problem.
        draw: the graph of a seed and a number; ``random_graph`` by default.
    """
    seen, started = Fuzzed(seed), time.monotonic()
    known, told = set[str](), started
    with _World() as world:
        history: list[Graph] = []
        for number in itertools.count():
            if number >= graphs or time.monotonic() - started >= seconds or len(seen.failures) >= most_failures:
                return seen
            graph = (draw or random_graph)(seed, number)
            history.append(graph)
            problem = world.problem(graph, seen)
            seen.graphs += 1
            seen.features.update(features(graph))
            if problem:
                show(f"graph {number + 1}: {problem}; looking for the least that shows it")
                if _kind(problem) not in known:
                    known.add(_kind(problem))
                    seen.failures.append(least(history, problem, tries))
                world.renew()
                history.clear()
            elif time.monotonic() - told >= _QUIET:
                told = time.monotonic()
                show(
                    f"{seen.graphs} graphs, {len(seen.failures)} failures, {seen.compiled_graphs} compiled, "
                    f"largest difference {seen.largest_difference:.1e}, {seen.refused.total()} raised by eager too"
                )
    raise AssertionError("graphs have no end")


def rows(seen: Fuzzed) -> list[tuple[str, object]]:
    """What to print of a run."""
    return [
        ("graphs, each eager and compiled", seen.graphs),
        ("failures", len(seen.failures)),
        ("largest difference, relative", f"{seen.largest_difference:.1e}"),
        ("graphs compiled", seen.compiled_graphs),
        ("not finite in eager either", seen.not_finite),
        ("computed by several devices", seen.shared),
        *((f"raised by eager too: {what}", count) for what, count in seen.refused.most_common()),
        *((f"eager: {reason}", count) for reason, count in seen.eager.most_common()),
        *((f"compiled again: {reason}", count) for reason, count in seen.recompiles.most_common()),
        *((f"with {feature}", count) for feature, count in sorted(seen.features.items())),
    ]


def numbers(seen: Fuzzed) -> dict[str, Any]:
    """What to write of a run as JSON."""
    return {**vars(seen), "failures": [failure.as_test() for failure in seen.failures]}


def replay(*graphs: Graph) -> None:
    """Run ``graphs`` in this order on models of their own; raises AssertionError when one of them has a problem."""
    with _World() as world:
        for graph in graphs:
            problem = world.problem(graph, Fuzzed(0))
            assert not problem, f"{graph}: {problem}"


class _World:
    """Models and regions that the graphs of a run share."""

    def __init__(self) -> None:
        self._models: dict[str, tuple[dict[str, Tensor], Any]] = {}
        self._blocks: Any = None
        self._devices = imitated_devices(3)

    def __enter__(self) -> _World:
        self._regions = host_regions.REGIONS
        self._level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        self._devices.start()
        self.renew()
        return self

    def __exit__(self, *exc: object) -> None:
        self._forget()
        self._devices.stop()
        logging.disable(self._level)
        host_regions.REGIONS = self._regions

    def renew(self) -> None:
        """As after a start of the host."""
        self._forget()
        torch._dynamo.reset()
        host_regions.REGIONS = RegionStore(capacity=self._regions.capacity)

    def _forget(self) -> None:
        comfy.model_management.unload_all_models()
        self._models.clear()
        gc.collect()

    def problem(self, graph: Graph, seen: Fuzzed) -> str:
        """What does not hold for ``graph``, in words; empty when all does."""
        before = graphs_so_far()
        if graph.seed % _FRESH == 0:
            self._forget()
        # Whichever comes first may find a MODEL that was never loaded, and leave behind what the other one meets.
        ran = {fast: self._latent(graph, fast, seen) for fast in (graph.seed % 2 == 0, graph.seed % 2 == 1)}
        (want, refused), (got, failed) = ran[False], ran[True]
        seen.compiled_graphs += graphs_so_far() - before
        if refused is not None or failed is not None:
            if refused is not None and type(failed) is type(refused):
                seen.refused[f"{type(refused).__name__}: {refused}"[:120]] += 1
                return ""
            return f"compiled gave {_told(failed)} where eager gave {_told(refused)}"
        assert want is not None and got is not None
        if problem := self._said(seen):
            return problem
        finite = want.isfinite()
        if not finite.all():
            seen.not_finite += 1
            return (
                "" if torch.equal(finite, got.isfinite()) else "compiled is not finite where eager is, or the reverse"
            )
        difference = (want - got).abs().max().item() / max(1.0, want.abs().max().item())
        if graph.quantize not in ROUNDING_FORMATS:
            seen.largest_difference = max(seen.largest_difference, difference)
        limit = QUANTIZED_TOLERANCE if graph.quantize in ROUNDING_FORMATS else TOLERANCE
        return "" if difference <= limit else f"the image differs from eager by {difference:.1e}"

    def _said(self, seen: Fuzzed) -> str:
        """What is wrong with what the node said of its last run."""
        blocks = self._blocks
        seen.eager.update(set(blocks.eager))
        seen.recompiles.update(set(blocks.recompiles))
        for text in (*blocks.eager, *blocks.recompiles):
            if _GUARD_WORDS.search(text):
                return f"these words reach a user: {text}"
            if "could not be compiled" in text:
                return text
        counts = blocks.account.counts
        if counts["selected"] != counts["compiled"] + counts["eager"] + counts["not_run"]:
            return f"blocks are not accounted for: {counts}"
        return ""

    def _latent(self, graph: Graph, fast: bool, seen: Fuzzed) -> tuple[Tensor | None, Exception | None]:
        torch.manual_seed(graph.seed)
        try:
            # As the host's nodes run.
            with torch.inference_mode():
                model, cond = self._chain(graph, fast)
            latent = sample(
                model,
                graph.width,
                graph.height,
                graph.tokens,
                graph.batch,
                graph.steps,
                graph.seed,
                cfg=graph.cfg,
                sampler=graph.sampler,
                scheduler=graph.scheduler,
                frames=graph.frames,
                **cond,
            )
            if fast:
                self._blocks = compiled_blocks(model)
                seen.shared += any(shared.steps for shared in model.get_wrappers("apply_model", SPLIT))
            return latent, None
        except Exception as error:
            # Whatever it is, the other side must give the same.
            return None, error

    def _chain(self, graph: Graph, fast: bool) -> tuple[Any, dict[str, Any]]:
        weights, model = self._model(graph.model)
        cond = _conditioning(graph, model)
        hooks = []
        layers = [name.removesuffix(".weight") for name in weights] if graph.model in FAMILIES else None
        files = [adapter(weights, each.kind, layers, rank=each.rank, seed=each.seed) for each in graph.adapters]
        for each, file in zip(graph.adapters, files, strict=True):
            if each.how == "weights":
                model, _ = comfy.sd.load_lora_for_models(model, None, file, each.strength, 0)
            elif each.how == "hook":
                hooks.append(comfy.hooks.create_hook_lora(file, strength_model=each.strength, strength_clip=0.0))
        if hooks:
            cond["hooks"] = comfy.hooks.HookGroup.combine_all_hooks(hooks)
        if graph.quantize:
            model = quantize_repeated_blocks(model, graph.quantize, "", NodeText(None))
        for each, file in zip(graph.adapters, files, strict=True):
            if each.how == "bypass":
                model, _ = comfy.sd.load_bypass_lora_for_models(model, None, file, each.strength, 0)
        model = _patched(model, graph.patches)
        if graph.devices > 1 and fast:
            model = split_repeated_blocks(model, ", ".join(map(str, range(graph.devices))), NodeText(None))
        if graph.offload and (fast or _streamed_is_another(graph)):
            budget, ahead, modulation, resident = graph.offload
            lean = OffloadSettings(budget, ahead, True, modulation, resident)
            model = offload_repeated_blocks(model, lean, NodeText(None))
        if fast:
            settings = CompileSettings(backend=graph.backend, dynamic=graph.dynamic)
            selection = graph.double_blocks, graph.single_blocks
            model = compile_repeated_blocks(model, settings, *selection, "eager", NodeText(None))
        return _patched(model, graph.patches_after), cond

    def _model(self, name: str) -> tuple[dict[str, Tensor], Any]:
        if name in FAMILIES and name not in self._models:
            model = tiny(name)
            blocks = streamable_layers(model.model.diffusion_model, ahead=False).values()
            layers = {f"{path}.weight": layer.weight for block in blocks for path, layer in block.items()}
            self._models[name] = layers, model
        if name not in self._models:
            weights = MODELS[name]()
            model = _load(weights)
            # As of a model from a file.
            model.cached_patcher_init = _load, (weights,)
            self._models[name] = weights, model
        return self._models[name]


def _load(weights: dict[str, Tensor], disable_dynamic: bool = True) -> Any:
    """A MODEL as a loader of the host makes it, by whose names for it the host asks for another."""
    return load({key: weight.clone() for key, weight in weights.items()})


def _streamed_is_another(graph: Graph) -> bool:
    """Whether ComfyUI itself gives another image where it applies LoRAs to weights that it has not loaded: it rounds
    quantized ones anew where it loads them, and the one of a hook goes on before those of the MODEL elsewhere."""
    ways = {each.how for each in graph.adapters}
    dora = any(each.kind == "dora" for each in graph.adapters)
    return "weights" in ways and (bool(graph.quantize) or (dora and "hook" in ways))


def _patched(model: Any, patches: Sequence[tuple[str, float]]) -> Any:
    model = model.clone()
    for name, strength in patches:
        PATCHES[name](model, strength)
    return model


def _conditioning(graph: Graph, model: Any) -> dict[str, Any]:
    cond: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(graph.seed + 1)
    if graph.mask:
        dtype, _, ndim = graph.mask.partition(" ")
        tokens = graph.tokens
        if graph.model in ("flux2", "klein"):
            # The host pads text.
            tokens = max(tokens, 512)
        size = tokens + 16
        allowed = torch.rand(size, size, generator=generator) > 0.4
        allowed.fill_diagonal_(True)
        mask = allowed if dtype == "bool" else torch.zeros(size, size).masked_fill(~allowed, -10.0)
        mask = mask.to(getattr(torch, dtype))
        cond["attention_mask"] = mask.reshape((1,) * (int(ndim) - 2) + mask.shape)
        cond["attention_mask_img_shape"] = (4, 4)
    if graph.references:
        channels = model.model.latent_format.latent_channels
        sizes = [(1, channels, *size) for size in graph.references]
        cond["reference_latents"] = [torch.randn(size, generator=generator) for size in sizes]
        cond["reference_latents_method"] = graph.references_method
    return cond


def least(history: Sequence[Graph], problem: str, tries: int = 40) -> Failure:
    """The fewest and plainest of the last graphs found in so many tries that still show a problem of this kind, each
    time from a fresh start."""
    left = tries

    def shows(graphs: Sequence[Graph]) -> bool:
        nonlocal left
        if left == 0:
            return False
        left -= 1
        with _World() as world:
            found = [world.problem(graph, Fuzzed(0)) for graph in graphs]
        return _kind(found[-1]) == _kind(problem) and not any(found[:-1])

    lengths = [length for length in (1, 2, 4, 8, 16, 32, 64) if length < len(history)]
    kept = next((list(history[-length:]) for length in lengths if shows(history[-length:])), list(history))
    for graph in kept[:-1]:
        rest = [other for other in kept if other is not graph]
        if shows(rest):
            kept = rest
    for index in reversed(range(len(kept))):
        for change in plainer(kept[index]):
            changed = [*kept[:index], change(kept[index]), *kept[index + 1 :]]
            if changed != kept and shows(changed):
                kept = changed
    return Failure(problem, tuple(kept))


def _kind(problem: str) -> str:
    return re.sub(r"[\d.e+-]+", "", problem)[:40]


def _told(error: Exception | None) -> str:
    if error is None:
        return "an image"
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__} ({first[:100]})"
