"""What another node replaces in the classes of a model's modules, for some steps or for good, is in the image."""

import contextlib
import functools
from unittest.mock import patch

import comfy.ldm.flux.layers
import comfy.ldm.flux.math
import comfy.ldm.lightricks.av_model
import comfy.ldm.modules.attention
import comfy.ldm.qwen_image.model
import comfy.ldm.wan.model
import comfy.ops
import comfy.quant_ops
import pytest
import torch
from hotpath_pack.devtools import checkpoints
from hotpath_pack.devtools.family_models import tiny
from hotpath_pack.host.families import attention
from sampling import SMALL, TOLERANCE, compiled, compiled_blocks, load, sample
from torch import nn

CLASSES = {
    "QKNorm": ("flux", comfy.ldm.flux.layers.QKNorm, "forward"),
    "the host's Linear": ("flux", comfy.ops.disable_weight_init.Linear, "forward"),
    "Linear": ("flux", nn.Linear, "forward"),
    "LayerNorm": ("flux", nn.LayerNorm, "forward"),
    "RMSNorm": ("flux", nn.RMSNorm, "forward"),
    "GELU": ("flux", nn.GELU, "forward"),
    "Wan": ("wan_t2v", comfy.ldm.wan.model.WanSelfAttention, "forward"),
    "Qwen-Image": ("qwen_image", comfy.ldm.qwen_image.model.Attention, "forward"),
    "LTX": ("ltx2", comfy.ldm.lightricks.av_model.BasicAVTransformerBlock, "get_ada_values"),
}


def times(original):
    @functools.wraps(original)
    def changed(*args, **kwargs):
        out = original(*args, **kwargs)
        return tuple(part * 1.3 for part in out) if isinstance(out, (tuple, list)) else out * 1.3

    return changed


def assert_replaced_for_some_steps(model, places, replaced):
    """From the second step on ``replaced`` stands in ``places``, each an object and a name, as another pack would put
    it there."""
    calls = []

    def wrapper(executor, *args, **kwargs):
        calls.append(None)
        with contextlib.ExitStack() as scope:
            for place, name in places if len(calls) > 1 else ():
                scope.enter_context(patch.object(place, name, replaced))
            return executor(*args, **kwargs)

    scheduled = model.clone()
    scheduled.add_wrapper_with_key("diffusion_model", "other pack", wrapper)
    plain, want = sample(model, **SMALL), sample(scheduled, **SMALL)
    calls.clear()
    got = sample(compiled(scheduled, on_failure="eager"), **SMALL)
    assert (want - plain).abs().max() > 1e-3
    assert (want - got).abs().max() <= TOLERANCE


@pytest.mark.parametrize("which", CLASSES)
def test_a_method_replaced_for_some_steps(flux, which):
    family, kind, name = CLASSES[which]
    model = flux if family == "flux" else tiny(family)
    assert_replaced_for_some_steps(model, [(kind, name)], times(getattr(kind, name)))


FUNCTIONS = {
    "the host's call of PyTorch's attention": (comfy.ops, "scaled_dot_product_attention"),
    "the host's default attention": (comfy.ldm.modules.attention, "attention_pytorch"),
    "PyTorch's attention": (torch.nn.functional, "scaled_dot_product_attention"),
    "the kernel of the rotary embedding": (comfy.quant_ops.ck, "apply_rope"),
    "the rotary embedding": (comfy.ldm.flux.math, "apply_rope"),
}


@pytest.mark.parametrize("hopper", [pytest.param(False, marks=pytest.mark.sweep), True])
@pytest.mark.parametrize("which", FUNCTIONS)
def test_a_function_replaced_for_some_steps(flux, which, hopper, monkeypatch):
    """Also where this pack would have PyTorch choose another kernel."""
    module, name = FUNCTIONS[which]
    monkeypatch.setattr(attention, "cached_prefers_cudnn", lambda device: hopper)
    places = [(module, name)]
    if name == "attention_pytorch":
        places.append((comfy.ldm.flux.math, "optimized_attention"))
    assert_replaced_for_some_steps(flux, places, times(getattr(module, name)))


