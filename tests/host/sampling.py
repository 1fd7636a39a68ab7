"""Sampling a tiny model through the host, and what is compared."""

from dataclasses import replace

import torch
from hotpath_pack.devtools.sampling import load as load
from hotpath_pack.devtools.sampling import sample as sample
from hotpath_pack.host.compiling.call import Call
from hotpath_pack.host.compiling.compile import compile_repeated_blocks
from hotpath_pack.host.quantizing.formats import node_formats
from hotpath_pack.host.quantizing.quantize import quantize_repeated_blocks
from hotpath_pack.host.residency.offload import KEY, OffloadSettings, offload_repeated_blocks
from hotpath_pack.host.residency.streaming import RESIDENCY
from hotpath_pack.host.telling.progress import NodeText
from hotpath_pack.hotpath.counters import breaks_so_far, graphs_so_far
from hotpath_pack.hotpath.settings import CompileSettings

TOLERANCE = 1e-4
SMALL = dict(width=32, height=32, tokens=4)
# Half of the time of ``aot_eager``, which has its turn: see conftest.py.
SETTINGS = CompileSettings(backend="eager")


class Texts(NodeText):
    """Keeps what a node would show: each new text, and the whole of the last status."""

    def __init__(self):
        super().__init__("7")
        object.__setattr__(self, "seen", [])
        object.__setattr__(self, "last", {})

    def show(self, text, state="done", reasons=(), **facts):
        if self.seen[-1:] != [text]:
            self.seen.append(text)
        self.last.clear()
        self.last.update(state=state, reasons=list(reasons), facts=facts)


def compiled(model, double="all", single="all", on_failure="error", text=None, blocks="all", cache="off", **changes):
    settings, text = replace(SETTINGS, **changes), text or Texts()
    return compile_repeated_blocks(model, settings, double, single, on_failure, text, cache, other_blocks=blocks)


def compiled_blocks(model):
    """The wrapper that the node put on a MODEL."""
    (wrapper,) = model.get_wrappers("apply_model", "hotpath_compile")
    return wrapper


def swapped(model):
    """A scope in which blocks of a compiled MODEL run as they do within a step."""
    blocks = compiled_blocks(model)
    call = Call(blocks.selected)
    blocks.account = call.account
    return blocks._swapped(model.model.diffusion_model, call, ())


def quantized(model, format=None, skip="", text=None):
    with torch.inference_mode():
        return quantize_repeated_blocks(model, format or node_formats()[1], skip, text or Texts())


def offloaded(model, modulation="ahead", text=None, **settings):
    return offload_repeated_blocks(model, OffloadSettings(modulation=modulation, **settings), text or Texts())


def ahead_of(model):
    """What makes modulation ahead for a MODEL."""
    return model.get_wrappers("apply_model", KEY)[-1]


def streamed_of(model):
    """What streams the blocks of a MODEL."""
    return model.get_wrappers("apply_model", KEY)[0]


def assert_two_graphs(model, **run):
    """Compiled, ``model`` is two graphs whatever the size, text and steps, and gives what it gives itself."""
    fast = compiled(model, backend="eager")
    with Counting() as counting, torch._dynamo.config.patch(error_on_recompile=True):
        for change in (dict(), dict(width=48), dict(tokens=5), dict(steps=2)):
            assert_parity(model, fast, **{**run, **change})
    assert (counting.graphs, counting.breaks) == (2, 0)
    assert compiled_blocks(fast).eager == {}


class Counting:
    """Graphs and breaks of a span of code."""

    def __enter__(self):
        self._before = graphs_so_far(), breaks_so_far()
        return self

    def __exit__(self, *exc):
        graphs, breaks = self._before
        self.graphs = graphs_so_far() - graphs
        self.breaks = breaks_so_far() - breaks


def assert_parity(model, fast, **run):
    """``fast`` gives what ``model`` gives, and neither is trivial."""
    want = sample(model, **run)
    got = sample(fast, **run)
    assert want.isfinite().all() and want.std() > 0.1
    difference = (want - got).abs().max().item()
    assert difference <= TOLERANCE, f"largest difference from eager {difference}"


def assert_streams(model, lean, least=1, **run):
    """``lean`` gives the very bits of ``model``, and streamed some blocks for it."""
    want = sample(model, **run)
    assert want.isfinite().all() and want.std() > 0.1
    assert torch.equal(sample(lean, **run), want)
    blocks = streamed_of(lean)
    assert blocks.not_streamed == set()
    assert len(RESIDENCY[lean.model].streamed) >= least
    assert bool(blocks.bytes_copied) == bool(least)
    return lean
