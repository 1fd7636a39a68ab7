"""What conditioning may bring: references, masks, ControlNets and LoRAs that follow the steps."""

import comfy.controlnet
import comfy.hooks
import comfy.ldm.flux.controlnet
import comfy.ops
import torch
from hotpath_pack.devtools import checkpoints

import nodes as host_nodes


def in_fill(**run):
    return dict(concat_latent_image=torch.randn(1, 16, 8, 8), concat_mask=torch.ones(1, 1, 64, 64), **run)


def with_reference(channels, method):
    return dict(reference_latents=[torch.randn(1, channels, 8, 6)], reference_latents_method=method)


def regional(positive):
    """Two prompts, each where its mask says."""
    mask = torch.zeros(1, 64, 64)
    mask[:, :, :32] = 1
    other = [[-positive[0][0], dict(positive[0][1])]]
    (left,) = host_nodes.ConditioningSetMask().append(positive, mask, "default", 1.0)
    (right,) = host_nodes.ConditioningSetMask().append(other, 1 - mask, "default", 0.8)
    return host_nodes.ConditioningCombine().combine(left, right)[0]


def hook_lora(flux_weights, *keyframes):
    """A LoRA whose strength follows the steps, as the host's hook nodes make it."""
    hooks = comfy.hooks.create_hook_lora(checkpoints.lora(flux_weights), strength_model=1.0, strength_clip=0.0)
    if keyframes:
        schedule = comfy.hooks.HookKeyframeGroup()
        for start, strength in keyframes:
            schedule.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
        hooks.set_keyframes_on_hooks(schedule)
    return hooks


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
