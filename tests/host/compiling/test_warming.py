"""Compiling while the workflow loads: what was made from the structure alone is what the first step needs."""

import gc
import threading
import weakref

import comfy.memory_management
import comfy.model_management
import comfy.ops
import pytest
import torch
from comfy.sd import load_lora_for_models
from hotpath_pack.devtools import checkpoints, family_models, gguf_pack
from hotpath_pack.devtools.gpu_host import until_ready
from hotpath_pack.host.compiling import artifacts, warming
from hotpath_pack.host.compiling import when as whens
from hotpath_pack.host.compiling.compile import compile_repeated_blocks
from hotpath_pack.hotpath import graphs
from hotpath_pack.hotpath.compiled import Region
from hotpath_pack.hotpath.examples import describe_tensors
from hotpath_pack.hotpath.limits import nobody_compiling
from hotpath_pack.hotpath.settings import CompileSettings
from sampling import TOLERANCE, Texts, compiled_blocks, load, offloaded, quantized, sample

pytestmark = [
    pytest.mark.skipif(not graphs.supported(), reason="needs PyTorch 2.11"),
    pytest.mark.usefixtures("user_folder"),
]


@pytest.fixture
def prepared(monkeypatch):
    """Names of threads that compiled."""
    threads = []
    compile_graph = Region._compile_ahead

    def note(self, *args):
        threads.append(threading.current_thread().name)
        return compile_graph(self, *args)

    monkeypatch.setattr(Region, "_compile_ahead", note)
    return threads


def ahead(model, when="wait", cache="auto", **settings):
    # As a node runs.
    with torch.inference_mode():
        return compile_repeated_blocks(
            model, CompileSettings(**settings), "all", "all", "error", Texts(), cache, when=when
        )


def patched(model):
    clone = model.clone()
    clone.set_model_attn1_output_patch(lambda attn, extra_options: attn * 0.5)
    return clone


def with_lora(weights):
    return load_lora_for_models(load(weights), None, checkpoints.lora(weights), 0.5, 0)[0]


def flux(format=None, **made):
    weights = checkpoints.flux1(1, 1, **made)
    return weights if format is None else checkpoints.quantized(weights, format)


OFTEN = {
    "patched": lambda: patched(load(flux())),
    "Flux.2 in bf16": lambda: load(checkpoints.flux2(1, 1), dtype=torch.bfloat16),
    "offloaded": lambda: offloaded(load(flux())),
}
SELDOM = {
    "with a LoRA": lambda: with_lora(flux()),
    "GGUF": lambda: gguf_pack.load(flux(), lambda name: "Q4_K"),
    "a checkpoint in int8": lambda: load(flux("int8_tensorwise")),
    "a checkpoint in fp8": lambda: load(flux("float8_e4m3fn", dtype=torch.bfloat16), dtype=torch.bfloat16),
    "int8_dynamic": lambda: quantized(load(flux()), "int8_dynamic"),
    "fp8_e4m3_rowwise": lambda: quantized(load(flux()), "fp8_e4m3_rowwise"),
    "int4_weight_only": lambda: quantized(load(flux()), "int4_weight_only"),
    "offloaded in 8 bits": lambda: offloaded(quantized(load(flux()), "int8_dynamic")),
    "streamed": lambda: offloaded(load(flux()), budget="0 %"),
    "Flux.2 offloaded": lambda: offloaded(load(checkpoints.flux2(1, 1))),
}


def all_kinds():
    yield from OFTEN
    yield from (pytest.param(name, marks=pytest.mark.sweep) for name in SELDOM)


@pytest.mark.parametrize("name", all_kinds())
def test_the_first_step_finds_ready_what_it_needs(name, prepared, regions):
    # As nodes run.
    with torch.inference_mode():
        model = {**OFTEN, **SELDOM}[name]()
        fast = ahead(model)
        until_ready()
        got, want = sample(fast), sample(model)
    exact = got.dtype == torch.float32 and name in ("patched", "offloaded", "with a LoRA", "streamed")
    assert (got - want).norm() <= (TOLERANCE if exact else 0.05) * want.norm()
    assert [thread.startswith("hotpath-warming") for thread in prepared] == [True, True]
    assert [(region.stats.graphs, len(region.stats.recompiles)) for region in regions] == [(1, 0), (1, 0)]
    assert compiled_blocks(fast).seconds > 0 and compiled_blocks(fast).eager == {}


@pytest.mark.parametrize("make", [checkpoints.flux1, checkpoints.flux2])
def test_what_blocks_are_called_with_is_known_with_dynamic_vram_too(make, monkeypatch):
    """There the host makes layers without weights."""
    model = load(make(1, 1))
    config = {**model.model.model_config.unet_config, "dtype": torch.float32}
    with torch.inference_mode():
        want = warming.block_calls(model, model.model.diffusion_model, torch.float32)
        monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
        host = type(model.model.diffusion_model)(**config, device="meta", operations=comfy.ops.disable_weight_init)
        assert host.img_in.weight is None, "the host makes them otherwise"
        got = warming.block_calls(model, model.model.diffusion_model, torch.float32)
    assert set(got) == {"double", "single"}
    for kind, (inputs, _) in want.items():
        assert describe_tensors(got[kind][0]) == describe_tensors(inputs)


