"""Other packs' patches, added after the first run, changed, and removed again: what eager gives, each time."""

import pytest
import torch
from sampling import Counting, assert_parity, compiled, compiled_blocks, sample


def attn1_patch(model, strength):
    def patch(q, k, v, pe=None, attn_mask=None, extra_options=None):
        gain = 1 + strength * extra_options["block_index"] + float(extra_options["sigmas"][0])
        offset = extra_options["img_slice"][0]
        k = torch.cat((k[:, :, :offset] * gain, k[:, :, offset:]), 2)
        return {"q": q * gain, "k": k, "v": v}

    model.set_model_attn1_patch(patch)


def attn1_patch_that_adds_tokens(model, strength):
    """As image prompt adapters do: more keys and values than queries, hence its own rotary embedding and mask."""

    def patch(q, k, v, pe=None, attn_mask=None, extra_options=None):
        from comfy.ldm.flux.math import apply_rope

        q, k = apply_rope(q, k, pe)
        extra = torch.full_like(k[:, :, :3], strength)
        return {"q": q, "k": torch.cat((k, extra), 2), "v": torch.cat((v, extra), 2), "pe": None}

    model.set_model_attn1_patch(patch)


def attn1_output_patch(model, strength):
    def patch(attn, extra_options):
        scale = strength * (2 if extra_options["block_type"] == "single" else 1)
        out = attn.clone()
        out[:, extra_options["img_slice"][0] :] *= 1 + scale
        return out

    model.set_model_attn1_output_patch(patch)


