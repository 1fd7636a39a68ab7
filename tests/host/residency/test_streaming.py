"""Offload Repeated Blocks: blocks whose weights arrive one ahead of the compute give what resident ones give."""

import gc
import weakref

import comfy.model_management
import comfy_extras.nodes_model_merging as merging
import folder_paths
import pytest
import torch
from changes import with_lora
from comfy_extras.nodes_torch_compile import TorchCompileModel
from conditions import hook_lora
from hotpath_pack.devtools import checkpoints
from hotpath_pack.devtools.copies import LateCopies
from hotpath_pack.host.residency import streaming
from hotpath_pack.host.residency.budget import GIB, Budget
from hotpath_pack.host.residency.streaming import RESIDENCY, pinned_copies
from hotpath_pack.host.telling.report import describe, report
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from sampling import (
    SMALL,
    TOLERANCE,
    Counting,
    Texts,
    assert_parity,
    assert_streams,
    compiled,
    compiled_blocks,
    load,
    offloaded,
    quantized,
    sample,
    streamed_of,
)
from test_offload import loaded_bytes
from torch.multiprocessing.reductions import StorageWeakRef

BUDGETS = ("0 %", "25 %", "50 %", "75 %", "100 %")


@given(number=st.floats(0, 1000).map(lambda number: round(number, 3)), unit=st.sampled_from(["", "GiB", " gib", " GB"]))
def test_a_budget_in_gib(number, unit):
    assert Budget.parse(f" {number}{unit} ").bytes(1) == pytest.approx(number * GIB)


def test_budgets_of_all_kinds():
    assert Budget.parse("auto").bytes(10) == float("inf")
    assert Budget.parse("25 %").bytes(1000) == 250 and Budget.parse("100%").bytes(8) == 8
    for odd in ("", "half", "-1", "120 %", "1 TiB", "nan", "inf", None, 5):
        with pytest.raises(ValueError, match="budget: .* is no budget. Write 'auto', a number of GiB"):
            Budget.parse(odd)


@pytest.mark.parametrize("modulation", ["ahead", "in place"])
def test_every_budget_from_nothing_to_all(flux, modulation):
    whole = flux.model_size()
    counts = []
    for percent in range(0, 101, 10):
        lean = offloaded(flux, modulation, budget=f"{percent} %")
        sample(lean, **SMALL)
        counts.append(len(RESIDENCY[flux.model].streamed))
        assert_streams(flux, lean, least=counts[-1], **SMALL)
        assert lean.loaded_size() <= max(whole * percent / 100, lean._fixed_bytes(lean._block_sizes())) + 1
        assert abs(lean.loaded_size() - loaded_bytes(lean)) < 50_000
    assert counts[0] == 5 and counts[-1] == 0 and counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("resident", ["spread", "first", "last"])
@pytest.mark.parametrize("prefetch_blocks", [0, 1, 3])
@pytest.mark.parametrize("pin_memory", [True, False])
@pytest.mark.sweep(keep=["True-1-spread", "True-3-first", "False-0-last"])
def test_settings(flux, resident, prefetch_blocks, pin_memory):
    settings = dict(resident=resident, prefetch_blocks=prefetch_blocks, pin_memory=pin_memory)
    assert_streams(flux, offloaded(flux, budget="40 %", **settings), **SMALL)


@pytest.mark.parametrize("seed", range(3))
def test_copies_that_come_late_and_in_any_order(flux, seed, monkeypatch):
    monkeypatch.setattr(streaming, "copy_engine", lambda device: LateCopies(seed))
    for prefetch_blocks in (0, 1, 2):
        assert_streams(flux, offloaded(flux, budget="0 %", prefetch_blocks=prefetch_blocks), least=5, **SMALL)
        assert_parity(flux, compiled(offloaded(flux, budget="30 %", prefetch_blocks=prefetch_blocks)), **SMALL)


