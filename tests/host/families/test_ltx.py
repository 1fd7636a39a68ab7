"""LTX-Video 2: a video and its sound, both of its block's streams, in one graph."""

import comfy.ldm.lightricks.av_model
import comfy.sample
import pytest
import torch
from changes import in_low_vram, with_lora
from comfy.nested_tensor import NestedTensor
from hotpath_pack.devtools import family_models
from hotpath_pack.host.families import family_of
from hotpath_pack.host.families.reads import options_read
from hotpath_pack.host.measuring.synthetic import Inputs
from hotpath_pack.host.measuring.synthetic import sample as sample_synthetic
from sampling import TOLERANCE, Counting, compiled, compiled_blocks, offloaded, quantized
from test_families import lora, with_override

MODELS = {"ltx2": 128, "ltx23": 128}
READ = options_read(comfy.ldm.lightricks.av_model.BasicAVTransformerBlock)


def tiny(name="ltx2", blocks=2):
    return family_models.build(name, 2, blocks, MODELS[name])


def sample(model, frames=2, width=3, sound=5, tokens=8, batch=1, cfg=1.0, given=False, **cond):
    """Both latents of a short run in one row; sizes in latents. With ``given`` the first frame is one that is there."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, 128, frames, 2, width), (batch, 8, sound, 16)]
    noise = [torch.randn(shape, generator=generator) for shape in (shapes if sound else shapes[:1])]
    diffusion = model.model.diffusion_model
    texts, _ = family_of(diffusion).conditioning(diffusion, tokens)
    text = torch.randn(texts.shape, generator=generator)
    mask = torch.ones(1, 1, frames, 2, width)
    mask[:, :, 0] = 0
    nested = (lambda parts: NestedTensor(parts)) if sound else (lambda parts: parts[0])
    with torch.inference_mode():
        out = comfy.sample.sample(
            model,
            nested(noise),
            2,
            cfg,
            "euler",
            "simple",
            [[text, cond]],
            [[text * 0.5, {}]],
            nested([torch.zeros_like(part) for part in noise]),
            noise_mask=mask if given else None,
            seed=0,
            disable_pbar=True,
        )
    return torch.cat([part.flatten() for part in (out.unbind() if sound else [out])])


def assert_parity(model, fast, **run):
    want = sample(model, **run)
    assert want.isfinite().all() and want.std() > 0.1
    difference = (sample(fast, **run) - want).abs().max().item()
    assert difference <= TOLERANCE, f"largest difference from eager {difference}"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.sweep(keep=["ltx23"])
def test_one_graph_whatever_the_frames_sides_sound_and_text(name):
    model = tiny(name)
    fast = compiled(model, backend="eager")
    with Counting() as counting, torch._dynamo.config.patch(error_on_recompile=True):
        assert_parity(model, fast)
        assert_parity(model, fast, frames=3, width=4, sound=9, tokens=21)
    assert (counting.graphs, counting.breaks) == (1, 0)
    assert compiled_blocks(fast).eager == {} and dict(compiled_blocks(fast).compiled) == {"transformer": 2}


@pytest.mark.parametrize("run", [dict(given=True), dict(sound=0)], ids=["a given frame", "no sound"])
@pytest.mark.sweep(keep=["a given frame"])
def test_another_kind_of_video_is_one_graph_more_and_its_sizes_none(run):
    model = tiny()
    fast = compiled(model, backend="eager")
    with Counting() as counting, torch._dynamo.config.patch(error_on_recompile=True):
        assert_parity(model, fast, **run)
        assert_parity(model, fast, frames=3, width=4, tokens=21, **run)
    assert (counting.graphs, counting.breaks) == (1, 0)
    assert compiled_blocks(fast).eager == {}


@pytest.mark.sweep
def test_batches_and_guidance():
    model = tiny(blocks=1)
    fast = compiled(model, backend="eager")
    assert_parity(model, fast, cfg=3.0)
    assert_parity(model, fast, batch=3, cfg=3.0)
    assert compiled_blocks(fast).eager == {}


def with_options(model, **options):
    clone = model.clone()
    clone.model_options["transformer_options"].update(options)
    return clone


@pytest.mark.parametrize(
    "part",
    [{"run_ax": False}, {"a2v_cross_attn": False}, {"v2a_cross_attn": False}, {"stg_skip_self_attn": True}],
    ids=min,
)
@pytest.mark.sweep(keep=["a2v_cross_attn", "stg_skip_self_attn"])
def test_parts_that_another_node_leaves_out_are_left_out(part):
    model = tiny(blocks=1)
    less = with_options(model, **part)
    fast = compiled(less, backend="eager")
    assert_parity(less, fast)
    assert compiled_blocks(fast).eager == {}
    assert ((sample(less) - sample(model)).abs().max() > 1e-3) == (READ >= set(part))


@pytest.mark.skipif("stg_skip_self_attn" not in READ, reason="ComfyUI has this guidance from 0.33 on")
def test_guidance_by_some_blocks_without_attention_is_one_graph_more():
    from comfy_extras.nodes_lt import LTXVSpatioTemporalGuidance

    model = tiny()
    (guided,) = LTXVSpatioTemporalGuidance.execute(model, 1.0, "1", 0.0, 1.0).result
    fast = compiled(guided, backend="eager")
    with Counting() as counting:
        assert_parity(guided, fast)
    assert (counting.graphs, counting.breaks) == (2, 0)
    assert compiled_blocks(fast).eager == {}
    assert (sample(guided) - sample(model)).abs().max() > 1e-3


@pytest.mark.sweep
def test_attention_of_others_runs_as_it_is():
    model = tiny(blocks=1)
    changed = with_override(model)
    fast = compiled(changed, backend="eager")
    assert_parity(changed, fast)
    assert compiled_blocks(fast).eager == {}
    assert (sample(changed) - sample(model)).abs().max() > 1e-3


def test_loras_low_vram_and_offload_take_the_same_graph():
    model = tiny(blocks=1)
    with Counting() as counting, torch._dynamo.config.patch(error_on_recompile=True):
        assert_parity(model, compiled(model, backend="eager"))
        patched = with_lora(model, lora(model), 1.0)
        assert_parity(in_low_vram(patched), compiled(in_low_vram(patched), backend="eager"))
        lean = offloaded(model, budget="0 %")
        assert sample(lean).equal(sample(model))
        assert_parity(lean, compiled(lean, backend="eager"))
    assert (counting.graphs, counting.breaks) == (1, 0)
    assert (sample(patched) - sample(model)).abs().max() > 1e-3


@pytest.mark.sweep
def test_quantized_it_is_compiled_what_it_is_eager():
    model = tiny("ltx23", blocks=1)
    small = quantized(model, "int8_weight_only")
    full = sample(model)
    assert 0 < (sample(small) - full).norm() < 0.05 * full.norm()
    fast = compiled(small, backend="eager")
    assert_parity(small, fast)
    assert compiled_blocks(fast).eager == {}


def test_it_is_warmed_up_without_prompts():
    assert len(sample_synthetic(tiny(blocks=1), Inputs(64, 64, 1, 8), 1)) == 1
