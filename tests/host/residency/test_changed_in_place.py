"""Offload Repeated Blocks with weights that another node changes in place, which PyTorch may not count."""

from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from hotpath_pack.hotpath.values import sampled
from hypothesis import given
from hypothesis import strategies as st
from sampling import SMALL, TOLERANCE, compiled, load, offloaded, sample
from torch import autocast
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=3)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int8])


@given(
    sizes=SIZES, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8]), scale=st.sampled_from([1.5, -1])
)
def test_what_is_scaled_is_another(sizes, dtype, scale):
    """However it lies in memory."""
    whole = torch.randint(1, 50, (*sizes, 2)).to(dtype)
    for tensor in (whole, whole.transpose(0, -1), whole[..., :1], whole[:1]):
        before = sampled([tensor, whole])
        assert torch.equal(sampled([tensor, whole]), before)
        tensor.copy_(tensor * scale if dtype != torch.int8 else tensor + 3)
        assert torch.equal(sampled([tensor, whole]), before) is not bool(tensor.numel())


@pytest.mark.parametrize("in_step", [False, True], ids=["between steps", "between blocks"])
@pytest.mark.parametrize("budget", ["0 %", "40 %"])
def test_weights_changed_in_place_while_sampling_are_seen(flux, in_step, budget):
    """Those that another node changes, of blocks that arrived before."""
    model, calls = flux.model.diffusion_model, []
    layers = [block.linear1 for block in model.single_blocks] + [block.img_mlp[0] for block in model.double_blocks]
    before = [layer.weight.detach().clone() for layer in layers]

    def change(times):
        calls.append(None)
        if len(calls) == times:
            for layer in layers:
                layer.weight.data.mul_(1.5)

    def wrapper(apply_model, args):
        if not in_step:
            change(2)
        return apply_model(args["input"], args["timestep"], **args["c"])

    def replaced(args, extra):
        out = extra["original_block"](args)
        if in_step:
            change(2)
        return out

    def changed(model):
        calls.clear()
        for layer, weight in zip(layers, before, strict=True):
            layer.weight.data.copy_(weight)
        changing = model.clone()
        changing.set_model_unet_function_wrapper(wrapper)
        changing.set_model_patch_replace(replaced, "dit", "double_block", 0)
        return sample(changing, **SMALL, steps=3)

    plain, want = sample(flux, **SMALL, steps=3), changed(flux)
    assert (want - plain).abs().max() > 1e-3
    for lean in (offloaded(flux, "in place", budget=budget), compiled(offloaded(flux, "in place", budget=budget))):
        assert (changed(lean) - want).abs().max() <= TOLERANCE


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("while_sampling", [False, True])
def test_weights_changed_in_place_where_nothing_counts_it_are_seen(flux_weights, inference, while_sampling):
    with torch.inference_mode(inference):
        flux = load({name: weight.clone() for name, weight in flux_weights.items()})
    layer, calls = flux.model.diffusion_model.double_blocks[0].img_mod.lin, []
    before = layer.weight.detach().clone()

    def change(*_):
        with torch.inference_mode(inference):
            layer.weight.data.mul_(1.5)

    def wrapper(apply_model, args):
        calls.append(None)
        if while_sampling and len(calls) == 2:
            change()
        return apply_model(args["input"], args["timestep"], **args["c"])

    changing, latents = flux.clone(), []
    changing.set_model_unet_function_wrapper(wrapper)
    plain = sample(flux)
    for model in (changing, offloaded(changing)):
        layer.weight.data.copy_(before)
        if not while_sampling:
            assert torch.equal(sample(model), plain)
            change()
        calls.clear()
        latents.append(sample(model))
    assert torch.equal(*latents) and (latents[0] - plain).abs().max() > 1e-3


def scaled(original, times=1.5):
    return lambda *args, **kwargs: original(*args, **kwargs) * times


class Mode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out * 1.5 if func is torch.nn.functional.silu else out


@contextmanager
def a_hook_around_every_module(layer):
    handle = register_module_forward_hook(lambda module, args, out: out * 1.5 if module is layer else None)
    try:
        yield
    finally:
        handle.remove()


AROUND = {
    "hook": a_hook_around_every_module,
    "mode": lambda layer: Mode(),
    "silu": lambda layer: patch.object(torch.nn.functional, "silu", scaled(torch.nn.functional.silu)),
    "linear": lambda layer: patch.object(torch.nn.functional, "linear", scaled(torch.nn.functional.linear, 1.01)),
    "forward": lambda layer: patch.object(type(layer), "forward", scaled(type(layer).forward, 1.01)),
    "autocast": lambda layer: autocast("cpu", torch.bfloat16),
    "weight": lambda layer: changed_for_a_while(layer),
}


@contextmanager
def changed_for_a_while(layer):
    before = layer.weight.detach().clone()
    layer.weight.data.mul_(1.5)
    try:
        yield
    finally:
        layer.weight.data.copy_(before)


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("first", [True, False])
def test_modulation_is_made_as_it_would_be_in_this_very_step(flux, around, first):
    """Where another node has something around the model in one of two prompts."""
    layer = flux.model.diffusion_model.double_blocks[0].img_mod.lin

    def wrapper(executor, *args, **kwargs):
        with AROUND[around](layer):
            return executor(*args, **kwargs)

    changed = flux.clone()
    changed.add_wrapper_with_key("diffusion_model", "other pack", wrapper)
    plain, want = sample(flux, **SMALL), sample(changed, **SMALL)
    assert (want - plain).abs().max() > 1e-3
    ahead = offloaded(flux)
    ahead_of_changed = ahead.clone()
    ahead_of_changed.add_wrapper_with_key("diffusion_model", "other pack", wrapper)
    runs = [(ahead, plain), (ahead_of_changed, want)]
    for model, wanted in [*(runs if first else reversed(runs)), *runs]:
        assert torch.equal(sample(model, **SMALL), wanted)
