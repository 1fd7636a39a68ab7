"""The host's own nodes before and after Compile Repeated Blocks: what eager gives with each."""

import comfy.clip_vision as clip_vision
import comfy.controlnet
import comfy.hooks
import comfy.ldm.flux.controlnet
import comfy.ldm.flux.redux as redux
import comfy.ldm.modules.attention as host_attention
import comfy.ops
import comfy.sd
import comfy_extras.nodes_easycache as easycache
import comfy_extras.nodes_flux as flux_nodes
import comfy_extras.nodes_freelunch as freelunch
import comfy_extras.nodes_model_advanced as advanced
import comfy_extras.nodes_model_merging as merging
import comfy_extras.nodes_slg as slg
import folder_paths
import pytest
import torch
from conditions import control_net, hook_lora, regional, with_control
from hotpath_pack.devtools import checkpoints
from safetensors.torch import load_file
from sampling import Counting, assert_parity, compiled, compiled_blocks, load, sample

import nodes as host_nodes


def output(result):
    """The MODEL that a node of either API returns."""
    return getattr(result, "args", result)[0]


def easy_cache(model):
    return output(easycache.EasyCacheNode.execute(model, 3.0, 0.0, 1.0, False))


def lazy_cache(model):
    return output(easycache.LazyCacheNode.execute(model, 0.5, 0.0, 1.0, False))


def model_sampling(model):
    return output(advanced.ModelSamplingFlux().patch(model, 3.0, 0.5, 1024, 1024))


def rescale_cfg(model):
    return output(advanced.RescaleCFG().patch(model, 0.7))


def skip_layer_guidance(model):
    return output(slg.SkipLayerGuidanceDiTSimple.execute(model, 0.0, 1.0, "1", "0,2"))


def function_wrapper(model):
    wrapped = model.clone()
    wrapped.set_model_unet_function_wrapper(
        lambda apply_model, args: apply_model(args["input"], args["timestep"], **args["c"]) * 0.9
    )
    return wrapped


