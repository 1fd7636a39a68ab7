"""Quantize Repeated Blocks behind nodes that changed the MODEL in a way which a quantized one beside it would lose."""

from functools import partial
from unittest.mock import patch

import pytest
import torch
from hotpath_pack.devtools import checkpoints
from sampling import SMALL, compiled, load, offloaded, quantized, sample
from torch import nn


def captured_by_a_function(model, forward):
    """As a step cache does, which puts a forward of its own on the model for the length of a step."""

    diffusion_model = model.model.diffusion_model

    def bound(apply_model, args):
        with patch.multiple(diffusion_model, forward_orig=forward):
            return apply_model(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(bound)


def captured_by_an_object(model, forward):
    class Cache:
        def __init__(self, block):
            self.blocks = [block]

        def __call__(self, executor, *args, **kwargs):
            return executor(*args, **kwargs)

    model.add_wrapper_with_key("diffusion_model", "x", Cache(model.model.diffusion_model.double_blocks[0]))


def captured_by_a_method(model, forward):
    class Cache:
        def __init__(self, block):
            self.block = block

        def wrap(self, executor, *args, **kwargs):
            return executor(*args, **kwargs)

    model.add_wrapper_with_key("diffusion_model", "x", Cache(model.model.diffusion_model.double_blocks[0]).wrap)


def captured_in_part(model, forward):
    def called(block, executor, *args, **kwargs):
        return executor(*args, **kwargs)

    model.add_wrapper_with_key("apply_model", "x", partial(called, model.model.diffusion_model.single_blocks[0]))


@pytest.mark.parametrize(
    "capture", [captured_by_a_function, captured_by_an_object, captured_by_a_method, captured_in_part]
)
def test_code_that_works_on_the_model_as_it_was_loaded(flux, capture):
    model = flux.clone()
    capture(model, lambda *args, **kwargs: None)
    with pytest.raises(ValueError, match="works on the model as it was loaded.*Put Quantize Repeated Blocks before"):
        quantized(model)
    sample(quantized(flux), **SMALL)


def test_code_that_holds_no_part_of_it_comes_along(flux):
    model, seen = flux.clone(), []
    model_sampling = model.get_model_object("model_sampling")

    def wrapper(executor, *args, **kwargs):
        seen.append(model_sampling.sigma_max)
        return executor(*args, **kwargs)

    model.add_wrapper_with_key("diffusion_model", "x", wrapper)
    sample(quantized(model), **SMALL)
    assert seen
    # Nodes of this pack, in any order.
    sample(quantized(offloaded(compiled(flux))), **SMALL)


CHANGES = {
    "a function on the model": lambda model: setattr(model, "forward_orig", lambda *args, **kwargs: None),
    "a number of a norm": lambda model: setattr(model.double_blocks[0].img_norm1, "eps", 0.5),
    "a number of a module": lambda model: setattr(model.pe_embedder, "theta", 77),
    "a list of a module": lambda model: setattr(model.pe_embedder, "axes_dim", [56, 56, 16]),
    "what the model was made by": lambda model: setattr(model.params, "guidance_embed", False),
}


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_in_place(flux_weights, change, after):
    flux = load(dict(flux_weights))
    if after:
        quantized(flux)
    CHANGES[change](flux.model.diffusion_model)
    with pytest.raises(ValueError, match="another node changed this model in place"):
        quantized(flux)


def test_weights_changed_since_are_quantized_anew():
    flux = load(checkpoints.flux1(1, 1))
    model, latents = flux.model.diffusion_model, []
    steps = (
        lambda: None,
        lambda: model.double_blocks[0].img_mlp[0].weight.data.mul_(1.5),
        lambda: setattr(model, "img_in", model.img_in),
        lambda: setattr(model.img_in, "weight", nn.Parameter(model.img_in.weight * 2, requires_grad=False)),
    )
    for step in steps:
        step()
        latents.append(sample(quantized(flux), **SMALL))
    assert torch.equal(latents[1], latents[2])
    assert not torch.equal(latents[0], latents[1]) and not torch.equal(latents[2], latents[3])


def test_what_another_clone_has_replaced_is_not_its_own(flux):
    """While that clone's patches are on the model, and after."""
    model, want = flux.model.diffusion_model, sample(quantized(flux), **SMALL)
    patched = flux.clone()
    patched.add_object_patch("diffusion_model.forward_orig", model.forward_orig)
    patched.add_object_patch("diffusion_model.pe_embedder.theta", 77)
    sample(patched, **SMALL)
    assert model.pe_embedder.theta == 77 and "forward_orig" in vars(model)
    assert torch.equal(sample(quantized(flux), **SMALL), want)
    sample(flux, **SMALL)
    assert model.pe_embedder.theta != 77 and "forward_orig" in vars(model)
    assert torch.equal(sample(quantized(flux, "int8_weight_only"), **SMALL), sample(quantized(flux), **SMALL)) is False
