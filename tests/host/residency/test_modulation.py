"""Modulation ahead of time gives the very bits of modulation in place."""

import comfy.model_management
import comfy.samplers
import comfy_extras.nodes_model_merging as merging
import pytest
import torch
from changes import in_low_vram, with_lora
from conditions import control_net, hook_lora, regional, with_control
from hotpath_pack.devtools import checkpoints
from hotpath_pack.host.quantizing.formats import Int8WeightOnlyLayout
from hotpath_pack.host.residency import modulation
from sampling import (
    SMALL,
    Counting,
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


def test_a_quantized_weight_is_dequantized_once_for_all_vectors(flux, monkeypatch):
    dequantize, counts = Int8WeightOnlyLayout.dequantize, []

    def counting(qdata, params):
        counts.append(tuple(qdata.shape))
        return dequantize(qdata, params)

    small = quantized(flux)
    ahead = assert_same_bits(small, **dict(SMALL, steps=4))
    ahead_of(ahead)._states.clear()
    monkeypatch.setattr(Int8WeightOnlyLayout, "dequantize", counting)
    sample(ahead, **dict(SMALL, steps=4))
    layers = modulation.modulation_layers(flux.model.diffusion_model)
    assert ahead_of(ahead).vectors == 5 and len(counts) == len(layers)


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


def test_the_table_is_bounded(flux, monkeypatch):
    row = sum(layer.out_features for layer in modulation.modulation_layers(flux.model.diffusion_model).values()) * 4
    monkeypatch.setattr(modulation, "CAPACITY", 3 * row + row // 2)
    ahead = offloaded(flux)
    for seed in range(2):
        assert_same_bits(flux, ahead, **SMALL, steps=6, seed=seed)
    assert ahead_of(ahead).vectors == 3 and ahead_of(ahead).table_bytes == 3 * row
