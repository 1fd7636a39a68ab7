"""Offload Repeated Blocks: modulation ahead of time gives the very bits of modulation in place."""

import gc
import weakref

import comfy.samplers
import comfy_extras.nodes_model_merging as merging
import folder_paths
import pytest
import torch
from changes import in_low_vram, with_lora
from comfy.model_patcher import ModelPatcher
from comfy.sd import load_lora_for_models
from conditions import control_net, hook_lora, regional, with_control
from hotpath_pack.devtools import checkpoints
from hotpath_pack.host.residency import modulation
from hotpath_pack.host.residency.offload import LeavesOut
from hotpath_pack.host.telling.report import describe, report
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from sampling import (
    SMALL,
    Counting,
    Texts,
    ahead_of,
    assert_parity,
    compiled,
    compiled_blocks,
    load,
    offloaded,
    quantized,
    sample,
)


def assert_same_bits(model, ahead=None, **run):
    """``ahead`` gives what ``model`` gives, and made all of it ahead."""
    ahead = ahead or offloaded(model)
    want = sample(model, **run)
    assert want.isfinite().all() and want.std() > 0.1
    assert torch.equal(sample(ahead, **run), want)
    assert ahead_of(ahead).vectors and not ahead_of(ahead).in_place
    return ahead


@pytest.fixture
def made(monkeypatch):
    """How many vectors each pass over the modulation layers made."""
    counts, compute = [], modulation._State._compute

    def counting(self, *args):
        before = len(self.table)
        row = compute(self, *args)
        counts.append(len(self.table) - before)
        return row

    monkeypatch.setattr(modulation._State, "_compute", counting)
    return counts


def test_a_schedule_is_made_on_its_first_step_and_serves_the_next_prompt(flux, made):
    ahead = assert_same_bits(flux, steps=4)
    assert made == [5], "four steps and the end of the schedule"
    assert_same_bits(flux, ahead, steps=4)
    assert made == [5]
    assert_same_bits(flux, ahead, steps=4, seed=1)
    assert made == [5, 5], "another prompt, whose pooled text is another"
    assert_same_bits(flux, ahead, steps=4, seed=1, guidance=2.0)
    assert made == [5, 5, 5]


@pytest.mark.parametrize("sampler", comfy.samplers.KSampler.SAMPLERS)
@pytest.mark.sweep(keep=["euler", "heun", "dpmpp_2m_sde", "uni_pc", "dpm_adaptive"])
def test_every_sampler(flux, sampler):
    run = dict(SMALL, steps=4, sampler=sampler, cfg=2.0 if "cfg_pp" in sampler else 1.0)
    assert_same_bits(flux, **run)


@pytest.mark.parametrize("scheduler", comfy.samplers.KSampler.SCHEDULERS)
def test_every_scheduler_is_foreseen(flux, scheduler, made):
    assert_same_bits(flux, **SMALL, steps=4, scheduler=scheduler)
    assert len(made) == 1


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.sweep(keep=["1", "3"])
def test_guidance_and_batches(flux, batch, made):
    ahead = assert_same_bits(flux, **SMALL, batch=batch, cfg=2.0)
    assert len(made) == 1, "both sides of the guidance in one call"
    # Texts that the host can't put in one batch.
    assert_same_bits(flux, ahead, **SMALL, batch=batch, cfg=2.0, condition=longer)
    assert len(made) == 2


def longer(positive):
    return [[torch.cat([positive[0][0]] * 3, 1), positive[0][1]]]


def test_regional_prompts_and_a_control_net(flux):
    assert_same_bits(flux, condition=regional)
    assert_same_bits(flux, **with_control(control_net(flux), 0.7))


@pytest.mark.parametrize("method", ["offset", "index", "uxo"])
def test_kontext_reference_latents(flux, method):
    latent = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(9))
    assert_same_bits(flux, reference_latents=[latent], reference_latents_method=method)