def test_auto_streams_what_does_not_fit_into_the_memory_that_is_free(flux):
    lean = offloaded(flux)
    sizes = lean._block_sizes()
    slots = 2 * max(sizes.values())
    with torch.inference_mode():
        lean.partially_load(lean.load_device, 1e32)
        assert RESIDENCY[flux.model].streamed == ()
        for blocks in (4, 2, 0, 3):
            memory = lean._fixed_bytes(sizes) + sum(sorted(sizes.values())[:blocks]) + slots
            lean.partially_load(lean.load_device, memory - lean.loaded_size())
            streamed = RESIDENCY[flux.model].streamed
            assert lean.loaded_size() + slots * bool(streamed) <= memory and len(streamed) <= 5 - blocks + 1
            assert blocks > 2 or streamed
            assert abs(lean.loaded_size() - loaded_bytes(lean)) < 50_000
        lean.partially_load(lean.load_device, 1e32)
    assert RESIDENCY[flux.model].streamed == ()
    assert_streams(flux, lean, least=0, **SMALL)


def test_loras_and_their_strength(flux, flux_weights):
    weights = checkpoints.lora(flux_weights)
    lean = offloaded(flux, budget="30 %")
    for strength in (0.5, 1.0, 0.0, 0.5):
        for other in (with_lora(lean, weights, strength), offloaded(with_lora(flux, weights, strength), budget="30 %")):
            assert_parity(with_lora(flux, weights, strength), other)
            assert streamed_of(other).bytes_copied
    assert_streams(flux, lean)


@pytest.mark.parametrize("budget", ["auto", "40 %", "0 %"])
@pytest.mark.parametrize("modulation", ["ahead", "in place"])
def test_the_first_prompt_of_all_has_a_lora(flux, flux_weights, modulation, budget):
    """On a MODEL that the host has not loaded before."""
    weights = checkpoints.lora(flux_weights)
    got = sample(with_lora(offloaded(flux, modulation=modulation, budget=budget), weights, 1.0))
    other = load({name: weight.clone() for name, weight in flux_weights.items()})
    assert torch.equal(got, sample(with_lora(other, weights, 1.0)))


def test_loras_that_change_while_sampling(flux, flux_weights):
    lean = offloaded(flux, budget="0 %")
    for keyframes in ((), ((0.0, 0.2), (0.5, 1.0))):
        assert_streams(flux, lean, steps=4, cfg=2.0, hooks=hook_lora(flux_weights, *keyframes))
    assert_streams(flux, lean, steps=4)


def test_a_weight_function_of_another_node(flux):
    for name in ("double_blocks.1.img_mlp.0", "single_blocks.1.linear1", "single_blocks.2.modulation.lin"):
        changed = flux.clone()
        changed.add_weight_wrapper(f"diffusion_model.{name}.weight", lambda weight: weight * 1.1)
        assert not torch.equal(sample(changed, **SMALL), sample(flux, **SMALL))
        assert_streams(changed, offloaded(changed, budget="0 %"), **SMALL)
        assert_parity(changed, compiled(offloaded(changed, budget="0 %")), **SMALL)


@pytest.mark.parametrize("lora", [False, True])
def test_quantized_weights_move_as_they_are_kept(flux, flux_weights, lora):
    plain = offloaded(flux, budget="0 %")
    sample(plain, **SMALL)
    small = quantized(flux)
    lean = offloaded(small, budget="0 %")
    if lora:
        weights = checkpoints.lora(flux_weights)
        # On arrival it goes to the weight in full precision; the host quantizes what it keeps on the device anew.
        want, got = sample(with_lora(small, weights, 0.5), **SMALL), sample(with_lora(lean, weights, 0.5), **SMALL)
        assert (want - got).norm() / want.norm() < 0.05
        said = "a LoRA is added to the quantized weights of 5 of them without rounding it"
        assert streamed_of(lean).summary().endswith(said)
        sample(lean, **SMALL)
        assert said not in streamed_of(lean).summary()
        return
    assert_streams(small, lean, least=5, **SMALL)
    assert streamed_of(lean).bytes_copied < 0.4 * streamed_of(plain).bytes_copied
    assert torch.equal(sample(quantized(plain), **SMALL), sample(small, **SMALL))


