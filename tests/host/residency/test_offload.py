"""Offload Repeated Blocks: what the host loads and counts without modulation, what is saved, and what is told."""

import gc
import weakref

import comfy.model_management
import comfy.sd
import comfy_extras.nodes_model_merging as merging
import folder_paths
import pytest
import torch
from changes import with_lora
from comfy.model_patcher import ModelPatcher
from comfy.sd import load_lora_for_models
from hotpath_pack.devtools import checkpoints
from hotpath_pack.host.residency import modulation
from hotpath_pack.host.residency.offload import LeavesOut
from hotpath_pack.host.telling.report import describe, report
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from sampling import SMALL, Texts, ahead_of, load, offloaded, sample


def test_the_hosts_load_leaves_modulation_out(flux):
    whole, ahead = flux.model_size(), offloaded(flux)
    layers = modulation.modulation_layers(flux.model.diffusion_model).values()
    share = sum(tensor.nbytes for layer in layers for tensor in layer.parameters())
    assert ahead.model_size() == whole - share and ahead.clone().clone().model_size() == whole - share
    assert offloaded(ahead).model_size() == whole - share
    assert 0.2 < share / whole < 0.3
    sample(ahead)
    buffers = sum(buffer.nbytes for buffer in flux.model.buffers())
    assert ahead.loaded_size() == whole - share - buffers
    sample(flux)
    assert flux.loaded_size() == whole
    sample(ahead)
    assert ahead.loaded_size() == whole - share - buffers
    in_place = offloaded(ahead, "in place")
    assert in_place.model_size() == whole


def loaded_bytes(model):
    modules = [module for module in model.model.modules() if getattr(module, "comfy_patched_weights", False)]
    return sum(tensor.nbytes for module in modules for tensor in module.parameters(recurse=False))


STEPS = st.sampled_from(["load ahead", "load plain", "a little ahead", "a little plain", "free some", "unload", "lora"])


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, min_size=1, max_size=7))
def test_what_the_host_counts_is_what_is_loaded_whatever_it_does(steps):
    # Given as a fixture, they would fill the report of a failure.
    weights = checkpoints.flux1(2, 3)
    plain = load(dict(weights))
    ahead = offloaded(plain)
    lora = checkpoints.lora(weights)
    layers = modulation.modulation_layers(plain.model.diffusion_model).values()
    before = {name: tensor.clone() for name, tensor in plain.model.state_dict().items()}
    exact, loaded = True, plain
    for step in steps:
        if step == "lora":
            plain, ahead = (load_lora_for_models(model, None, lora, 0.5, 0)[0] for model in (plain, ahead))
            continue
        loads = "ahead" in step or "plain" in step
        patcher = loaded = (ahead if "ahead" in step else plain) if loads else loaded
        with torch.inference_mode():
            if "load" in step and "un" not in step:
                patcher.partially_load(patcher.load_device, 1e32)
            elif "little" in step:
                patcher.partially_load(patcher.load_device, 5_000_000)
            elif step == "free some":
                patcher.partially_unload(patcher.offload_device, 3_000_000)
            else:
                patcher.detach()
        # After it the host's own count of a partly loaded MODEL is not what is there.
        exact = step == "unload" or (exact and "little" not in step)
        assert not exact or abs(patcher.loaded_size() - loaded_bytes(patcher)) < 50_000
        if "ahead" in step:
            assert not any(getattr(layer, "comfy_patched_weights", False) for layer in layers)
            assert all(layer.comfy_cast_weights for layer in layers)
    ahead.detach()
    after = plain.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("resident", ["spread", "first", "last"])
@pytest.mark.parametrize("free", [0.1, 0.3])
def test_a_clone_without_the_node_loads_no_more_than_is_free(flux, resident, free):
    """The host's order is another: beside what is there it would load what it counts as there once more."""
    lean, free = offloaded(flux, "in place", budget="50 %", resident=resident), int(free * flux.model_size())
    with torch.inference_mode():
        lean.partially_load(lean.load_device, 1e32)
        there = loaded_bytes(lean)
        assert 0.3 * flux.model_size() < there == lean.loaded_size()
        flux.partially_load(flux.load_device, free)
        assert loaded_bytes(flux) <= there + free
        lean.partially_load(lean.load_device, 0)
        assert loaded_bytes(lean) == lean.loaded_size() <= there + free