def test_fill_and_schnell():
    for weights in (checkpoints.flux1(2, 3, guidance=False), checkpoints.flux1(2, 3, in_features=384)):
        assert_same_bits(load(weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loras_on_modulation_and_their_strength(flux_weights, dtype, made):
    flux = load({name: weight.to(dtype) for name, weight in flux_weights.items()})
    flux.set_model_compute_dtype(dtype)
    weights = checkpoints.lora(flux_weights)
    assert any("mod" in name for name in weights)
    ahead, plain = offloaded(flux), sample(flux)
    for strength in (0.5, 1.0, 0.5):
        before = with_lora(flux, weights, strength)
        assert not torch.equal(sample(before), plain)
        assert_same_bits(before)
        after = with_lora(ahead, weights, strength)
        assert torch.equal(sample(after), sample(before))
    assert torch.equal(sample(ahead), plain)


def test_loras_that_change_while_sampling(flux, flux_weights):
    ahead = offloaded(flux)
    for keyframes in ((), ((0.0, 0.2), (0.5, 1.0))):
        run = dict(steps=4, cfg=2.0, hooks=hook_lora(flux_weights, *keyframes))
        assert torch.equal(sample(ahead, **run), sample(flux, **run))
        assert ahead_of(ahead).in_place == {"LoRAs change while sampling (hooks)"}
    assert_same_bits(flux, ahead, steps=4)


def test_merged_models(flux, flux_weights):
    other = load({name: weight * 0.8 for name, weight in flux_weights.items()})
    (merged,) = merging.ModelMergeSimple().merge(flux, other, 0.3)
    ahead = assert_same_bits(merged)
    (merged_after,) = merging.ModelMergeSimple().merge(offloaded(flux), other, 0.3)
    assert torch.equal(sample(merged_after), sample(ahead))


@pytest.mark.parametrize("lora", [False, True])
def test_quantized_models_in_either_order(flux, flux_weights, lora):
    model = with_lora(flux, checkpoints.lora(flux_weights), 0.5) if lora else flux
    small = quantized(model)
    ahead = assert_same_bits(small, **SMALL)
    other_order = quantized(offloaded(model))
    assert torch.equal(sample(other_order, **SMALL), sample(small, **SMALL))
    assert ahead_of(other_order).vectors
    assert other_order.model_size() == ahead.model_size() < small.model_size()


def test_weights_changed_in_place_are_seen(flux):
    ahead = offloaded(flux)
    assert_same_bits(flux, ahead)
    layer = flux.model.diffusion_model.double_blocks[1].txt_mod.lin
    layer.weight.data.mul_(1.5)
    layer.weight = torch.nn.Parameter(layer.weight.data, requires_grad=False)
    assert_same_bits(flux, ahead)


def test_a_layer_that_another_pack_changed_computes_in_place(flux):
    ahead, block = offloaded(flux), flux.model.diffusion_model.single_blocks[1]
    hook = block.modulation.lin.register_forward_hook(lambda module, args, out: out * 1.5)
    want = sample(flux)
    hook.remove()
    assert not torch.equal(want, sample(flux))
    sample(ahead)
    hook = block.modulation.lin.register_forward_hook(lambda module, args, out: out * 1.5)
    assert torch.equal(sample(ahead), want)
    (reason,) = ahead_of(ahead).in_place
    assert "single_blocks.1.modulation.lin" in reason and "forward hook" in reason
    hook.remove()
    assert_same_bits(flux, ahead)


def patched_blocks(model, change):
    """A patch on every block that gives it another conditioning vector."""
    patched = model.clone()
    for kind, count in (("double_block", 2), ("single_block", 3)):
        for index in range(count):
            patched.set_model_patch_replace(change, "dit", kind, index)
    return patched


def test_a_patch_that_gives_a_block_another_vector(flux):
    def weaker(args, extra):
        return extra["original_block"]({**args, "vec": args["vec"] * 0.9})

    patched = patched_blocks(flux, weaker)
    assert not torch.equal(sample(patched), sample(flux))
    assert_same_bits(patched)


def test_a_patch_that_writes_into_the_vector_is_refused(flux):
    def weaker(args, extra):
        args["vec"].mul_(0.9)
        return extra["original_block"](args)

    patched = patched_blocks(flux, weaker)
    with pytest.raises(RuntimeError, match="Set modulation to 'in place' on Offload Repeated Blocks"):
        sample(offloaded(patched))
    assert torch.equal(sample(offloaded(offloaded(patched), "in place")), sample(patched))


def test_a_patch_that_writes_into_the_vector_of_earlier_blocks_is_refused_too(flux):
    def writes(args, extra):
        args["vec"].mul_(0.9)
        return extra["original_block"](args)

    def hides(args, extra):
        return extra["original_block"]({**args, "vec": args["vec"] * 1.0})

    patched = flux.clone()
    patched.set_model_patch_replace(writes, "dit", "single_block", 1)
    patched.set_model_patch_replace(hides, "dit", "single_block", 2)
    with pytest.raises(RuntimeError, match="Set modulation to 'in place'"):
        sample(offloaded(patched))


def test_an_interrupt_while_it_is_made(flux, monkeypatch):
    ahead, left = offloaded(flux), [3]

    def interrupt():
        left[0] -= 1
        if not left[0]:
            raise comfy.model_management.InterruptProcessingException

    with monkeypatch.context() as patch, pytest.raises(comfy.model_management.InterruptProcessingException):
        patch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", interrupt)
        sample(ahead)
    assert ahead_of(ahead).vectors == 0
    assert not any("forward" in module.__dict__ for module in flux.model.modules())
    assert_same_bits(flux, ahead)


def test_compiled_it_is_two_graphs_without_modulation(flux, flux_weights):
    weights = checkpoints.lora(flux_weights)
    with Counting() as counting, torch._dynamo.config.patch(error_on_recompile=True):
        for order in (lambda model: compiled(offloaded(model)), lambda model: offloaded(compiled(model))):
            fast = order(flux)
            for run in (dict(steps=4), dict(width=96), dict(tokens=5)):
                assert_parity(flux, fast, **run)
            lively = with_lora(flux, weights, 1.0)
            assert_parity(lively, order(lively))
        assert_parity(flux, compiled(offloaded(in_low_vram(flux))))
    assert (counting.graphs, counting.breaks) == (2, 0)
    blocks = compiled_blocks(fast)
    assert blocks.eager == {} and dict(blocks.compiled) == {"double": 2, "single": 3}
    names = {name for plan in blocks.plans._plans.values() for name, _ in plan.template.named_parameters()}
    assert names and not any("mod" in name for name in names)


def test_compiled_with_inductor_and_quantized(flux):
    assert_parity(flux, compiled(offloaded(flux), backend="inductor"))
    small = quantized(flux)
    with Counting() as counting:
        assert_parity(small, compiled(offloaded(small), backend="eager"), **SMALL)
    assert (counting.graphs, counting.breaks) == (2, 0)


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
    exact = True
    for step in steps:
        if step == "lora":
            plain, ahead = (load_lora_for_models(model, None, lora, 0.5, 0)[0] for model in (plain, ahead))
            continue
        patcher = ahead if "ahead" in step else plain
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


def test_saved_as_any_other_model(flux, flux_weights, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    model = with_lora(flux, checkpoints.lora(flux_weights), 0.5)
    for name, saved in (("plain", model), ("ahead", offloaded(model))):
        sample(saved)
        with torch.inference_mode():
            merging.ModelSave().save(saved, name)
    plain, ahead = (load_file(path) for path in sorted(tmp_path.glob("*.safetensors"), reverse=True))
    assert plain.keys() == ahead.keys() and all(torch.equal(plain[name], ahead[name]) for name in plain)


def test_the_table_is_bounded(flux, monkeypatch):
    row = sum(layer.out_features for layer in modulation.modulation_layers(flux.model.diffusion_model).values()) * 4
    monkeypatch.setattr(modulation, "CAPACITY", 3 * row + row // 2)
    ahead = offloaded(flux)
    for seed in range(2):
        assert_same_bits(flux, ahead, **SMALL, steps=6, seed=seed)
    assert ahead_of(ahead).vectors == 3 and ahead_of(ahead).table_bytes == 3 * row


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
