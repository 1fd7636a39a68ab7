"""Models of every family: what eager gives, in as few graphs as there are structures of blocks."""

import pytest
import torch
from changes import in_low_vram, with_lora
from hotpath_pack.devtools import family_models
from hotpath_pack.devtools.family_models import tiny
from hotpath_pack.devtools.measure import snr
from hotpath_pack.host.families import FAMILIES, SUPPORTED, family_of, named_blocks
from hotpath_pack.host.measuring.synthetic import Inputs
from hotpath_pack.host.measuring.synthetic import sample as sample_synthetic
from hotpath_pack.host.residency.offload import KEY
from sampling import TOLERANCE, Counting, assert_parity, compiled, compiled_blocks, offloaded, quantized, sample

FLUX_LIKE = (
    "hunyuan_video",
    "hunyuan_video_15",
    "hunyuan_image_21",
    "hunyuan_3d",
    "longcat",
    "ovis",
    "chroma_radiance",
)
OTHERS = ("qwen_image", "z_image", "wan_t2v", "wan_i2v", "wan_ti2v_5b", "lumina2", "krea2")
# Structures of blocks, each of which is a graph.
GRAPHS = {**dict.fromkeys(FLUX_LIKE, 2), **dict.fromkeys(OTHERS, 1), "z_image": 2, "lumina2": 2}


class Seen:
    """As much of what CLIP Vision gives as the host uses."""

    def __init__(self, tokens):
        generator = torch.Generator().manual_seed(tokens)
        self.penultimate_hidden_states = torch.randn(1, tokens, 1280, generator=generator)


def masked(tokens, seen):
    return dict(tokens=tokens, attention_mask=(torch.arange(tokens) < seen).long()[None])


def reference(*shape, **more):
    return dict(reference_latents=[torch.randn(shape, generator=torch.Generator().manual_seed(1))], **more)


ZERO = dict(reference_latents_method="index_timestep_zero")
# Of each of these kinds of input, one more graph at most for each structure; none for the second of a kind.
KINDS_OF_INPUT = {
    "hunyuan_video": [
        [dict(frames=3, guiding_frame_index=0), dict(frames=4, width=96, guiding_frame_index=0)],
        [masked(16, 11), masked(24, 11)],
    ],
    "qwen_image": [
        [masked(16, 11), masked(24, 11)],
        [reference(1, 16, 1, 8, 6, **ZERO), reference(1, 16, 1, 8, 10, width=96, **ZERO)],
    ],
    "krea2": [[reference(1, 16, 1, 8, 6, **ZERO), reference(1, 16, 1, 8, 10, width=96, **ZERO)]],
    "wan_i2v": [[dict(frames=3, clip_vision_output=Seen(257)), dict(frames=4, clip_vision_output=Seen(514))]],
}


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.sweep(keep=["hunyuan_video", "chroma_radiance", "qwen_image", "z_image", "wan_t2v", "krea2"])
def test_each_model_is_as_many_graphs_as_it_has_structures_of_blocks(name):
    model = tiny(name)
    fast = compiled(model, backend="eager")
    # Of Krea 2 they are a batch.
    frames = model.model.latent_format.latent_dimensions == 3 and name != "krea2"
    with Counting() as counting, torch._dynamo.config.patch(error_on_recompile=True):
        assert_parity(model, fast)
        assert_parity(model, fast, width=96, tokens=40, **(dict(frames=3) if frames else {}))
    assert (counting.graphs, counting.breaks) == (GRAPHS[name], 0)
    assert compiled_blocks(fast).eager == {}
    blocks = [
        block
        for kind in family_of(model.model.diffusion_model).kinds
        for block in kind.blocks(model.model.diffusion_model)
    ]
    assert sum(compiled_blocks(fast).compiled.values()) == len(blocks) >= 2


@pytest.mark.parametrize("name", KINDS_OF_INPUT)
@pytest.mark.sweep(keep=["qwen_image"])
def test_other_kinds_of_input_are_one_graph_more_and_their_sizes_none(name):
    model = tiny(name)
    for runs in KINDS_OF_INPUT[name]:
        fast = compiled(model, backend="eager")
        with Counting() as counting, torch._dynamo.config.patch(error_on_recompile=True):
            for run in runs:
                assert_parity(model, fast, **run)
        assert (counting.graphs, counting.breaks) == (GRAPHS[name], 0)
        assert compiled_blocks(fast).eager == {}