def test_compiled_it_is_two_graphs_whatever_is_resident(flux, flux_weights):
    weights = checkpoints.lora(flux_weights)
    with Counting() as counting, torch._dynamo.config.patch(error_on_recompile=True):
        for budget in BUDGETS:
            for order in (
                lambda model, budget: compiled(offloaded(model, budget=budget)),
                lambda model, budget: offloaded(compiled(model), budget=budget),
            ):
                fast = order(flux, budget)
                assert_parity(flux, fast, **SMALL)
                assert dict(compiled_blocks(fast).compiled) == {"double": 2, "single": 3}
                assert compiled_blocks(fast).eager == {}
        for change in (dict(width=96), dict(tokens=5), dict(steps=3)):
            assert_parity(flux, order(flux, "30 %"), **change)
        for strength in (0.5, 1.0):
            lively = with_lora(flux, weights, strength)
            assert_parity(lively, order(lively, "30 %"), **SMALL)
    assert (counting.graphs, counting.breaks) == (2, 0)


def test_compiled_with_inductor_and_quantized(flux):
    assert_parity(flux, compiled(offloaded(flux, budget="30 %"), backend="inductor"))
    small = quantized(flux)
    with Counting() as counting:
        for budget in BUDGETS:
            assert_parity(small, compiled(offloaded(small, budget=budget), backend="eager"), **SMALL)
    assert (counting.graphs, counting.breaks) == (2, 0)


@pytest.mark.parametrize("weights", [checkpoints.flux2, checkpoints.chroma])
@pytest.mark.sweep(keep=["flux2"])
def test_other_models(weights):
    model = load(weights(2, 3))
    lean = assert_streams(model, offloaded(model, budget="0 %"), least=5)
    assert_parity(model, compiled(lean))


def test_what_a_model_costs_to_stream_is_shown_and_reported(flux):
    text = Texts()
    lean = offloaded(flux, text=text, budget="20 %")
    sample(lean, **SMALL)
    residency = RESIDENCY[flux.model]
    summary = streamed_of(lean).summary()
    count = len(residency.streamed)
    assert summary.startswith(f"{5 - count} of 5 blocks resident, {count} streamed (0.0")
    assert text.seen[-1].startswith("modulation made ahead") and text.seen[-1].endswith(summary)
    assert summary in describe(lean)
    (entry,) = (entry for entry in report()["streamed"] if entry["node_id"] == "7")
    assert entry["streamed_blocks"] == count and entry["bytes_copied"] == streamed_of(lean).bytes_copied
    # Two steps, and the first block of a third, which never came.
    assert 2 <= entry["bytes_copied"] / entry["streamed_bytes"] < 3
    sample(lean, **SMALL)
    assert entry["bytes_copied"] == streamed_of(lean).bytes_copied


def test_where_the_whole_model_is_compiled_the_host_casts(flux):
    lean = offloaded(flux, budget="0 %")
    (whole,) = TorchCompileModel.execute(lean, "eager").args
    assert_parity(flux, whole)
    assert streamed_of(whole).not_streamed == {"another node compiles the whole model"}


def test_a_block_that_another_pack_changed_runs_as_it_is(flux):
    block = flux.model.diffusion_model.single_blocks[1]
    plain = sample(flux, **SMALL)
    lean = offloaded(flux, budget="0 %")
    original = type(block).forward
    block.forward = lambda *args, **kwargs: original(block, *args, **kwargs) * 1.1
    try:
        want = sample(flux, **SMALL)
        assert not torch.equal(want, plain)
        assert torch.equal(sample(lean, **SMALL), want)
        assert_parity(flux, compiled(lean, on_failure="eager"), **SMALL)
    finally:
        del block.forward
    assert_streams(flux, lean, **SMALL)


@pytest.mark.parametrize("error", [comfy.model_management.InterruptProcessingException, RuntimeError])
def test_an_end_in_mid_step_leaves_nothing_behind(flux, error, monkeypatch):
    monkeypatch.setattr(streaming, "copy_engine", lambda device: LateCopies(1))
    lean, left = offloaded(flux, budget="0 %"), [8]

    def end(module, args):
        left[0] -= 1
        if not left[0]:
            raise error("out of memory")

    hook = flux.model.diffusion_model.single_blocks[2].linear2.register_forward_pre_hook(end)
    before = {name: id(value) for name, value in flux.model.named_parameters()}
    for _ in range(4):
        left[0] = 2
        with pytest.raises(error):
            sample(lean, **SMALL)
        assert not any("forward" in module.__dict__ for module in flux.model.modules())
        assert len(streamed_of(lean)._runs) == 0
    hook.remove()
    assert len(before) == len(list(flux.model.named_parameters()))
    assert_streams(flux, lean, least=5, **SMALL)