def attention_override(model, strength):
    def override(func, q, k, v, *args, **kwargs):
        return func(q * (1 + strength), k, v, *args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = override


def patches_replace(model, strength):
    def double(args, extra):
        out = extra["original_block"](args)
        return {"img": out["img"] * (1 + strength), "txt": out["txt"]}

    def single(args, extra):
        return {"img": extra["original_block"]({**args, "img": args["img"] * (1 - strength)})["img"]}

    model.set_model_patch_replace(double, "dit", "double_block", 1)
    model.set_model_patch_replace(single, "dit", "single_block", 2)


def noise(*shape):
    """A constant would be lost in the next layer norm."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def patches_replace_that_skips(model, strength):
    def skip(args, extra):
        return {"img": args["img"] + strength * noise(*args["img"].shape)}

    model.set_model_patch_replace(skip, "dit", "single_block", 1)


def controlnet_residuals(model, strength):
    def wrapper(apply_model, args):
        def residual(value):
            x = args["input"]
            tokens = x.shape[2] * x.shape[3] // 4
            return value * noise(x.shape[0], tokens, model.model.diffusion_model.hidden_size)

        control = {"input": [residual(strength), None], "output": [None, residual(-strength)]}
        return apply_model(args["input"], args["timestep"], **{**args["c"], "control": control})

    model.set_model_unet_function_wrapper(wrapper)


def rope_options(model, strength):
    model.set_model_rope_options(scale_x=1 + strength, shift_x=0, scale_y=1, shift_y=strength, scale_t=1, shift_t=0)


PATCHES = [
    attn1_patch,
    attn1_patch_that_adds_tokens,
    attn1_output_patch,
    attention_override,
    patches_replace,
    patches_replace_that_skips,
    controlnet_residuals,
    rope_options,
]


def patched(model, patch, strength):
    clone = model.clone()
    patch(clone, strength)
    return clone


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.sweep(keep=["attn1_patch_that_adds_tokens", "attention_override", "patches_replace"])
def test_added_after_the_first_run_changed_and_removed(flux, patch):
    plain = sample(flux)
    assert_parity(flux, compiled(flux))
    images = []
    for strength in (0.3, 0.6):
        model = patched(flux, patch, strength)
        assert_parity(model, compiled(model))
        images.append(sample(model))
    assert_parity(flux, compiled(flux))
    assert (images[0] - plain).abs().max() > 1e-3, "the patch does nothing"
    assert (images[0] - images[1]).abs().max() > 1e-3, "the strength does nothing"


@pytest.mark.parametrize("patch", [attn1_patch, attn1_output_patch, attention_override])
@pytest.mark.sweep(keep=["attn1_output_patch"])
def test_patches_around_attention_cost_two_graphs_whatever_they_do(flux, patch):
    sample(compiled(flux))
    with Counting() as counting, torch._dynamo.config.patch(error_on_recompile=True):
        for strength, run in ((0.1, dict(steps=4)), (0.2, dict(width=96)), (0.3, dict(tokens=9))):
            model = patched(flux, patch, strength)
            assert_parity(model, compiled(model), **run)
    assert (counting.graphs, counting.breaks) == (2, 0)


def test_patches_combine(flux):
    model = flux
    for patch in (attn1_patch, attn1_output_patch, attention_override, patches_replace, controlnet_residuals):
        model = patched(model, patch, 0.2)
    assert_parity(model, compiled(model, backend="inductor"))


def test_a_patch_put_on_after_the_compile_node_works_the_same(flux):
    fast = compiled(flux)
    sample(fast)
    assert_parity(patched(flux, attn1_patch, 0.3), patched(fast, attn1_patch, 0.3))
    assert_parity(flux, fast)


def test_an_attention_mask(flux):
    mask = torch.zeros(1, 16 + 16, 16 + 16)
    mask[:, 16:, :8] = -torch.inf
    masked = dict(attention_mask=mask, attention_mask_img_shape=(4, 4))
    assert (sample(flux, **masked) - sample(flux)).abs().max() > 1e-3
    assert_parity(flux, compiled(flux), **masked)


def test_attention_that_cannot_be_traced_still_makes_two_graphs(flux, monkeypatch):
    """The host's default on a CPU reads memory statistics from the system inside the block."""
    import comfy.ldm.flux.math
    import comfy.ldm.modules.attention as attention

    monkeypatch.setattr(comfy.ldm.flux.math, "optimized_attention", attention.attention_sub_quad)
    with Counting() as counting:
        assert_parity(flux, compiled(flux))
        assert_parity(flux, compiled(flux), width=96)
    assert (counting.graphs, counting.breaks) == (2, 0)


def test_a_wrong_attention_shape_is_an_error_and_the_model_stays_usable(flux):
    def override(func, q, k, v, *args, **kwargs):
        return func(q, k, v, *args, **kwargs)[:, :, :5]

    broken = flux.clone()
    broken.model_options["transformer_options"]["optimized_attention_override"] = override
    with pytest.raises(Exception, match="the attention of a patched block returned"):
        sample(compiled(broken))
    assert_parity(flux, compiled(flux))


def reasons(model):
    return " ".join(compiled_blocks(model).eager)


def bolt_hook(block):
    handle = block.linear1.register_forward_hook(lambda module, args, out: out * 1.5)
    return handle.remove


def bolt_block_hook(block):
    handle = block.register_forward_pre_hook(lambda module, args: (args[0] * 1.1, *args[1:]))
    return handle.remove


def bolt_forward(block):
    original = block.linear2.forward
    block.linear2.forward = lambda x: original(x) * 0.5
    return lambda: delattr(block.linear2, "forward")


def bolt_foreign_linear(block):
    class ForeignLinear(type(block.linear1)):
        def forward(self, x):
            return super().forward(x) * 0.7

    block.linear1.__class__ = ForeignLinear
    return lambda: setattr(block.linear1, "__class__", ForeignLinear.__base__)


def bolt_block_forward(block):
    original = block.forward
    block.forward = lambda *args, **kwargs: original(*args, **kwargs) * 1.2
    return lambda: delattr(block, "forward")


@pytest.mark.parametrize(
    "bolt, reason",
    [
        (bolt_hook, "linear1 (Linear) has a forward hook"),
        (bolt_block_hook, "has a forward hook"),
        (bolt_forward, "linear2 (Linear) has an overridden forward"),
        (bolt_foreign_linear, "ForeignLinear"),
        (bolt_block_forward, "the block (SingleStreamBlock) has an overridden forward"),
    ],
)
def test_a_block_with_something_bolted_on_is_not_hoisted(flux, caplog, bolt, reason):
    assert_parity(flux, compiled(flux))
    plain = sample(flux)
    undo = bolt(flux.model.diffusion_model.single_blocks[1])
    fast = compiled(flux)
    assert_parity(flux, fast)
    assert (sample(flux) - plain).abs().max() > 1e-3, "what was bolted on does nothing"
    assert dict(compiled_blocks(fast).compiled) == {"double": 2, "single": 2}
    assert reason in reasons(fast)
    assert reason in caplog.text and "single block 1 runs without HotPath" in caplog.text
    undo()
    assert_parity(flux, fast)
    assert dict(compiled_blocks(fast).compiled) == {"double": 2, "single": 3}
    assert torch.equal(sample(flux), plain)


def test_a_hook_registered_between_two_runs_of_one_model_is_noticed(flux):
    fast = compiled(flux)
    sample(fast)
    undo = bolt_hook(flux.model.diffusion_model.single_blocks[0])
    assert_parity(flux, fast)
    undo()


def test_a_pack_that_replaces_the_blocks_forward_for_all_models(flux, monkeypatch):
    from comfy.ldm.flux.layers import SingleStreamBlock

    original = SingleStreamBlock.forward
    monkeypatch.setattr(SingleStreamBlock, "forward", lambda self, *args, **kw: original(self, *args, **kw) * 0.9)
    fast = compiled(flux)
    assert_parity(flux, fast)
    assert "SingleStreamBlock was replaced" in reasons(fast)


def test_a_pack_that_replaces_the_rotary_embedding(flux, monkeypatch):
    import comfy.ldm.flux.math

    original, plain = comfy.ldm.flux.math.apply_rope, sample(flux)
    monkeypatch.setattr(comfy.ldm.flux.math, "apply_rope", lambda q, k, pe: original(q, k, pe * 0.8))
    assert (sample(flux) - plain).abs().max() > 0.01
    fast = compiled(flux)
    with Counting() as counting:
        assert_parity(flux, fast)
    assert (counting.graphs, compiled_blocks(fast).eager) == (2, {})


def test_a_pack_that_replaces_the_attention_function(flux, monkeypatch):
    import comfy.ldm.flux.math

    original = comfy.ldm.flux.math.optimized_attention
    monkeypatch.setattr(
        comfy.ldm.flux.math, "optimized_attention", lambda q, *args, **kwargs: original(q * 2, *args, **kwargs)
    )
    fast = compiled(flux)
    assert_parity(flux, fast)
    assert "attention was replaced" in reasons(fast)
