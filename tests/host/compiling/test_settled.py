"""What another node changes of a block's modules in place, once they were compiled."""

import pytest
import torch
from hotpath_pack.devtools import family_models
from sampling import Counting, assert_parity, compiled, compiled_blocks, sample


def epsilon_of_a_layer(diffusion_model):
    diffusion_model.double_blocks[1].img_norm1.eps = 0.5


def epsilon_of_the_queries_norm(diffusion_model):
    diffusion_model.single_blocks[1].norm.query_norm.eps = 0.5


def a_gelu(diffusion_model):
    diffusion_model.double_blocks[0].img_mlp[1].approximate = "none"


@pytest.mark.parametrize("change", [epsilon_of_a_layer, epsilon_of_the_queries_norm, a_gelu])
def test_what_a_forward_reads_of_its_modules_is_read_anew(flux, change):
    fast = compiled(flux)
    assert_parity(flux, fast)
    before = sample(flux)
    change(flux.model.diffusion_model)
    assert (sample(flux) - before).abs().max() > 5e-4
    with Counting() as counting:
        assert_parity(flux, fast)
    assert (counting.graphs, counting.breaks) == (1, 0)
    assert compiled_blocks(fast).eager == {}


def before_a_step(model, change):
    def wrapper(apply_model, args):
        change()
        return apply_model(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(wrapper)


def between_two_blocks(model, change):
    """By a patch of the block before the one that is changed."""

    def replace(args, extra):
        change()
        return extra["original_block"](args)

    model.set_model_patch_replace(replace, "dit", "double_block", 0)


@pytest.mark.parametrize("put", [before_a_step, between_two_blocks])
def test_in_mid_run_too(flux, put):
    def changing(model):
        steps = []

        def change():
            steps.append(0)
            flux.model.diffusion_model.double_blocks[1].img_norm1.eps = 0.5 if len(steps) > 1 else 1e-6

        clone = model.clone()
        put(clone, change)
        return clone

    fast = compiled(flux)
    want, got = sample(changing(flux), steps=3), sample(changing(fast), steps=3)
    assert (want - got).abs().max() <= 1e-4
    assert (want - sample(flux, steps=3)).abs().max() > 1e-3


def test_what_stands_before_a_method_of_its_class():
    """A method that a forward calls, overridden on one module and given back."""
    model = family_models.tiny("z_image")
    fast = compiled(model)
    assert_parity(model, fast)
    before = sample(model)
    module = model.model.diffusion_model.layers[1].feed_forward
    module._forward_silu_gating = lambda x1, x3: x1 * x3
    assert (sample(model) - before).abs().max() > 5e-4
    assert_parity(model, fast)
    del module._forward_silu_gating
    with Counting() as counting:
        assert_parity(model, fast)
    assert counting.graphs == 0 and compiled_blocks(fast).eager == {}


def test_what_others_leave_on_modules_compiles_nothing(flux):
    fast = compiled(flux)
    assert_parity(flux, fast)
    with Counting() as counting, torch._dynamo.config.patch(error_on_recompile=True):
        for number in range(3):
            for block in flux.model.diffusion_model.single_blocks:
                block.step_cache_count, block.norm.step_cache_count = number, number
            assert_parity(flux, fast)
    assert counting.graphs == 0
