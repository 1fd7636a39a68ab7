"""A random graph: what is in it, drawn from a seed, and how it is told and made plainer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from torch import Tensor

from .checkpoints import flux1, flux2
from .patches import PATCHES

MODELS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "flux1": lambda: flux1(2, 3, hidden=128),
    "same_structure": lambda: flux1(2, 3, hidden=128, seed=7),
    "wider": lambda: flux1(2, 3, hidden=256, guidance=False, seed=1),
    "fill": lambda: flux1(2, 3, hidden=128, in_features=384, seed=2),
    "flux2": lambda: flux2(2, 3, hidden=128),
    "klein": lambda: flux2(2, 3, hidden=128, guidance=False, seed=3),
}
# Of other families; of videos there may be frames.
FAMILIES = (
    "qwen_image",
    "z_image",
    "lumina2",
    "krea2",
    "wan_t2v",
    "wan_i2v",
    "hunyuan_video",
    "longcat",
    "chroma_radiance",
)
VIDEOS = ("wan_t2v", "wan_i2v", "hunyuan_video")
# Patches that are not of Flux alone.
ANYWHERE = ("attention_override",)
SAMPLERS = (
    "euler",
    "euler_ancestral",
    "heun",
    "dpm_2",
    "lms",
    "dpmpp_2m",
    "dpmpp_sde",
    "ddim",
    "uni_pc",
    "res_multistep",
)
SCHEDULERS = ("simple", "normal", "karras", "sgm_uniform", "beta", "ddim_uniform")
ADAPTERS = ("lora", "dora", "loha", "lokr", "lokr_full", "diff")
BYPASSED = ("lora", "loha", "lokr", "lokr_full")
EXACT_FORMATS, ROUNDING_FORMATS = ("int8_weight_only",), ("int8_dynamic",)
MASKS = ("float32 2", "float32 3", "float32 4", "bool 3", "float16 3", "float64 3")
# Graphs that come with the same few settings, as each pair of a backend and a kind of sizes compiles all again.
PHASE = 1000


@dataclass(frozen=True)
class Adapter:
    """A LoRA, and ``how`` it is on the model: in its ``weights``, in ``bypass`` mode, or a ``hook`` of conditioning."""

    kind: str = "lora"
    strength: float = 1.0
    how: str = "weights"
    rank: int = 4
    seed: int = 1


@dataclass(frozen=True)
class Graph:
    """A prompt. Sizes are in pixels; ``references`` are sizes of reference latents in theirs; with more than one of
    ``devices``, which are imitated, tokens are shared out.

    ``patches`` stand before Compile Repeated Blocks and ``patches_after`` behind it.
    """

    model: str = "flux1"
    width: int = 64
    height: int = 64
    batch: int = 1
    tokens: int = 16
    steps: int = 1
    frames: int = 1
    sampler: str = "euler"
    scheduler: str = "simple"
    cfg: float = 1.0
    seed: int = 0
    mask: str = ""
    references: tuple[tuple[int, int], ...] = ()
    references_method: str = "offset"
    adapters: tuple[Adapter, ...] = ()
    quantize: str = ""
    patches: tuple[tuple[str, float], ...] = ()
    patches_after: tuple[tuple[str, float], ...] = ()
    offload: tuple[str, int, str, str] | None = None
    backend: str = "eager"
    dynamic: str = "auto"
    double_blocks: str = "all"
    single_blocks: str = "all"
    devices: int = 1

    def __repr__(self) -> str:
        return _text(self)


def random_graph(seed: int, number: int) -> Graph:
    """The graph of this number in the run of this seed."""
    few = _Few(random.Random(f"{seed} phase {number // PHASE}"))
    choose = random.Random(f"{seed} graph {number}")

    def perhaps(probability: float, values: Sequence[Any], otherwise: Any) -> Any:
        return choose.choice(values) if choose.random() < probability else otherwise

    graph = Graph(
        model=choose.choice(few.models),
        width=choose.randrange(32, 137, 8),
        height=choose.randrange(32, 137, 8),
        batch=perhaps(0.3, (2, 3), 1),
        tokens=choose.choice((1, 5, 16, 16, 33, 64)),
        steps=perhaps(0.4, (2, 3), 1),
        sampler=choose.choice(SAMPLERS),
        scheduler=choose.choice(SCHEDULERS),
        cfg=perhaps(0.3, (2.0, 4.5), 1.0),
        seed=choose.randrange(1000),
        adapters=tuple(_adapter(choose, few) for _ in range(perhaps(0.6, (1, 1, 2), 0))),
        quantize=perhaps(0.15, (few.format,), ""),
        patches=_patches(choose, (0, 0, 0, 1, 1, 2)),
        patches_after=_patches(choose, (0, 0, 0, 0, 1)),
        offload=perhaps(0.25, few.offloads, None),
        backend=few.backend,
        # As many sizes as there may be would compile as often.
        dynamic=perhaps(0.02, ("never",), few.dynamic),
        double_blocks=perhaps(0.1, ("0", "none"), "all"),
        single_blocks=perhaps(0.1, ("1-2", "0"), "all"),
    )
    share = random.Random(f"{seed} devices {number}")
    if share.random() < few.shared and graph.model not in FAMILIES:
        graph = replace(graph, devices=share.choice((2, 3)))
        if share.random() < 0.8:
            # What is in the way of sharing out is as frequent otherwise as to leave nothing to share out.
            adapters = tuple(each for each in graph.adapters if each.how == "weights")
            graph = replace(graph, adapters=adapters, patches=(), patches_after=(), offload=None)
    if graph.model in FAMILIES:
        return replace(
            graph,
            # The host pads no video of Hunyuan's to whole patches.
            width=-(-graph.width // 16) * 16,
            height=-(-graph.height // 16) * 16,
            frames=choose.choice((1, 2, 3)) if graph.model in VIDEOS else 1,
            patches=tuple(patch for patch in graph.patches if patch[0] in ANYWHERE),
            patches_after=tuple(patch for patch in graph.patches_after if patch[0] in ANYWHERE),
            double_blocks="all",
            single_blocks="all",
        )
    if choose.random() < 0.2:
        graph = replace(graph, mask=choose.choice(MASKS))
    elif choose.random() < 0.2:
        sizes = tuple((choose.randrange(2, 17), choose.randrange(2, 17)) for _ in range(choose.choice((1, 1, 2))))
        graph = replace(graph, references=sizes, references_method=few.method)
    return graph


class _Few:
    """What the graphs of a phase have in common: each choice here compiles all blocks again."""

    def __init__(self, choose: random.Random) -> None:
        self.models = choose.choice(
            (
                *(("flux1", "same_structure"), ("flux1", "wider"), ("flux2", "klein"), ("fill", "flux1")) * 3,
                *((name,) for name in FAMILIES),
            )
        )
        self.backend = choose.choice(("eager",) * 5 + ("aot_eager",) * 3 + ("inductor",))
        self.dynamic = choose.choice(("auto", "auto", "always"))
        self.bypassed = choose.choice(BYPASSED)
        self.format = choose.choice((*EXACT_FORMATS, *ROUNDING_FORMATS))
        self.method = choose.choice(("offset", "index", "uxo", "index_timestep_zero"))
        modulation = choose.choice(("ahead", "in place"))
        # The graphs of several devices are others than those of one.
        self.shared = choose.choice((0, 0, 0.5))
        self.offloads = [
            (budget, prefetch, modulation, resident)
            for budget in ("0 %", "40%", "auto")
            for prefetch in (0, 1, 2)
            for resident in ("spread", "first")
        ]


def _adapter(choose: random.Random, few: _Few) -> Adapter:
    how = choose.choice(("weights", "weights", "bypass", "hook"))
    kind = few.bypassed if how == "bypass" else choose.choice(ADAPTERS)
    strength = choose.choice((-0.7, 0.3, 0.8, 1.0, 1.6))
    return Adapter(kind, strength, how, choose.choice((2, 4, 4, 8)), choose.randrange(1, 4))


def _patches(choose: random.Random, counts: Sequence[int]) -> tuple[tuple[str, float], ...]:
    names = choose.sample(tuple(PATCHES), choose.choice(counts))
    return tuple((name, choose.choice((0.1, 0.3, 0.6))) for name in names)


def plainer(graph: Graph) -> Iterator[Callable[[Graph], Graph]]:
    """Changes that each make a graph plainer, the large ones first."""
    defaults = {item.name: item.default for item in fields(Graph)}
    shape = ("width", "height", "batch", "tokens", "steps", "frames", "sampler", "scheduler", "cfg", "seed")
    nodes = ("devices", "offload", "quantize", "backend", "dynamic", "double_blocks", "single_blocks")
    rest = [
        ("mask",),
        ("references", "references_method"),
        ("adapters",),
        ("patches",),
        ("patches_after",),
    ]
    for names in (shape, nodes, *rest, *((name,) for name in ("model", *nodes, *shape))):
        yield partial(replace, **{name: defaults[name] for name in names})
    for name in ("adapters", "patches", "patches_after"):
        for each in getattr(graph, name):
            yield partial(_without, name=name, each=each)


def _without(graph: Graph, name: str, each: Any) -> Graph:
    rest: dict[str, Any] = {name: tuple(kept for kept in getattr(graph, name) if kept != each)}
    return replace(graph, **rest)


def features(graph: Graph) -> Iterator[str]:
    yield from (graph.model, graph.backend, f"dynamic {graph.dynamic}", graph.sampler)
    yield from ({f"{each.kind} ({each.how})": None for each in graph.adapters})
    yield from ({name: None for name, _ in (*graph.patches, *graph.patches_after)})
    for name, has in (
        ("mask", graph.mask),
        ("references", graph.references),
        ("offload", graph.offload),
        (graph.quantize, graph.quantize),
        ("CFG", graph.cfg != 1),
        ("batch", graph.batch > 1),
        ("size not of 16", graph.width % 16 or graph.height % 16),
        ("devices", graph.devices > 1),
        ("some blocks", (graph.double_blocks, graph.single_blocks) != ("all", "all")),
    ):
        if has:
            yield name


def _text(value: Any) -> str:
    told = [
        f"{item.name}={getattr(value, item.name)!r}"
        for item in fields(value)
        if getattr(value, item.name) != item.default
    ]
    return f"{type(value).__name__}({', '.join(told)})"