def test_what_the_host_pinned_is_unpinned_before_it_is_copied_to_one_buffer(flux, monkeypatch):
    """The memory is freed then."""
    pinned = {}

    def pin(tensor):
        pinned[tensor.data_ptr()] = tensor.nbytes
        return True

    monkeypatch.setattr(comfy.model_management, "pin_memory", pin)
    monkeypatch.setattr(comfy.model_management, "unpin_memory", lambda it: pinned.pop(it.data_ptr()))
    block, lean = flux.model.diffusion_model.single_blocks[0], offloaded(flux, budget="0 %")
    flux.pin_weight_to_device("diffusion_model.single_blocks.0.linear1.weight")
    flux.pin_weight_to_device("diffusion_model.single_blocks.0.linear2.bias")
    before = dict(pinned)
    with torch.inference_mode():
        sample(lean)
    assert len(before) == 2 and not any(pinned.get(place) == size for place, size in before.items())
    assert block.linear1.weight.untyped_storage().data_ptr() in pinned


def test_saved_as_any_other_model(flux, flux_weights, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    model = with_lora(flux, checkpoints.lora(flux_weights), 0.5)
    for name, saved in (("plain", model), ("ahead", offloaded(model))):
        sample(saved)
        with torch.inference_mode():
            merging.ModelSave().save(saved, name)
    plain, ahead = (load_file(path) for path in sorted(tmp_path.glob("*.safetensors"), reverse=True))
    assert plain.keys() == ahead.keys() and all(torch.equal(plain[name], ahead[name]) for name in plain)


def test_nothing_outlives_the_model(flux_weights):
    flux = load(dict(flux_weights))
    ahead = offloaded(flux)
    sample(ahead)
    wrapper, model = ahead_of(ahead), weakref.ref(flux.model)
    assert wrapper.vectors
    with torch.inference_mode():
        comfy.model_management.unload_all_models()
    assert wrapper.vectors == 0, "the host unloads the model"
    sample(ahead)
    assert wrapper.vectors
    del flux, ahead
    comfy.model_management.unload_all_models()
    comfy.model_management.cleanup_models_gc()
    gc.collect()
    assert model() is None and wrapper.vectors == wrapper.table_bytes == 0


def test_a_deep_clone_makes_its_own(flux_weights, tmp_path):
    path = checkpoints.save(tmp_path / "flux.safetensors", flux_weights)
    ahead = offloaded(comfy.sd.load_diffusion_model(str(path)))
    sample(ahead)
    clone = ahead.deepclone_multigpu(new_load_device=torch.device("cpu"))
    assert type(clone) is LeavesOut and clone.model is not ahead.model
    with torch.inference_mode():
        clone.model.diffusion_model.single_blocks[0].modulation.lin.weight.mul_(0.5)
    changed = sample(clone)
    assert not torch.equal(changed, sample(ahead))
    assert torch.equal(sample(offloaded(clone, "in place")), changed)


@pytest.mark.parametrize("make", [checkpoints.flux2, checkpoints.chroma])
@pytest.mark.sweep(keep=["flux2"])
def test_blocks_without_modulation_of_their_own_say_so(make):
    model, text = load(make()), Texts()
    ahead = offloaded(model, text=text)
    assert torch.equal(sample(ahead, **SMALL), sample(model, **SMALL))
    said = "modulation in place: the blocks of this model have no modulation layers of their own"
    assert text.seen[0] == said and said in describe(ahead)


def test_the_node_and_the_report_tell_what_was_made(flux):
    text = Texts()
    ahead = offloaded(flux, text=text)
    sample(ahead, steps=4)
    size = ahead_of(ahead).table_bytes
    assert text.seen == [
        "making modulation for 5 vectors ahead ...",
        f"modulation made ahead for 5 vectors ({size / 2**20:.1f} MiB)",
        f"modulation made ahead for 5 vectors ({size / 2**20:.1f} MiB); all 5 blocks resident",
    ]
    assert all(part in describe(ahead) for part in text.seen[-1].split("; "))
    assert report()["modulation"][-1] == {"node_id": "7", "vectors": 5, "table_bytes": size, "in_place": []}


def test_what_can_not_be_offloaded_is_named(flux):
    with pytest.raises(ValueError, match="model: this is str, not a MODEL"):
        offloaded("flux")
    with pytest.raises(ValueError, match="modulation: 'never' is unknown. Choose one of ahead, in place"):
        offloaded(flux, "never")

    class OtherPatcher(ModelPatcher):
        pass

    foreign = flux.clone()
    foreign.__class__ = OtherPatcher
    with pytest.raises(ValueError, match="OtherPatcher of another pack manages its memory. Load the model"):
        offloaded(foreign)
    assert sample(flux).std() > 0.1
