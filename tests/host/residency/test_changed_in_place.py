"""Offload Repeated Blocks with weights that another node changes in place, which PyTorch may not count."""

import pytest
import torch
from hotpath_pack.hotpath.values import sampled
from hypothesis import given
from hypothesis import strategies as st
from sampling import SMALL, TOLERANCE, compiled, load, offloaded, sample

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