@pytest.mark.parametrize("name", ["qwen_image", "z_image", "wan_t2v", "krea2"])
@pytest.mark.sweep(keep=["z_image"])
def test_batches_and_guidance(name):
    model = tiny(name)
    fast = compiled(model, backend="eager")
    for run in ({}, dict(cfg=3.0), dict(batch=3)):
        assert_parity(model, fast, **run)
    assert all(region.stats.graphs <= 2 for region in compiled_blocks(fast).regions)
    assert compiled_blocks(fast).eager == {}


@pytest.mark.parametrize("name", ["qwen_image", "z_image", "wan_t2v", "krea2"])
@pytest.mark.sweep(keep=["qwen_image"])
def test_generated_code_gives_what_eager_gives(name):
    model = tiny(name, blocks=1)
    fast = compiled(model, backend="inductor")
    assert_parity(model, fast)
    assert_parity(model, fast, width=96, tokens=40)
    assert compiled_blocks(fast).eager == {}


def lora(model, rank=4):
    """A LoRA for every Linear of the model's blocks."""
    generator, weights = torch.Generator().manual_seed(1), {}
    diffusion = model.model.diffusion_model
    for path, block in named_blocks(diffusion):
        for name, layer in block.named_modules():
            if hasattr(layer, "out_features"):
                down = torch.randn(rank, layer.in_features, generator=generator)
                weights[f"diffusion_model.{path}.{name}.lora_down.weight"] = down * (0.2 / layer.in_features**0.5)
                up = torch.randn(layer.out_features, rank, generator=generator)
                weights[f"diffusion_model.{path}.{name}.lora_up.weight"] = up / rank**0.5
    return weights


@pytest.mark.parametrize("name", [*OTHERS[:3], "krea2", "hunyuan_video"])
@pytest.mark.sweep(keep=["wan_t2v", "hunyuan_video"])
def test_loras_and_low_vram_take_the_same_graphs(name):
    model = tiny(name)
    fast = compiled(model, backend="eager")
    with Counting() as counting, torch._dynamo.config.patch(error_on_recompile=True):
        assert_parity(model, fast)
        patched = with_lora(model, lora(model), 1.0)
        assert_parity(in_low_vram(patched), compiled(in_low_vram(patched), backend="eager"))
        assert_parity(patched, compiled(patched, backend="eager"))
    assert (counting.graphs, counting.breaks) == (GRAPHS[name], 0)
    assert (sample(patched) - sample(model)).abs().max() > 0.01


# dB of one step against full precision, and the format; every model's, in the formats that any machine runs.
QUANTIZED = {
    **{name: ("int8_dynamic", 28) for name in GRAPHS if name not in ("wan_ti2v_5b", "hunyuan_video_15")},
    "wan_i2v": ("int8_weight_only", 34),
}


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.sweep(keep=["hunyuan_image_21", "z_image"])
def test_quantized_it_is_near_full_precision_and_compiled_what_it_is_eager(name):
    format, least = QUANTIZED[name]
    model = wide(name)
    small = quantized(model, format)
    run = dict(width=32, height=32, tokens=4, steps=1)
    assert snr(sample(model, **run), sample(small, **run)) >= least
    fast = compiled(small, backend="eager")
    assert_parity(small, fast, **run)
    assert compiled_blocks(fast).eager == {}


def wide(name):
    """Wide enough for layers that are worth quantizing."""
    heads = {"hunyuan_3d": 4, "lumina2": 3, "krea2": 4}.get(name, 2)
    return family_models.build(name, heads, 1, 3584 if name == "longcat" else 64)


def test_references_of_z_image_run_eager_and_say_so():
    model = tiny("z_image", blocks=1)
    fast = compiled(model, backend="eager", on_failure="eager")
    assert_parity(model, fast, **reference(1, 16, 8, 6))
    assert any("timestep" in reason for reason in compiled_blocks(fast).eager)


def with_override(model):
    patched = model.clone()
    options = patched.model_options["transformer_options"]
    options["optimized_attention_override"] = lambda func, *args, **kwargs: func(*args, **kwargs).roll(1, 1)
    return patched


