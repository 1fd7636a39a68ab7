"""The host's own nodes before and after Compile Repeated Blocks: what eager gives with each."""

import comfy.controlnet
import comfy.hooks
import comfy.ldm.flux.controlnet
import comfy.ops
import comfy.sd
import comfy_extras.nodes_easycache as easycache
import comfy_extras.nodes_model_advanced as advanced
import comfy_extras.nodes_model_merging as merging
import comfy_extras.nodes_slg as slg
import folder_paths
import pytest
import torch
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


CHANGES = [easy_cache, lazy_cache, model_sampling, rescale_cfg, skip_layer_guidance, function_wrapper]


@pytest.mark.parametrize("change", CHANGES)
def test_before_and_after_the_compile_node(flux, change):
    run = dict(steps=8, cfg=2.0)
    changed = change(flux)
    assert (sample(changed, **run) - sample(flux, **run)).abs().max() > 1e-3, "the node does nothing"
    assert_parity(changed, compiled(changed), **run)
    assert_parity(changed, change(compiled(flux)), **run)
    assert_parity(flux, compiled(flux), **run)


def hook_lora(flux_weights, *keyframes):
    """A LoRA whose strength follows the steps, as the host's hook nodes make it."""
    hooks = comfy.hooks.create_hook_lora(checkpoints.lora(flux_weights), strength_model=1.0, strength_clip=0.0)
    if keyframes:
        schedule = comfy.hooks.HookKeyframeGroup()
        for start, strength in keyframes:
            schedule.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
        hooks.set_keyframes_on_hooks(schedule)
    return hooks


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


def control_net(flux):
    """A ControlNet of one double block through the host's loader, with random weights."""
    config = {**flux.model.model_config.unet_config, "depth": 1, "depth_single_blocks": 0}
    config.pop("image_model")
    net = comfy.ldm.flux.controlnet.ControlNetFlux(operations=comfy.ops.disable_weight_init, **config)
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for name, value in net.state_dict().items():
        scale = 0.5 / value.shape[1] ** 0.5 if value.ndim > 1 else 0.1
        weights[name] = torch.randn(value.shape, generator=generator) * scale + ("norm" in name)
    # Files have the original's names, which the host translates.
    weights = {name.replace("_norm.weight", "_norm.scale"): value for name, value in weights.items()}
    return comfy.controlnet.load_controlnet_state_dict(weights)


def with_control(net, strength):
    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(6))
    positive = [[torch.zeros(1), {}]]
    applied, _ = host_nodes.ControlNetApplyAdvanced().apply_controlnet(positive, positive, net, image, strength, 0, 1)
    return applied[0][1]


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