def test_slots_are_given_back_at_the_end_of_a_run(flux, monkeypatch):
    slots = []

    class Noted(streaming.Stream):
        def __init__(self, *args):
            super().__init__(*args)
            slots.extend(StorageWeakRef(slot.untyped_storage()) for slot in self.slots)

    monkeypatch.setattr(streaming, "Stream", Noted)
    lean = compiled(offloaded(flux, budget="0 %"), backend="eager")
    gc.disable()
    try:
        sample(lean)
        assert slots and all(slot.expired() for slot in slots), "on a card that is full they would be missing"
    finally:
        gc.enable()


def test_weights_replaced_while_sampling_are_seen(flux):
    layer = flux.model.diffusion_model.single_blocks[1].linear1
    steps = []

    def replace(args):
        steps.append(None)
        if len(steps) % 3 == 2:
            layer.weight = torch.nn.Parameter(layer.weight.data * 1.2, requires_grad=False)

    def wrapper(apply_model, args):
        replace(args)
        return apply_model(args["input"], args["timestep"], **args["c"])

    original = layer.weight
    lean = offloaded(flux, budget="0 %")
    sample(lean, **SMALL, steps=3)
    latents = []
    for model in (flux, lean):
        layer.weight = torch.nn.Parameter(original.data.clone(), requires_grad=False)
        changed = model.clone()
        changed.set_model_unet_function_wrapper(wrapper)
        steps.clear()
        latents.append(sample(changed, **SMALL, steps=3))
    assert torch.equal(*latents)


@pytest.mark.parametrize("lora", [False, True])
def test_settings_one_after_another_leave_the_weights_as_they_are(flux, flux_weights, lora):
    model = with_lora(flux, checkpoints.lora(flux_weights), 0.5) if lora else flux
    want = sample(model, **SMALL)
    for modulation in ("in place", "ahead", "in place"):
        for budget in ("0 %", "60 %", "100 %", "30 %"):
            got = sample(offloaded(model, modulation, budget=budget), **SMALL)
            assert (got - want).abs().max() <= TOLERANCE
            assert torch.equal(sample(model, **SMALL), want), (modulation, budget)
    comfy.model_management.unload_all_models()
    now = flux.model.diffusion_model.state_dict()
    assert all(torch.equal(now[name], weight) for name, weight in flux_weights.items() if name in now)


def test_weights_that_left_their_pinned_copy_and_changed_are_seen(flux):
    lean = offloaded(flux, budget="0 %")
    assert_streams(flux, lean, **SMALL)
    layer = flux.model.diffusion_model.single_blocks[1].linear1
    # As a module that was moved to a device and back: the same Parameter, elsewhere.
    with torch.inference_mode():
        layer.weight.data = layer.weight.data.clone().mul_(1.5)
    assert_streams(flux, lean, **SMALL)


def test_pinned_copies_are_made_once_and_go_with_the_model(flux_weights):
    flux = load(dict(flux_weights))
    lean = offloaded(flux, budget="0 %")
    sample(lean, **SMALL)
    layer = flux.model.diffusion_model.single_blocks[1].linear1
    first = layer.weight
    sample(with_lora(lean, checkpoints.lora(flux_weights), 0.5), **SMALL)
    sample(offloaded(flux, budget="20 %"), **SMALL)
    sample(lean, **SMALL)
    assert layer.weight is first, "shared by clones"
    assert torch.equal(first, flux_weights["single_blocks.1.linear1.weight"])
    copies = weakref.ref(pinned_copies(flux.model))
    comfy.model_management.unload_all_models()
    assert copies() is not None
    del flux, lean, layer, first
    gc.collect()
    comfy.model_management.cleanup_models()
    gc.collect()
    assert copies() is None


def test_saved_as_any_other_model(flux, flux_weights, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    model = with_lora(flux, checkpoints.lora(flux_weights), 0.5)
    lean = offloaded(model, budget="0 %")
    for name, saved in (("plain", model), ("lean", lean)):
        sample(saved, **SMALL)
        with torch.inference_mode():
            merging.ModelSave().save(saved, name)
    plain, lean = (load_file(path) for path in sorted(tmp_path.glob("*.safetensors"), reverse=True))
    assert plain.keys() == lean.keys() and all(torch.equal(plain[name], lean[name]) for name in plain)