@pytest.mark.parametrize("before", [True, False])
def test_a_hook_around_every_module(flux, before):
    layer, fast = flux.model.diffusion_model.single_blocks[0].linear1, compiled(flux, on_failure="eager")
    plain = sample(flux if before else fast, **SMALL)
    hook = lambda module, args, out: out * 1.3 if module is layer else None  # noqa: E731
    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        want, got = sample(flux, **SMALL), sample(fast, **SMALL)
        told = compiled_blocks(fast).summary()
    finally:
        handle.remove()
    assert (want - plain).abs().max() > 1e-3 and (want - got).abs().max() <= TOLERANCE
    assert "a hook is around every module" in told
    assert (sample(fast, **SMALL) - plain).abs().max() <= TOLERANCE


class Scaled(torch.Tensor):
    """A weight whose products are its own."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        return out * 1.3 if func is torch.nn.functional.linear or func is torch._C._nn.linear else out


def test_a_weight_that_computes_in_its_own_way_runs_eager(flux):
    layer = flux.model.diffusion_model.single_blocks[0].linear1
    before = sample(flux, **SMALL)
    layer.weight = nn.Parameter(layer.weight.detach().clone().as_subclass(Scaled), requires_grad=False)
    fast = compiled(flux, on_failure="eager")
    want, got = sample(flux, **SMALL), sample(fast, **SMALL)
    assert (want - before).abs().max() > 1e-3 and (want - got).abs().max() <= TOLERANCE
    assert "which computes in its own way" in compiled_blocks(fast).summary()


def test_a_bias_that_a_layer_gains(flux):
    model = load(checkpoints.flux2(1, 1))
    fast, tokens = compiled(model, on_failure="eager"), dict(SMALL, width=64, height=64)
    before = sample(fast, **tokens)
    layer = model.model.diffusion_model.single_blocks[0].linear1
    layer.bias = nn.Parameter(torch.randn(layer.out_features), requires_grad=False)
    want, got = sample(model, **tokens), sample(fast, **tokens)
    assert (want - before).abs().max() > 1e-3 and (want - got).abs().max() <= TOLERANCE


class CalledOtherwise(comfy.ops.disable_weight_init.Linear):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs) * 1.3


def its_own_cast(block):
    block.linear1.comfy_cast_weights, before = True, block.linear1.forward_comfy_cast_weights
    block.linear1.forward_comfy_cast_weights = lambda x: before(x) * 1.3


def its_own_call(block):
    before = block.linear1._call_impl
    block.linear1._call_impl = lambda *args, **kwargs: before(*args, **kwargs) * 1.3


def another_class(block):
    block.linear1.__class__ = CalledOtherwise


def another_submodule(block):
    before = block.mlp_act
    block.__dict__["mlp_act"] = lambda x: before(x) * 1.5


def another_weight(block):
    block.linear1.__dict__["weight"] = block.linear1.weight * 1.3


def a_norm_with_weights(block):
    weight = torch.full(block.pre_norm.normalized_shape, 1.5)
    block.pre_norm.weight = nn.Parameter(weight, requires_grad=False)


def a_forward_of_its_class(block):
    """Which it has from another until then."""
    kind = type("Linear", (type(block.linear1),), {"__module__": type(block.linear1).__module__})
    block.linear1.__class__ = kind
    return lambda: setattr(kind, "forward", times(kind.forward))


ON_MODULES = (its_own_cast, its_own_call, another_class, another_submodule, another_weight, a_norm_with_weights)


@pytest.mark.parametrize("when", [pytest.param("before", marks=pytest.mark.sweep), "after", "while it samples"])
@pytest.mark.parametrize("change", [*ON_MODULES, a_forward_of_its_class])
def test_what_comes_before_what_a_module_has(flux, change, when):
    model, plain = load(checkpoints.flux1(1, 2)), None
    block, calls = model.model.diffusion_model.single_blocks[0], []
    then = change(block) if change is a_forward_of_its_class else lambda: change(block)
    fast = compiled(model, on_failure="eager")
    plain = sample(model if when == "before" else fast, **SMALL, steps=2)

    def wrapper(executor, *args, **kwargs):
        calls.append(None)
        if when == "while it samples" and len(calls) == 2:
            then()
        return executor(*args, **kwargs)

    if when == "while it samples":
        fast.add_wrapper_with_key("diffusion_model", "other pack", wrapper)
    else:
        then()
    got, want = sample(fast, **SMALL, steps=2), sample(model, **SMALL, steps=2)
    if when == "while it samples":
        assert (got - plain).abs().max() > 1e-3
        # Its first step was sampled before the change.
        got = sample(fast, **SMALL, steps=2)
    assert (want - plain).abs().max() > 1e-3
    assert (want - got).abs().max() <= TOLERANCE