def test_where_it_is_not_known_the_compiler_is_started(monkeypatch):
    """Blocks of other families, as long as nothing is stored."""
    started = []
    monkeypatch.setattr(whens, "start_compiler", lambda device: started.append(threading.current_thread().name))
    model = family_models.tiny("z_image")
    ahead(model)
    until_ready()
    assert [name.startswith("hotpath-warming") for name in started] == [True]
    folder = artifacts.store().folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "another.graphs").touch()
    ahead(model)
    until_ready()
    assert len(started) == 1


def test_another_variant_is_compiled_as_ever(prepared, regions):
    """A patch that comes after the node, which it knew nothing of."""
    model = load(checkpoints.flux1(1, 0))
    fast = patched(ahead(model))
    until_ready()
    assert (sample(fast) - sample(patched(model))).abs().max() <= TOLERANCE
    assert len(prepared) == 2 and prepared[1] == "MainThread"


def test_what_fails_ahead_is_left_to_the_first_step(monkeypatch, prepared):
    model = load(checkpoints.flux1(1, 0))

    def fail(*args):
        raise RuntimeError("no memory")

    monkeypatch.setattr(warming, "example_weights", fail)
    fast = ahead(model)
    assert (sample(fast) - sample(model)).abs().max() <= TOLERANCE
    assert prepared == ["MainThread"]


@pytest.mark.parametrize("fails", [False, True])
def test_memory_of_examples_goes_while_nobody_records(fails, monkeypatch):
    """With ComfyUI's allocator what is freed while another thread records a CUDA graph ends the process."""
    gone, make = [], warming.example_weights

    def free_for_another_thread():
        with nobody_compiling() as free:
            gone.append(not free)

    def ask():
        other = threading.Thread(target=free_for_another_thread)
        other.start()
        other.join()

    def noted(*args):
        made = make(*args)
        for weight in made.values():
            weakref.finalize(weight, ask)
        return made

    def prepare(self, *args):
        if fails:
            raise RuntimeError("no memory")

    monkeypatch.setattr(warming, "example_weights", noted)
    monkeypatch.setattr(Region, "prepare", prepare)
    fast = ahead(load(checkpoints.flux1(1, 1)))
    until_ready()
    assert gone and all(gone)
    assert compiled_blocks(fast)


class Slow:
    """Stands in for a region's compiling, until it is let go."""

    def __init__(self, monkeypatch):
        self.begun, self.go, self.names = threading.Event(), threading.Event(), []
        monkeypatch.setattr(Region, "prepare", self)

    def __call__(self, *args):
        self.names.append(threading.current_thread().name)
        self.begun.set()
        assert self.go.wait(60)


def test_an_interrupt_reaches_who_waits(monkeypatch, regions):
    slow = Slow(monkeypatch)
    model = load(checkpoints.flux1(1, 0))
    fast = ahead(model)
    assert slow.begun.wait(60)
    threading.Timer(0.3, comfy.model_management.interrupt_current_processing).start()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(fast)
    blocks = model.model.diffusion_model.double_blocks
    assert all("forward" not in block.__dict__ for block in blocks)
    slow.go.set()
    until_ready()
    assert [(region.stats.graphs, region.compiled) for region in regions] == [(0, False)]


def test_a_node_that_is_executed_again_cancels_what_has_not_begun(monkeypatch):
    slow = Slow(monkeypatch)
    model = load(checkpoints.flux1(1, 1))
    first = ahead(model)
    assert slow.begun.wait(60)
    second = ahead(model)
    slow.go.set()
    until_ready()
    assert len(slow.names) == 3 and first is not second


def test_what_is_under_way_keeps_no_model_alive(monkeypatch):
    slow = Slow(monkeypatch)
    model = load(checkpoints.flux1(1, 1))
    fast = ahead(model)
    assert slow.begun.wait(60)
    # A loaded model is held by the host too.
    left = weakref.ref(model.model)
    del model, fast
    gc.collect()
    assert left() is None
    slow.go.set()
    until_ready()
    assert len(slow.names) == 1


def test_without_a_cache_or_another_backend_nothing_is_compiled_ahead(monkeypatch):
    slow = Slow(monkeypatch)
    slow.go.set()
    for change in (dict(cache="off"), dict(backend="aot_eager"), dict(fullgraph=False)):
        ahead(load(checkpoints.flux1(1, 0)), **change)
        until_ready()
    assert not slow.names