def free_u(model):
    """The host's FreeU is for the U-Net and refuses Flux; packs bring its filter to blocks."""

    def filtered(args, extra):
        out = extra["original_block"](args)
        side = int((out["img"].shape[1] // 4) ** 0.5) * 2
        image = out["img"].transpose(1, 2).unflatten(2, (side, -1))
        image = freelunch.Fourier_filter(image, threshold=1, scale=0.5)
        return {**out, "img": image.flatten(2).transpose(1, 2)}

    with pytest.raises(KeyError):
        freelunch.FreeU.execute(model, 1.1, 1.2, 0.9, 0.2)
    patched = model.clone()
    patched.set_model_patch_replace(filtered, "dit", "double_block", 0)
    return patched


CHANGES = [easy_cache, lazy_cache, model_sampling, rescale_cfg, skip_layer_guidance, function_wrapper, free_u]


@pytest.mark.parametrize("change", CHANGES)
def test_before_and_after_the_compile_node(flux, change):
    run = dict(steps=8, cfg=2.0)
    changed = change(flux)
    assert (sample(changed, **run) - sample(flux, **run)).abs().max() > 1e-3, "the node does nothing"
    assert_parity(changed, compiled(changed), **run)
    assert_parity(changed, change(compiled(flux)), **run)
    assert_parity(flux, compiled(flux), **run)


def choose_attention(model):
    node = advanced.ModelAttentionBackend
    # Of the older API before ComfyUI 0.36.
    choose = node.execute if hasattr(node, "execute") else node().patch
    return output(choose(model, "pytorch attention"))


@pytest.mark.skipif(not hasattr(advanced, "ModelAttentionBackend"), reason="this ComfyUI has no such node")
def test_the_attention_that_the_hosts_node_chooses(flux):
    model = choose_attention(flux)
    with Counting() as counting:
        assert_parity(flux, compiled(flux, backend="eager"))
        for fast in (compiled(model, backend="eager"), choose_attention(compiled(flux, backend="eager"))):
            # PyTorch's own is traced, as without the node.
            assert_parity(model, fast)
            assert compiled_blocks(fast).eager == {}
    assert (counting.graphs, counting.breaks) == (2, 0)

    calls = []

    @host_attention.wrap_attn
    def counted(q, *args, **kwargs):
        calls.append(q.shape)
        return host_attention.attention_pytorch(q * 0.3, *args, **kwargs)

    model = flux.clone()
    model.set_model_optimized_attention(counted)
    assert (sample(model) - sample(flux)).abs().max() > 1e-3
    assert_parity(model, compiled(model, backend="eager"))
    calls.clear()
    sample(compiled(model, backend="eager"), steps=1)
    assert len(calls) == 5, "once a block"


@pytest.mark.skipif(not hasattr(flux_nodes, "FluxKVCache"), reason="this ComfyUI has no such node")
def test_keys_and_values_of_a_reference_that_are_kept_after_the_first_step():
    def cached(model):
        return output(flux_nodes.FluxKVCache.execute(model))

    model = load(checkpoints.flux2(1, 2))
    reference = torch.randn(1, 128, 3, 2, generator=torch.Generator().manual_seed(4))
    run = dict(reference_latents=[reference])
    without = sample(model, reference_latents_method="index_timestep_zero", **run)
    assert (sample(cached(model), **run) - without).abs().max() > 1e-3, "the node does nothing"
    with Counting() as counting, torch._dynamo.config.patch(error_on_recompile=True):
        for fast, size in (
            (compiled(cached(model), backend="eager"), {}),
            (cached(compiled(model, backend="eager")), {"width": 96}),
        ):
            assert_parity(cached(model), fast, **size, **run)
            assert compiled_blocks(fast).eager == {}
    assert (counting.graphs, counting.breaks) == (2, 0)


def style_model(flux, strength, kind):
    """Redux with random weights, through the host's node: more text tokens, and for ``attn_bias`` a mask."""
    encoder = redux.ReduxImageEncoder(32, flux.model.diffusion_model.params.context_in_dim)
    generator = torch.Generator().manual_seed(3)
    for weight in encoder.parameters():
        torch.nn.init.normal_(weight, std=0.1, generator=generator)
    seen = clip_vision.Output()
    seen["last_hidden_state"] = torch.randn(1, 9, 32, generator=generator)
    model = comfy.sd.StyleModel(encoder)
    return lambda positive: host_nodes.StyleModelApply().apply_stylemodel(positive, model, seen, strength, kind)[0]


def areas(positive):
    other = [[-positive[0][0], dict(positive[0][1])]]
    (left,) = host_nodes.ConditioningSetAreaPercentage().append(positive, 0.5, 1.0, 0.0, 0.0, 1.0)
    (right,) = host_nodes.ConditioningSetAreaPercentage().append(other, 0.5, 1.0, 0.5, 0.0, 1.0)
    return host_nodes.ConditioningCombine().combine(left, right)[0]


def test_regional_prompts_by_attention_mask_by_mask_and_by_area(flux):
    plain, fast = sample(flux), compiled(flux)
    weak, strong = (style_model(flux, strength, "attn_bias") for strength in (0.2, 2.0))
    assert "attention_mask" in weak([[torch.zeros(1, 4, flux.model.diffusion_model.params.context_in_dim), {}]])[0][1]
    assert (sample(flux, condition=weak) - sample(flux, condition=strong)).abs().max() > 1e-3
    for condition in (weak, strong, style_model(flux, 1.0, "multiply"), regional, areas, weak):
        assert (sample(flux, condition=condition) - plain).abs().max() > 1e-3
        assert_parity(flux, fast, condition=condition)
    assert_parity(flux, fast)


def test_a_lora_scheduled_over_the_steps(flux, flux_weights):
    plain = sample(flux, steps=4)
    with Counting() as counting, torch._dynamo.config.patch(error_on_recompile=True):
        for keyframes in ((), ((0.0, 0.2), (0.5, 1.0))):
            run = dict(steps=4, hooks=hook_lora(flux_weights, *keyframes))
            assert (sample(flux, **run) - plain).abs().max() > 1e-3
            assert_parity(flux, compiled(flux), **run)
    assert (counting.graphs, counting.breaks) == (2, 0)
    assert torch.equal(sample(flux, steps=4), plain)


def test_a_lora_on_one_side_of_the_guidance(flux, flux_weights):
    run = dict(steps=3, cfg=2.0, hooks=hook_lora(flux_weights))
    assert_parity(flux, compiled(flux), **run)


def test_a_control_net_added_changed_and_removed(flux):
    net = control_net(flux)
    assert type(net).__name__ == "ControlNet"
    plain = sample(flux)
    fast = compiled(flux)
    assert_parity(flux, fast)
    for strength in (0.5, 1.0):
        assert (sample(flux, **with_control(net, strength)) - plain).abs().max() > 1e-3
        assert_parity(flux, fast, **with_control(net, strength))
    assert_parity(flux, fast)


def test_merged_models(flux, flux_weights):
    other = load({name: weight * 0.8 for name, weight in flux_weights.items()})
    (merged,) = merging.ModelMergeSimple().merge(flux, other, 0.3)
    assert (sample(merged) - sample(flux)).abs().max() > 1e-3
    assert_parity(merged, compiled(merged))
    (merged_after,) = merging.ModelMergeSimple().merge(compiled(flux), other, 0.3)
    assert_parity(merged, merged_after)


def test_a_saved_model_has_the_hosts_keys(flux, flux_weights, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    for name, model in (("eager", flux), ("compiled", compiled(flux))):
        sample(model)
        with torch.inference_mode():
            merging.ModelSave().save(model, name)
    eager, fast = (load_file(path) for path in sorted(tmp_path.glob("*.safetensors"), reverse=True))
    assert eager.keys() == fast.keys()
    assert all(torch.equal(eager[key], fast[key]) for key in eager)


def test_a_deep_clone_for_another_device_runs_its_own_weights(flux_weights, tmp_path):
    path = checkpoints.save(tmp_path / "flux.safetensors", flux_weights)
    model = comfy.sd.load_diffusion_model(str(path))
    fast = compiled(model)
    sample(fast)
    clone = fast.deepclone_multigpu(new_load_device=torch.device("cpu"))
    assert clone.model is not model.model
    assert clone.get_wrappers("apply_model", "hotpath_compile") == [compiled_blocks(fast)]
    with torch.inference_mode():
        clone.model.diffusion_model.single_blocks[0].linear1.weight.mul_(0.5)
    changed = sample(clone)
    assert (changed - sample(fast)).abs().max() > 1e-3, "the clone ran the first model's weights"
    clone.remove_wrappers_with_key("apply_model", "hotpath_compile")
    assert (sample(clone) - changed).abs().max() <= 1e-4