def with_patch(model, name):
    patched = model.clone()
    if name == "wan_t2v":
        patched.set_model_patch(lambda args: args["x"] * 0.9 + args["q"].flatten(2) * 0.1, "attn1_patch")
        patched.set_model_patch(
            lambda args: args["x"] * (1 + 0.1 * args["transformer_options"]["block_index"]), "attn2_patch"
        )
        return patched

    def patch(q, k, v, pe, attn_mask, extra_options):
        if name == "qwen_image":
            start, end = extra_options["img_slice"]
            assert end == q.shape[2] > start
        return {"v": v * (1 + 0.1 * extra_options["block_index"])}

    patched.set_model_attn1_patch(patch)
    return patched


@pytest.mark.parametrize("name", ["qwen_image", "z_image", "wan_t2v", "krea2"])
@pytest.mark.sweep(keep=["qwen_image", "krea2"])
def test_what_others_put_around_attention_runs_as_it_is(name):
    model = tiny(name)
    # A patch that runs within the same call as an override needs no graph of its own.
    graphs = [GRAPHS[name], GRAPHS[name] if name == "qwen_image" else 0]
    for changed in [with_override(model)] + ([with_patch(model, name)] if name != "z_image" else []):
        fast = compiled(changed, backend="eager")
        run = masked(16, 11) if name == "qwen_image" else {}
        with Counting() as counting:
            assert_parity(changed, fast, **run)
        assert (counting.graphs, counting.breaks) == (graphs.pop(0), 0)
        assert compiled_blocks(fast).eager == {}
        assert (sample(changed, **run) - sample(model, **run)).abs().max() > 1e-3


def test_what_counts_calls_of_attention_counts_in_the_order_of_eager():
    """Which Inductor would change within a block of Wan."""
    model, calls = tiny("wan_i2v"), []
    run = dict(frames=3, clip_vision_output=Seen(257))

    def override(attention, *args, **kwargs):
        calls.append(None)
        return attention(*args, **kwargs) * (1 + 0.05 * (len(calls) % 7))

    def counted(model):
        calls.clear()
        return sample(model, **run)

    patched = model.clone()
    patched.model_options["transformer_options"]["optimized_attention_override"] = override
    want = counted(patched)
    assert (want - sample(model, **run)).abs().max() > 1e-2
    assert (counted(compiled(patched, backend="inductor")) - want).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", [*FLUX_LIKE, *OTHERS[:3]])
@pytest.mark.sweep(keep=["longcat", "wan_t2v"])
def test_offloaded_it_gives_the_same_bits(name):
    model = tiny(name)
    want = sample(model)
    lean = offloaded(model, budget="0 %")
    assert torch.equal(sample(lean), want)
    ahead = lean.get_wrappers("apply_model", KEY)[-1]
    if name in ("hunyuan_video", "hunyuan_3d", "longcat"):
        assert ahead.vectors == 3, "both steps and the end were foreseen, and nothing else was made"
    assert_parity(model, compiled(lean, backend="eager"))


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.sweep(keep=["hunyuan_3d", "lumina2"])
def test_a_model_without_prompts_is_warmed_up(name):
    assert len(sample_synthetic(tiny(name, blocks=1), Inputs(64, 64, 1, 8), 1)) == 1


def test_a_model_that_merely_has_such_blocks_is_refused():
    model = tiny("hunyuan_video", blocks=1)
    lookalike = type("Lookalike", (type(model.model.diffusion_model),), {"__module__": "comfy.ldm.flux.model"})
    model.model.diffusion_model.__class__ = lookalike
    with pytest.raises(
        ValueError, match=r"HunyuanVideo \(Lookalike\) has no repeated blocks to compile that this pack"
    ):
        compiled(model)
    assert "Qwen-Image" in SUPPORTED and len({family.name for family in FAMILIES}) == len(FAMILIES)


def test_ranges_of_other_lists_count_on_from_one_to_the_next():
    model = tiny("z_image")
    fast = compiled(model, backend="eager", blocks="1-2,5")
    assert_parity(model, fast, steps=1)
    assert dict(compiled_blocks(fast).compiled) == {"context refiner": 1, "noise refiner": 1, "main": 1}
    with pytest.raises(ValueError, match=r"blocks: block 6 is outside this model, which has 6 \(0-5\)"):
        compiled(model, blocks="6")
    with pytest.raises(ValueError, match="blocks: 'none' leave no block"):
        compiled(model, blocks="none")
